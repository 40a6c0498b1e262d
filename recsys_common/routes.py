"""By which ways do rows get from a table to tensors? Six small ways, side by side, so that they can be compared.

    columns = {"user_index": "int32", "rating": "float32"}          # name -> dtype
    paths = export_csv(warehouse, "examples", f"{warehouse.storage}/csv", columns, gzip=True)
    dataset = read_csv(paths, columns, batch_size=8192)

1. `export_csv`, `read_csv`: `EXPORT DATA` to text, parsed by TensorFlow.
2. `export_rows`, `read_rows`: TFRecord with one `tf.train.Example` a row, as Google's Dataflow template writes it
   (GoogleCloudPlatform/DataflowTemplates, BigQueryToTFRecord.java): a NULL is left out, FLOAT64 becomes float32, a
   struct is refused.
3. `export_parquet`: `EXPORT DATA` to Parquet, which TensorFlow cannot read; `conversion.py` makes record batches of it.
4. Storage Read streams written straight to record batches, also by `conversion.py`.
5. `table_stream`, in a file of its own: Storage Read streams into `tf.data`, with no files between.
6. `export_packed`, `read_packed`: BigQuery packs the columns itself, and its own export is read by native ops.

All take a table of the warehouse's dataset that has an INT64 column `shard` of 0..n-1, and `columns` with the dtypes
int64, int32, float32, float64 or string. All readers give batches `{name: tensor [rows]}` with the same rows, each
once: an export is checked against a count of every shard. Cluster the table by shard, or each of the n statements of
an export scans, and bills, all of it.

An export goes into a new folder `export-<random>` below the one that it is given, and earlier ones there are removed
only once it is whole. `overwrite = true` would replace files of equal names alone: of an earlier export with more
files, some would stay and be read with the new ones; and to empty the folder first would leave nothing if we fail.

Needs: bigquery.py embedded_bigquery.py scale.py table_stream.py sql/packed_batches.sql
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import tensorflow as tf

from recsys_common.bigquery import SQL_FOLDER, STREAMS, Warehouse, plain
from recsys_common.table_stream import expect_rows
from recsys_common.table_stream import table_stream as table_stream  # route 5, beside the others

FILES_AT_ONCE = 8  # files that a reader has open, as in input_pipeline.py
PACKED = {"user_id": "int64", "item_id": "int64", "timestamp": "int64", "rating": "float32"}
RATING_UNIT = 1 / 65536  # of the packed rating, an integer


def export_csv(warehouse: Warehouse, table: str, folder: str, columns: dict[str, str], *, gzip: bool) -> list[str]:
    """Export to CSV without a header, in one statement for each shard. Returns the files' paths, as we open them.

    Args:
      folder: `gs://` address.
      columns: what to export; the dtypes matter to `read_csv` only.

    Raises:
      ValueError: no rows, a shard that is NULL, a column that is nested or repeated (BigQuery would refuse it too).
      RuntimeError: other rows were exported than the table had.
      google.api_core.exceptions.GoogleAPIError: a statement failed, such as for a column that is not there.
    """
    address = f"{warehouse.project}.{warehouse.dataset}.{plain(table)}"
    for field in warehouse.client.get_table(address, retry=warehouse.retry()).schema:
        if field.name in columns and (field.mode == "REPEATED" or field.field_type in ("RECORD", "STRUCT")):
            kind = f"{field.field_type} {field.mode}"
            raise ValueError(
                f"table {table!r}, column {field.name!r} is {kind}; CSV holds plain columns only. Flatten it in SQL."
            )
    options = "format = 'CSV', header = false" + ", compression = 'GZIP'" * gzip
    return _export(warehouse, table, folder, "csv.gz" if gzip else "csv", options, _select(columns))


def read_csv(paths: list[str], columns: dict[str, str], batch_size: int) -> tf.data.Dataset:
    """Batches of the rows of `export_csv`; the last batch of a file is smaller. Names that end in .gz are gunzipped.

    Iterating raises InvalidArgumentError where a number is missing (NULL) or does not fit its dtype, and at a line
    break within a string. A NULL string becomes "".
    """
    # A number without a default is required; TensorFlow would take 0 for NULL, and nobody would know.
    defaults = [tf.constant([""] if dtype == "string" else [], dtype) for dtype in columns.values()]

    def decode(lines: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(zip(columns, tf.io.decode_csv(lines, defaults), strict=True))

    return _files(paths, lambda path: _lines(path).batch(batch_size).map(decode))


def export_rows(warehouse: Warehouse, table: str, folder: str, columns: dict[str, str]) -> list[str]:
    """Write TFRecords with one `tf.train.Example` a row, one file for each shard, by this process's Python: slow.

    Arguments and errors as for `export_csv`, but lists are written as lists (the reader's dtype is then "int64[]").
    """
    with _new_folder(warehouse, folder) as target:
        paths, target = [], warehouse.local(target)
        tf.io.gfile.makedirs(target)
        snapshot, shards, _ = warehouse.shard_counts(table, {})
        for shard, expected in shards.items():
            rows = warehouse.read(table, list(columns), f"shard = {shard}", snapshot)
            expect_rows(f"{table!r}, shard {shard}", rows.num_rows, expected)
            paths.append(f"{target}/shard-{shard:05d}.tfrecord")
            with tf.io.TFRecordWriter(paths[-1] + ".writing") as writer:
                for example in _examples(rows):
                    writer.write(example)
            tf.io.gfile.rename(paths[-1] + ".writing", paths[-1])
        return paths


def read_rows(paths: list[str], columns: dict[str, str], batch_size: int) -> tf.data.Dataset:
    """Batches of the rows of `export_rows`; the last batch of a file is smaller. float64 has a float32's digits.

    A dtype with "[]" behind is a list, and becomes a RaggedTensor. Iterating raises InvalidArgumentError where a
    value is missing (NULL), or a list stands in a plain column, or an integer does not fit its dtype.
    """
    spec = {}
    for name, dtype in columns.items():
        # An Example has int64, float32 and bytes, nothing else.
        stored = tf.string if dtype.startswith("string") else tf.int64 if dtype.startswith("int") else tf.float32
        ragged = tf.io.RaggedFeature(stored, row_splits_dtype=tf.int64)
        spec[name] = ragged if dtype.endswith("[]") else tf.io.FixedLenFeature([], stored)

    def decode(records: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
        batch = tf.io.parse_example(records, spec)
        return {name: _cast(batch[name], columns[name].removesuffix("[]"), name) for name in columns}

    return _files(paths, lambda path: tf.data.TFRecordDataset(path).batch(batch_size).map(decode))


def export_parquet(warehouse: Warehouse, table: str, folder: str, columns: dict[str, str]) -> list[str]:
    """Export to Parquet (snappy), in one statement for each shard; arguments and errors as for `export_csv`."""
    options = "format = 'PARQUET', compression = 'SNAPPY'"
    return _export(warehouse, table, folder, "parquet", options, _select(columns))


def export_packed(warehouse: Warehouse, table: str, folder: str, rows_per_record: int = 4096) -> list[str]:
    """Let BigQuery pack user_id, item_id, timestamp and rating into record batches, one a line, in gzipped CSV.

    Arguments and errors as for `export_csv`.
    """
    sql = (SQL_FOLDER / "packed_batches.sql").read_text().rstrip().removesuffix(";")
    packed = f"SELECT `rows`, {', '.join(PACKED)} FROM (\n{sql}\n)"
    options = "format = 'CSV', header = false, compression = 'GZIP'"
    return _export(warehouse, table, folder, "csv.gz", options, packed, rows_per_record)


def read_packed(paths: list[str]) -> tf.data.Dataset:
    """The record batches of `export_packed`: `{name: tensor [rows]}` of `PACKED`, rating in float32.

    Iterating raises InvalidArgumentError where a line is not what `export_packed` writes.
    """

    def decode(line: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, *texts = tf.io.decode_csv(line, [tf.constant([], tf.int64)] + [tf.constant([], tf.string)] * len(PACKED))
        batch = {}
        for (name, dtype), text in zip(PACKED.items(), texts, strict=True):
            values = tf.io.decode_raw(tf.io.decode_base64(text), tf.int64, little_endian=False)
            tf.debugging.assert_equal(tf.size(values, tf.int64), rows, f"column {name}: other rows than the line says")
            batch[name] = values if dtype == "int64" else tf.cast(tf.cast(values, tf.float64) * RATING_UNIT, dtype)
        return batch

    return _files(paths, lambda path: _lines(path).map(decode))


def _select(columns: Iterable[str]) -> str:
    return f"SELECT {', '.join(map(plain, columns))} FROM export_rows WHERE shard = @shard"


@contextmanager
def _new_folder(warehouse: Warehouse, folder: str) -> Iterator[str]:
    """The address of a new folder below `folder`; earlier ones are removed once the block is done."""
    # The address goes into SQL as text: options of EXPORT DATA take no parameters.
    if not re.fullmatch(r"gs://[\w.-]+(/[\w.=-]+)+", folder):
        raise ValueError(f"{folder!r} is not a gs://bucket/folder of letters, digits, '_', '.', '-' and '='")
    local = warehouse.local(folder)
    found = tf.io.gfile.listdir(local) if tf.io.gfile.isdir(local) else []
    yield f"{folder}/export-{uuid.uuid4().hex[:8]}"
    for name in found:
        if re.fullmatch(r"export-[0-9a-f]{8}/?", name):
            tf.io.gfile.rmtree(f"{local}/{name}")


def _export(
    warehouse: Warehouse, table: str, folder: str, ending: str, options: str, select: str, rows_per_record: int = 0
) -> list[str]:
    """Run `EXPORT DATA` for each shard, several at a time, and return the files that are there then.

    `select` reads FROM export_rows, in whose place comes the table; its parameters are shard and rows_per_record.
    """
    from google.cloud import bigquery

    snapshot, shards, _ = warehouse.shard_counts(table, {})
    # All statements see the table of one moment. The embedded service keeps no history, and nobody else writes there.
    at = "" if warehouse.embedded else f" FOR SYSTEM_TIME AS OF TIMESTAMP '{snapshot}'"
    select = select.replace("FROM export_rows", f"FROM {plain(table)}{at}")

    def export(shard: int) -> int:
        values = {"shard": shard} | ({"rows_per_record": rows_per_record} if rows_per_record else {})
        parameters = [bigquery.ScalarQueryParameter(name, "INT64", value) for name, value in values.items()]
        uri = f"{target}/shard-{shard:05d}-*.{ending}"
        job = warehouse.client.query(
            f"EXPORT DATA OPTIONS (uri = '{uri}', overwrite = true, {options}) AS\n{select}",
            job_config=bigquery.QueryJobConfig(query_parameters=parameters),
            retry=warehouse.retry(),
        )
        job.result(retry=warehouse.retry())
        # The client has no property for this part of the job's statistics.
        done = job._properties["statistics"]["query"]["exportDataStatistics"]
        found, expected = int(done["rowCount"]), math.ceil(shards[shard] / (rows_per_record or 1))
        expect_rows(f"{table!r}, shard {shard}", found, expected)
        return int(done["fileCount"])

    with _new_folder(warehouse, folder) as target:
        with ThreadPoolExecutor(STREAMS) as pool:
            written = sum(pool.map(export, shards))
        paths = sorted(tf.io.gfile.glob(f"{warehouse.local(target)}/*.{ending}"))
        if len(paths) != written:
            # A statement that BigQuery tried again may leave files of its first attempt.
            raise RuntimeError(f"{target}: {len(paths)} files, the statements wrote {written}. Run the export again.")
        return paths


def _examples(rows: pa.Table) -> Iterator[bytes]:
    """One serialized `tf.train.Example` for each row; a NULL is left out."""
    kinds, values = [], []
    for name in rows.column_names:
        column, type_ = rows[name], rows.schema.field(name).type
        value_type = type_.value_type if pa.types.is_list(type_) else type_
        if pa.types.is_integer(value_type):
            kinds.append("int64_list")
        elif pa.types.is_floating(value_type):
            kinds.append("float_list")
        elif pa.types.is_string(value_type):
            kinds.append("bytes_list")
            column = column.cast(pa.list_(pa.binary()) if pa.types.is_list(type_) else pa.binary())
        else:
            raise ValueError(f"column {name!r} is {type_}; a tf.train.Example holds integers, floats and strings only")
        values.append(column.to_pylist())
    for row in zip(*values, strict=True):
        example = tf.train.Example()
        for name, kind, value in zip(rows.column_names, kinds, row, strict=True):
            if value is not None:
                getattr(example.features.feature[name], kind).value.extend(value if type(value) is list else [value])
        # Otherwise a map's order, and so the bytes, differ from process to process.
        yield example.SerializeToString(deterministic=True)


def _cast(values: tf.Tensor | tf.RaggedTensor, dtype: str, name: str) -> tf.Tensor | tf.RaggedTensor:
    """`values` as `dtype`; an integer that does not fit is an error, where `tf.cast` would keep its lower bits."""
    if dtype == "int32":
        flat = values.flat_values if isinstance(values, tf.RaggedTensor) else values
        tf.debugging.assert_equal(tf.cast(tf.cast(flat, tf.int32), tf.int64), flat, f"column {name} does not fit int32")
    return values if dtype == "string" else tf.cast(values, dtype)


def _lines(path: tf.Tensor) -> tf.data.Dataset:
    return tf.data.TextLineDataset(path, tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", ""))


def _files(paths: list[str], read: Callable[[tf.Tensor], tf.data.Dataset]) -> tf.data.Dataset:
    """`read` on every file, several at a time."""
    if not paths:
        raise ValueError("no files to read: pass what the export returned")
    files = tf.data.Dataset.from_tensor_slices(paths)
    batches = files.interleave(read, cycle_length=FILES_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE)
    return batches.prefetch(tf.data.AUTOTUNE)
