"""What is wrong with these files of ratings, and in which line?

    layout = checks.Layout({"userId": checks.ID, "movieId": checks.ID, "rating": checks.STARS}, header=True)
    table, place = layout.read(path)
    place(7)                            # "ratings.csv, line 9": where row 7 of the table stands

Arrow reads and checks a file in bulk. In a bad file the first bad line is found by halving: the same parser is
asked about half of the lines, then about half of those. Blank lines are skipped.

Needs: __init__.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from . import ITEMS_SCHEMA, RATINGS_SCHEMA, RatingTables

LARGEST_ID = 2**63 - 1
MEND = "Mend or remove the line, or download the file again."
CUT = "It looks half-downloaded: download it again. (If the line is whole, end it with a line break.)"

Place = Callable[[int], str]  # the number of a row, from 0 -> "file, line n"


class Kind(NamedTuple):
    """What a field may hold: its Arrow type, the words for it, and which values of a column are good."""

    type: pa.DataType
    expected: str
    good: Callable[[pa.ChunkedArray], pa.ChunkedArray]


def _between(low: float, high: float) -> Callable[[pa.ChunkedArray], pa.ChunkedArray]:
    return lambda column: pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))  # no NaN


ID = Kind(pa.int64(), f"an integer from 0 to {LARGEST_ID}", _between(0, LARGEST_ID))
SECONDS = Kind(pa.int64(), "seconds since 1970, an integer from 0", _between(0, LARGEST_ID))
STARS = Kind(pa.float32(), "a number from 1 to 5", _between(1, 5))
HALF_STARS = Kind(pa.float32(), "a number from 0.5 to 5", _between(0.5, 5))
FLAG = Kind(pa.int8(), "0 or 1", _between(0, 1))
DATE = Kind(pa.date32(), "a date such as 2005-09-06", pc.is_valid)
YEAR = Kind(pa.string(), "a year such as 2005, or NULL", lambda c: pc.match_substring_regex(c, r"^(\d{4}|NULL)$"))
TEXT = Kind(pa.string(), "a text that is not empty", lambda column: pc.not_equal(column, ""))
ANY_TEXT = Kind(pa.string(), "a text", pc.is_valid)


def files(folder: Path, names: list[str], advice: str) -> list[Path]:
    """The paths of files that must all be there; FileNotFoundError names those that are not."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 4:,} more" if len(missing) > 4 else ""
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:4])}{more}. {advice}")
    return [folder / name for name in names]


def line_of_row(row: int, paths: list[Path], is_row: Callable[[bytes], object] = bytes.strip) -> str:
    """The file and the line, from 1, of a row, from 0, of files read one after the other."""
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                row -= bool(is_row(line))
                if row < 0:
                    return f"{path}, line {number}"
    raise IndexError(f"{paths[-1]} ends {row + 1:,} rows too early")


@dataclass(frozen=True)
class Layout:
    """How the lines of a file hold their fields."""

    columns: dict[str, Kind]  # in the file's order
    separator: str = ","  # one character
    encoding: str = "utf-8"
    header: bool = False  # the first line holds the names of the columns
    quotes: bool = False  # a field may stand in double quotes, and then hold the separator
    prepare: Callable[[bytes], bytes] = bytes  # turns lines with another separator into as many with this one

    def read(self, path: Path) -> tuple[pa.Table, Place]:
        """Read and check a file: a table without nulls, of one row or more, and where each row stands.

        Raises ValueError if the file is empty, or a line is malformed or cut; the message names the first such line.
        """
        with path.open("rb") as file:
            header = file.readline().decode("utf-8-sig", "replace").rstrip() if self.header else ""
            data = file.read()
        if not data or data.isspace():
            raise ValueError(f"{path} has no rows ({path.stat().st_size} bytes). Download the file again.")
        if self.header and header != (expected := ",".join(self.columns)):
            raise ValueError(f"{path}, line 1: the header is {shorten(header)}, expected {expected!r}. {MEND}")
        try:
            table = self.parse(data)
        except ValueError as error:
            raise self.bad_line(path, data, 1 + self.header) from error
        if not data.endswith(b"\n"):
            last = data[data.rfind(b"\n") + 1 :]
            raise ValueError(f"{path} ends in {shorten(last)}, without a line break. {CUT}")
        return table, lambda row: line_of_row(row + self.header, [path])

    def parse(self, data: bytes) -> pa.Table:
        """Parse and check whole lines. Raises ValueError, without the number of the line."""
        table = arrow_csv.read_csv(
            pa.BufferReader(self.prepare(data)),
            arrow_csv.ReadOptions(column_names=list(self.columns), encoding=self.encoding),
            arrow_csv.ParseOptions(delimiter=self.separator, quote_char='"' if self.quotes else False),
            arrow_csv.ConvertOptions(
                column_types={name: kind.type for name, kind in self.columns.items()},
                null_values=[],  # "nan" and "" are faults here, not nulls
                strings_can_be_null=False,
            ),
        )
        for name, kind in self.columns.items():
            if not pc.all(kind.good(table[name]), min_count=0).as_py():
                raise ValueError(f"{name} is not {kind.expected}")
        return table

    def bad_line(self, path: Path, data: bytes, first_line: int) -> ValueError:
        """The error for the first bad line of lines that `parse` refuses; `first_line` is the number of the first."""
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
        borders = np.unique([0, *ends, len(data)])
        good, bad = 0, len(borders) - 1  # the lines up to `good` are good, those up to `bad` are not
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._is_good(data[borders[good] : borders[middle]]):
                good = middle
            else:
                bad = middle
        line = data[borders[good] : borders[bad]]
        advice = MEND if line.endswith(b"\n") else f"The file ends in this line. {CUT}"
        return ValueError(f"{path}, line {first_line + good}: {self._fault(line)}. {advice}")

    def _is_good(self, data: bytes) -> bool:
        try:
            self.parse(data)
        except ValueError:
            return False
        return True

    def _fault(self, line: bytes) -> str:
        """What is wrong with a bad line: the field that is refused where all others may be any text."""
        try:
            text = line.decode(self.encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            return f"{shorten(line)} is not {self.encoding}"
        any_text = replace(self, columns=dict.fromkeys(self.columns, ANY_TEXT))
        if any_text._is_good(line):
            for name, kind in self.columns.items():
                if not replace(self, columns=any_text.columns | {name: kind})._is_good(line):
                    return f"{name} is {shorten(any_text.parse(line)[name][0].as_py())}, expected {kind.expected}"
        return f"{shorten(text)} was found, expected {len(self.columns)} fields: {', '.join(self.columns)}"


def shorten(text: str | bytes) -> str:
    """The text in quotes, cut to a length that fits in a message."""
    quoted = repr(text[:100])
    return quoted if len(quoted) <= 70 else f"{quoted[:66]}...{quoted[-1]}"


def rating_tables(
    name: str, time: str, ratings: list, place: Place, items: list, item_place: Place, duplicates: str
) -> RatingTables:
    """Put the columns of `RATINGS_SCHEMA` and `ITEMS_SCHEMA` together, after the checks that need several of them.

    Raises ValueError if an item is there twice, a rated item is not there, or a user rated an item twice; the
    message names the lines. With duplicates="last" the later of such ratings stays, and a warning counts the others.
    """
    ratings = pa.Table.from_arrays(ratings, schema=RATINGS_SCHEMA)
    items = pa.Table.from_arrays(items, schema=ITEMS_SCHEMA)
    check_unique(item_place, item=items["item_id"].to_numpy())
    known = pc.is_in(ratings["item_id"], value_set=items["item_id"].combine_chunks()).to_numpy()
    if not known.all():
        row = int(known.argmin())
        missing = pc.count_distinct(ratings["item_id"].filter(pa.array(~known))).as_py()
        raise ValueError(
            f"{place(row)}: item {ratings['item_id'][row]} is rated but has no title ({missing:,} such items in all). "
            "Take all files from the same download."
        )
    return RatingTables(name, without_duplicates(ratings, duplicates, place), items, time)


def _keys(*columns: np.ndarray) -> np.ndarray:
    """One int64 a row, equal for two rows exactly if all their columns are."""
    key = columns[0]
    for column in columns[1:]:
        if (int(key.max()) + 1) * (int(column.max()) + 1) > LARGEST_ID:
            key, column = (np.unique(ids, return_inverse=True)[1] for ids in (key, column))
        key = key * (column.max() + 1) + column
    return key


def check_unique(place: Place, advice: str = "download the file again", **columns: np.ndarray) -> None:
    """Raise ValueError if two rows have the same columns; the message names the first row that repeats one."""
    keys = _keys(*columns.values())
    in_order = np.sort(keys)  # much faster than the search below, which most files do not need
    if (in_order[1:] == in_order[:-1]).any():
        again = np.ones(len(keys), bool)
        again[np.unique(keys, return_index=True)[1]] = False
        second = int(again.argmax())
        first = int((keys == keys[second]).argmax())
        what = ", ".join(f"{name} {column[second]}" for name, column in columns.items())
        raise ValueError(
            f"{place(first)} and {place(second)}: {what} is there twice ({again.sum():,} such rows in all). "
            f"Remove one, or {advice}."
        )


def without_duplicates(ratings: pa.Table, duplicates: str, place: Place) -> pa.Table:
    """Refuse ("error") second ratings of an item by the same user, or keep the "last" by time, then by row."""
    if duplicates not in ("error", "last"):
        raise ValueError(f"duplicates is {duplicates!r}, expected 'error' or 'last'.")
    user, item, time = (ratings[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    if duplicates == "error":
        check_unique(place, "load with duplicates='last' to keep the later", user=user, item=item)
        return ratings
    keys = _keys(user, item)
    order = np.lexsort([time, keys])  # stable: equals stay in the order of the rows
    last = np.append(keys[order[1:]] != keys[order[:-1]], True)
    if not last.all():
        warnings.warn(f"dropped {(~last).sum():,} of {len(keys):,} ratings: rated again later.", stacklevel=2)
    return ratings.take(np.sort(order[last]))


def compare_with_published(tables: RatingTables, folder: Path, ratings: int, items: int) -> None:
    """Warn if a folder does not hold as many ratings and items as were published."""
    found = (tables.ratings.num_rows, tables.items.num_rows)
    if found != (ratings, items):
        published = f"published were {ratings:,} and {items:,}. If you did not take some out yourself, a file was cut."
        warnings.warn(f"{folder} holds {found[0]:,} ratings and {found[1]:,} items, {published}", stacklevel=3)
