"""Where do the ratings of the Netflix Prize come from?

    tables = netflix.load("data")    # reads data/netflix/, which must be there

Netflix withdrew the data in 2010 and their terms forbid passing them on, so there is no download. Whoever has
them puts one of these into the folder:

    training_set/mv_0000001.txt, mv_0000002.txt, ...  and  movie_titles.txt    as Netflix published them
    combined_data_1.txt ... combined_data_4.txt       and  movie_titles.csv    as Kaggle repackaged them

Both hold lines `user,rating,date`, under a line `item:`. They are parsed in blocks of 64 MB; the whole has
100,480,507 ratings of 17,770 films by 480,189 people (2.8 GB as a table).

Needs: __init__.py checks.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import RATINGS_SCHEMA, RatingTables, checks

BLOCK = 64 * 2**20
RATINGS, FILMS = 100_480_507, 17_770
FIRST_TWO_COMMAS = re.compile(rb"^([^,\n]*),([^,\n]*),", re.MULTILINE)
ROWS = checks.Layout({"user": checks.ID, "rating": checks.STARS, "date": checks.DATE})
TITLES = checks.Layout(  # item,year,title where a title may hold commas
    {"item": checks.ID, "year": checks.YEAR, "title": checks.TEXT},
    separator="\x1f",
    encoding="latin-1",
    prepare=lambda text: FIRST_TWO_COMMAS.sub(b"\\1\x1f\\2\x1f", text),
)


def load(data_dir: str | Path, *, duplicates: str = "error") -> RatingTables:
    """Read the Netflix Prize ratings from the folder `netflix` in `data_dir`.

    A timestamp is the midnight (UTC) that began the day; titles end in the year; there are no genres. With
    duplicates="last" the later of two ratings of a film by the same user is kept.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a malformed or half-downloaded file; the message names the line.
    """
    folder = Path(data_dir, "netflix")
    names = ["movie_titles.csv", *(f"combined_data_{number}.txt" for number in range(1, 5))]
    if (folder / "training_set").is_dir():
        names = ["movie_titles.txt", *(f"training_set/mv_{number:07}.txt" for number in range(1, FILMS + 1))]
    titles_path, *paths = checks.files(folder, names, "Netflix withdrew these data: take them from a copy you have.")
    titles, title_line = TITLES.read(titles_path)
    item, year, title = titles.columns
    dated = pc.binary_join_element_wise(title, " (", year, ")", "")
    no_genres = pa.array([[]] * len(item), pa.list_(pa.string()))
    items = [item, pc.if_else(pc.equal(year, "NULL"), title, dated), no_genres]
    films = [table for path in paths for table in _read(path)]
    ratings = pa.concat_tables([RATINGS_SCHEMA.empty_table(), *films]).combine_chunks()
    del films  # as large as the ratings
    if ratings.num_rows == 0:
        raise ValueError(f"{folder} holds items but no ratings. Take the files from your copy again.")

    def place(row: int) -> str:
        return checks.line_of_row(row, paths, lambda line: line.strip() and not line.rstrip().endswith(b":"))

    tables = checks.rating_tables("netflix", "seconds", ratings.columns, place, items, title_line, duplicates)
    checks.compare_with_published(tables, folder, RATINGS, FILMS)
    return tables


def _read(path: Path) -> Iterator[pa.Table]:
    """The ratings of a file, film by film."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes). Take it from your copy again.")
    for item, first_line, rows in _films(path):
        if not re.fullmatch(rb"\d{1,19}", item) or int(item) > checks.LARGEST_ID:
            number, found = (first_line - 1, item + b":") if item else (first_line, rows.split(b"\n")[0])
            found = checks.shorten(found.decode("latin-1"))
            raise ValueError(
                f"{path}, line {number}: {found} is there, expected an item and a colon, such as '17:'. {checks.MEND}"
            )
        if not rows or rows.isspace():
            continue
        try:
            table = ROWS.parse(rows)
        except ValueError as error:
            raise ROWS.bad_line(path, rows, first_line) from error
        seconds = table["date"].cast(pa.int32()).to_numpy().astype(np.int64) * 86_400
        columns = [table["user"], np.full(table.num_rows, int(item)), table["rating"], seconds]
        yield pa.Table.from_arrays(columns, schema=RATINGS_SCHEMA)


def _films(path: Path) -> Iterator[tuple[bytes, int, bytes]]:
    """The item, the number of the first line, and the lines under `item:`; in parts where a block ends among them."""
    item, number = b"", 1
    with path.open("rb") as file:
        while block := file.read(BLOCK) + file.readline():  # whole lines
            *pieces, rows = block.replace(b"\r\n", b"\n").split(b":\n")
            for piece in pieces:
                end = piece.rfind(b"\n") + 1
                if end or item:
                    yield item, number, piece[:end]
                item, number = piece[end:], number + piece.count(b"\n") + 1
            yield item, number, rows
            number += rows.count(b"\n")
