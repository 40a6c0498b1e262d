"""Where do ratings come from?

    tables = datasets.load("ml-1m", "data")

Whatever the source, the result is the same pair of Arrow tables, so nothing after this file knows MovieLens
from Netflix or from the simulator:

    ratings: user_id int64, item_id int64, rating float32, timestamp int64     no nulls, no NaN, one row a pair
    items:   item_id int64, title string, genres list<string>                  every item_id of ratings is there

`timestamp` holds seconds since 1970 where the source has a clock, the position within the user's history where
it has only an order, and 0 where it has neither; `RatingTables.time` says which.

Needs: movielens.py netflix.py checks.py download.py simulated.py simulated_items.py (copy the whole folder).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

RATINGS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
    ]
)
ITEMS_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("genres", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class RatingTables:
    """Ratings and the items they speak of.

    Attributes:
      name: the dataset's name, such as "ml-1m".
      ratings: rows of `RATINGS_SCHEMA`.
      items: rows of `ITEMS_SCHEMA`.
      time: what `timestamp` means: "seconds" since 1970, "order" within a user, or "none".
      stream: yields `ratings` a table at a time in their place, where they may be more than memory holds.
      truth: what only a simulator knows (`simulated.Truth`), None for real ratings.
      table: `project.dataset.table` of a BigQuery table that is read in place; `ratings` and `items` are empty then.
    """

    name: str
    ratings: pa.Table
    items: pa.Table
    time: Literal["seconds", "order", "none"]
    truth: object | None = None
    table: str = ""
    stream: Callable[[], Iterator[pa.Table]] | None = None


def load(
    name: str,
    data_dir: str = "data",
    *,
    rows: int = 100_000,
    seed: int = 1,
    duplicates: str = "error",
    stream: bool = False,
) -> RatingTables:
    """Read, download or simulate a data set.

    Args:
      name: "simulated", "sample" (the committed one), "netflix", a key of `movielens.NAMES`, or a BigQuery table
        `project.dataset.table` with timestamps in seconds: `bigquery.Warehouse.load` reads it in place.
      data_dir: where the folders of real data sets lie, or are downloaded to.
      rows: ratings to simulate.
      seed: of the simulation.
      stream: draw simulated ratings a table at a time (`RatingTables.stream`), instead of all into memory.
      duplicates: what to do with a second rating of an item by a user: "error", or "last" to keep the later one.

    Raises:
      ValueError: an unknown name, or a file with a bad line (file, line, found, expected).
      FileNotFoundError: files that are missing and cannot be downloaded.
    """
    from . import movielens, netflix, simulated

    if name.count(".") == 2:
        return RatingTables(name, RATINGS_SCHEMA.empty_table(), ITEMS_SCHEMA.empty_table(), "seconds", table=name)
    if name == "simulated":
        if stream:
            none, items = RATINGS_SCHEMA.empty_table(), simulated.item_table(rows, seed)
            return RatingTables(name, none, items, "seconds", stream=functools.partial(simulated.stream, rows, seed))
        return simulated.load(rows, seed)
    if name == "sample":
        return movielens.read_csv_folder(f"{data_dir}/sample", name, duplicates=duplicates)
    if name == "netflix":
        return netflix.load(data_dir, duplicates=duplicates)
    if name in movielens.NAMES:
        return movielens.load(name, data_dir, duplicates=duplicates)
    raise ValueError(f"{name!r} is not a data set; expected simulated, sample, netflix, {', '.join(movielens.NAMES)}")


def folder(name: str, data_dir: str) -> Path:
    """Where the files of a data set lie, or will lie once `load` has downloaded them.

    Raises:
      ValueError: `name` is not a data set of files.
    """
    from . import movielens

    places = {"sample": "sample", "netflix": "netflix"} | {
        each: place for each, (_, place, *_) in movielens.NAMES.items()
    }
    if name not in places:
        raise ValueError(
            f"{name!r} is not a data set; expected simulated, {', '.join(places)}, or project.dataset.table"
        )
    return Path(data_dir, places[name])
