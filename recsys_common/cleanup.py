"""What of ours is still paid for in Google Cloud, and how is it removed? Listed first, deleted only when told to.

    python -m recsys_common.cleanup --bucket my-bucket                 (make clean-cloud BUCKET=my-bucket)
    python -m recsys_common.cleanup --bucket my-bucket --confirm       (make clean-cloud BUCKET=my-bucket CONFIRM=1)

Ours is what a `manifest.json` with `"made_by": "recsys_common"` names: the files beside it, and the tables that its
`source` names (where the rows came from, and what was made on the way), if their dataset carries our label. Everything
else stays, and so does what a manifest that is not ours names too, and a table that was made anew after its export.
A manifest is deleted after all that it names, so an interrupted deletion can be run again.

Needs: bigquery.py embedded_bigquery.py scale.py
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recsys_common import bigquery, scale

MANIFEST, MADE_BY = "manifest.json", "recsys_common"
# The projects of embedded services, whose tables end with their process.
EMBEDDED = ("embedded", scale.REHEARSAL["PROJECT"])


@dataclass(frozen=True)
class Found:
    """A `manifest.json`.

    Attributes:
      path: where it lies.
      text: what it says.
      wrong: why it is not one of ours; "" if it is.
      files: name -> (rows, bytes) of the files that it names; empty if it is not ours.
      tables: each project.dataset.table that its `source` names: where its rows came from, what was made on the way.
      snapshot: the moment whose rows were exported; None if the `source` does not say.
      beside: names of the files in its folder, itself included.
    """

    path: str
    text: str
    wrong: str
    files: dict[str, tuple[int, int]]
    tables: tuple[str, ...]
    snapshot: datetime.datetime | None
    beside: set[str]


def find(folder: str) -> list[Found]:
    """All manifests under a folder, local or `gs://`, ours or not.

    Raises:
      tf.errors.OpError: the folder does not exist, or it or one in it may not be read.
    """
    return [_found(path, beside) for path, beside in _walk(folder)]


def _walk(folder: str) -> Iterator[tuple[str, set[str]]]:
    """The manifests' paths, each with the names of the files in its folder."""
    import tensorflow as tf

    files, folders = set(), []
    for name in sorted(tf.io.gfile.listdir(folder)):
        path = os.path.join(folder, name)
        # Cloud Storage marks a folder by a slash; to ask about each of 10,000 files would take minutes.
        inner = name.endswith("/") if "://" in folder else os.path.isdir(path) and not os.path.islink(path)
        if inner:
            folders.append(path.rstrip("/"))
        else:
            files.add(name)
    if MANIFEST in files:
        yield os.path.join(folder, MANIFEST), files
    for inner in folders:
        yield from _walk(inner)


def _text(path: str) -> str:
    import tensorflow as tf

    with tf.io.gfile.GFile(path, "rb") as stream:
        return stream.read().decode(errors="replace")


def _found(path: str, beside: set[str]) -> Found:
    text = _text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        return Found(path, text, f"not JSON: {error}", {}, (), None, beside)
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        return Found(path, text, f"not ours: it does not say made_by {MADE_BY}", {}, (), None, beside)
    try:
        files = {str(file["name"]): (int(file["rows"]), int(file["bytes"])) for file in content["files"]}
        source = content["source"] if {"version", "columns"} <= set(content) else None
        on_the_way, snapshot = source.get("tables", []), source.get("snapshot_time")
        if not isinstance(on_the_way, list) or not all(isinstance(table, str) for table in on_the_way):
            raise TypeError(f"source.tables is {on_the_way!r}")
        if snapshot and (snapshot := datetime.datetime.fromisoformat(snapshot)).tzinfo is None:
            raise ValueError(f"source.snapshot_time {snapshot} has no time zone")
        tables = {source.get("table"), *on_the_way} - {None}
        places = [(source.get("project"), source.get("dataset"), table) for table in sorted(tables)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = f"damaged: {type(error).__name__} {error}, expected version, columns, files, source as we write them"
        return Found(path, text, wrong, {}, (), None, beside)
    if outside := [name for name in files if name in ("", ".", "..", MANIFEST) or os.path.basename(name) != name]:
        return Found(path, text, f"damaged: it names {outside[0]!r}, expected files beside it", {}, (), None, beside)
    whole = tuple(".".join(names) for names in places if all(isinstance(name, str) for name in names))
    return Found(path, text, "", files, whole, snapshot or None, beside)


def clean(folder: str, connect: Callable[[], object], confirm: bool = False) -> None:
    """List what our manifests under a folder name; with `confirm`, delete it.

    Args:
      folder: local or `gs://`.
      connect: gives a `google.cloud.bigquery.Client`; called only if a manifest names a table of Google Cloud.
      confirm: delete, after listing.

    Raises:
      tf.errors.OpError, google.api_core.exceptions.GoogleAPIError: something may not be read or deleted. What was
        deleted is gone, every manifest whose things were not is still there: run it again.
      RuntimeError: a manifest changed meanwhile, so somebody is writing an export; or `connect` had no credentials.
    """
    import tensorflow as tf

    found = find(folder)
    ours = [manifest for manifest in found if not manifest.wrong]
    others = [manifest for manifest in found if manifest.wrong]
    doomed, totals = {}, (0, 0, 0)
    for manifest in ours:
        place = os.path.dirname(manifest.path)
        doomed[manifest.path] = []
        for name, (rows, size) in manifest.files.items():
            path = os.path.join(place, name)
            if name not in manifest.beside:
                print(f"gone    {path}")
            elif other := next((other for other in others if name in other.text), None):
                print(f"keep    {path}: {other.path} names it too")
            else:
                print(f"delete  {path}: {rows:,} rows, {size:,} bytes")
                doomed[manifest.path].append(path)
                totals = totals[0] + 1, totals[1] + rows, totals[2] + size
        print(f"delete  {manifest.path}, last")
        if stay := len(manifest.beside - set(manifest.files) - {MANIFEST}):
            print(f"keep    {place}: {stay} other files there, which no manifest of ours names")
    for other in others:
        print(f"keep    {other.path} and its folder: {other.wrong}")
    named = sorted({table for manifest in ours for table in manifest.tables})
    tables = {table: _table(table, ours, others, connect) for table in named}
    kinds = {table: kind for table, kind in tables.items() if kind}
    count = f"{totals[0]:,} files ({totals[1]:,} rows, {totals[2]:,} bytes), {len(ours)} manifests, {len(kinds)} tables"
    if not ours:
        print(f"{folder}: no manifest of ours, nothing to delete")
    elif not confirm:
        print(f"Nothing was deleted. With CONFIRM=1: {count}.")
    else:
        for number, manifest in enumerate(ours):
            if _text(manifest.path) != manifest.text:
                raise RuntimeError(f"{manifest.path} changed just now: an export is being written. Run this again.")
            for path in doomed[manifest.path]:
                tf.io.gfile.remove(path)
            still_named = {table for later in ours[number + 1 :] for table in later.tables}
            for table in sorted(kinds.keys() & set(manifest.tables) - still_named):
                _drop(connect(), kinds[table], table)
            tf.io.gfile.remove(manifest.path)
        print(f"Deleted: {count}.")


def _table(table: str, ours: list[Found], others: list[Found], connect: Callable[[], object]) -> str:
    """Print what is to become of a table; "TABLE" or "VIEW" if it is to be deleted, otherwise ""."""
    from google.api_core.exceptions import NotFound

    project, dataset, name = table.rsplit(".", 2)
    if project in EMBEDDED:
        print(f"gone    table {table}, with the embedded BigQuery that had it")
        return ""
    if not scale.TABLE.fullmatch(table):
        print(f"keep    table {table!r}: not the name of a table, expected project.dataset.table")
        return ""
    if other := next((other for other in others if dataset in other.text and name in other.text), None):
        print(f"keep    table {table}: {other.path} names it too")
        return ""
    client = connect()
    try:
        labels = client.get_dataset(f"{project}.{dataset}").labels
        if not bigquery.LABEL.items() <= labels.items():
            print(f"keep    table {table}: not ours, its dataset has the labels {labels}, expected {bigquery.LABEL}")
            return ""
        there = client.get_table(table)
    except NotFound:
        print(f"gone    table {table}")
        return ""
    if there.table_type not in ("TABLE", "VIEW"):
        print(f"keep    table {table}: a {there.table_type}, which we never make")
        return ""
    exported = [manifest.snapshot for manifest in ours if table in manifest.tables and manifest.snapshot]
    if exported and there.created > max(exported):
        print(f"keep    table {table}: made anew on {there.created}, after the export that names it")
        return ""
    print(f"delete  {there.table_type.lower()} {table}: {there.num_rows or 0:,} rows, {there.num_bytes or 0:,} bytes")
    return there.table_type


def _drop(client, kind: str, table: str) -> None:
    from google.cloud.bigquery import QueryJobConfig

    # By SQL: the embedded service cannot delete a view through the REST API.
    config = QueryJobConfig(maximum_bytes_billed=bigquery.MAXIMUM_BYTES_BILLED)
    client.query(f"DROP {kind} IF EXISTS `{table}`", job_config=config).result()


def main() -> int:
    """List, and delete with --confirm; 0 when done or nothing to do, 2 when refused."""
    parser = argparse.ArgumentParser(description="List what our manifests name in a bucket; delete it with --confirm.")
    parser.add_argument("--bucket", default="", help="Cloud Storage bucket, without gs://")
    parser.add_argument("--folder", default="", help="instead: a gs:// or local folder")
    parser.add_argument("--project", default="", help="Google Cloud project to ask BigQuery with (default: yours)")
    parser.add_argument("--confirm", action="store_true", help="delete; without it, only list")
    arguments = parser.parse_args()
    if bool(arguments.bucket) == bool(arguments.folder):
        print("say where to look: make clean-cloud BUCKET=my-bucket (or --folder, not both)", file=sys.stderr)
        return 2

    @functools.cache
    def connect():
        if not scale.credentials():
            raise RuntimeError("a manifest names a BigQuery table, and there are no Google credentials to look: log in")
        from google.cloud.bigquery import Client

        return Client(arguments.project or None)

    import tensorflow as tf
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        clean(arguments.folder or f"gs://{arguments.bucket}", connect, arguments.confirm)
    except (RuntimeError, OSError, tf.errors.OpError, GoogleAPIError, GoogleAuthError) as error:
        print(f"stopped: {getattr(error, 'message', None) or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
