"""What may the model see, and what is it asked? In a warehouse by SQL, for plain files in memory.

    splits.split(warehouse, "auto", tables.time)        # writes split_ratings; returns the name of the SQL that did
    parts = splits.leave_one_out(*interactions.read("ml-1m.txt"))          # or temporal, strong_generalisation, given
    parts["test"].train, parts["test"].seen, parts["test"].test            # three `Interactions` of the same rows

temporal        one moment for everyone; the model sees nothing of what came after it, of anyone. With a
                `validation_fraction`, what comes next is for validation, and the test begins after that
leave-one-out   each user's last item is asked for, the last but one kept out for validation. Common in papers, and
                possible with an order alone; the model does see what *others* did later
strong generalisation   some users are kept out of training altogether; the model is told a part of their items, and is
                asked for the others (Liang et al., "Variational Autoencoders for Collaborative Filtering", WWW 2018)
given           training and test as they stand in two files

Needs: interactions.py record_batches.py scale.py sql/temporal_split.sql sql/leave_last_out.sql
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recsys_common.interactions import Interactions

SPLITS = ("auto", "temporal", "leave-one-out")
TRAIN_FRACTION = 0.8
BYTES_A_ROW = 64  # of four columns, their order, and the sorted copies


def split(warehouse, how: str, time: str, validation_fraction: float = 0.0) -> str:
    """Mark each row of `ratings` as train, validation or test, in `split_ratings`.

    Args:
      warehouse: a `bigquery.Warehouse` with the table `ratings`.
      how: "temporal", "leave-one-out", or "auto": temporal where there is a clock, leave-one-out where there is only
        an order.
      time: what the timestamps mean, `RatingTables.time`: "seconds", "order" or "none".
      validation_fraction: of a temporal split, the share of ratings for validation; leave-one-out always has one.

    Raises:
      ValueError: an unknown split, or one that these timestamps cannot carry.
    """
    if how not in SPLITS:
        raise ValueError(f"SPLIT={how!r} is not a split; expected one of {', '.join(SPLITS)}")
    if time == "none":
        raise ValueError(
            "these ratings have neither a clock nor an order, so nothing in them comes last: they serve to predict "
            "ratings, not the next item. Take a data set with timestamps, such as ml-latest-small."
        )
    if how == "temporal" and time != "seconds":
        raise ValueError(
            "SPLIT='temporal' needs timestamps in seconds; these ratings have only each user's order. "
            "Use SPLIT='leave-one-out'."
        )
    if how == "temporal" or (how == "auto" and time == "seconds"):
        fractions = {"train_fraction": TRAIN_FRACTION, "validation_fraction": float(validation_fraction)}
        warehouse.run("temporal_split.sql", **fractions)
        return "temporal_split.sql"
    warehouse.run("leave_last_out.sql", holdout=1)
    return "leave_last_out.sql"


@dataclass(frozen=True, eq=False)
class Split:
    """What one evaluation needs. All three have the same users and the same items.

    Attributes:
      train: what a model is fitted to.
      seen: what it is told of each user when it is asked, and does not show again.
      test: what it is asked for. A user without such items is not asked.
      user_ids: int64 [num_users], the id of each row.
      item_ids: int64 [num_items], the id of each item; that of item 0, which is none, is -1.
    """

    train: Interactions
    seen: Interactions
    test: Interactions
    user_ids: np.ndarray
    item_ids: np.ndarray


def given(*parts: tuple[np.ndarray, ...]) -> dict[str, Split]:
    """Training, test and perhaps validation in between, each int64 [N] ids of users and of items, as `read` gives them.

    Each part may have a third array, times: int64 [N], seconds.

    Every item of any part is ranked. Asked for the test, a model has seen training and validation.

    Returns:
      {"test": split}, and "validation" first where there is such a part. Both have the same `train`. A pair that was
      seen before is not asked for; a warning counts them.
    """
    user_ids = np.unique(np.concatenate([users for users, *_ in parts]))
    item_ids = np.concatenate([[-1], np.unique(np.concatenate([items for _, items, *_ in parts]))])
    rows = [(np.searchsorted(user_ids, users), np.searchsorted(item_ids, items), *t) for users, items, *t in parts]
    made = {}
    for number, name in list(enumerate(["validation", "test"][3 - len(parts) :], start=1)):
        told, had, *when = (np.concatenate(each) for each in zip(*rows[:number], strict=True))
        asked, wanted, *_ = rows[number]
        again = np.isin(asked * len(item_ids) + wanted, told * len(item_ids) + had)
        if again.any():
            user, item = user_ids[asked[again][0]], item_ids[wanted[again][0]]
            warnings.warn(
                f"{np.count_nonzero(again):,} of {len(again):,} pairs of the {name} were seen before, such as user "
                f"{user}, item {item}: left out, since a model is not asked for what its user has had",
                stacklevel=2,
            )
        train, seen, test = (
            Interactions.of_pairs(users, items, len(user_ids), len(item_ids), times=times[0] if times else None)
            for users, items, *times in (rows[0], (told, had, *when), (asked[~again], wanted[~again]))
        )
        made[name] = Split(train if number > 1 else seen, seen, test, user_ids, item_ids)
    return made


def leave_one_out(users: np.ndarray, items: np.ndarray) -> dict[str, Split]:
    """Each user's last item for the test, the last but one for validation; pairs as `read` gives them.

    As Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, do: who has fewer than three items is
    trained on and not asked.
    """
    order = np.argsort(users, kind="stable")
    _, begin, count = np.unique(users[order], return_index=True, return_counts=True)
    from_end = np.empty(len(users), np.int64)  # 0 for a user's last
    from_end[order] = np.repeat(begin + count, count) - 1 - np.arange(len(users))
    short = np.isin(users, users[order][begin[count < 3]])
    part = np.where(short, 0, np.select([from_end == 0, from_end == 1], [2, 1], 0))
    return _parted(users, items, part)


def temporal(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, fractions: tuple[float, float] = (0.8, 0.1)
) -> dict[str, Split]:
    """One moment for all: training ends at it, validation begins, and ends at a second one.

    Args:
      users, items, times: int64 [N].
      fractions: of the rows, those of training and of validation. Rows of one time stay together, in the earlier part.

    Returns:
      As `given`. Items that only the later parts have are ranked too. Rows of validation and test that repeat an
      earlier pair are left out.
    """
    order = np.argsort(times, kind="stable")
    users, items, times = users[order], items[order], times[order]
    first, second = (times[max(int(np.ceil(part * len(times))) - 1, 0)] for part in np.cumsum(fractions))
    part = (times > first).astype(np.int64) + (times > second)
    return _parted(users, items, part, times)


def strong_generalisation(
    users: np.ndarray, items: np.ndarray, held_out: int, told: float = 0.8, seed: int = 98765, minimum: int = 5
) -> dict[str, Split]:
    """`held_out` users for validation, as many for the test, and the others to train on.

    The protocol of Liang et al. 2018, section 4.1, in this order: only users with `minimum` items or more; users
    are shuffled; only items that training users have. Of each held-out user with `minimum` or more of those, a random
    `told` of them is `seen`, the rest is asked for; held-out users with fewer are told all and not asked.

    Raises:
      ValueError: fewer users than are to be held out.
    """
    random = np.random.default_rng(seed)
    ids, row, count = np.unique(users, return_inverse=True, return_counts=True)
    enough = random.permutation(ids[count >= minimum])
    if len(enough) <= 2 * held_out:
        raise ValueError(f"{len(enough):,} users have {minimum} items or more, expected over 2 x {held_out:,} held out")
    parts = {"train": enough[2 * held_out :], "validation": enough[:held_out], "test": enough[held_out : 2 * held_out]}
    of = {name: np.isin(users, chosen) for name, chosen in parts.items()}
    known = np.isin(items, items[of["train"]])
    item_ids = np.concatenate([[-1], np.unique(items[of["train"]])])
    item_row = np.searchsorted(item_ids, items)

    def made(where):
        return Interactions.of_pairs(row[where], item_row[where], len(ids), len(item_ids))

    splits = {}
    for name in ("validation", "test"):
        of_part = np.flatnonzero(of[name] & known)
        shuffled = of_part[np.lexsort([random.random(len(of_part)), row[of_part]])]
        _, begin, length = np.unique(row[shuffled], return_index=True, return_counts=True)
        place = np.arange(len(shuffled)) - np.repeat(begin, length)
        asked = np.where(length < minimum, 0, np.floor((1 - told) * length + 1e-9))  # 10 times .2 is 2, not 1.9999
        is_test = np.zeros(len(users), bool)
        is_test[shuffled[place < np.repeat(asked, length)]] = True
        train, seen = made(of["train"]), made(of["train"] | (of[name] & known & ~is_test))
        splits[name] = Split(train, seen, made(is_test), ids, item_ids)
    return splits


def _parted(users, items, part, *times) -> dict[str, Split]:
    """Rows with 0 for training, 1 for validation, 2 for the test; what repeats an earlier pair is not asked for."""
    (_, user), (_, item) = (np.unique(ids, return_inverse=True) for ids in (users, items))
    _, pair = np.unique(user * (item.max() + 1) + item, return_inverse=True)
    earliest = np.full(pair.max() + 1, 3)
    np.minimum.at(earliest, pair, part)
    keep = (part == 0) | (part == earliest[pair])
    places = [keep & (part == each) for each in range(3)]
    return given(*(tuple(column[place] for column in (users, items, *times)) for place in places))


def prepared(data) -> dict[str, Split]:
    """The same of prepared data: what its record batches hold, and the pairs of its parts.

    Ratings and times are there if the config has features of the columns rating and timestamp. Rows are those of the
    tables of embeddings, but user row 0 and item 0 are for all ids that training does not know, also where
    data.oov_buckets is more than 1. Of many users only some are asked, and only theirs is `seen`.

    Args:
      data: a `prepare.Prepared`.

    Raises:
      ValueError: the training rows do not fit in this machine's memory.
    """
    from recsys_common import record_batches, scale

    rows, memory = min(data.train.rows, data.config.data.limit or data.train.rows), scale.machine()["memory_gb"]
    if memory and rows * BYTES_A_ROW > memory * 2**30 / 2:
        raise ValueError(
            f"{data.folder}: {rows:,} training rows take {rows * BYTES_A_ROW / 2**30:.0f} GB while they are sorted, "
            f"expected half of the {memory} GB of this machine at most. data.limit takes the first of them, which are "
            "a random sample, as the files are."
        )
    there = data.config.record_columns()
    names = ["user_index", "item_index", *(name for name in ("rating", "timestamp") if name in there)]
    parts, read = [], 0
    for batch in record_batches.read(data.train, names).as_numpy_iterator():
        parts.append([batch[name][: rows - read] for name in names])
        read += len(parts[-1][0])
        if read >= rows:
            break
    columns = {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
    unknown = data.config.data.oov_buckets - 1  # the last row of theirs
    columns |= {name: np.maximum(columns[name] - unknown, 0) for name in ("user_index", "item_index")}
    known = np.flatnonzero(columns["item_index"] > 0)
    order = known[np.argsort(columns.get("timestamp", columns["user_index"])[known], kind="stable")]
    users, items, ratings, times = (
        columns[name][order] if name in columns else None
        for name in ("user_index", "item_index", "rating", "timestamp")
    )
    user_ids, item_ids = (np.append(-1, data.vocabulary(side)) for side in ("user", "item"))
    size, made = (len(user_ids), len(item_ids)), {}
    train = Interactions.of_pairs(users, items, *size, ratings, times)
    for part in ("validation", "test"):
        pairs = (np.maximum(rows - unknown, 0) for rows in data.pairs(part))
        asked_users, asked_items, seen_users, seen_items = pairs
        seen = Interactions.of_pairs(seen_users[seen_items > 0], seen_items[seen_items > 0], *size)
        test = Interactions.of_pairs(asked_users, asked_items, *size)
        made[part] = Split(train, seen, test, user_ids, item_ids)
    return made


# Ratings ------------------------------------------------------------------------------------------------


class RatingSplit(NamedTuple):
    """Ratings to train on, with `values`, and those to be predicted: users, items int [N], ratings float32 [N]."""

    train: Interactions
    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray


def rated(train: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...]) -> RatingSplit:
    """Training and test as `read_ratings` gives them. Rows and items are numbered over both."""
    user_ids = np.unique(np.concatenate([train[0], test[0]]))
    item_ids = np.concatenate([[-1], np.unique(np.concatenate([train[1], test[1]]))])
    users, items = np.searchsorted(user_ids, train[0]), np.searchsorted(item_ids, train[1])
    data = Interactions.of_pairs(users, items, len(user_ids), len(item_ids), values=train[2])
    asked = np.searchsorted(user_ids, test[0]), np.searchsorted(item_ids, test[1])
    return RatingSplit(data, *asked, test[2], user_ids, item_ids)


def random_folds(rows: int, test_fraction: float, seed: int = 0) -> list[np.ndarray]:
    """Masks [rows] of disjoint random tests: ten of a tenth, five of a fifth. The first of ten is "90/10"."""
    folds = round(1 / test_fraction)
    number = np.random.default_rng(seed).permutation(rows) % folds
    return [number == fold for fold in range(folds)]
