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

import bisect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import ITEMS_SCHEMA, RATINGS_SCHEMA, RatingTables, checks

BLOCK = 64 * 2**20
HEADER = re.compile(rb"(\d+):\s*")
RATINGS, FILMS = 100_480_507, 17_770
ROW = {"user": checks.ID, "rating": checks.rating(1, 5), "date": checks.DATE}
TITLE = {"item": checks.ID, "year": checks.YEAR, "title": checks.TEXT}


def load(data_dir: str | Path, *, duplicates: str = "error") -> RatingTables:
    """Read the Netflix Prize ratings from `data_dir`.

    Args:
      data_dir: holds the folder `netflix`, or is the folder with `movie_titles.txt` or `.csv`.
      duplicates: "error", or "last" to keep the later of two ratings of a film by the same user.

    Returns:
      The tables. A timestamp is the midnight (UTC) that began the day; titles end in the year; no genres.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a malformed or half-downloaded file; the message names the line.
    """
    titles_path, paths = _find(Path(data_dir))
    items = _titles(titles_path)
    tables: list[pa.Table] = []
    blocks: list[tuple] = []  # (first row, file, first line, lines of the block that are headers)
    rows = 0
    for path in paths:
        item = None
        for first_line, data in _blocks(path):
            try:
                table, headers, last = _parse(data, item)
            except (ValueError, OverflowError) as error:
                raise _first_bad_line(path, first_line, data, item, str(error)) from error
            tables.append(table)
            blocks.append((rows, path, first_line, headers))
            rows, item = rows + table.num_rows, last
        if item is None:
            raise ValueError(f"{path} is empty (0 bytes). Take it from your copy again.")
    if rows == 0:
        raise ValueError(f"{paths[0].parent} holds items but no ratings. Take the files from your copy again.")
    ratings = pa.concat_tables(_join_small(tables))

    def where(row: int) -> str:
        block = bisect.bisect_right(blocks, row, key=lambda block: block[0]) - 1
        first_row, path, first_line, headers = blocks[block]
        before = np.searchsorted(headers - np.arange(len(headers)), row - first_row, side="right")
        return f"{path}, line {first_line + row - first_row + before}"

    checks.check_items(ratings, items, where, titles_path)
    if items.num_rows == FILMS and rows != RATINGS:
        warnings.warn(
            f"{paths[0].parent} holds {rows:,} ratings, Netflix published {RATINGS:,}. They are read as they "
            "are; if you did not take some out yourself, a file was cut.",
            stacklevel=2,
        )
    return RatingTables("netflix", checks.without_duplicates(ratings, duplicates, where), items, "seconds")


def _find(data_dir: Path) -> tuple[Path, list[Path]]:
    """The titles and the files of ratings, in order; none is missing."""
    named = [
        folder / name
        for folder in (data_dir / "netflix", data_dir)
        for name in ("movie_titles.txt", "movie_titles.csv")
    ]
    titles = next((path for path in named if path.is_file()), None)
    how = (
        "Netflix withdrew these data in 2010 and they cannot be downloaded: put your copy there, either "
        "training_set/mv_*.txt and movie_titles.txt, or combined_data_1.txt to 4 and movie_titles.csv."
    )
    if titles is None:
        raise FileNotFoundError(f"no movie_titles.txt or .csv in {data_dir / 'netflix'} or {data_dir}. {how}")
    folder = titles.parent
    if (folder / "training_set").is_dir():
        last = max(
            (int(path.stem[3:]) for path in (folder / "training_set").glob("mv_" + "[0-9]" * 7 + ".txt")),
            default=1,
        )
        paths = [folder / "training_set" / f"mv_{number:07}.txt" for number in range(1, last + 1)]
    else:
        paths = [folder / f"combined_data_{number}.txt" for number in range(1, 5)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4:,} more" if len(missing) > 4 else "")
        raise FileNotFoundError(f"{paths[0].parent} lacks {names}. {how}")
    return titles, paths


def _titles(path: Path) -> pa.Table:
    """`item,year,title` in Latin-1, where a title may hold commas and the year may be NULL."""
    lines = checks.read_table(path, {"line": checks.TEXT}, separator="\x1f", encoding="latin-1")["line"]
    try:
        parts = pc.split_pattern(lines, ",", max_splits=2)
        if pc.min(pc.list_value_length(parts)).as_py() < len(TITLE):
            raise ValueError("a line has fewer than 3 fields")
        item, year, title = (pc.list_element(parts, field) for field in range(3))
        item = item.cast(pa.int64())
        for kind, column in zip(TITLE.values(), (item, year, title), strict=True):
            if not kind.column_is_good(column):
                raise ValueError(f"a field is not {kind.expected}")
    except ValueError as error:
        raise checks.first_bad_line(
            path, TITLE, lambda line: line.split(",", 2), False, "latin-1", str(error)
        ) from error
    checks.check_unique(item.to_numpy(), path, header=False)
    dated = pc.binary_join_element_wise(title, " (", year, ")", "")
    title = pc.if_else(pc.equal(year, "NULL"), title, dated)
    no_genres = pa.array([[]] * len(item), pa.list_(pa.string()))
    return pa.Table.from_arrays([item, title, no_genres], schema=ITEMS_SCHEMA)


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file in blocks of whole lines, each with the number of its first line."""
    first_line, rest = 1, b""
    with path.open("rb") as file:
        while piece := file.read(BLOCK):
            data = rest + piece
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                yield first_line, data[:end]
                first_line += data.count(b"\n", 0, end)
    if rest:  # a last line without an end
        yield first_line, rest


def _parse(data: bytes, item: int | None) -> tuple[pa.Table, np.ndarray, int]:
    """Whole lines -> rows, the lines (from 0) that are headers, the last item. `item` is that before them."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == ord("\n")) + 1  # of the lines
    ends = ends if data.endswith(b"\n") else np.append(ends, len(data))
    colons = np.flatnonzero(text == ord(":"))
    headers = np.searchsorted(ends, colons, side="right")  # their lines
    starts, ends_of_headers = np.append(0, ends)[headers], ends[headers]
    found = [HEADER.fullmatch(data[start:end]) for start, end in zip(starts, ends_of_headers, strict=True)]
    if None in found or (item is None and (len(headers) == 0 or headers[0] > 0)):
        raise ValueError("a header is not an item and a colon, or the first is missing")
    items = np.array([-1 if item is None else item, *(int(match[1]) for match in found)], np.int64)
    counts = np.diff(np.concatenate([[-1], headers, [len(ends)]])) - 1  # rows of each item
    pieces = zip(np.append(0, ends_of_headers), np.append(starts, len(data)), strict=True)
    rows = b"".join(data[start:end] for start, end in pieces)
    columns = RATINGS_SCHEMA.empty_table().columns
    if rows:
        table = checks.parse(rows, ROW, ",")
        seconds = table["date"].cast(pa.int32()).to_numpy().astype(np.int64) * 86_400
        columns = [table["user"], np.repeat(items, counts), table["rating"], seconds]
    return pa.Table.from_arrays(columns, schema=RATINGS_SCHEMA), headers, int(items[-1])


def _join_small(tables: list[pa.Table], rows: int = 2**20) -> Iterator[pa.Table]:
    """The same rows in fewer chunks: 17,770 of them, one a film, would slow down whatever comes after."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(part.num_rows for part in group) >= rows:
            yield pa.concat_tables(group).combine_chunks()
            group = []
    if group:
        yield pa.concat_tables(group).combine_chunks()


def _first_bad_line(path: Path, first_line: int, data: bytes, item: int | None, otherwise: str) -> ValueError:
    """The error for the first malformed line of a block, found by a slow scan."""
    for number, raw in enumerate(data.splitlines(keepends=True), first_line):
        line = raw.decode("latin-1").rstrip("\r\n")
        header = HEADER.fullmatch(raw)
        if header and int(header[1]) <= checks.LARGEST_ID:
            item = int(header[1])
            continue
        problem = f"{checks.shorten(line)} is there, expected an item and a colon, such as '17:'"
        if item is not None:
            problem = checks.line_problem(ROW, line, line.split(","))
        if problem:
            return checks.line_error(path, number, raw, problem)
    return ValueError(f"{path} could not be read: {otherwise}.")
