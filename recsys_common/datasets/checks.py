"""What is wrong with this file of ratings, and in which line?

    columns = {"userId": checks.ID, "movieId": checks.ID, "rating": checks.rating(0.5, 5)}
    table = checks.read_table(path, columns, header=True)

A good file is read and checked in bulk by Arrow and NumPy. Only when that finds a fault, a slow scan looks
for the first bad line, so that the message can name it. Blank lines are skipped, as Arrow does.

Needs: nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

LARGEST_ID = 2**63 - 1
MEND = "Mend or remove the line, or download the file again."


@dataclass(frozen=True)
class Kind:
    """What a column may hold: its Arrow type, the words for it, one test in two forms (column and field)."""

    type: pa.DataType
    expected: str
    column_is_good: Callable[[pa.ChunkedArray], bool]
    field_is_good: Callable[[str], bool]


def _matching(expected: str, pattern: str) -> Kind:
    """A text that matches a regular expression as a whole."""
    return Kind(
        pa.string(),
        expected,
        lambda column: pc.all(pc.match_substring_regex(column, f"^({pattern})$")).as_py(),
        lambda text: re.fullmatch(pattern, text) is not None,
    )


def _none_is_negative(column: pa.ChunkedArray) -> bool:
    return pc.min(column).as_py() >= 0


def _is_whole_number(text: str) -> bool:
    return re.fullmatch(r"\s*\d+\s*", text) is not None and int(text) <= LARGEST_ID


def _is_date(text: str) -> bool:
    try:
        return str(np.datetime64(text, "D")) == text
    except ValueError:
        return False


ID = Kind(pa.int64(), f"an integer from 0 to {LARGEST_ID}", _none_is_negative, _is_whole_number)
SECONDS = Kind(pa.int64(), "seconds since 1970, an integer from 0", _none_is_negative, _is_whole_number)
DATE = Kind(pa.date32(), "a date such as 2005-09-06", lambda column: True, _is_date)
TEXT = _matching("a text that is not empty", ".+")
ANY_TEXT = _matching("a text", ".*")
FLAG = _matching("0 or 1", "[01]")
YEAR = _matching("a year such as 2005, or NULL", "[0-9]{4}|NULL")


def rating(lowest: float, highest: float) -> Kind:
    """A rating between two bounds, both included; NaN and infinities are refused."""

    def column_is_good(column: pa.ChunkedArray) -> bool:
        bounds = pc.min_max(column).as_py()  # skips NaN, hence the test for finite values
        return pc.all(pc.is_finite(column)).as_py() and lowest <= bounds["min"] and bounds["max"] <= highest

    def field_is_good(text: str) -> bool:
        try:
            return lowest <= float(text) <= highest  # False for NaN too
        except ValueError:
            return False

    return Kind(pa.float32(), f"a number from {lowest:g} to {highest:g}", column_is_good, field_is_good)


def read_table(
    path: Path,
    columns: dict[str, Kind],
    *,
    separator: str = ",",
    header: bool = False,
    encoding: str = "utf-8",
    quotes: bool = False,
) -> pa.Table:
    """Read a file of separated values and check every column.

    Args:
      path: the file.
      columns: name and kind of every column, in the file's order; with `header` the names must be the file's.
      separator: one character, or "::".
      header: whether the first line holds the column names.
      encoding: of the text columns.
      quotes: whether a field may stand in double quotes (and then hold the separator).

    Returns:
      A table with the columns' Arrow types, no nulls, at least one row.

    Raises:
      ValueError: the file is empty or a line is malformed; the message names the first such line.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes). Download the file again.")

    def fast(source: Path | bytes, header: bool) -> pa.Table:
        if len(separator) == 1:
            return parse(source, columns, separator, header, encoding, quotes)
        text = source if isinstance(source, bytes) else source.read_bytes()
        text = text.replace(separator.encode(), b"\x1f")  # Arrow splits at one character only
        return parse(text, columns, "\x1f", header, encoding, quotes)

    def split(line: str) -> list[str]:
        return next(csv.reader([line], delimiter=separator)) if quotes else line.split(separator)

    try:
        table = fast(path, header)
    except ValueError as error:
        raise first_bad_line(path, columns, split, header, encoding, str(error), fast) from error
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows. Download the file again.")
    return table


def parse(source, columns, delimiter, header=False, encoding="utf-8", quotes=False) -> pa.Table:
    """The fast half of `read_table`. Raises ValueError without a line number."""
    table = arrow_csv.read_csv(
        pa.BufferReader(source) if isinstance(source, bytes) else source,
        arrow_csv.ReadOptions(column_names=None if header else list(columns), encoding=encoding),
        arrow_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quotes else False),
        arrow_csv.ConvertOptions(
            column_types={name: kind.type for name, kind in columns.items()},
            null_values=[],  # "nan" and "" are faults here, not nulls
            strings_can_be_null=False,
        ),
    )
    if table.column_names != list(columns):
        raise ValueError(f"its columns are {table.column_names}, expected {list(columns)}")
    for name, kind in columns.items():
        if table.num_rows and not kind.column_is_good(table[name]):
            raise ValueError(f"{name} holds something else than {kind.expected}")
    return table


def first_bad_line(
    path: Path,
    columns: dict[str, Kind],
    split: Callable[[str], list[str]],
    header: bool,
    encoding: str,
    otherwise: str,
    fast: Callable[[bytes, bool], object] | None = None,
) -> ValueError:
    """The error for the first malformed line, found by a slow scan; `otherwise` is said if it finds none.

    `fast(text, header)` raises ValueError unless all the lines in a text are good: it spares most of the scan.
    """
    number = 0
    with path.open("rb") as file:
        while lines := file.readlines(2**24):
            with contextlib.suppress(ValueError):  # the scan of these lines will say more
                if fast:
                    fast(b"".join(lines), header and number == 0)
                    number += len(lines)
                    continue
            for raw in lines:
                number += 1
                try:
                    line = raw.decode(encoding).rstrip("\r\n")
                except UnicodeDecodeError:
                    return line_error(path, number, raw, f"{shorten(raw)} is not {encoding}")
                problem = None
                if header and number == 1:
                    if line.removeprefix("\ufeff") != ",".join(columns):
                        problem = f"the header is {shorten(line)}, expected {','.join(columns)!r}"
                elif line:
                    problem = line_problem(columns, line, split(line))
                if problem:
                    return line_error(path, number, raw, problem)
    return ValueError(f"{path} could not be read: {otherwise}. Download the file again.")


def line_problem(columns: dict[str, Kind], line: str, fields: list[str]) -> str | None:
    """What is wrong with the fields of one line, or None."""
    if len(fields) != len(columns):
        found = f"{len(fields)} field" + ("" if len(fields) == 1 else "s")
        return f"{shorten(line)} has {found}, expected {len(columns)} ({', '.join(columns)})"
    for (name, kind), text in zip(columns.items(), fields, strict=True):
        if not kind.field_is_good(text):
            return f"{name} is {shorten(text)}, expected {kind.expected}"
    return None


def line_error(path: Path, number: int, raw: bytes, problem: str) -> ValueError:
    """The error for one line; `raw` ends in a line break unless the file ends there."""
    cut = "" if raw.endswith(b"\n") else " The file ends in this line: it looks half-downloaded."
    return ValueError(f"{path}, line {number}: {problem}.{cut} {MEND}")


def shorten(text: str | bytes) -> str:
    """The text in quotes, cut to a length that fits in a message."""
    quoted = repr(text[:100])
    return quoted if len(quoted) <= 70 else f"{quoted[:66]}...{quoted[-1]}"


def line_of_row(path: Path, row: int, header: bool) -> int:
    """The number, from 1, of the line that holds a row of the table, from 0; blank lines hold none."""
    seen = -2 if header else -1
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            seen += line.strip(b"\r\n") != b""
            if seen == row:
                return number
    raise IndexError(f"{path} has no row {row}")


def without_duplicates(ratings: pa.Table, duplicates: str, where: Callable[[int], str]) -> pa.Table:
    """Refuse or drop second ratings of an item by the same user.

    Args:
      ratings: has the columns user_id, item_id (int64, 0 or more) and timestamp.
      duplicates: "error", or "last" to keep the rating with the latest timestamp (of equals the later row).
      where: the place of a row in its file, for the message.

    Returns:
      `ratings`, or the rows that stay, in the same order. A warning says how many were dropped.

    Raises:
      ValueError: with "error", if a user rated an item twice; the message names both places.
    """
    if duplicates not in ("error", "last"):
        raise ValueError(f"duplicates is {duplicates!r}, expected 'error' or 'last'.")
    pair = _pairs(ratings)
    if (pair[1:] > pair[:-1]).all():  # most files are sorted by user and item
        return ratings
    pair.sort()
    if (pair[1:] > pair[:-1]).all():
        return ratings
    pair = _pairs(ratings)
    by_time = [ratings["timestamp"].to_numpy()] if duplicates == "last" else []
    order = np.lexsort([*by_time, pair])  # stable: equals stay in file order
    again = pair[order[1:]] == pair[order[:-1]]
    if duplicates == "error":
        at = np.flatnonzero(again)[np.argmin(order[1:][again])]
        first, second = order[at : at + 2].tolist()
        raise ValueError(
            f"{where(first)} and {where(second)}: user {ratings['user_id'][second]} rated item "
            f"{ratings['item_id'][second]} twice ({again.sum():,} such rows in all). Remove one, or load "
            "with duplicates='last' to keep the later."
        )
    kept = np.sort(order[np.append(~again, True)])
    warnings.warn(
        f"dropped {again.sum():,} of {len(pair):,} ratings: the same user rated the same item again later.",
        stacklevel=2,
    )
    return ratings.take(kept)


def _pairs(ratings: pa.Table) -> np.ndarray:
    """One int64 per row, equal for two rows exactly if user and item are."""
    width = pc.max(ratings["item_id"]).as_py() + 1
    if (pc.max(ratings["user_id"]).as_py() + 1) * width <= LARGEST_ID:
        chunks = ((batch["user_id"].to_numpy(), batch["item_id"].to_numpy()) for batch in ratings.to_batches())
        return np.concatenate([user * width + item for user, item in chunks])
    user, item = (np.unique(ratings[name], return_inverse=True)[1] for name in ("user_id", "item_id"))
    return user * (item.max() + 1) + item


def check_unique(ids: np.ndarray, path: Path, header: bool) -> None:
    """Raise ValueError if an id of a file's rows, in file order, is there twice."""
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        first, second = np.flatnonzero(ids == values[np.argmax(counts > 1)])[:2].tolist()
        raise ValueError(
            f"{path}, line {line_of_row(path, first, header)} and line {line_of_row(path, second, header)}: "
            f"item {ids[first]} is there twice. Remove one of the lines, or download the file again."
        )


def check_items(ratings: pa.Table, items: pa.Table, where: Callable[[int], str], items_path: Path) -> None:
    """Raise ValueError unless every rated item is in `items`; `where` gives the place of a row of ratings."""
    known = pc.is_in(ratings["item_id"], value_set=items["item_id"].combine_chunks()).to_numpy()
    if not known.all():
        row = int(np.argmin(known))
        missing = pc.count_distinct(ratings["item_id"].filter(pa.array(~known))).as_py()
        raise ValueError(
            f"{where(row)}: item {ratings['item_id'][row]} is rated but is not in {items_path} "
            f"({missing:,} such items in all). Take both files from the same download."
        )
