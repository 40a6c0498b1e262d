"""What is deleted from the cloud: what our manifests name, and nothing else, whatever lies beside it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import tensorflow as tf
from google.api_core.exceptions import GoogleAPIError, NotFound

from recsys_common import bigquery, cleanup, record_batches
from recsys_common.embedded_bigquery import EmbeddedBigQuery

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "reader-project"  # "embedded" would say that there is nothing to look up


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory):
    server = EmbeddedBigQuery(tmp_path_factory.mktemp("bigquery"))
    with bigquery.Warehouse(server, PROJECT, "bucket", bigquery.DATASET, "US") as connected:
        connected.client.create_dataset("shop")  # the reader's own, without our label
        yield connected


@pytest.fixture
def tables(warehouse):
    """Makes tables, or views, and says which there are."""

    def make(name: str, kind: str = "TABLE") -> dict:
        warehouse.query(f"CREATE OR REPLACE {kind} {name} AS SELECT 1 AS user_id")
        dataset, _, table = name.rpartition(".")
        return {"project": PROJECT, "dataset": dataset or bigquery.DATASET, "table": table}

    def there(dataset: str = bigquery.DATASET) -> set[str]:
        return {table.table_id for table in warehouse.client.list_tables(f"{PROJECT}.{dataset}")}

    make.there, make.client = there, warehouse.client
    yield make
    for table in warehouse.client.list_tables(f"{PROJECT}.{bigquery.DATASET}"):
        warehouse.query(f"DROP {table.table_type} {table.table_id}")


def no_tables():
    raise AssertionError("no manifest names a table of Google Cloud; nobody need ask BigQuery")


def export(folder: Path, *sizes: int, source: dict | None = None) -> record_batches.Manifest:
    """Record batches as they are really written, one file for each size."""
    shards = [pa.table({"user_id": list(range(size))}) for size in sizes]
    return record_batches.write(folder, shards, {"user_id": "int32"}, source=source)


def write_manifest(folder: Path, **changed) -> Path:
    """A manifest by hand, with one file `part-1` of 3 rows and 12 bytes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "part-1").write_bytes(bytes(12))
    content = {"version": 2, "made_by": "recsys_common", "columns": [], "source": {}}
    content["files"] = [{"name": "part-1", "rows": 3, "bytes": 12, "sha256": ""}]
    content = {name: value for name, value in (content | changed).items() if value is not None}
    path = folder / "manifest.json"
    path.write_text(json.dumps(content))
    return path


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Files -------------------------------------------------------------------------------------------------


def test_lists_exactly_what_it_would_delete_and_deletes_nothing(tmp_path, capsys):
    manifest = export(tmp_path / "a" / "b", 5, 7)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cleanup.clean(str(tmp_path), no_tables)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"delete  {path}: {rows} rows, {os.path.getsize(path):,} bytes"
        for path, rows in zip(manifest.paths, (5, 7), strict=True)
    ]
    assert said[2] == f"delete  {tmp_path}/a/b/manifest.json, last"
    size = sum(os.path.getsize(path) for path in manifest.paths)
    assert said[3] == f"Nothing was deleted. With CONFIRM=1: 2 files (12 rows, {size:,} bytes), 1 manifests, 0 tables."
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_deletes_what_it_listed_and_nothing_beside_it(tmp_path, capsys):
    export(tmp_path / "ours", 5, 7)
    export(tmp_path / "ours" / "inner", 4)
    for name in ("ours/notes.txt", "ours/part-99999-deadbeef.tfrecord", "ours/other/part-1", "theirs/data.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    (tmp_path / "linked").symlink_to(tmp_path / "ours", target_is_directory=True)
    cleanup.clean(str(tmp_path), no_tables, confirm=True)
    said = capsys.readouterr().out
    stay = {"ours/notes.txt", "ours/part-99999-deadbeef.tfrecord", "ours/other/part-1", "theirs/data.csv"}
    assert tree(tmp_path) == stay
    assert f"keep    {tmp_path}/ours: 2 other files there, which no manifest of ours names" in said
    assert "Deleted: 3 files (16 rows," in said and "2 manifests" in said
    cleanup.clean(str(tmp_path), no_tables, confirm=True)
    assert "no manifest of ours, nothing to delete" in capsys.readouterr().out and tree(tmp_path) == stay


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"made_by": None}, "it does not say made_by recsys_common"),
        ({"made_by": "somebody"}, "it does not say made_by recsys_common"),
        ({"version": None}, "damaged"),
        ({"columns": None}, "damaged"),
        ({"files": None}, "damaged: KeyError 'files'"),
        ({"files": [{"name": "part-1"}]}, "damaged: KeyError 'rows'"),
        ({"files": ["part-1"]}, "damaged: TypeError"),
        ({"files": 5}, "damaged: TypeError"),
        ({"source": "a table"}, "damaged"),
        ({"source": {"tables": "ratings"}}, "damaged: TypeError source.tables is 'ratings'"),
        ({"source": {"tables": ["ratings", 5]}}, "damaged: TypeError source.tables is ['ratings', 5]"),
        ({"source": {"snapshot_time": "yesterday"}}, "damaged: ValueError"),
        ({"source": {"snapshot_time": "2026-01-01T00:00:00"}}, "has no time zone"),
        ({"source": {"snapshot_time": 5}}, "damaged: TypeError"),
        ({"files": [{"name": "../part-1", "rows": 1, "bytes": 1}]}, "it names '../part-1', expected files beside it"),
        ({"files": [{"name": "/part-1", "rows": 1, "bytes": 1}]}, "it names '/part-1'"),
        ({"files": [{"name": "x/part-1", "rows": 1, "bytes": 1}]}, "it names 'x/part-1'"),
        ({"files": [{"name": "..", "rows": 1, "bytes": 1}]}, "it names '..'"),
        ({"files": [{"name": "manifest.json", "rows": 1, "bytes": 1}]}, "it names 'manifest.json'"),
    ],
)
def test_a_manifest_that_is_not_ours_is_named_and_left_alone(tmp_path, capsys, changed, why):
    write_manifest(tmp_path / "m", **changed)
    (tmp_path / "part-1").write_bytes(b"outside")
    before = tree(tmp_path)
    cleanup.clean(str(tmp_path), no_tables, confirm=True)
    said = capsys.readouterr().out
    assert f"keep    {tmp_path}/m/manifest.json and its folder: " in said and why in said and "delete  " not in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", '{"made_by": "recsys_common", "files": [{"na', "[]", "null", '"x"', "\xff"])
def test_a_manifest_that_cannot_be_parsed_is_left_alone(tmp_path, capsys, text):
    path = write_manifest(tmp_path / "m")
    path.write_bytes(text.encode("latin-1"))
    export(tmp_path / "ours", 5)
    cleanup.clean(str(tmp_path), no_tables, confirm=True)
    assert f"keep    {path} and its folder: not " in capsys.readouterr().out
    assert tree(tmp_path) == {"m/manifest.json", "m/part-1"}


def test_what_another_manifest_names_stays(tmp_path, capsys):
    write_manifest(tmp_path / "ours")
    (tmp_path / "manifest.json").write_text(json.dumps({"made_by": "somebody", "uses": ["ours/part-1"]}))
    cleanup.clean(str(tmp_path), no_tables, confirm=True)
    assert f"keep    {tmp_path}/ours/part-1: {tmp_path}/manifest.json names it too" in capsys.readouterr().out
    assert tree(tmp_path) == {"ours/part-1", "manifest.json"}


def test_an_interrupted_deletion_is_finished_by_running_it_again(tmp_path, monkeypatch, tables):
    remove = tf.io.gfile.remove
    for last in range(7):  # 2 files and a manifest, 3 files and a manifest
        source = tables("examples")
        manifests = [
            export(tmp_path / name, *sizes, source=source) for name, sizes in (("a", (5, 7)), ("b", (1, 2, 3)))
        ]
        calls = iter(range(last + 1))

        def broken(path, calls=calls):
            if next(calls, None) is None:
                raise tf.errors.UnavailableError(None, None, "the network is gone")
            remove(path)

        if last < 6:
            monkeypatch.setattr(tf.io.gfile, "remove", broken)
            with pytest.raises(tf.errors.UnavailableError):
                cleanup.clean(str(tmp_path), lambda: tables.client, confirm=True)
            monkeypatch.setattr(tf.io.gfile, "remove", remove)
            assert len(tree(tmp_path)) == 7 - (last + 1)
        for manifest in manifests:  # as long as anything is left, its manifest is
            left = [path for path in manifest.paths if os.path.exists(path)]
            assert not left or os.path.exists(os.path.join(manifest.folder, "manifest.json"))
        if "examples" in tables.there():
            assert tree(tmp_path)
        cleanup.clean(str(tmp_path), lambda: tables.client, confirm=True)
        assert tree(tmp_path) == set() and tables.there() == set()


def test_an_export_that_is_being_replaced_is_left_alone(tmp_path, monkeypatch):
    export(tmp_path / "a", 5)
    export(tmp_path / "b", 7)
    remove = tf.io.gfile.remove

    def meanwhile(path):
        monkeypatch.setattr(tf.io.gfile, "remove", remove)
        export(tmp_path / "b", 9)
        remove(path)

    monkeypatch.setattr(tf.io.gfile, "remove", meanwhile)
    with pytest.raises(RuntimeError, match=r"b/manifest\.json changed just now"):
        cleanup.clean(str(tmp_path), no_tables, confirm=True)
    assert record_batches.Manifest.load(tmp_path / "b").rows == 9


# Tables ------------------------------------------------------------------------------------------------


def test_tables_of_our_dataset_go_and_the_readers_own_stay(tmp_path, tables, warehouse, capsys):
    export(tmp_path / "a", 5, source=tables("examples"))
    export(tmp_path / "b", 5, source=tables("seen", "VIEW"))
    export(tmp_path / "c", 5, source=tables("shop.ratings"))
    tables("not_named")
    for confirm in (False, True):
        assert tables.there() == {"examples", "seen", "not_named"}
        cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm)
    said = capsys.readouterr().out
    assert f"delete  table {PROJECT}.recsys_common.examples: " in said
    assert f"delete  view {PROJECT}.recsys_common.seen: " in said
    assert f"keep    table {PROJECT}.shop.ratings: not ours, its dataset has the labels {{}}" in said
    assert "3 manifests, 2 tables." in said and "not_named" not in said
    assert tables.there() == {"not_named"} and tables.there("shop") == {"ratings"} and tree(tmp_path) == set()


def test_what_was_made_on_the_way_goes_too(tmp_path, tables, warehouse):
    tables("counted"), tables("not_named")
    export(tmp_path, 5, source=tables("examples") | {"tables": ["counted", "examples", "gone"]})
    cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    assert tables.there() == {"not_named"} and tree(tmp_path) == set()


def test_a_table_that_was_made_anew_after_its_export_stays(tmp_path, tables, warehouse, capsys):
    def now() -> str:
        return warehouse.query("SELECT CURRENT_TIMESTAMP() AS now")["now"][0].as_py().isoformat()

    anew, kept, again = tables("anew"), tables("kept"), tables("again", "VIEW")
    first = {"snapshot_time": now()}
    export(tmp_path / "a", 5, source=anew | first | {"tables": ["again"]})
    export(tmp_path / "b", 5, source=kept | first)
    time.sleep(0.01)  # BigQuery tells milliseconds
    tables("anew"), tables("again", "VIEW")
    export(tmp_path / "0", 5, source=again | {"snapshot_time": now()})  # the later of two exports of it
    cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    said = capsys.readouterr().out
    created = warehouse.client.get_table(f"{PROJECT}.recsys_common.anew").created
    table = f"{PROJECT}.recsys_common.anew"
    assert f"keep    table {table}: made anew on {created}, after the export that names it" in said
    assert tables.there() == {"anew"} and tree(tmp_path) == set() and "3 manifests, 2 tables." in said


def test_a_table_that_a_manifest_of_others_names_stays(tmp_path, tables, warehouse, capsys):
    source = tables("examples")
    export(tmp_path / "ours", 5, source=source)
    other = write_manifest(tmp_path / "theirs", made_by="somebody", source=source)
    cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    assert f"keep    table {PROJECT}.recsys_common.examples: {other} names it too" in capsys.readouterr().out
    assert tables.there() == {"examples"} and tree(tmp_path) == {"theirs/manifest.json", "theirs/part-1"}


def test_a_table_stays_until_the_last_manifest_that_names_it(tmp_path, tables, warehouse, monkeypatch):
    source = tables("examples")
    for name in "abc":
        export(tmp_path / name, 5, source=source)
    seen, remove = [], tf.io.gfile.remove
    monkeypatch.setattr(tf.io.gfile, "remove", lambda path: (seen.append((path, tables.there())), remove(path)))
    cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    last = str(tmp_path / "c" / "manifest.json")
    assert [there for path, there in seen if path != last] == [{"examples"}] * 5
    assert seen[-1] == (last, set())


def test_tables_that_are_gone_do_no_harm(tmp_path, tables, warehouse, capsys):
    for number, (project, dataset) in enumerate([(PROJECT, "recsys_common"), (PROJECT, "gone"), ("embedded", "shop")]):
        export(tmp_path / str(number), 5, source={"project": project, "dataset": dataset, "table": "x"})
    export(tmp_path / "3", 5, source={"table": "half a name"})
    export(tmp_path / "4", 5, source={"project": PROJECT, "dataset": "recsys_common", "table": "x`; DROP TABLE y"})
    cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    said = capsys.readouterr().out
    assert said.count("gone    table ") == 3 and "gone    table embedded.shop.x, with the embedded BigQuery" in said
    assert "DROP TABLE y': not the name of a table" in said and tree(tmp_path) == set()


def test_a_table_that_cannot_be_dropped_keeps_its_manifest(tmp_path, tables, warehouse, monkeypatch):
    export(tmp_path, 5, source=tables("examples"))
    monkeypatch.setattr(cleanup, "_drop", lambda *_: (_ for _ in ()).throw(GoogleAPIError("no permission")))
    with pytest.raises(GoogleAPIError):
        cleanup.clean(str(tmp_path), lambda: warehouse.client, confirm=True)
    assert tree(tmp_path) == {"manifest.json"} and tables.there() == {"examples"}


# The command -------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cleanup", *arguments])
    code = cleanup.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command(tmp_path, monkeypatch, capsys):
    export(tmp_path, 5)
    code, out, _ = command(monkeypatch, capsys, "--folder", str(tmp_path))
    assert code == 0 and "Nothing was deleted" in out and len(tree(tmp_path)) == 2
    code, out, _ = command(monkeypatch, capsys, "--folder", str(tmp_path), "--confirm")
    assert code == 0 and "Deleted: 1 files (5 rows" in out and tree(tmp_path) == set()
    code, out, _ = command(monkeypatch, capsys, "--folder", str(tmp_path), "--confirm")
    assert code == 0 and "nothing to delete" in out


def test_the_command_refuses(tmp_path, monkeypatch, capsys):
    for arguments in ([], ["--bucket", "b", "--folder", "f"]):
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "") and "make clean-cloud BUCKET=my-bucket" in err
    code, out, err = command(monkeypatch, capsys, "--folder", str(tmp_path / "nowhere"))
    assert (code, out) == (2, "") and "nowhere" in err


def test_without_credentials_nothing_of_a_table_is_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recsys_common.scale.credentials", lambda: "")
    export(tmp_path, 5, source={"project": PROJECT, "dataset": "recsys_common", "table": "examples"})
    code, _, err = command(monkeypatch, capsys, "--folder", str(tmp_path), "--confirm")
    assert code == 2 and "no Google credentials" in err and len(tree(tmp_path)) == 2


def test_the_command_asks_bigquery(tmp_path, tables, warehouse, monkeypatch, capsys):
    monkeypatch.setattr("recsys_common.scale.credentials", lambda: "some")
    monkeypatch.setattr("google.cloud.bigquery.Client", lambda project: warehouse.client)
    export(tmp_path, 5, source=tables("examples"))
    code, _, _ = command(monkeypatch, capsys, "--folder", str(tmp_path), "--project", PROJECT, "--confirm")
    assert code == 0 and tree(tmp_path) == set()
    with pytest.raises(NotFound):
        warehouse.client.get_table(f"{PROJECT}.recsys_common.examples")


@pytest.mark.parametrize(
    ("words", "environment", "confirmed"),
    [
        (["CONFIRM=1"], {}, True),
        ([], {}, False),
        (["CONFIRM=0"], {}, False),
        (["CONFIRM=no"], {}, False),
        ([], {"CONFIRM": "1"}, False),  # left over in a shell, it is no word of today
    ],
)
def test_make_confirms_only_when_told_to(words, environment, confirmed):
    make = ["make", "-n", "-C", str(ROOT), "clean-cloud", "BUCKET=b", *words]
    said = subprocess.run(make, capture_output=True, text=True, check=True, env=os.environ | environment).stdout
    assert "recsys_common.cleanup --bucket 'b'" in said and ("--confirm" in said) == confirmed
