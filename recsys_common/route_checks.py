"""What does each route from a table to tensors do with values that are easily lost? Measured, not looked up.

    for found in survival(warehouse):                  # {"route", "case", "outcome"}
        print(found["case"], "by", found["route"], found["outcome"])

One row with one such value goes down each route, and what arrives is compared bit for bit with what was sent.

Needs: bigquery.py embedded_bigquery.py scale.py record_batches.py routes.py table_stream.py sql/packed_batches.sql
"""

from __future__ import annotations

import re
import struct
import tempfile
import textwrap
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from recsys_common import record_batches, routes
from recsys_common.bigquery import Warehouse

TABLE = "route_checks"
THIRD = struct.unpack("<f", struct.pack("<f", 1 / 3))[0]  # as a float32 has it
# Case -> the value in SQL, the dtype it is read as, the value that should arrive.
CASES = {
    "NULL integer": ("CAST(NULL AS INT64)", "int64", None),
    "NULL float": ("CAST(NULL AS FLOAT64)", "float32", None),
    "NULL string": ("CAST(NULL AS STRING)", "string", None),
    "empty string": ("''", "string", ""),
    "string with quotes and comma": ("'a \"b\", c'", "string", 'a "b", c'),
    "string with line break": (r"'a\nb'", "string", "a\nb"),
    "2^63 - 1": ("9223372036854775807", "int64", 2**63 - 1),
    "2^53 + 1": ("9007199254740993", "int64", 2**53 + 1),
    "2^31 read as int32": ("2147483648", "int32", 2**31),
    "float64 0.1": ("CAST('0.1' AS FLOAT64)", "float64", 0.1),
    "float32 1/3": (f"CAST('{THIRD!r}' AS FLOAT64)", "float32", THIRD),
    "-0.0": ("CAST('-0.0' AS FLOAT64)", "float32", -0.0),
    "NaN": ("CAST('NaN' AS FLOAT64)", "float32", float("nan")),
    "infinity": ("CAST('inf' AS FLOAT64)", "float32", float("inf")),
    "ARRAY [1, 2, 3]": ("[CAST(1 AS INT64), 2, 3]", "int64[]", [1, 2, 3]),
    "ARRAY []": ("ARRAY<INT64>[]", "int64[]", []),
    "STRUCT": ("STRUCT(1 AS a, 'x' AS b)", "string", {"a": 1, "b": "x"}),
}


def survival(warehouse: Warehouse) -> list[dict[str, str]]:
    """Send every case down every route; of the table `route_checks` and files below `warehouse.storage`, nothing stays.

    Returns:
      {"route", "case", "outcome"}, case after case. An outcome is "kept", "becomes ..." with what arrived instead,
      "error: ..." with the beginning of the message, or "... rows" where one row became none or several.
    """
    values = ", ".join(f"{sql} AS value_{number}" for number, (sql, _, _) in enumerate(CASES.values()))
    try:
        warehouse.query(f"CREATE OR REPLACE TABLE {TABLE} AS SELECT 0 AS shard, 1 AS id, {values}")
        return [
            {"route": route, "case": case, "outcome": _outcome(warehouse, send, f"value_{number}", dtype, sent)}
            for number, (case, (_, dtype, sent)) in enumerate(CASES.items())
            for route, send in ROUTES.items()
        ]
    finally:
        # No manifest names them, so nobody would find them to delete.
        warehouse.query(f"DROP TABLE IF EXISTS {TABLE}")
        folder = warehouse.local(f"{warehouse.storage}/{TABLE}")
        if tf.io.gfile.exists(folder):
            tf.io.gfile.rmtree(folder)


def _outcome(warehouse: Warehouse, send: Callable, column: str, dtype: str, sent) -> str:
    from google.api_core.exceptions import GoogleAPIError

    try:
        arrived = send(warehouse, {"id": "int64", column: dtype})
    except (ValueError, RuntimeError, pa.ArrowException, tf.errors.OpError, GoogleAPIError) as error:
        # Less what differs from run to run, and what TensorFlow puts around a message.
        reason = str(error).split("\n")[0].replace(column, "value")
        reason = re.sub(
            r"\{\{.*?\}\} ?|\[Op:.*|Error in user-defined function.* Iterator::\S+: |Name: <unknown>, ", "", reason
        )
        reason = re.sub(r"^(\w+Error: |\S*/\S+, file \d+: |table '\w+'[,:] )+", "", reason)
        return "error: " + textwrap.shorten(reason, 80, placeholder=" ...")
    if len(arrived) != 1:
        return f"{len(arrived)} rows"
    return "kept" if _bits(arrived[0]) == _bits(sent) else f"becomes {arrived[0]!r}"


def _bits(value):
    """What is equal only where the values are, to the last bit; every NaN is one."""
    if isinstance(value, float):
        return "NaN" if value != value else struct.pack("<d", value)
    return value


def _values(dataset: tf.data.Dataset) -> list:
    """The column that is not `id`, of all rows, as Python values."""
    found = []
    for batch in dataset:
        (value,) = (values for name, values in batch.items() if name != "id")
        rows = value.to_list() if isinstance(value, tf.RaggedTensor) else value.numpy().tolist()
        found += [row.decode() if isinstance(row, bytes) else row for row in rows]
    return found


def through_record_batches(table: pa.Table, columns: dict[str, str]) -> list:
    """The column that is not `id`, after the table was written as record batches and read again."""
    with tempfile.TemporaryDirectory() as folder:
        return _values(record_batches.read(record_batches.write(folder, [table], _plain(columns))))


def _plain(columns: dict[str, str]) -> dict[str, str]:
    """Only `read_rows` has to be told what is a list; the others see it in the table's schema."""
    return {name: dtype.removesuffix("[]") for name, dtype in columns.items()}


def _csv(warehouse: Warehouse, columns: dict[str, str]) -> list:
    paths = routes.export_csv(warehouse, TABLE, f"{warehouse.storage}/{TABLE}/csv", columns, gzip=False)
    return _values(routes.read_csv(paths, columns, 8))


def _rows(warehouse: Warehouse, columns: dict[str, str]) -> list:
    paths = routes.export_rows(warehouse, TABLE, f"{warehouse.storage}/{TABLE}/rows", columns)
    return _values(routes.read_rows(paths, columns, 8))


def _parquet(warehouse: Warehouse, columns: dict[str, str]) -> list:
    tables = []
    for path in routes.export_parquet(warehouse, TABLE, f"{warehouse.storage}/{TABLE}/parquet", columns):
        with tf.io.gfile.GFile(path, "rb") as stream:
            tables.append(pq.read_table(pa.BufferReader(stream.read())))
    return through_record_batches(pa.concat_tables(tables), columns)


def _storage_read(warehouse: Warehouse, columns: dict[str, str]) -> list:
    return through_record_batches(warehouse.read(TABLE, list(columns)), columns)


def _table_stream(warehouse: Warehouse, columns: dict[str, str]) -> list:
    return _values(routes.table_stream(warehouse, TABLE, _plain(columns), 8))


# The names that benchmarks and the chapter use.
ROUTES = {
    "csv": _csv,
    "tfrecord row": _rows,
    "parquet": _parquet,
    "storage read": _storage_read,
    "table stream": _table_stream,
}
