"""How does a config become data to train and to judge by? All steps of chapters 1 and 4 in one call, made once.

    prepared = prepare(config, data_dir="data")          # a Prepared; the second call finds it and returns at once
    prepared.config.build(prepared.frequency())          # its tables are as long as the data needs
    users, items, seen_users, seen_items = prepared.pairs("validation")

The ratings are loaded into the warehouse, split (80% of them for training, then 10% for validation and 10% for the
test, or leave-one-out), numbered by vocabularies.sql, and the training rows converted to record batches. The folder:

    train/                     record batches with their manifest.json
    user_vocabulary.parquet    user_id, user_index, frequency (in training), sorted by index; item_vocabulary likewise
    validation.parquet         user_index, item_index, asked: pairs that are to be found, and (not asked) those seen
    test.parquet               likewise; what validation asked is seen
    validation_histories.parquet, test_histories.parquet   user_index, history; where data.table is histories
    data.json                  last: what it was made from, rows, and the SHA-256 of each file

Its name is a hash of all that it depends on: the data set's files, the SQL, and the fields of the config that count.
So runs that differ in their model alone share it, and nothing stale is ever taken up. Simulated ratings are always
those of the same draw: another `seed` trains anew on the same data.

Needs: config.py declared_features.py plain_yaml.py masking.py features.py bigquery.py embedded_bigquery.py
ratings_table.py datasets/ splits.py conversion.py record_batches.py scale.py sql/
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from recsys_common import bigquery, conversion, datasets, ratings_table, splits
from recsys_common.config import Config
from recsys_common.record_batches import Manifest
from recsys_common.scale import SIMULATED_ROWS, TABLE, rehearsing

log = logging.getLogger("recsys_common")
VERSION = 1
VALIDATION_FRACTION = 0.1
PARTS = ("validation", "test")
SIDES = ("user", "item")
TABLES = {"examples": ["user_index", "item_index", "rating", "timestamp"]}
TABLES["histories"] = [*TABLES["examples"], "history"]


@dataclass(frozen=True)
class Prepared:
    """Data that is ready.

    Attributes:
      folder: where it lies, local or gs://.
      config: the one that was asked for, with the rows of its tables.
      train: the manifest of the training rows.
      about: data.json. "content" is a hash that is equal where all files are.
    """

    folder: str
    config: Config
    train: Manifest
    about: dict

    def vocabulary(self, side: str) -> np.ndarray:
        """int64: the ids of the rows of the "user" or "item" table from oov_buckets on, in their order."""
        table = self._read(f"{side}_vocabulary")
        known = table[f"{side}_index"].to_numpy() >= self.config.data.oov_buckets
        return table[f"{side}_id"].to_numpy()[known]

    def vocabularies(self) -> dict[str, np.ndarray]:
        """The ids of each feature that has a table by vocabulary, in the order of its rows."""
        sides = {f"{side}_index": side for side in SIDES}
        features = {name: each for name, each in self.config.features.items() if each.kind == "index"}
        return {name: self.vocabulary(sides[each.column]) for name, each in features.items() if each.column in sides}

    def frequency(self) -> np.ndarray:
        """int64: how many training rows each row of the item table has; a bucket has those of all its ids."""
        table = self._read("item_vocabulary")
        rows = np.zeros(self.about["rows"]["item"], np.int64)
        np.add.at(rows, table["item_index"].to_numpy(), table["frequency"].to_numpy())
        return rows

    def pairs(self, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Four int64 arrays for `evaluation.evaluate`: users and items asked for, users and items seen before.

        Args:
          part: "validation" or "test".
        """
        table = self._read(part)
        asked = table["asked"].to_numpy()
        columns = [table[name].to_numpy() for name in ("user_index", "item_index")]
        return *(column[asked] for column in columns), *(column[~asked] for column in columns)

    def histories(self, part: str) -> dict[int, list[int]]:
        """user_index -> items taken before that part, the oldest first. Empty unless data.table is histories."""
        if self.config.data.table != "histories":
            return {}
        table = self._read(f"{part}_histories")
        return dict(zip(table["user_index"].to_pylist(), table["history"].to_pylist(), strict=True))

    def inputs(self, users: np.ndarray, histories: dict[int, list[int]]):
        """What a model's `scores` takes: the users; with histories, all that the features of a user are made of."""
        config = self.config
        if not config.lengths():
            return users
        columns = {name: np.zeros(len(users), dtype) for name, dtype in config.record_columns().items()}
        columns["user_index"] = users.astype(np.int32)
        for column, length in config.lengths().items():  # padded on the left, as input_pipeline.batches does
            taken = [histories.get(int(user), [])[-length:] for user in users]
            columns[column] = np.array([[0] * (length - len(row)) + row for row in taken], np.int32)
            columns[f"{column}_length"] = np.array([len(row) for row in taken], np.int32)
        return config.transform()({name: tf.constant(column) for name, column in columns.items()})

    def _read(self, name: str) -> pa.Table:
        with tf.io.gfile.GFile(os.path.join(self.folder, f"{name}.parquet"), "rb") as stream:
            return pq.read_table(pa.BufferReader(stream.read()))


def prepare(
    config: Config,
    folder: str | os.PathLike | None = None,
    *,
    runs_dir: str | os.PathLike = "runs",
    data_dir: str = "data",
    project: str = "",
    bucket: str = "",
    location: str = "US",
) -> Prepared:
    """Make the data of a config, or find it. A call that was killed is made again, and goes on where it can.

    Args:
      folder: of the data; None: the config's data.folder, or else `<hash of all it depends on>` in
        `runs_dir/data`, or in gs://bucket/data.
      data_dir: where data sets that are files lie, or are downloaded to.
      project, bucket, location: as for `bigquery.connect`; "" is the embedded BigQuery.

    Raises:
      ValueError: a feature whose column the table does not have, or whose rows nobody knows, a table or split that is
        not made here, data that cannot be split, a folder that holds other data; all before anything is exported.
      Others as `datasets.load`, `ratings_table.load` and `conversion.convert`.
    """
    check(config)
    with contextlib.ExitStack() as stack:
        source = _Source(config, data_dir, project, bucket, location, stack)
        depends = source.depends()
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        base = f"gs://{bucket}/data" if bucket and not rehearsing() else Path(runs_dir) / "data"
        folder = os.fspath(folder or config.data.folder or os.path.join(base, key[:12]))
        stack.enter_context(_one_at_a_time(folder))
        about = _json(folder, "data.json")
        if about and about["key"] != key:
            then, now = about["depends"], depends
            other = [f"{name}: {then.get(name)!r}, now {now[name]!r}" for name in now if then.get(name) != now[name]]
            raise ValueError(f"{folder} holds other data:\n  " + "\n  ".join(other) + "\nName another folder, or none.")
        if about is None:
            start = time.perf_counter()
            about = {"version": VERSION, "key": key, "depends": depends} | _made(config, folder, source)
            _write(folder, "data.json", json.dumps(about, indent=1).encode())
            log.info("data: %s, made in %.1f s", folder, time.perf_counter() - start)
        else:
            log.info("data: %s, found", folder)
    return found(folder, config)


def found(folder: str | os.PathLike, config: Config) -> Prepared:
    """What `prepare` has made for a config.

    Raises:
      FileNotFoundError: data.json or a file of the training rows is not there.
      ValueError: it was made for a config whose data differ.
    """
    folder = os.fspath(folder)
    if (about := _json(folder, "data.json")) is None:
        raise FileNotFoundError(f"{folder}: no data.json, so its data is gone or was never finished; prepare it again")
    asked = _of_config(config)
    other = [f"{name}: {about['depends'][name]!r}, now {asked[name]!r}" for name in asked]
    other = [line for name, line in zip(asked, other, strict=True) if about["depends"][name] != asked[name]]
    if other:
        raise ValueError(f"{folder} was made for another config:\n  " + "\n  ".join(other))
    return Prepared(folder, _with_rows(config, about["rows"]), Manifest.load(os.path.join(folder, "train")), about)


def check(config: Config) -> None:
    """Refuse what cannot be prepared, before anything is read.

    Raises:
      ValueError: a table or split that is not made here; each feature whose column the table does not have.
    """
    data = config.data
    if data.table not in TABLES:
        raise ValueError(f"data.table: found {data.table!r}; prepare makes {' and '.join(TABLES)}")
    if data.split != "train":
        raise ValueError(f"data.split: found {data.split!r}, expected 'train': validation and test are held out")
    lacking = []
    for name, feature in config.features.items():
        if feature.column not in TABLES[data.table]:
            elsewhere = [f"data.table={other}" for other, columns in TABLES.items() if feature.column in columns]
            hint = f"; set {elsewhere[0]}" if elsewhere else ""
            there = ", ".join(TABLES[data.table])
            lacking.append(
                f"features.{name}: the table {data.table} has no column {feature.column!r}, only {there}{hint}"
            )
        elif feature.column == "history" and feature.kind != "history":
            lacking.append(f"features.{name}: the column 'history' holds lists: expected kind history")
    if lacking:
        raise ValueError("\n  ".join([f"{len(lacking)} of the features cannot be had", *lacking]))


class _Source:
    """Where the ratings are; connects and loads when asked."""

    def __init__(self, config, data_dir, project, bucket, location, stack):
        self.config, self.data_dir, self.stack = config, data_dir, stack
        self.connection, self.warehouse, self.tables = (project, bucket), None, None
        self.location = location

    def connect(self) -> bigquery.Warehouse:
        if self.warehouse is None:
            connected = bigquery.connect(*self.connection, location=self.location)
            self.warehouse = self.stack.enter_context(connected)
        return self.warehouse

    def load(self) -> datasets.RatingTables:
        if self.tables is None:
            rows = self.config.data.rows or SIMULATED_ROWS["small"]
            self.tables = datasets.load(self.config.data.dataset, self.data_dir, rows=rows, stream=rows > 10_000_000)
        return self.tables

    def depends(self) -> dict:
        """All that decides what the data will be."""
        data, name = self.config.data, self.config.data.dataset
        decides = {"version": VERSION}
        if name == "simulated":
            decides["rows"] = data.rows or SIMULATED_ROWS["small"]
        elif TABLE.match(name) and rehearsing():
            decides["modified"] = "never"  # it is made anew, the same, whenever the service starts
        elif TABLE.match(name) and self.connection[0]:
            table = self.connect().client.get_table(name, retry=self.warehouse.retry())
            decides["modified"] = table.modified.isoformat()
            if table.table_type != "TABLE":  # of a view that says when its SQL was changed
                rows = f"SELECT COUNT(*) AS n, CAST(MAX(timestamp) AS STRING) AS latest FROM `{name}`"
                decides["rows"] = self.warehouse.query(rows).to_pylist()
        elif not TABLE.match(name):
            folder = datasets.folder(name, self.data_dir)
            if not folder.is_dir():
                self.load()  # downloads it, or says what is missing
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            decides["files"] = {str(path.relative_to(folder)): _sha256(path) for path in files}
        decides |= _of_config(self.config)
        files = ("temporal_split", "leave_last_out", "vocabularies", "examples", "histories", "part_pairs")
        sql = "".join((bigquery.SQL_FOLDER / f"{file}.sql").read_text() for file in (*files, "part_histories"))
        return decides | {"sql": hashlib.sha256(sql.encode()).hexdigest()}


def _of_config(config: Config) -> dict:
    """What of a config decides the data."""
    data = config.data
    decides = {"dataset": data.dataset, "split_by": data.split_by, "table": data.table, "shards": data.shards}
    decides |= {"train_fraction": splits.TRAIN_FRACTION, "validation_fraction": VALIDATION_FRACTION}
    decides |= {"oov_buckets": data.oov_buckets, "minimum_frequency": data.minimum_frequency}
    decides |= {"columns": config.record_columns(), "length": _length(config)}
    return decides | {"users": config.evaluation.users}


def _made(config: Config, folder: str, source: _Source) -> dict:
    """Make the files; what data.json says of them."""
    data, tables, warehouse = config.data, source.load(), source.connect()
    log.info("data: loading %s", tables.name)
    ratings_table.load(warehouse, tables)
    split = splits.split(warehouse, data.split_by, tables.time, VALIDATION_FRACTION)
    rows = warehouse.count("ratings")
    numbering = {"oov_buckets": data.oov_buckets, "minimum_frequency": data.minimum_frequency}
    warehouse.run("vocabularies.sql", **numbering, pieces=1 + rows // 100_000_000)
    shards = data.shards or max(8, rows // conversion.ROWS_PER_FILE)
    warehouse.run("examples.sql", shards=shards)
    if data.table == "histories":
        warehouse.run("histories.sql", length=_length(config), shards=shards)
    counts = warehouse.query("SELECT split, COUNT(*) AS n FROM examples GROUP BY split").to_pylist()
    counts = {part: {row["split"]: row["n"] for row in counts}.get(part, 0) for part in ("train", *PARTS)}
    if sum(counts.values()) != rows or not all(counts.values()):
        raise ValueError(f"{tables.name}: {rows:,} ratings became {counts}; expected as many, and some in each part")
    log.info("data: %s", ", ".join(f"{n:,} rows for {part}" for part, n in counts.items()))
    names = [*(f"{side}_vocabulary" for side in SIDES), data.table]
    changed = {name: warehouse.changed(name) for name in names}
    files, known = {}, {}
    for side in SIDES:
        table = warehouse.read(f"{side}_vocabulary", [f"{side}_id", f"{side}_index", "frequency"])
        table = table.sort_by([(f"{side}_index", "ascending"), (f"{side}_id", "ascending")])
        known[side] = max(int(table[f"{side}_index"][-1].as_py()) + 1, data.oov_buckets)
        files |= _parquet(folder, f"{side}_vocabulary", table)
    stride = -(-(known["user"] - data.oov_buckets) // config.evaluation.users)
    for part in PARTS:
        warehouse.run("part_pairs.sql", part=part, stride=max(stride, 1), oov_buckets=data.oov_buckets)
        order = [(name, "ascending") for name in ("user_index", "item_index", "asked")]
        pairs = warehouse.read("part_pairs").sort_by(order)
        if not pairs.num_rows:
            raise ValueError(f"{tables.name}: nobody who is in training is in {part}; there is nobody to ask")
        files |= _parquet(folder, part, pairs)
        if data.table == "histories":
            warehouse.run("part_histories.sql", part=part, earlier=_length(config) - 1)
            files |= _parquet(folder, f"{part}_histories", warehouse.read("part_histories").sort_by("user_index"))
    exported = conversion.TableShards(warehouse, data.table, {"split": data.split})
    train = conversion.convert(os.path.join(folder, "train"), exported, config.record_columns())
    if train.rows != counts["train"]:
        raise RuntimeError(f"{folder}/train has {train.rows:,} rows, the warehouse {counts['train']:,}: export again")
    if replaced := [name for name in names if warehouse.changed(name) != changed[name]]:
        where = f"{warehouse.project}.{warehouse.dataset}.{replaced[0]}"
        raise RuntimeError(f"{where} was replaced meanwhile, by somebody else: prepare again, one at a time")
    files |= {f"train/{file.name}": file.sha256 for file in train.files}
    content = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    about = {"dataset": tables.name, "split": split, "counts": counts, "rows": known, "stride": max(stride, 1)}
    return about | {"content": content, "files": files, "manifest": _file_sha256(folder, "train/manifest.json")}


def _length(config: Config) -> int:
    return max(config.lengths().values(), default=1)


def _with_rows(config: Config, rows: dict[str, int]) -> Config:
    """The config with the rows of its tables."""
    of_column = {"user_index": rows["user"], "item_index": rows["item"], "history": rows["item"]}
    needed = {
        name: of_column[feature.column]
        for name, feature in config.features.items()
        if feature.kind in ("index", "history") and feature.column in of_column
    }
    return config.with_rows(needed)


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Wait while another process of this machine makes the same data."""
    if "://" in folder:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _parquet(folder: str, name: str, table: pa.Table) -> dict[str, str]:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return {f"{name}.parquet": _write(folder, f"{name}.parquet", buffer.getvalue())}


def _write(folder: str, name: str, content: bytes) -> str:
    """Write beside the name and rename into place. Returns the SHA-256."""
    path = os.path.join(folder, name)
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(f"{path}.writing", "wb") as stream:
        stream.write(content)
    tf.io.gfile.rename(f"{path}.writing", path, overwrite=True)
    return hashlib.sha256(content).hexdigest()


def _json(folder: str, name: str) -> dict | None:
    path = os.path.join(folder, name)
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as stream:
        return json.loads(stream.read())


def _file_sha256(folder: str, name: str) -> str:
    with tf.io.gfile.GFile(os.path.join(folder, name), "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
