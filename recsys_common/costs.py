"""What will a full run do, and what will it cost? Said before anything is paid for.

    python -m recsys_common.costs --chapter 2 --rows 1e9                       (make plan SCALE=full CHAPTER=2)
    python -m recsys_common.costs --chapter 2 --table p.shop.ratings           rows and a dry run from BigQuery

Bytes come from the columns that each step reads and the number of rows. With `--table`, BigQuery is asked for the
table's rows and for a dry run; both are free. Prices stand in `prices.json`, each with its source and the day on which
it was read, or marked unread; what is unread is printed as an amount in place of money. Hours and bytes in files come
from `benchmarks/data_export.json`, which `make bench` writes.

Needs: scale.py prices.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from recsys_common import scale

PRICES = Path(__file__).parent / "prices.json"
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "data_export.json"
FULL_ROWS = 50e9
# What a unit in prices.json begins with -> how many bytes or hours that is.
UNITS = {"TiB": 2**40, "GiB": 2**30, "hour": 1}
# The prices, and what their amounts are called in a line of the plan.
KINDS = {
    "query": "query",
    "storage_read": "read",
    "export": "export",
    "bigquery_storage": "table",
    "cloud_storage": "files",
    "worker": "worker",
}
# BigQuery counts 8 bytes for INT64, FLOAT64 and TIMESTAMP, and 2 + length for STRING: 7 for 'train'.
NUMBER, SPLIT = 8, 7


@dataclass(frozen=True)
class Price:
    """An entry of prices.json; `price`, `currency` and `read` (a date, YYYY-MM-DD) are None while it is unread."""

    unit: str
    price: float | None
    currency: str | None
    source: str
    read: str | None

    def __post_init__(self):
        found = (self.price, self.currency, self.read)
        if str(self.unit).split(" ")[0] not in UNITS:
            raise ValueError(f"unit {self.unit!r}, expected one that begins with {', '.join(UNITS)}")
        if not str(self.source).startswith("https://"):
            raise ValueError(f"source {self.source!r}, expected the https:// address of the official page")
        if found.count(None) not in (0, 3):
            raise ValueError(
                f"price {self.price!r}, currency {self.currency!r}, read {self.read!r}; expected all three, or null "
                "for all three while the price is unread"
            )
        if self.price is not None:
            if type(self.price) not in (int, float) or not 0 <= self.price < math.inf:
                raise ValueError(f"price {self.price!r}, expected a number from 0 up")
            if datetime.date.fromisoformat(self.read) > datetime.date.today():
                raise ValueError(f"read {self.read}, which is in the future; expected the day on which it was read")

    @property
    def size(self) -> int:
        """Bytes, or hours, in one unit."""
        return UNITS[self.unit.split(" ")[0]]


def load_prices(path: str | Path = PRICES) -> dict[str, Price]:
    """The prices by their names in `KINDS`.

    Raises:
      ValueError: not JSON, a name too many or too few, a field missing or impossible, a price without source or date,
        two currencies. The message says which price and what was expected.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict) or set(content) != set(KINDS):
        raise ValueError(f"{path}: prices {sorted(content)}, expected {sorted(KINDS)}")
    names, prices = [field.name for field in fields(Price)], {}
    for kind, entry in content.items():
        if not isinstance(entry, dict) or set(entry) != set(names):
            raise ValueError(f"{path}, {kind!r}: {entry}, expected the fields {', '.join(names)}")
        try:
            prices[kind] = Price(**entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, {kind!r}: {error}") from error
    if len(currencies := {price.currency for price in prices.values()} - {None}) > 1:
        raise ValueError(f"{path}: prices in {' and '.join(sorted(currencies))}, which cannot be added; expected one")
    return prices


def bill(amounts: dict[str, float | None], prices: dict[str, Price]) -> str:
    """What amounts cost: "3.20 USD", and "unread: 4.77 TiB query + ..." for those without a price.

    Args:
      amounts: kind -> bytes (hours for "worker"); None where the amount itself is not known, 0 where there is none.
      prices: as `load_prices` gives them.
    """
    money, unread = 0.0, []
    for kind, amount in amounts.items():
        price = prices[kind]
        if amount is None or (amount and price.price is None):
            unit = price.unit.split(" ")[0]
            unread.append(f"{'?' if amount is None else figure(amount / price.size)} {unit} {KINDS[kind]}")
        else:
            money += amount / price.size * (price.price or 0)
    currency = next((p.currency for p in prices.values() if p.currency), "in your currency")
    known = [f"{money:,.2f} {currency}"] if money or not unread else []
    return " + ".join(known + ["unread: " + " + ".join(unread)] * bool(unread))


def price_list(prices: dict[str, Price]) -> list[str]:
    """A line for each price: what it is of, what it is, and where it was or is to be read."""
    lines = ["", f"{'price':9}{'of one':39}{'is':24}source"]
    for kind, price in prices.items():
        said = "unread" if price.price is None else f"{price.price:g} {price.currency or 'as given'}, {price.read or ''}"
        lines.append(f"{KINDS[kind]:9}{price.unit:39}{said.rstrip(', '):24}{price.source.removeprefix('https://')}")
    return [
        *lines,
        "Prices differ by region. Read them, then write price, currency and day into prices.json, or pass",
        f"{', '.join(f'--price-{kind.replace("_", "-")} X' for kind in list(KINDS)[:2])} and so on (see --help).",
    ]


def figure(value: float | None) -> str:
    """A number at a glance: 1,863 or 17.8 or 0.07 or 0.00031; "?" for None, "-" for 0."""
    if not value:
        return "?" if value is None else "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def size(value: float | None) -> str:
    """Bytes at a glance: "1.46 TiB"; "?" for None, "-" for 0."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value and value >= 2**power:
            return f"{figure(value / 2**power)} {unit}"
    return f"{value:.0f} B" if value else figure(value)


@dataclass(frozen=True)
class Step:
    """A line of the plan: what is done, bytes for each row and for each id, and the price that those bytes have."""

    what: str
    a_row: float
    an_id: float
    billed: str  # a name of KINDS


# Chapter 1, step by step. Upper bounds: what a clustered table lets BigQuery leave out is counted all the same.
ROAD = (
    Step("check_ratings.sql", 4 * NUMBER, 0, "query"),
    Step("the most popular titles, and the counts of all items", 3 * NUMBER, 0, "query"),
    Step("temporal_split.sql: the clock, then every column", 5 * NUMBER, 0, "query"),
    Step("how many rows and users each part has, twice", NUMBER + 2 * SPLIT, 0, "query"),
    Step("vocabularies.sql: ids and split, twice", 2 * (NUMBER + SPLIT), 0, "query"),
    Step("examples.sql: every column, and both vocabularies", 4 * NUMBER + SPLIT, 3 * NUMBER, "query"),
    Step("rows in each shard", NUMBER + SPLIT, 0, "query"),
    Step("the shards, two columns and the filter's two", 3 * NUMBER + SPLIT, 0, "storage_read"),
    Step("evaluation_pairs.sql", 3 * NUMBER + 2 * SPLIT, 0, "query"),
    Step("liked.sql, titles.sql: one person", 4 * NUMBER + SPLIT, NUMBER, "query"),
    Step("two shards as CSV, for the third pain", 3 * NUMBER + SPLIT, 0, "query"),
    Step(
        "split_ratings, examples, vocabularies: tables",
        2 * (4 * NUMBER + SPLIT) + NUMBER,
        4 * NUMBER,
        "bigquery_storage",
    ),
    Step("record batches of two int32 columns, in Cloud Storage", 8, 0, "cloud_storage"),
)


def road_plan(rows: float, ids: float, prices: dict[str, Price]) -> str:
    """Chapter 1: a line a step, and the bill of each kind; `rows` ratings, `ids` users and items together."""
    lines = [f"{rows:,.0f} ratings, {ids:,.0f} ids", "", f"{'step':58}{'schema x rows':>14}  billed as"]
    total = dict.fromkeys(prices, 0.0)
    for step in ROAD:
        amount = rows * step.a_row + ids * step.an_id
        total[step.billed] += amount
        lines.append(f"{step.what:58}{size(amount):>14}  {KINDS[step.billed]}")
    billed = {kind: amount for kind, amount in total.items() if amount}
    lines += ["", f"{'in all':8}{bill(billed, prices)}"]
    lines += [f"{KINDS[kind]:8}{bill({kind: amount}, prices)}" for kind, amount in billed.items()]
    lines += price_list({kind: prices[kind] for kind in billed})
    return "\n".join(
        [*lines, "Tables and files are billed until they are deleted. Training is not in this plan: chapter 5 prices it."]
    )


@dataclass(frozen=True)
class Route:
    """A way from the table with shards to tensors: what BigQuery does, which files stay, who works.

    Attributes:
      scanned: by queries (EXPORT DATA), bytes a row.
      read: through the Storage Read API, bytes a row.
      files: the benchmark's cases `bytes/row ...` of the files that stay; the first is what EXPORT DATA wrote, if any.
      worker: whether machines of ours make the files, so that making takes paid hours.
    """

    scanned: int = 0
    read: int = 0
    files: tuple[str, ...] = ()
    worker: bool = False


OWN = 4 * NUMBER  # user_id, item_id, rating, timestamp
SHARDED = 5 * NUMBER  # and shard
ROWS_PER_FILE = 10_000_000  # 200 MB of record batches, and far below the 1 GB that EXPORT DATA puts into one file
ROUTES = {
    "csv.gz": Route(scanned=SHARDED, files=("csv.gz",)),
    "csv": Route(scanned=SHARDED, files=("csv",)),
    "tfrecord row": Route(read=SHARDED, files=("tfrecord row",), worker=True),
    # Parquet is converted to the record batches that the Storage Read route writes; both stay.
    "parquet": Route(scanned=SHARDED, files=("parquet", "storage read"), worker=True),
    "storage read": Route(read=SHARDED, files=("storage read",), worker=True),
    "table stream": Route(read=SHARDED),
    "packed": Route(scanned=SHARDED, files=("packed",)),
}


def load_benchmark(path: str | Path = BENCHMARK) -> dict | None:
    """`benchmarks/data_export.json` with its rows as {case: value}; None where it is not there.

    Raises:
      ValueError: a speed in another unit than million rows a second, or that is not positive.
    """
    if not Path(path).is_file():
        return None
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    for row in content["rows"]:
        speed = row["case"].removeprefix("export ") in ROUTES
        if (speed and row["unit"] != "M rows/s") or not row["value"] > 0:
            raise ValueError(f"{path}, {row['case']!r}: {row['value']} {row['unit']}, expected M rows/s above 0")
    return content | {"rows": {row["case"]: row["value"] for row in content["rows"]}}


def route_amounts(name: str, rows: float, own: float, measured: dict[str, float]) -> dict[str, float | None]:
    """What one route uses: kind -> bytes, hours for "worker"; None where it was not measured.

    Args:
      name: a route of `ROUTES`.
      rows: rows of the table.
      own: bytes that BigQuery scans to read the four columns of the reader's own table once.
      measured: the benchmark's case -> value.
    """
    route = ROUTES[name]
    a_row = [measured.get(f"bytes/row {case}") for case in route.files]
    written = [rows * width if width else None for width in a_row]
    # Every route first checks the reader's table, then makes the table with shards from it.
    amounts = {"query": 2 * own + rows * route.scanned, "storage_read": rows * route.read}
    amounts["export"] = written[0] if route.scanned else 0
    amounts["bigquery_storage"] = rows * SHARDED
    amounts["cloud_storage"] = None if None in written else sum(written)
    amounts["worker"] = hours(rows, measured.get(f"export {name}")) if route.worker else 0
    return amounts


def hours(rows: float, speed: float | None) -> float | None:
    """Hours for `rows` at `speed` million rows a second; None at an unknown speed."""
    return rows / (speed * 1e6) / 3600 if speed else None


def routes_table(rows: float, own: float, prices: dict[str, Price], measured: dict[str, float]) -> list[str]:
    """The routes of chapter 2 at `rows` rows: a table of amounts and one of costs."""
    shards = math.ceil(rows / ROWS_PER_FILE)
    heads = ("scanned", "read", "in tables", "in files", "files", "hours to make", "hours an epoch")
    widths = (11, 11, 11, 11, 8, 15, 16)
    lines = ["", f"AT {rows:,.0f} ROWS", f"{'route':15}" + "".join(map(str.rjust, heads, widths))]
    costs = [f"{'route':15}cost of making, of one epoch's reads from BigQuery, and of storage for a month"]
    for name, route in ROUTES.items():
        used = route_amounts(name, rows, own, measured)
        cells = [size(used[kind]) for kind in ("query", "storage_read", "bigquery_storage", "cloud_storage")]
        making = hours(rows, measured.get(f"export {name}")) if route.files else 0
        cells += [f"{shards * len(route.files):,}" if route.files else "-"]
        cells += [figure(making), figure(hours(rows, measured.get(name)))]
        lines.append(f"{name:15}" + "".join(map(str.rjust, cells, widths)))
        costs.append(f"{name:15}{bill(used, prices)}")
    return [*lines, "", *costs]


def routes_plan(rows: float, prices: dict[str, Price], benchmark: dict | None, dry_run: int | None = None) -> str:
    """Chapter 2: what is scanned and why that is believed, then every route at `rows` and at 50 billion rows.

    Args:
      rows: rows of the reader's table.
      prices: as `load_prices` gives them.
      benchmark: as `load_benchmark` gives it.
      dry_run: bytes of a dry run over the four columns of the reader's table; None where there was none.
    """
    sizes = list(dict.fromkeys([rows, FULL_ROWS]))
    known = {rows: dry_run} if dry_run else {}
    lines = ["", f"{'bytes':58}{'a row':>6}" + "".join(f"{f'{n:,.0f} rows':>27}" for n in sizes)]
    for what, a_row, own in (
        ("your table, four columns: check_ratings.sql", OWN, True),
        ("your table, four columns: making the table with shards", OWN, True),
        ("the table with shards, stored", SHARDED, False),
        ("the table with shards: EXPORT DATA, or packing in SQL", SHARDED, False),
        ("the table with shards: a Storage Read session", SHARDED, False),
    ):
        cells = [
            f"{size(known[n])}, dry run" if own and n in known else f"{size(n * a_row)}, schema x rows" for n in sizes
        ]
        lines.append(f"{what:58}{a_row:6}" + "".join(f"{cell:>27}" for cell in cells))
    lines.append("Schema x rows: 8 bytes a value. No dry run knows the table with shards, which does not exist yet.")
    measured = benchmark["rows"] if benchmark else {}
    for n in sizes:
        lines += routes_table(n, known.get(n, n * OWN), prices, measured)
    lines += ["", "scanned, read, in tables: sums of the lines on top. All files at once; a table stream has none."]
    if benchmark is None:
        lines += ["?: hours and bytes in files are not known here: make bench, in a checkout, measures them."]
    else:
        machine = benchmark["machine"]
        lines += [
            f"in files, hours: measured {benchmark['date'][:10]} at commit {benchmark['commit']} with the embedded BigQuery",
            f"on one machine: {machine['cores']} cores, {machine['cpu']}, {machine['memory_gb']} GB. ?: not measured.",
        ]
    return "\n".join([*lines, *price_list(prices)])


def look_up(client, table: str) -> tuple[int | None, int | None]:
    """The table's rows, None for a view, and a dry run's bytes for its four columns, None where BigQuery says 0."""
    from google.cloud import bigquery

    # A dry run bills nothing, and is there to say how far a query is above any limit.
    config = bigquery.QueryJobConfig(dry_run=True, use_query_cache=False, maximum_bytes_billed=2**62)
    job = client.query(f"SELECT user_id, item_id, rating, timestamp FROM `{table}`", job_config=config)
    return client.get_table(table).num_rows or None, job.total_bytes_processed or None


def main() -> int:
    """Print the plan; 2 when the arguments do not fit."""
    parser = argparse.ArgumentParser(description="Say what a full run scans, reads and stores; nothing is paid for.")
    parser.add_argument("--chapter", type=int, default=1, help="chapter number (default: 1)")
    parser.add_argument("--rows", type=float, help="ratings (default: the table's, or 50e9)")
    parser.add_argument("--ids", type=float, default=100e6, help="users and items, for chapter 1 (default: 100e6)")
    parser.add_argument("--project", default="", help="Google Cloud project, to look the table's size up")
    parser.add_argument("--table", default="", help="project.dataset.table, for its rows and a dry run")
    prices = load_prices()
    for kind, price in prices.items():
        flag = f"--price-{kind.replace('_', '-')}"
        parser.add_argument(flag, type=float, help=f"of one {price.unit}, instead of the one in prices.json")
    arguments = parser.parse_args()
    if arguments.chapter not in (1, 2):
        print(f"chapter {arguments.chapter} has no full run yet; chapters 1 and 2 have", file=sys.stderr)
        return 2
    rows, dry_run = None, None
    if arguments.table:
        if not scale.TABLE.match(arguments.table):
            print(f"{arguments.table!r} is not a BigQuery table, project.dataset.table", file=sys.stderr)
            return 2
        if not scale.credentials():
            print("no Google credentials to ask for the table's size: log in, or give --rows", file=sys.stderr)
            return 2
        from google.cloud import bigquery

        rows, dry_run = look_up(bigquery.Client(arguments.project or None), arguments.table)
        if not (rows := arguments.rows or rows):
            print(f"{arguments.table} is a view or has no rows: give --rows", file=sys.stderr)
            return 2
    rows = rows or arguments.rows or FULL_ROWS
    for kind, price in prices.items():
        if (given := getattr(arguments, f"price_{kind}")) is not None:
            prices[kind] = replace(price, price=given, currency=price.currency or "", read=price.read or "")
    print(f"chapter {arguments.chapter}, SCALE=full{', ' + arguments.table if arguments.table else ''}")
    plan = road_plan(rows, arguments.ids, prices) if arguments.chapter == 1 else routes_plan(
        rows, prices, load_benchmark(), dry_run
    )
    print(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
