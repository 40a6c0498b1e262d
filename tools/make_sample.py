"""How is data/sample made? Simulated ratings, written as the CSV files of MovieLens latest-small.

python tools/make_sample.py --rows 16000 --out data/sample
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from recsys_common.datasets.simulated import item_table, stream


def write_csv(folder: str | Path, rows: int, seed: int = 1) -> None:
    """Write ratings.csv and movies.csv into `folder`, in the format of MovieLens latest-small."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    movies = ([i["item_id"], i["title"], "|".join(i["genres"])] for i in item_table(rows, seed).to_pylist())
    ratings = (row for table in stream(rows, seed) for row in zip(*table.to_pydict().values(), strict=True))
    _write(Path(folder, "movies.csv"), "movieId,title,genres", movies)
    _write(Path(folder, "ratings.csv"), "userId,movieId,rating,timestamp", ratings)


def _write(path: Path, header: str, lines: Iterable) -> None:
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(lines)
    beside.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write simulated ratings as MovieLens CSV files.")
    parser.add_argument("--rows", type=int, default=100_000, help="ratings in all, 1,000 or more (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="another seed is another world (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for ratings.csv and movies.csv")
    arguments = parser.parse_args()
    write_csv(arguments.out, arguments.rows, arguments.seed)
