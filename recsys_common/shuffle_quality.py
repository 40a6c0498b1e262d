"""How far is an order of rows from a uniform permutation?

    measure(position, user, label, batch_size=8192)
    # displacement, spread of a batch, rows of the same user in a batch, label autocorrelation

A uniform permutation gives 1, 1, 1 and 0; the order of a table sorted by time or user 0, almost 0, many and its own.
Write each row's position in the sorted table as one more column, read one whole pass, and hand in what came out. It
takes four numbers, since each is blind to something. A reversed table has its rows far from home, and each batch still
comes from one moment: displacement does not see that, the spread does. Neither sees what a batch from one moment holds:
in a table sorted by user that is rows of few users, in one sorted by time it may be labels that drift.

Needs: nothing else.
"""

from __future__ import annotations

import numpy as np


def measure(position, user, label, batch_size: int) -> dict[str, float]:
    """Four measures of an order of n rows: 1, 1, 1, 0 for a uniform permutation, the first three in exact expectation.

    displacement: mean distance between a row's place in this order and its position in the table, in units of
      (n^2 - 1) / 3n, the mean distance in a uniform permutation. 0 for the table's own order, 1.5 for its reversal.
    spread of a batch: cut the table into `batch_size` equal stretches; of how many a batch has a row, in units of what
      a uniform sample reaches (63% of them, if the table is large). Near 0 for sorted rows, above 1 where rows are
      spread more evenly than by chance. The distance between a batch's first and last position, or their standard
      deviation, would be about as large as that of a uniform sample for rows from only eight moments, far apart.
    rows of the same user in a batch: mean number of other rows of a row's own user within its batch, in units of
      sum over users of c (c - 1) / n * (batch_size - 1) / (n - 1), where c is a user's rows: a row has c - 1 others,
      each of which is in its batch with that last probability. NaN if no user has two rows.
    label autocorrelation: correlation of the labels of neighbouring rows (lag 1); see `autocorrelation_bound`. NaN if
      the labels are all the same.

    Args:
      position: int [n], the position in the table, 0..n-1, of each row, in the order in which training sees the rows.
      user: int or string [n], whose row it is, in the same order.
      label: numbers [n], in the same order.
      batch_size: consecutive rows that make a batch, 2..n. Rows after the last full batch count for displacement and
        label autocorrelation alone.

    Raises:
      ValueError: lengths that differ, fewer rows than 2 or than a batch, or positions that are not 0..n-1, each once;
        the first that is doubled or missing is named.
    """
    position, user, label = np.asarray(position), np.asarray(user), np.asarray(label, np.float64)
    _check(position, user, label, batch_size)
    rows, position = len(position), position.astype(np.int64)
    return {
        "displacement": float(np.abs(np.arange(rows) - position).mean() / ((rows**2 - 1) / (3 * rows))),
        "spread of a batch": _spread(position, batch_size),
        "rows of the same user in a batch": _same_user(user, batch_size),
        "label autocorrelation": _autocorrelation(label),
    }


def autocorrelation_bound(rows: int) -> float:
    """What the label autocorrelation of a uniform permutation stays below, in size, in 95% of cases: 2 / sqrt(n)."""
    return 2 / rows**0.5


def _spread(position: np.ndarray, batch_size: int) -> float:
    rows, used = len(position), len(position) // batch_size * batch_size
    stretch = position * batch_size // rows
    reached = np.zeros(used, bool)  # [batches * stretches]
    reached[np.arange(used) // batch_size * batch_size + stretch[:used]] = True
    # A stretch of m rows is missed if all of a batch, drawn without replacement, comes from the other n - m.
    sizes, times = np.unique(np.bincount(stretch), return_counts=True)
    missed = [np.prod(1 - size / (rows - np.arange(batch_size))) for size in sizes]
    return float(reached.mean() / (1 - np.average(missed, weights=times)))


def _same_user(user: np.ndarray, batch_size: int) -> float:
    rows, used = len(user), len(user) // batch_size * batch_size
    _, user, total = np.unique(user, return_inverse=True, return_counts=True)
    _, together = np.unique(np.arange(used) // batch_size * len(total) + user[:used], return_counts=True)
    expected = (total * (total - 1)).sum() / rows * (batch_size - 1) / (rows - 1)
    return float((together * (together - 1)).sum() / used / expected) if expected else float("nan")


def _autocorrelation(label: np.ndarray) -> float:
    centred = label - label.mean()
    return float(centred[:-1] @ centred[1:] / (centred @ centred)) if np.ptp(label) else float("nan")


def _check(position: np.ndarray, user: np.ndarray, label: np.ndarray, batch_size: int) -> None:
    shapes, rows = [position.shape, user.shape, label.shape], position.size
    if shapes != [(rows,)] * 3 or position.dtype.kind not in "iu":
        raise ValueError(f"position, user, label {shapes}, {position.dtype}; expected [n] of each, integer positions")
    if not 2 <= batch_size <= rows:
        raise ValueError(f"batch_size {batch_size:,} and {rows:,} rows; expected a batch of 2 rows to all rows")
    in_order = np.sort(position)
    wrong = int(np.argmax(in_order != np.arange(rows)))
    if (value := int(in_order[wrong])) != wrong:
        found = f"{wrong:,} is missing" if value > wrong else f"{value:,} comes {(position == value).sum()} times"
        raise ValueError(
            f"position {found}; expected 0 to {rows - 1:,}, each once. Hand in one whole pass over the table: of all "
            "workers, without rows dropped or padded at its end."
        )
