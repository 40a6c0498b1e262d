"""How do ratings become tables of the warehouse?

    load(warehouse, datasets.load("ml-1m", "data"))               # uploaded, counted, checked
    load(warehouse, datasets.load("project.dataset.ratings"))     # read where it is, through a view; checked

Needs: bigquery.py embedded_bigquery.py scale.py datasets/ sql/
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from recsys_common.bigquery import Warehouse, plain
from recsys_common.datasets import RatingTables
from recsys_common.scale import TABLE, progress, rehearsing

TABLES = {
    "ratings": "CREATE TABLE ratings (user_id INT64, item_id INT64, rating FLOAT64, timestamp INT64)",
    "items": "CREATE TABLE items (item_id INT64, title STRING, genres ARRAY<STRING>)",
}
# The columns of a table that is read in place, with the types that they may have.
SOURCES = {
    "ratings": {
        "user_id": ["INT64"],
        "item_id": ["INT64"],
        "rating": ["FLOAT64", "INT64", "NUMERIC"],
        "timestamp": ["TIMESTAMP", "INT64"],
    },
    "items": {"item_id": ["INT64"], "title": ["STRING"], "genres": ["STRING REPEATED"]},
}
REHEARSAL_ROWS = 20_000
CHECK_WEIGHTS = {"user_id": 31415927, "item_id": 27182819, "rating": 14142137, "timestamp": 57721567}


def load(warehouse: Warehouse, tables: RatingTables, items_table: str = "") -> None:
    """Make `ratings` and `items` exist in the warehouse's dataset.

    Args:
      tables: `datasets.RatingTables`. If it names a BigQuery table, that one is read through a view and nothing is
        copied; it must have the columns user_id, item_id, rating, timestamp (INT64, INT64, FLOAT64, TIMESTAMP or
        INT64 seconds). Whether a pair occurs twice in it is not checked: that would cost a pass with a shuffle.
      items_table: with a table name, the table of item_id, title, genres; "" for none.

    Raises:
      ValueError: a bad name, a missing or mistyped column, no rows; nulls, NaN or negative ids, counted.
    """
    if rehearsing():
        _stage(warehouse)
    if tables.table:
        _view(warehouse, "ratings", tables.table)
        if items_table:
            _view(warehouse, "items", items_table)
        else:
            _drop(warehouse, "items")
            warehouse.query(TABLES["items"])
        check(warehouse, tables.table)
    else:
        upload(warehouse, "ratings", tables.stream() if tables.stream else [tables.ratings])
        upload(warehouse, "items", [tables.items])
        check(warehouse, tables.name)


def _view(warehouse: Warehouse, name: str, table: str) -> None:
    if not TABLE.match(table):
        raise ValueError(f"{table!r} is not a BigQuery table name; expected project.dataset.table")
    if table.replace(":", ".").split(".")[-2] == warehouse.dataset:
        raise ValueError(f"{table} lies in {warehouse.dataset}, where tables are replaced. Copy it elsewhere.")
    names = {"INTEGER": "INT64", "FLOAT": "FLOAT64"}  # the API's old names
    types = {
        f.name: names.get(f.field_type, f.field_type) + " REPEATED" * (f.mode == "REPEATED")
        for f in warehouse.client.get_table(table).schema
    }
    for column, wanted in SOURCES[name].items():
        if types.get(column) not in wanted:
            raise ValueError(
                f"{table}: column {column!r} is {types.get(column, 'missing')}, expected {' or '.join(wanted)}; the "
                f"table has {', '.join(types)}. Make a view that renames or casts, and give its name instead."
            )
    # All routes out of the warehouse then meet one type; a NUMERIC would arrive as a decimal, which no file takes.
    casts = {
        ("rating", "NUMERIC"): "CAST(rating AS FLOAT64) AS rating",
        ("rating", "INT64"): "CAST(rating AS FLOAT64) AS rating",
        ("timestamp", "TIMESTAMP"): "UNIX_SECONDS(timestamp) AS timestamp",
    }
    columns = [casts.get((column, types[column]), column) for column in SOURCES[name]]
    _drop(warehouse, name)
    warehouse.query(f"CREATE VIEW {name} AS SELECT {', '.join(columns)} FROM `{table}`")


def _drop(warehouse: Warehouse, name: str) -> None:
    from google.api_core.exceptions import NotFound

    try:
        kind = warehouse.client.get_table(
            f"{warehouse.project}.{warehouse.dataset}.{name}", retry=warehouse.retry()
        ).table_type
    except NotFound:
        return
    warehouse.query(f"DROP {'VIEW' if kind == 'VIEW' else 'TABLE'} {plain(name)}")


def upload(warehouse: Warehouse, name: str, tables: Iterable[pa.Table]) -> int:
    """Make `ratings` or `items` from Arrow tables, taken one at a time, so that all of them may exceed memory.

    Returns:
      The number of rows.

    Raises:
      ValueError: no rows. OSError: the embedded service's disk is too small.
      RuntimeError: the warehouse counts another number of rows.
    """
    from google.cloud import bigquery

    target, rows = f"{warehouse.project}.{warehouse.dataset}.{name}", 0
    config = bigquery.LoadJobConfig(source_format="PARQUET", write_disposition="WRITE_APPEND")
    config.parquet_options = bigquery.ParquetOptions()
    config.parquet_options.enable_list_inference = True
    retries = 0 if warehouse.embedded else 6  # see Warehouse.retry
    bar = tqdm(desc=f"loading {name}", unit="row", unit_scale=True, delay=2, disable=not progress())
    for table in (table for table in tables if table.num_rows):
        warehouse.expect_space(4 * table.nbytes)  # the upload, the table, the log that it is written through
        if rows == 0:
            _drop(warehouse, name)
            warehouse.query(TABLES[name])  # the embedded service loads only into a table that exists
        file = io.BytesIO()
        pq.write_table(table, file)
        file.seek(0)
        job = warehouse.client.load_table_from_file(file, target, job_config=config, num_retries=retries)
        job.result(retry=warehouse.retry(), timeout=3600)
        rows += table.num_rows
        bar.update(table.num_rows)
    bar.close()
    if rows == 0:
        raise ValueError(f"table {name!r} has 0 rows; there is nothing to load. Check what the data set was read from.")
    if (found := warehouse.count(name)) != rows:
        raise RuntimeError(
            f"table {name!r} has {found:,} rows, expected {rows:,}: rows were lost or "
            "doubled on the way. Load it again; if it stays so, report it with what `make doctor` prints."
        )
    return rows


def check(warehouse: Warehouse, source: str) -> None:
    """Scan `ratings` once for what would spoil training; `source` is the name to use in the message."""
    row = warehouse.run("check_ratings.sql").to_pylist()[0]
    if row.pop("rows") == 0:
        raise ValueError(f"{source} has 0 ratings; there is nothing to train on. Check the table or its filter.")
    found = [f"{count:,} rows with {what.replace('_', ' ', 1)}" for what, count in row.items() if count]
    if found:
        raise ValueError(
            f"{source}: {', '.join(found)}; expected none. Find them with SELECT ... WHERE, mend or drop them in a "
            "view, and give the view's name instead."
        )


def column_checks(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """What `sql/column_checks.sql` finds in the warehouse, from rows that have left it; of parts of the rows, add up.

    Args:
      columns: user_id, item_id, timestamp int64 [rows], rating float [rows]; all finite.

    Returns:
      rows, and for every column and for whole rows sums that do not depend on the order; the file says of what.
    """
    p, q = 2**27 - 39, 2**27 - 111
    scaled = columns["rating"].astype(np.float64) * 65536
    whole, rest = np.trunc(scaled).astype(np.int64), np.trunc((scaled - np.trunc(scaled)) * 2.0**46).astype(np.int64)
    numbers = {name: columns[name].astype(np.int64) for name in CHECK_WEIGHTS if name != "rating"} | {"rating": whole}
    residues = {name: np.fmod(number, q) for name, number in numbers.items()}  # fmod: the sign of x, as in SQL
    residues["rating"] = np.fmod(residues["rating"] + np.fmod(rest, q), q)
    row = np.fmod(sum(residues[name] * weight for name, weight in CHECK_WEIGHTS.items()), q)
    cubes = {name: np.fmod(np.fmod(x * x, q) * x, q) for name, x in (residues | {"row": row}).items()}
    sums = {f"{name}_sum": int(np.fmod(number, p).sum()) for name, number in numbers.items()}
    return {"rows": len(row)} | sums | {f"{name}_cubes": int(x.sum()) for name, x in cubes.items()}


def _stage(warehouse: Warehouse) -> None:
    """For a rehearsal: the tables that a reader would bring, `shop.ratings` with a TIMESTAMP and `shop.items`."""
    from recsys_common.datasets import simulated

    tables = simulated.load(REHEARSAL_ROWS)
    shop = Warehouse(warehouse.server, warehouse.project, "", "shop", "US")
    upload(shop, "ratings", [tables.ratings])
    upload(shop, "items", [tables.items])
    shop.query(
        "CREATE OR REPLACE TABLE ratings AS SELECT * REPLACE (TIMESTAMP_SECONDS(timestamp) AS timestamp) FROM ratings"
    )
