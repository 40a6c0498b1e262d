"""How do a table's shards or many Parquet files become record batches, on all cores and through any interruption?

    manifest = convert("gs://bucket/train", TableShards(warehouse, "examples", {"split": "train"}), columns)
    manifest = convert("data/train", ParquetFiles("export/*.parquet"), columns)

A source has units (shards, files) that are converted independently of each other, by the threads of this process or by
the workers of a Beam pipeline (`beam_conversion.py`). A unit that is done leaves a receipt beside its files. Whatever
kills the conversion, the same call continues: units with a receipt are not read again, the others start over, and the
manifest is written when there is a receipt for each. Memory holds the rows of one file for each thread.

Needs: record_batches.py scale.py (and, for a table, bigquery.py embedded_bigquery.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from pyarrow import fs
from tqdm import tqdm

from recsys_common import scale
from recsys_common.record_batches import VERSION, Column, File, Manifest, batch_rows, schema, write_file

ROWS_PER_FILE = 4_000_000  # 112 MB of two ids, a rating and a time
PAUSE_SECONDS = 1
ATTEMPTS = 3  # for a unit whose source breaks half-way
PLAN, RECEIPT = "conversion.json", "unit-{:05d}-{}.json"  # a receipt is of a unit and a plan


class Incomplete(RuntimeError):
    """A unit gave another number of rows than it has: a stream broke and was taken up again at the wrong place."""


class ParquetFiles:
    """Parquet files as a source: one unit a file.

    Args:
      pattern: a glob such as "gs://bucket/export/*.parquet", or a list of paths and globs.
      about: where the files came from (SQL, parameters, table); goes into the manifest.

    Raises:
      FileNotFoundError: no file matches, or none matches one of the list.
      ValueError: not Parquet, or the files do not have the same columns; names two of them and the column.
      OSError: a file that cannot be read.
    """

    breaks = ()  # a file that cannot be read today cannot be read at once afterwards

    def __init__(self, pattern: str | list[str], about: dict | None = None):
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(self._find, patterns))
            if missing := [each for each, paths in zip(patterns, found, strict=True) if not paths] or not patterns:
                raise FileNotFoundError(f"{missing}: no such files")
            self.units = sorted({path for paths in found for path in paths})
            footers, sizes = list(pool.map(self._footer, self.units)), list(pool.map(tf.io.gfile.stat, self.units))
        self.rows, schemas, marks = zip(*footers, strict=True)
        self.schema = schemas[0]
        for unit, other in zip(self.units, schemas, strict=True):
            self._compare(unit, other)
        self.about = {"files": self.units} | (about or {})
        # A modification time has whole seconds here; the footer has the least and greatest value of every column.
        self.state = [(u, s.length, s.mtime_nsec, mark) for u, s, mark in zip(self.units, sizes, marks, strict=True)]

    @staticmethod
    def _find(pattern: str) -> list[str]:
        # A path may have brackets in it, as a glob has.
        return [pattern] if tf.io.gfile.exists(pattern) else tf.io.gfile.glob(pattern)

    @staticmethod
    @contextlib.contextmanager
    def _open(path: str) -> Iterator[pq.ParquetFile]:
        files, place = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        try:
            # Checksums are optional in Parquet, and by default not even looked at.
            with pq.ParquetFile(place, filesystem=files, page_checksum_verification=True) as file:
                yield file
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a whole Parquet file ({error}). Export it again.") from error
        except FileNotFoundError:
            raise  # it names the file
        except OSError as error:
            raise OSError(f"{path}: could not be read ({error}). If it is damaged, export it again.") from error

    def _footer(self, path: str) -> tuple[int, pa.Schema, str]:
        with self._open(path) as file:
            mark = hashlib.sha256(repr(file.metadata.to_dict()).encode()).hexdigest()
            return file.metadata.num_rows, file.schema_arrow.remove_metadata(), mark

    def _compare(self, unit: str, other: pa.Schema) -> None:
        for name in dict.fromkeys([*self.schema.names, *other.names]):
            kinds = [str(s.field(name).type) if name in s.names else "missing" for s in (self.schema, other)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"{unit}: column {name!r} is {kinds[1]}, but {kinds[0]} in {self.units[0]}. The files are of two "
                    "exports: put each export into a folder of its own."
                )

    def blocks(self, number: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a unit in blocks."""
        with self._open(self.units[number]) as file:
            yield from file.iter_batches(2**16, columns=columns, use_threads=False)


class TableShards:
    """A table with a column `shard` as a source, read through the Storage Read API: one unit a shard.

    Args:
      warehouse: a `bigquery.Warehouse`.
      table: a table of its dataset with an INT64 column `shard`.
      equal: column -> value that rows must have, such as {"split": "train"}.

    Raises:
      ValueError: no row matches, or a row has no shard.
    """

    def __init__(self, warehouse, table: str, equal: dict[str, str] | None = None):
        from google.api_core.exceptions import GoogleAPIError

        self.breaks = (GoogleAPIError, Incomplete)
        self.warehouse, self.table = warehouse, table
        # Before the rows are looked at: should they change in between, what is read now is not taken up later.
        changed = warehouse.changed(table)
        self.snapshot, counts, self.where = warehouse.shard_counts(table, equal or {})
        self.rows, self._shards = list(counts.values()), list(counts)
        self.units = [f"{table}, shard {shard}" for shard in counts]
        # Of one shard: the embedded service fetches all rows of a session when it is opened.
        one = f"shard = {self._shards[0]}"
        self.schema = warehouse.open(table, where=one, streams=1, snapshot=self.snapshot).arrow_schema
        self.about = warehouse.provenance(table) | {
            "where": self.where,
            "shards": len(counts),
            "snapshot_time": self.snapshot,
        }
        # The time of a snapshot differs from call to call; whether the table changed does not depend on it.
        self.state = [warehouse.project, warehouse.dataset, table, changed, self.where, self.rows]

    def blocks(self, number: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a unit in blocks. Units are read in parallel, so each takes a single stream."""
        where = " AND ".join(filter(None, [self.where, f"shard = {self._shards[number]}"]))
        session = self.warehouse.open(self.table, columns, where, streams=1, snapshot=self.snapshot)
        for stream in session.streams:
            yield from self.warehouse.blocks(session, stream)


@dataclass(frozen=True)
class Conversion:
    """A conversion that was begun: what a worker needs to do any unit of it, and to finish."""

    folder: str
    source: ParquetFiles | TableShards
    columns: list[Column]
    rows_per_record: int
    seed: int = 0
    rows_per_file: int = ROWS_PER_FILE
    compression: str = ""
    plan: str = ""
    pending: list[int] = field(default_factory=list)

    def unit(self, number: int) -> int:
        """Convert a unit and leave its receipt. Returns its rows.

        Two workers may do the same unit at the same time: whose receipt comes last, his files count. A unit that has
        one is not read again, since Beam repeats a whole bundle of units when one of them fails.

        Raises:
          Incomplete: its source gave another number of rows than it has, in `ATTEMPTS` attempts.
          ValueError: a value that does not fit; names unit, column and row.
        """
        if tf.io.gfile.exists(self._receipt(number)):
            return self.source.rows[number]
        for attempt in range(ATTEMPTS):
            try:
                files = list(self._files(number))
            except self.source.breaks:
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(PAUSE_SECONDS * 4**attempt)  # a service that is short of something needs a moment
            else:
                break
        _write_json(self._receipt(number), [asdict(file) for file in files])
        return self.source.rows[number]

    def _files(self, number: int) -> Iterator[File]:
        names = [column.name for column in self.columns]
        held, rows, part, found, expected = [], 0, 0, 0, self.source.rows[number]
        size = self._rows_of_a_file(number)
        for block in self.source.blocks(number, names):
            found += block.num_rows
            if found > expected:
                break  # at once: a stream that breaks and starts over, again and again, would never end
            while block.num_rows:
                taken = block.slice(0, size - rows)
                block = block.slice(taken.num_rows)
                held.append(taken)
                rows += taken.num_rows
                if rows == size:
                    yield self._file(number, part, held)
                    held, rows, part = [], 0, part + 1
        if found != expected:
            raise Incomplete(
                f"{self.source.units[number]}: {found:,} rows arrived{' so far' * (found > expected)}, it has "
                f"{expected:,}. A stream broke, or the source changed while it was read: run the same command again."
            )
        if held:
            yield self._file(number, part, held)

    def _file(self, number: int, part: int, blocks: list[pa.RecordBatch]) -> File:
        table, name = pa.Table.from_batches(blocks), f"part-{number:05d}-{part:03d}"
        blocks.clear()
        where, seed = self.source.units[number], self.seed + number
        if part:  # rows in an error are counted from there
            where += f", rows after the first {part * self._rows_of_a_file(number):,}"
        options = (self.rows_per_record, seed, self.compression, where)
        file = write_file(self.folder, name, table, self.columns, *options)
        pa.default_memory_pool().release_unused()  # otherwise each thread's share of it grows for a while
        return file

    def _rows_of_a_file(self, number: int) -> int:
        """A unit of a few rows more than `rows_per_file` makes one file; a larger one, files of equal size."""
        rows = self.source.rows[number]
        return -(-rows // max(1, round(rows / self.rows_per_file)))

    def _receipt(self, number: int) -> str:
        # A worker of an earlier conversion that nobody stopped leaves receipts too: the plan keeps them apart.
        return os.path.join(self.folder, RECEIPT.format(number, self.plan))

    def _is_done(self, number: int, there: set[str]) -> bool:
        """Whether a unit has a receipt and the files that it names; else it has no receipt afterwards."""
        path = self._receipt(number)
        if os.path.basename(path) not in there:
            return False
        done = all(file["name"] in there for file in _read_json(path))
        if not done:  # another export into this folder was finished meanwhile
            _remove(path)
        return done

    def finish(self) -> Manifest:
        """Write the manifest from the receipts, then remove them."""
        with ThreadPoolExecutor(32) as pool:  # a question to Cloud Storage takes 50 ms, and there may be 10,000 units
            receipts = list(pool.map(_read_json, map(self._receipt, range(len(self.source.units)))))
            files = [File(**file) for receipt in receipts for file in receipt]
            there = set(tf.io.gfile.listdir(self.folder))
            if gone := [file.name for file in files if file.name not in there]:
                raise FileNotFoundError(
                    f"{self.folder}: {gone[0]}, which was converted, is gone: another export into this folder was "
                    "finished meanwhile. Run the same command again, or choose another folder."
                )
            options = (self.rows_per_record, self.compression, self.seed)
            manifest = Manifest(self.folder, self.columns, files, *options, self.source.about).save()
            names = [name for name in tf.io.gfile.listdir(self.folder) if name.startswith((PLAN, "unit-"))]
            list(pool.map(_remove, [os.path.join(self.folder, name) for name in names]))
        return manifest


def begin(
    folder: str | os.PathLike,
    source: ParquetFiles | TableShards,
    columns: dict[str, str] | list[Column],
    *,
    seed: int = 0,
    rows_per_file: int = ROWS_PER_FILE,
    rows_per_record: int | None = None,
    compression: str = "",
) -> Conversion:
    """Begin a conversion into `folder`, or take up one of the same source, columns and options that was killed.

    Args: as for `convert`.

    Raises:
      ValueError: a column that the source does not have, no rows in a file.
    """
    folder, columns = os.fspath(folder), schema(columns, source.schema)
    rows_per_record = rows_per_record or batch_rows(columns)
    if missing := [column.name for column in columns if column.name not in source.schema.names]:
        raise ValueError(f"{source.units[0]}: no column {', '.join(missing)}; it has {', '.join(source.schema.names)}")
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file {rows_per_file}, expected 1 or more")
    options = (columns, rows_per_record, seed, rows_per_file, compression)
    same = hashlib.sha256(repr((VERSION, source.state, options)).encode()).hexdigest()
    plan = os.path.join(folder, PLAN)
    tf.io.gfile.makedirs(folder)
    there, numbers = set(tf.io.gfile.listdir(folder)), range(len(source.units))
    work = Conversion(folder, source, *options, same[:8])
    if not (tf.io.gfile.exists(plan) and _read_json(plan) == same):
        for name in there:
            if name.startswith("unit-") and work.plan not in name:
                _remove(os.path.join(folder, name))  # of another conversion, whose files the manifest will not name
        _write_json(plan, same)
    with ThreadPoolExecutor(32) as pool:
        done = list(pool.map(lambda number: work._is_done(number, there), numbers))
    return replace(work, pending=[number for number in numbers if not done[number]])


def convert(
    folder: str | os.PathLike,
    source: ParquetFiles | TableShards,
    columns: dict[str, str] | list[Column],
    *,
    workers: int | None = None,
    **options,
) -> Manifest:
    """Convert a source into record batches with the threads of this process.

    Args:
      folder: local or `gs://` folder; an export in it is replaced once the new one is complete.
      source: what to convert.
      columns: what to store, see `record_batches.write`.
      workers: units at a time; None for as many as there are cores. (Arrow, NumPy and the file writer let go of
        Python's lock, so threads do.)
      **options: seed, rows_per_file, rows_per_record, compression, as in `begin`.

    Raises: as `Conversion.unit`. What was finished stays, and the same call continues.
    """
    work = begin(folder, source, columns, **options)
    pool = ThreadPoolExecutor(workers or scale.machine()["cores"])
    rows = sum(source.rows)
    with tqdm(total=rows, unit=" rows", unit_scale=True, desc="converting", disable=not scale.progress()) as bar:
        bar.update(rows - sum(source.rows[number] for number in work.pending))
        try:
            for unit in as_completed([pool.submit(work.unit, number) for number in work.pending]):
                bar.update(unit.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return work.finish()


def _write_json(path: str, content) -> None:
    beside = f"{path}.{uuid.uuid4().hex}.writing"
    with tf.io.gfile.GFile(beside, "w") as stream:
        stream.write(json.dumps(content))
    tf.io.gfile.rename(beside, path, overwrite=True)


def _remove(path: str) -> None:
    with contextlib.suppress(tf.errors.NotFoundError):  # someone was faster, or it has its final name by now
        tf.io.gfile.remove(path)


def _read_json(path: str):
    with tf.io.gfile.GFile(path) as stream:
        return json.loads(stream.read())
