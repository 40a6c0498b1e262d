"""Who had what, in order? All histories as two arrays, and how plain files become them.

    users, items = read("train.txt")                        # lines `user item`, or `user item item ...`
    data = Interactions.of_pairs(users, items, num_users, num_items)       # of row numbers: splits.py makes them of ids
    data.matrix()                                           # SciPy, [num_users, num_items], ones
    data.history(7)                                         # items of row 7, in order

Models of chapter 7 fit this; a hundred million interactions are .4 GB. Item 0 stands for none, as in the tables of
the other chapters: it is never recommended, and in a test it is an item that training does not know.

Needs: nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LONGEST_ID = 18  # digits that an int64 surely holds


@dataclass(frozen=True, eq=False)
class Interactions:
    """Histories of users, one after the other.

    Attributes:
      offsets: int64 [num_users + 1]; the history of row u is items[offsets[u]:offsets[u + 1]].
      items: int32 [N], 1 to num_items - 1 (in a test 0, too), in order of time where there is one.
      num_items: items, with item 0, which is none.
      values: float32 [N], the ratings; None where there are none.
      times: int64 [N], seconds since 1970; None where there is no clock.
    """

    offsets: np.ndarray
    items: np.ndarray
    num_items: int
    values: np.ndarray | None = None
    times: np.ndarray | None = None

    @classmethod
    def of_pairs(cls, users, items, num_users: int, num_items: int, values=None, times=None) -> Interactions:
        """Histories of pairs: int [N] rows of users, int [N] items, values and times. A user's pairs stay in order.

        Raises:
          ValueError: a row or an item out of range; arrays of several lengths.
        """
        users, items = np.asarray(users, np.int64), np.asarray(items, np.int32)
        if {len(each) for each in (users, values, times) if each is not None} != {len(items)}:
            raise ValueError(f"{len(users)} users, {len(items)} items: expected as many of one as of the other")
        for name, rows, low, high in (("users", users, 0, num_users), ("items", items, 0, num_items)):
            if len(rows) and not low <= rows.min() <= rows.max() < high:
                raise ValueError(f"{name} has {rows.min()} to {rows.max()}, expected {low} to {high - 1}")
        order = np.argsort(users, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))]).astype(np.int64)
        values = None if values is None else np.asarray(values, np.float32)[order]
        times = None if times is None else np.asarray(times, np.int64)[order]
        return cls(offsets, items[order], num_items, values, times)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_users(self) -> int:
        """Rows, those without a history too."""
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Int64 [num_users], the length of each history."""
        return np.diff(self.offsets)

    @functools.cached_property
    def users(self) -> np.ndarray:
        """Int32 [N], the row of each interaction."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), self.lengths)

    @functools.cached_property
    def frequency(self) -> np.ndarray:
        """Int64 [num_items], the interactions of each item."""
        return np.bincount(self.items, minlength=self.num_items)

    def history(self, row: int) -> np.ndarray:
        """Int32, the items of one user, in order."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def rows(self, rows) -> Interactions:
        """The histories of some rows, int [B], as rows 0 to B - 1."""
        rows = np.asarray(rows, np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        where = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        values, times = (None if each is None else each[where] for each in (self.values, self.times))
        return Interactions(offsets, self.items[where], self.num_items, values, times)

    def matrix(self, values: bool = False):
        """CSR [num_users, num_items] of float32: 1 where there are interactions; or their `values`, summed."""
        from scipy import sparse

        data = self.values if values else np.ones(len(self), np.float32)
        shape = (self.num_users, self.num_items)
        made = sparse.csr_matrix((data, self.items, self.offsets), shape, copy=True)  # sorted in place below
        made.sum_duplicates()
        if not values:
            made.data[:] = 1
        return made


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A plain file of ids, `user item` or `user item item ...` a line, in order of time where there is one.

    Ids are integers from 0, with spaces or tabs between them; blank lines are skipped. A line may hold a user alone
    where others hold lists: somebody without items, who is left out.

    Returns:
      int64 [N] ids of users, int64 [N] ids of items, as they stand in the file.

    Raises:
      ValueError: a bad line (file, line, found, expected), or no interactions at all.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    numbers, line = _numbers(path, data, b"0123456789", np.int64, "integers from 0: user item, or user item item ...")
    of_line = np.bincount(line)
    if of_line.max(initial=0) < 3 and (of_line == 1).any():
        raise _fault(path, data, int((of_line == 1).argmax()), "two integers: user item")
    first = np.append(True, line[1:] != line[:-1])[: len(line)]
    if first.all():
        raise ValueError(f"{path}: no interactions were found, expected lines `user item` or `user item item ...`")
    return np.repeat(numbers[first], of_line[of_line > 0] - 1), numbers[~first]


def read_ratings(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """A file of ratings, `user item rating` or `user item rating time` a line.

    Between them stand spaces, tabs, commas or `::`, so it takes MovieLens' ratings.dat, u.data and u1.base.

    Returns:
      int64 [N] users, int64 [N] items, float32 [N] ratings, int64 [N] times or None.

    Raises:
      ValueError: a bad line (file, line, found, expected), or no ratings at all.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    expected = "numbers: user item rating, or user item rating time"
    plain = data.replace(b"::", b"  ").replace(b",", b" ")  # as long as before: places in it are places in the file
    numbers, line = _numbers(path, plain, b"0123456789.", np.float64, expected, data)
    of_line = np.bincount(line)
    width = 4 if len(of_line) and of_line[of_line > 0][0] == 4 else 3
    if ((of_line > 0) & (of_line != width)).any():
        raise _fault(path, data, int(((of_line > 0) & (of_line != width)).argmax()), f"{width} {expected}")
    if not len(numbers):
        raise ValueError(f"{path}: no ratings were found, expected lines of {expected}")
    columns = numbers.reshape(-1, width)
    broken = (columns[:, [0, 1, *range(3, width)]] % 1 != 0).any(1)
    if broken.any():
        raise _fault(path, data, int(line[int(broken.argmax()) * width]), f"{expected}; ids and times are integers")
    users, items, *times = (columns[:, place].astype(np.int64) for place in (0, 1, *range(3, width)))
    return users, items, columns[:, 2].astype(np.float32), times[0] if times else None


def _numbers(path, data: bytes, allowed: bytes, dtype, expected: str, shown: bytes | None = None):
    """All numbers of a file and the line of each, from 0; ValueError names the first line with anything else."""
    shown = data if shown is None else shown
    is_allowed, is_space = np.zeros(256, bool), np.zeros(256, bool)
    is_allowed[list(allowed)], is_space[list(b" \t\r\n")] = True, True
    characters = np.frombuffer(data, np.uint8)
    within = is_allowed[characters]
    bad = ~within & ~is_space[characters]
    newlines = characters == ord("\n")
    if bad.any():
        raise _fault(path, shown, int(np.count_nonzero(newlines[: int(bad.argmax())])), expected)
    begins = within & ~np.append(False, within[:-1])[: len(within)]
    ends = within & ~np.append(within[1:], False)[: len(within)]
    starts = np.flatnonzero(begins)
    line = np.cumsum(newlines)[starts]
    lengths = np.flatnonzero(ends) - starts + 1
    long = lengths > LONGEST_ID
    if long.any():
        raise _fault(path, shown, int(line[int(long.argmax())]), f"{expected}, of {LONGEST_ID} digits at most")
    try:
        numbers = np.array(data.split(), dtype) if dtype == np.float64 else np.fromstring(data, dtype, sep=" ")
    except ValueError:  # two points in a number
        twice = [place for place, each in enumerate(data.split()) if each.count(b".") > 1 or each == b"."]
        raise _fault(path, shown, int(line[twice[0]]), expected) from None
    return numbers, line


def _fault(path, data: bytes, line: int, expected: str) -> ValueError:
    text = data.split(b"\n")[line].decode(errors="replace").strip()
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return ValueError(f"{path}, line {line + 1}: found {text!r}, expected {expected}")
