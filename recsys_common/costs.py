"""What will a full run do, and what will it cost? Said before anything is paid for.

    python -m recsys_common.costs --chapter 2 --rows 1e9                (make plan SCALE=full CHAPTER=2)
    python -m recsys_common.costs --chapter 2 --table p.shop.ratings    rows and a dry run from BigQuery
    python -m recsys_common.costs --chapter 5 --price-tpu-v5e 1.5       training; your own price (or --prices FILE)

Bytes are columns times rows. With `--table`, BigQuery is asked for its rows and a dry run; both are free. A price in
`prices.json` has its source and day, or is unread: then amounts are printed. Hours and bytes in files come from
`benchmarks/data_export.json`, milliseconds of steps from `embeddings.json`; `make bench` writes both in a checkout.

Needs: prices.py prices.json scale.py sql/ training_costs.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from recsys_common import scale, training_costs
from recsys_common.prices import KINDS, PRICES, WAREHOUSE, bill, figure, given, load_prices, price_list

SQL_FOLDER = Path(__file__).parent / "sql"
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "data_export.json"
FULL_ROWS = 50e9
# Chapter 4: optimizer -> numbers of its state for a row of `dim`, and its step in benchmarks/embeddings.json.
STATE = {
    "lazy adam": (lambda dim: 2 * dim, "lazy adam, dimension 8 100M"),
    "lazy adam, row second moment": (lambda dim: dim + 1, "lazy adam, row second moment 100M"),
    "row-wise adagrad": (lambda dim: 1, "row-wise adagrad 100M"),
}
MEASURED_BATCH = 8192  # rows of a step in embeddings.json
KEPT = 3  # checkpoints that `training.keep` keeps
# BigQuery counts 8 bytes for INT64, FLOAT64 and TIMESTAMP, and 2 + length for STRING: 7 for 'train'.
NUMBER, SPLIT = 8, 7

# Chapter 1: (step, bytes for each row, bytes for each id, the price that they have). Upper bounds: what a clustered
# table lets BigQuery leave out is counted all the same.
ROAD = (
    ("check_ratings.sql", 4 * NUMBER, 0, "query"),
    ("the most popular titles, and the counts of all items", 3 * NUMBER, 0, "query"),
    ("temporal_split.sql: the clock, then every column", 5 * NUMBER, 0, "query"),
    ("how many rows and users each part has, twice", NUMBER + 2 * SPLIT, 0, "query"),
    ("vocabularies.sql: ids and split, twice; the counts", 2 * (NUMBER + SPLIT), 6 * NUMBER, "query"),
    ("examples.sql: every column, and both vocabularies", 4 * NUMBER + SPLIT, 3 * NUMBER, "query"),
    ("rows in each shard", NUMBER + SPLIT, 0, "query"),
    ("the shards, two columns and the filter's two", 3 * NUMBER + SPLIT, 0, "storage_read"),
    ("evaluation_pairs.sql", 3 * NUMBER + 2 * SPLIT, 0, "query"),
    ("liked.sql, titles.sql: one person", 4 * NUMBER + SPLIT, NUMBER, "query"),
    ("two shards as CSV, for the third pain", 3 * NUMBER + SPLIT, 0, "query"),
    ("both splits and the vocabularies, as tables", 2 * (4 * NUMBER + SPLIT) + NUMBER, 4 * NUMBER, "bigquery_storage"),
    ("record batches of two int32 columns, in Cloud Storage", 8, 0, "cloud_storage"),
)

COLUMNS, SHARDED = 4 * NUMBER, 5 * NUMBER  # user_id, item_id, rating, timestamp; and shard
# Chapter 2: the statements that read the reader's own table, bytes a row. The second reads both ids twice.
STATEMENTS = {"check_ratings.sql": COLUMNS, "export_rows.sql": COLUMNS + 2 * NUMBER}
ROWS_PER_FILE = 4_000_000  # and a shard, as in conversion.py
SAMPLED = 8 * ROWS_PER_FILE  # rows in route_rows: SAMPLE_FILES of chapter 2
OTHER = (  # whichever route, as in ROAD; an array is billed as its elements
    ("temporal_split.sql: the clock, then every column", 5 * NUMBER, 0, "query"),
    ("vocabularies.sql: ids and split, twice; the counts", 2 * (NUMBER + SPLIT), 6 * NUMBER, "query"),
    ("hashed_ids.sql: both ids, then every column", 6 * NUMBER + SPLIT, 0, "query"),
    ("histories.sql: every column, and both vocabularies", 4 * NUMBER + SPLIT, 3 * NUMBER, "query"),
    ("item_frequencies.sql, and looks at the vocabularies", 0, 5 * NUMBER, "query"),
    ("how many ratings each split and each shard has", 3 * NUMBER + SPLIT, 0, "query"),
    ("split_ratings, hashed_examples", 2 * (4 * NUMBER + SPLIT), 0, "bigquery_storage"),
    ("histories, with 20 items a history", (5 + 20) * NUMBER + SPLIT, 0, "bigquery_storage"),
    ("user_vocabulary and item_vocabulary", 0, 4 * NUMBER, "bigquery_storage"),
)
# The case that is nearer to a full run, where it was measured: what training reads, and 50 million rows.
BETTER = {"record batches": "record batches, shuffled", "export storage read": "storage read, 50M rows"}
BETTER["write record batches"] = "write record batches, 50M rows"
# Route -> the price at which rows leave BigQuery; the files that stay, as `bytes/row ...` of the benchmark names them,
# EXPORT DATA's first; the case in which machines of ours make files, for paid hours; the case that reads an epoch.
ROUTES = {
    "csv.gz": ("query", ["csv.gz"], "", "csv.gz"),
    "csv": ("query", ["csv"], "", "csv"),
    "tfrecord row": ("storage_read", ["tfrecord row"], "export tfrecord row", "tfrecord row"),
    "parquet": ("query", ["parquet", "record batches"], "write record batches", "record batches"),
    "storage read": ("storage_read", ["record batches"], "export storage read", "record batches"),
    "table stream": ("storage_read", [], "", "table stream"),
    "packed": ("query", ["packed"], "", "packed"),
}


def size(value: float | None) -> str:
    """Bytes at a glance: "1.46 TiB"; "?" for None, "-" for 0."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value and value >= 2**power:
            return f"{figure(value / 2**power)} {unit}"
    return f"{value:.0f} B" if value else figure(value)


def hours(rows: float, cases: set[str], measured: dict[str, float]) -> float | None:
    """Hours for `rows` in all these cases, or `BETTER` ones, one after another; None where one was not measured."""
    speeds = [measured.get(BETTER.get(case), measured.get(case)) for case in cases]
    return None if None in speeds else sum(rows / speed for speed in speeds) / 3.6e9


def road_plan(rows: float, ids: float, prices: dict[str, dict]) -> str:
    """Chapter 1 at `rows` ratings and `ids` users and items together: a line a step, and the bill of each kind."""
    lines = [f"{rows:,.0f} ratings, {ids:,.0f} ids", "", f"{'step':58}{'schema x rows':>14}  billed as"]
    total = dict.fromkeys(dict.fromkeys(kind for *_, kind in ROAD), 0.0)
    for what, a_row, an_id, kind in ROAD:
        total[kind] += (amount := rows * a_row + ids * an_id)
        lines.append(f"{what:58}{size(amount):>14}  {KINDS[kind]}")
    lines += ["", f"{'in all':9}{bill(total, prices)}"]
    lines += [f"{KINDS[kind]:9}{bill({kind: amount}, prices)}" for kind, amount in total.items()]
    last = "Tables and files are billed until they are deleted, here for a month. Chapter 5 prices training."
    return "\n".join([*lines, *price_list({kind: prices[kind] for kind in total}), last])


TRAINED = {
    4: "The chapter trains twice: once undisturbed, and once killed and resumed.",
    6: "The chapter trains three times: a run, the same run elsewhere, and one that differs in a line.",
}


def tables_plan(rows: float, ids: float, dim: int, path: Path | None = None) -> str:
    """Chapters 4 and 6: memory and disk of tables of `ids` rows, and hours for `rows` examples where measured."""
    path, steps = path or BENCHMARK.with_name("embeddings.json"), {}
    if path.is_file():
        steps = {row["case"]: row["value"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    lines = [f"TABLES OF {ids:,.0f} ROWS OF {dim} float32", ""]
    lines.append(f"{'optimizer':30}{'table':>11}{'state':>11}{'in all':>11}{'checkpoints':>13}{'hours an epoch':>16}")
    for name, (state, case) in STATE.items():
        table, more = 4 * ids * dim, 4 * ids * state(dim)
        epoch = rows / MEASURED_BATCH * steps[case] / 3.6e6 if case in steps else None
        sizes = f"{size(table):>11}{size(more):>11}{size(table + more):>11}{size((KEPT + 1) * (table + more)):>13}"
        lines.append(f"{name:30}{sizes}{figure(epoch):>16}")
    lines += ["", f"Checkpoints: {KEPT} are kept, while one more is written. Hours: {rows:,.0f} examples in batches of"]
    lines.append(f"{MEASURED_BATCH:,} on the 2 cores of the benchmark, a table of 100 M rows of 16 (lazy adam: of 8).")
    return "\n".join(lines)


def load_benchmark(path: str | Path = BENCHMARK) -> dict | None:
    """`benchmarks/data_export.json`, rows as {case: value}; None: no file. ValueError: other units or not above 0."""
    if not Path(path).is_file():
        return None
    content, used = json.loads(Path(path).read_text(encoding="utf-8")), {}
    for name, (_, files, worker, epoch) in ROUTES.items():
        used |= {f"bytes/row {file}": "bytes" for file in files}
        used |= dict.fromkeys([f"export {name}", worker, epoch, *BETTER.values()], "M rows/s")
    for row in content["rows"]:
        if (unit := used.get(row["case"], "")) and not (row["unit"] == unit and row["value"] > 0):
            raise ValueError(f"{path}, {row['case']!r}: {row['value']} {row['unit']}, expected {unit} above 0")
    return content | {"rows": {row["case"]: row["value"] for row in content["rows"]}}


def amounts(name: str, rows: float, own: float, measured: dict[str, float]) -> dict[str, float | None]:
    """What a route uses, for `bill`; `own` is the bytes that `STATEMENTS` scan, `measured` the benchmark's rows."""
    billed, files, worker, _ = ROUTES[name]
    written = [rows * width if (width := measured.get(f"bytes/row {file}")) else None for file in files]
    return {
        # Every route checks the reader's table and makes export_rows; an export counts its rows by shard.
        "query": own + rows * (NUMBER * bool(files) + SHARDED * (billed == "query")),
        "storage_read": rows * (SHARDED if files else COLUMNS) * (billed == "storage_read"),
        "export": written[0] if billed == "query" else 0,
        "bigquery_storage": rows * SHARDED,
        "cloud_storage": None if None in written else sum(written),
        "worker": hours(rows, {worker}, measured) if worker else 0,
    }


def routes_plan(rows: float, prices: dict, benchmark: dict | None, dry_run: dict | None = None, ids=100e6) -> str:
    """Chapter 2: what is scanned and how that is known, then every route at `rows` and at 50 billion rows.

    `dry_run` is the bytes of `STATEMENTS` over the reader's table, None where there was none; `ids`: as `road_plan`.
    """
    sizes = {n: {file: n * a_row for file, a_row in STATEMENTS.items()} for n in (rows, FULL_ROWS)}
    sizes[rows] = dry_run or sizes[rows]
    lines = ["", f"{'bytes':58}{'a row':>6}" + "".join(f"{f'{n:,.0f} rows':>26}" for n in sizes)]
    for what, a_row in (
        *((f"{file}: your table", a_row) for file, a_row in STATEMENTS.items()),
        ("export_rows, stored", SHARDED),
        ("export_rows: rows in each shard, for files", NUMBER),
        ("export_rows: EXPORT DATA, or packing in SQL", SHARDED),
        ("export_rows: Storage Read into files", SHARDED),
        ("export_rows: Storage Read, a table stream", COLUMNS),
    ):
        cells = [f"{size(n * a_row)}, schema x rows" for n in sizes]
        if what.endswith("your table") and dry_run:
            cells[0] = f"{size(dry_run[what.split(':')[0]])}, dry run"
        lines.append(f"{what:58}{a_row:6}" + "".join(f"{cell:>26}" for cell in cells))
    lines.append("Schema x rows: 8 bytes a value. export_rows does not exist yet, so no dry run can know it. A shard")
    lines.append("is taken to be scanned alone, which is a lower bound: it may be smaller than a storage block.")
    lines += ["", "The chapter's other SQL, whichever route:".ljust(58) + f"{'a row':>6}{'an id':>7}  billed as"]
    lines += [f"{what:58}{a_row:6}{an_id:7}  {KINDS[kind]}" for what, a_row, an_id, kind in OTHER]
    lines.append(f"route_rows.sql, in the bills: at most {SAMPLED:,} rows of {SHARDED} bytes, exported 4 times, kept")
    for n in sizes:
        few, some = min(n, SAMPLED) * SHARDED, min(ids, 2 * n)
        total = {"query": 5 * few, "bigquery_storage": few}
        for _, a_row, an_id, kind in OTHER:
            total[kind] += n * a_row + some * an_id
        lines.append(f"in all, {n:,.0f} rows and {some:,.0f} ids: {bill(total, prices)}")
    measured = benchmark["rows"] if benchmark else {}
    heads = ("scanned", "read", "in tables", "in files", "files", "hours to make", "hours an epoch")
    widths = (11, 11, 12, 12, 9, 15, 16)
    for n, own in sizes.items():
        lines += ["", f"AT {n:,.0f} ROWS", f"{'route':14}" + "".join(map(str.rjust, heads, widths))]
        used = {name: amounts(name, n, sum(own.values()), measured) for name in ROUTES}
        for name, (_, files, worker, epoch) in ROUTES.items():
            cells = [size(used[name][k]) for k in ("query", "storage_read", "bigquery_storage", "cloud_storage")]
            cells += [f"{math.ceil(n / ROWS_PER_FILE) * len(files):,}" if files else "-"]
            making = {f"export {name}", worker} - {""} if files else set()  # Parquet is exported, then converted
            cells += [figure(hours(n, cases, measured)) for cases in (making, {epoch})]
            lines.append(f"{name:14}" + "".join(map(str.rjust, cells, widths)))
        lines += ["", f"{'route':14}costs to make, read for one epoch from BigQuery, and keep for a month"]
        lines += [f"{name:14}{bill(used[name], prices)}" for name in ROUTES]
    lines += ["", "scanned, read, in tables: as on top. A table stream has no files, and reads in every epoch."]
    known = "not known (?). `make bench`, in a checkout, measures them on that machine."
    if benchmark:
        cpu, cores, memory = (benchmark["machine"][name] for name in ("cpu", "cores", "memory_gb"))
        known = f"benchmarks/data_export.json, {benchmark['date'][:10]}, with the embedded BigQuery, on one machine\n"
        known += f"of {cores} cores ({cpu}) and {memory} GB. ?: not measured there. Record batches: shuffled when\n"
        known += "they are read, 50 million rows when they are made, where that was measured."
    lines += [f"in files, hours: {known}", *price_list({kind: prices[kind] for kind in WAREHOUSE})]
    return "\n".join(lines)


def look_up(client, table: str) -> tuple[int | None, dict[str, int] | None]:
    """The table's rows, None for a view; a dry run's bytes of `STATEMENTS`, or None. ValueError: BigQuery refuses."""
    from google.api_core.exceptions import GoogleAPICallError
    from google.cloud import bigquery

    config = bigquery.QueryJobConfig(query_parameters=[bigquery.ScalarQueryParameter("shards", "INT64", 1)])
    # A dry run bills nothing, and is there to say how far a query is above any limit.
    config.dry_run, config.use_query_cache, config.maximum_bytes_billed = True, False, 2**62
    ratings, found = f"WITH ratings AS (SELECT user_id, item_id, rating, timestamp FROM `{table}`)", {}
    try:
        for file in STATEMENTS:
            select = (SQL_FOLDER / file).read_text().split(" AS\n", 1)[-1].rstrip().removesuffix(";")
            sql = f"{ratings} SELECT * FROM (\n{select}\n)"
            found[file] = client.query(sql, job_config=config).total_bytes_processed
        return client.get_table(table).num_rows or None, found if all(found.values()) else None
    except GoogleAPICallError as error:
        raise ValueError(f"{table}: {error.message}") from error


def main() -> int:
    """Print the plan; 2 when the arguments do not fit."""
    prices = load_prices()
    parser = argparse.ArgumentParser(description="Say what a full run scans, reads and stores; nothing is paid for.")
    parser.add_argument("--chapter", type=int, default=1, help="chapter number (default: 1)")
    parser.add_argument("--rows", type=float, help="ratings (default: the table's, or 50e9)")
    parser.add_argument("--ids", type=float, default=100e6, help="users and items together (default: 100e6)")
    parser.add_argument("--dim", type=int, default=64, help="numbers of a row, in chapters 4 and 6 (default: 64)")
    parser.add_argument("--project", default="", help="Google Cloud project, to ask about the table")
    parser.add_argument("--table", default="", help="project.dataset.table, to ask for its rows and a dry run")
    parser.add_argument("--prices", default=PRICES, help="a file of yours, as prices.json")
    parser.add_argument(
        "--utilisation", type=float, default=training_costs.UTILISATION, help="of a bound, in chapter 5"
    )
    parser.add_argument("--input-rows", type=float, help="rows/s that one host's input gives, in chapter 5")
    for kind, price in prices.items():
        parser.add_argument(f"--price-{kind.replace('_', '-')}", type=float, help=f"of one {price['unit']}")
    arguments = parser.parse_args()
    rows, dry_run, table = arguments.rows, None, arguments.table
    head = f"chapter {arguments.chapter}, SCALE=full{', ' + table if table else ''}"
    try:
        if arguments.chapter not in (1, 2, 3, 4, 5, 6):
            raise ValueError(f"chapter {arguments.chapter} has no full run yet; chapters 1 to 6 have")
        prices = given(load_prices(arguments.prices), **{kind: getattr(arguments, f"price_{kind}") for kind in prices})
        if table and not scale.TABLE.fullmatch(table):
            raise ValueError(f"{table!r} is not a BigQuery table's name, project.dataset.table")
        if table and not scale.credentials():
            raise ValueError("no Google credentials to ask for the table's size: log in, or give --rows")
        if table:
            from google.cloud import bigquery  # two seconds, and not needed for a plan from --rows

            counted, dry_run = look_up(bigquery.Client(arguments.project or None), table)
            if not (rows := rows or counted):
                raise ValueError(f"{table} is a view, which has no size of its own, or empty: give --rows")
        if arguments.chapter == 5:
            plan = training_costs.plan(prices, rows or FULL_ROWS, arguments.utilisation, arguments.input_rows)
            print(f"{head}\n{plan}")
            return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(head)
    if arguments.chapter == 3:
        print(
            "Of chapter 2's plan, which follows: export_rows, the route 'storage read', two shards read once more from"
        )
        print("BigQuery, and the files read for about two epochs. None of the other SQL, and none of the other routes.")
    rows, ids, one = rows or FULL_ROWS, arguments.ids, arguments.chapter in (1, 4, 6)
    if arguments.chapter in TRAINED:
        print(f"{tables_plan(rows, ids, arguments.dim)}\n{TRAINED[arguments.chapter]}\n")
        print("Chapter 1's plan, without titles, liked items and CSV:")
    print(road_plan(rows, ids, prices) if one else routes_plan(rows, prices, load_benchmark(BENCHMARK), dry_run, ids))
    return 0


if __name__ == "__main__":
    sys.exit(main())
