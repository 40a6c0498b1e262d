"""Which items, of all items, would it have shown, and how good is that? Exact full ranking.

    result = evaluate(model.scores, test_users, test_items, seen_users, seen_items, num_items=n, k=10)
    result["NDCG@10"]
    ranking = rank(...)                         # the same arguments; metrics.py says what else can be asked of it

Every item is ranked for every test user, without those that the user has already had. Metrics against a sample, one
true item among a hundred random ones, reorder models (Krichene & Rendle, "On Sampled Metrics for Item Recommendation",
KDD 2020); metrics.py has them only to show that. Equal scores are ordered by a fixed random permutation of the items,
so that a model that gives everything the same score gets chance, not the ids' order.

Needs: metrics.py
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

BLOCK = 512  # users scored together, at most, and
CELLS = 25_000_000  # scores held at once: 100 MB in float32
SORTED_FROM = 4  # targets of a user; for more, a row is sorted once and not compared with each


class Ranking(NamedTuple):
    """Where the items that were asked for stand, and what is shown.

    Attributes:
      ranks: float64 [N], 1 for the top of the list, inf for an item that cannot be shown. Pairs that occur twice in the
        test, or that the user had already seen, are asked for once and not at all.
      users: int64 [N], whose rank it is.
      items: int64 [N], the item; 0 for one outside the vocabulary, which counts each time it is asked for.
      shown: int64 [U, min(k, num_items - 1)], best first, one row for each distinct test user in ascending order; 0
        where a user has seen nearly everything.
      num_items: items including item 0.
    """

    ranks: np.ndarray
    users: np.ndarray
    items: np.ndarray
    shown: np.ndarray
    num_items: int


def evaluate(
    scores: Callable[[np.ndarray], np.ndarray],
    test_users: np.ndarray,
    test_items: np.ndarray,
    seen_users: np.ndarray,
    seen_items: np.ndarray,
    num_items: int,
    k: int = 10,
) -> dict[str, float]:
    """Means over the users that have a test item: HR@k, recall@k, NDCG@k, MRR and coverage@k, as metrics.py has them.

    Args and errors are those of `rank`. The value of "users" is their number.
    """
    from recsys_common import metrics

    ranking = rank(scores, test_users, test_items, seen_users, seen_items, num_items, k)
    of_users = metrics.per_user(ranking, (k,), ("HR", "recall", "NDCG", "MRR"))
    means = {name: float(np.mean(values)) for name, values in of_users.items()}
    return means | {f"coverage@{k}": metrics.coverage(ranking, k), "users": len(np.unique(ranking.users))}


def rank(
    scores: Callable[[np.ndarray], np.ndarray],
    test_users: np.ndarray,
    test_items: np.ndarray,
    seen_users: np.ndarray,
    seen_items: np.ndarray,
    num_items: int,
    k: int = 10,
) -> Ranking:
    """The rank of each test pair, and the list that each test user is shown.

    Scores are asked for in blocks of users; what follows runs on all cores, at 2 to 3 reads of each score.

    Args:
      scores: int64 [B] user indices -> float [B, num_items]; higher is better, -inf is never shown, column 0 is not
        looked at.
      test_users, test_items: int [N], the pairs asked for. Item 0 stands for "not in the vocabulary": it can never be
        shown, and counts against the model.
      seen_users, seen_items: int [M], pairs before the test; these items are not shown again.
      num_items: items including item 0.
      k: length of the list.

    Raises:
      ValueError: no test pair, an index out of range, scores of another shape, or a score that is not a number.
    """
    test_users, test_items = np.asarray(test_users, np.int64), np.asarray(test_items, np.int64)
    seen_users, seen_items = np.asarray(seen_users, np.int64), np.asarray(seen_items, np.int64)
    known, missing = _asked(test_users, test_items, seen_users, seen_items, num_items, k)
    # Where scores are equal, the item of lower priority number stands first.
    priority = np.append(0, np.empty(num_items - 1, np.int64))
    priority[np.random.default_rng(0).permutation(np.arange(1, num_items))] = np.arange(1, num_items)

    by_user = np.argsort(seen_users, kind="stable")
    seen_users, seen_items = seen_users[by_user], seen_items[by_user]
    users = np.unique(test_users)
    k = min(k, num_items - 1)
    shown, ranks = np.zeros((len(users), k), np.int64), np.empty(len(known))
    size, workers = max(1, min(BLOCK, CELLS // num_items)), os.cpu_count() or 1

    def piece(begin: int, score: np.ndarray) -> None:
        """Lists and ranks of users[begin:begin + len(score)]."""
        block = users[begin : begin + len(score)]
        low, high = np.searchsorted(seen_users, [block[0], block[-1] + 1])
        row = np.searchsorted(block, seen_users[low:high])
        of_block = block[row] == seen_users[low:high]
        hidden = (
            np.append(row[of_block], np.arange(len(block))),
            np.append(seen_items[low:high][of_block], [0] * len(block)),
        )
        before = score[hidden]  # the array is the model's, who may want it back as it was
        score[hidden] = -np.inf
        shown[begin : begin + len(block)] = _top(score, priority, k, block)
        low, high = np.searchsorted(known[:, 0], [block[0], block[-1] + 1])
        ranks[low:high] = _ranks(score, np.searchsorted(block, known[low:high, 0]), known[low:high, 1], priority)
        score[hidden] = before

    with ThreadPoolExecutor(workers) as pool:
        for begin in range(0, len(users), size):
            block = users[begin : begin + size]
            score = np.require(scores(block), np.float32, ["C", "W"])
            if score.shape != (len(block), num_items):
                raise ValueError(f"scores gave shape {score.shape} for {len(block)} users and {num_items} items")
            step = max(1, min(-(-len(block) // workers), CELLS // 16 // num_items))
            starts = range(0, len(block), step)
            list(pool.map(lambda at: piece(begin + at, score[at : at + step]), starts))  # noqa: B023, awaited here
    owners = np.concatenate([known[:, 0], missing])
    items = np.concatenate([known[:, 1], np.zeros(len(missing), np.int64)])
    return Ranking(np.concatenate([ranks, np.full(len(missing), np.inf)]), owners, items, shown, num_items)


def _asked(test_users, test_items, seen_users, seen_items, num_items: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct unseen test pairs [N, 2] of known items, by user; and the user of each pair of an unknown item."""
    if k < 1 or num_items < 2:
        raise ValueError(f"k={k}, num_items={num_items}; expected k of at least 1 and 2 or more items (item 0 is none)")
    for name, items in (("test_items", test_items), ("seen_items", seen_items)):
        if len(items) and (items.min() < 0 or items.max() >= num_items):
            raise ValueError(f"{name} has {items.min()}..{items.max()}, expected 0..{num_items - 1}")
    if len(test_users) == 0:
        raise ValueError("the test has no pairs; there is nothing to rank. Check the split.")
    # An item outside the vocabulary is a miss each time it is asked for; the others are asked for once.
    known = np.unique(np.stack([test_users, test_items], 1)[test_items > 0], axis=0)
    known = known[~np.isin(known @ [num_items, 1], np.stack([seen_users, seen_items], 1) @ [num_items, 1])]
    missing = test_users[test_items == 0]
    if len(known) + len(missing) == 0:
        raise ValueError("every test pair is also a seen pair; there is nothing to rank. Check the split.")
    return known, missing


def _ranks(score: np.ndarray, rows: np.ndarray, items: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """1 + the items that stand before each of `items`, in its row of `score`; `rows` ascend."""
    found = np.empty(len(rows))
    starts = np.append(np.flatnonzero(np.diff(rows, prepend=-1)), len(rows))
    for begin, end in itertools.pairwise(starts):
        others, asked = score[rows[begin]], items[begin:end]
        own = others[asked]
        if end - begin > SORTED_FROM:
            in_order = np.sort(others)
            above = len(others) - np.searchsorted(in_order, own, "right")
            equal = len(others) - np.searchsorted(in_order, own, "left") - above
        else:
            above = np.array([np.count_nonzero(others > each) for each in own])
            equal = np.array([np.count_nonzero(others == each) for each in own])
        for tied in np.flatnonzero(equal > 1):
            above[tied] += np.count_nonzero(priority[others == own[tied]] < priority[asked[tied]])
        found[begin:end] = np.where(np.isneginf(own), np.inf, 1 + above)
    return found


def _top(score: np.ndarray, priority: np.ndarray, k: int, users: np.ndarray) -> np.ndarray:
    """Items of the k highest scores [B, k], best first; 0 for -inf.

    The columns are dealt to groups, and of each group the maximum is taken: one pass that NumPy vectorises. The k
    highest scores lie in the k groups of the highest maxima, so only those are looked into.
    """
    width = int((len(priority) * k) ** 0.5)  # groups: as many as there are columns in k groups
    depth = len(priority) // width
    strides = (score.strides[0], width * score.itemsize, score.itemsize)
    dealt = np.lib.stride_tricks.as_strided(score, (len(score), depth, width), strides, writeable=False)
    maxima = np.concatenate([dealt.max(1), score[:, depth * width :]], 1)  # the last columns are groups of their own
    if np.isnan(maxima).any():  # a maximum over a NaN is one
        row, column = np.argwhere(np.isnan(score))[0]
        raise ValueError(f"the score of user {users[row]} for item {column} is NaN; the training diverged")
    groups = np.argpartition(maxima, -k, axis=1)[:, -k:]
    inside = groups[:, :, None] + width * np.arange(depth)  # [B, k, depth]
    alone = groups >= width
    inside[alone] = (groups[alone] + width * (depth - 1))[:, None]
    repeated = np.zeros(inside.shape, bool)
    repeated[alone, 1:] = True
    columns = inside.reshape(len(score), -1)
    looked_at = np.where(repeated.reshape(columns.shape), -np.inf, np.take_along_axis(score, columns, 1))
    best = np.argpartition(looked_at, -k, axis=1)[:, -k:]
    columns, values = np.take_along_axis(columns, best, 1), np.take_along_axis(looked_at, best, 1)

    # Where more than k scores are as high as the lowest that is shown, the priority decides among those.
    lowest = values.min(1, keepdims=True)
    in_other_groups = (maxima >= lowest).sum(1) > (np.take_along_axis(maxima, groups, 1) >= lowest).sum(1)
    tied = np.flatnonzero(((looked_at >= lowest).sum(1) > k) | in_other_groups)
    if len(tied):
        columns[tied] = _top_of_tied(score[tied], priority, k)
        values[tied] = np.take_along_axis(score[tied], columns[tied], 1)
    order = np.lexsort([priority[columns], -values])
    return np.take_along_axis(np.where(np.isneginf(values), 0, columns), order, 1)


def _top_of_tied(score: np.ndarray, priority: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k highest scores, in any order; of equal ones those of lower priority."""
    order = np.argsort(priority)
    score = score[:, order]
    threshold = np.partition(score, -k, axis=1)[:, -k][:, None]
    at, above = score == threshold, score > threshold
    keep = above | (at & (np.cumsum(at, 1) <= k - above.sum(1, keepdims=True)))
    return order[np.nonzero(keep)[1].reshape(len(score), k)]
