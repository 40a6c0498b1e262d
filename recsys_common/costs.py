"""What will a full run do, and what will it cost? Said before anything is paid for.

    python -m recsys_common.costs --rows 50e9 --ids 100e6                      (make plan)
    python -m recsys_common.costs --project p --table p.shop.ratings           rows as BigQuery counts them

Bytes are computed from the columns that each step reads and the number of rows; nothing is sent to the cloud but,
with `--table`, one free request for the table's metadata. Prices change and differ by region: none is built in. Read
today's at cloud.google.com/bigquery/pricing and cloud.google.com/storage/pricing, pass them, and money is printed too.

Needs: scale.py
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from recsys_common import scale

TIB, GIB = 2**40, 2**30
# BigQuery counts 8 bytes for INT64, FLOAT64 and TIMESTAMP, and 2 + length for STRING: 7 for 'train'.
NUMBER, SPLIT = 8, 7


@dataclass(frozen=True)
class Step:
    """A line of the plan: what is done, bytes for each row and for each id, and what those bytes are billed as."""

    what: str
    a_row: float
    an_id: float
    billed: str  # "query", "read" or "stored"


# Chapter 1, step by step. Upper bounds: what a clustered table lets BigQuery leave out is counted all the same.
ROAD = (
    Step("check_ratings.sql", 4 * NUMBER, 0, "query"),
    Step("the most popular titles, and the counts of all items", 3 * NUMBER, 0, "query"),
    Step("temporal_split.sql: the clock, then every column", 5 * NUMBER, 0, "query"),
    Step("how many rows and users each part has, twice", NUMBER + 2 * SPLIT, 0, "query"),
    Step("vocabularies.sql: ids and split, twice", 2 * (NUMBER + SPLIT), 0, "query"),
    Step("examples.sql: every column, and both vocabularies", 4 * NUMBER + SPLIT, 3 * NUMBER, "query"),
    Step("rows in each shard", NUMBER + SPLIT, 0, "query"),
    Step("the shards, two columns and the filter's two", 3 * NUMBER + SPLIT, 0, "read"),
    Step("evaluation_pairs.sql", 3 * NUMBER + 2 * SPLIT, 0, "query"),
    Step("liked.sql, titles.sql: one person", 4 * NUMBER + SPLIT, NUMBER, "query"),
    Step("two shards as CSV, for the third pain", 3 * NUMBER + SPLIT, 0, "query"),
    Step("split_ratings, examples, vocabularies: tables", 2 * (4 * NUMBER + SPLIT) + NUMBER, 4 * NUMBER, "stored"),
    Step("record batches of two int32 columns, in Cloud Storage", 8, 0, "stored"),
)


def plan(rows: float, ids: float, prices: dict[str, float | None]) -> str:
    """The plan as text: a line a step, a total for each kind of bill, and money where a price is given.

    Args:
      rows: ratings in the table.
      ids: users and items together.
      prices: "query" and "read" in currency a TiB, "stored" in currency a GiB and month; None where it is not known.
    """
    lines = [f"{rows:,.0f} ratings, {ids:,.0f} ids", "", f"{'step':58}{'TiB':>9}  billed as"]
    total = dict.fromkeys(prices, 0.0)
    for step in ROAD:
        size = rows * step.a_row + ids * step.an_id
        total[step.billed] += size
        lines.append(f"{step.what:58}{size / TIB:9.2f}  {step.billed}")
    lines.append("")
    for kind, unit, size in (("query", "TiB", TIB), ("read", "TiB", TIB), ("stored", "GiB and month", GIB)):
        amount = total[kind] / size
        price = prices[kind]
        money = (
            f"price not given (--price-{kind} X for a {unit})"
            if price is None
            else f"{amount * price:,.2f} in your currency"
        )
        lines.append(f"{kind:8}{amount:14,.2f} {unit:14} {money}")
    lines.append(
        "Tables and files are billed until they are deleted. Training is not in this plan: chapter 5 prices it."
    )
    return "\n".join(lines)


def main() -> int:
    """Print the plan; 2 when the arguments do not fit."""
    parser = argparse.ArgumentParser(description="Say what a full run scans, reads and stores; nothing is paid for.")
    parser.add_argument("--chapter", type=int, default=1, help="chapter number (default: 1)")
    parser.add_argument("--rows", type=float, default=50e9, help="ratings (default: 50e9)")
    parser.add_argument("--ids", type=float, default=100e6, help="users and items (default: 100e6)")
    parser.add_argument("--project", default="", help="Google Cloud project, to look the table's size up")
    parser.add_argument("--table", default="", help="project.dataset.table, instead of --rows")
    for kind, unit in (
        ("query", "TiB scanned"),
        ("read", "TiB through the Storage Read API"),
        ("stored", "GiB and month"),
    ):
        parser.add_argument(f"--price-{kind}", type=float, help=f"currency for a {unit}, as read today")
    arguments = parser.parse_args()
    if arguments.chapter != 1:
        print(f"chapter {arguments.chapter} has no full run yet; chapter 1 has", file=sys.stderr)
        return 2
    rows = arguments.rows
    if arguments.table:
        if not scale.credentials():
            print("no Google credentials to ask for the table's size: log in, or give --rows", file=sys.stderr)
            return 2
        from google.cloud import bigquery

        rows = bigquery.Client(arguments.project or None).get_table(arguments.table).num_rows
        if rows is None:
            print(f"{arguments.table} is a view, which has no size of its own: give --rows", file=sys.stderr)
            return 2
    prices = {kind: getattr(arguments, f"price_{kind}") for kind in ("query", "read", "stored")}
    print(f"chapter 1, SCALE=full{', ' + arguments.table if arguments.table else ''}")
    print(plan(rows, arguments.ids, prices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
