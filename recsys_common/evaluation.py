"""Which items, of all items, would it have shown, and how good is that? Exact full ranking.

    result = evaluate(model.scores, test_users, test_items, seen_users, seen_items, num_items=n, k=10)
    result["NDCG@10"]

Every item is ranked for every test user, without those that the user has already had. Sampled metrics (one true item
among a hundred random ones) are not offered: they reorder models (Krichene & Rendle, "On Sampled Metrics for Item
Recommendation", KDD 2020). Equal scores are ordered by a fixed random permutation of the items, so that a model that
gives everything the same score gets chance, not the ids' order.

Needs: nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 512  # users scored together, at most, and
CELLS = 25_000_000  # scores held at once: 100 MB in float32


def evaluate(
    scores: Callable[[np.ndarray], np.ndarray],
    test_users: np.ndarray,
    test_items: np.ndarray,
    seen_users: np.ndarray,
    seen_items: np.ndarray,
    num_items: int,
    k: int = 10,
) -> dict[str, float]:
    """Means over the users that have at least one test item.

    For a user with test items T, of which `hits` are among the k shown, at ranks r:
    HR@k = 1 if hits > 0; recall@k = hits / |T|; NDCG@k = sum 1 / log2(1 + r) over the hits, divided by the same sum
    for a perfect list, sum_(j=1..min(k, |T|)) 1 / log2(1 + j) (Jarvelin & Kekalainen 2002, binary gains);
    MRR = 1 / (rank of the first test item, over the whole ranking); coverage@k = share of items 1..num_items - 1
    shown to at least one user.

    Args:
      scores: int [U] user indices -> float [U, num_items]; higher is better, -inf is never shown.
      test_users, test_items: int [N], the pairs asked for. Item 0 stands for "not in the vocabulary": it can never be
        shown, and counts against the model.
      seen_users, seen_items: int [M], pairs before the test; these items are not shown again.
      num_items: items including item 0.
      k: length of the list.

    Raises:
      ValueError: no test pair, an index out of range, scores of another shape, or a score that is not a number.
    """
    ranks, users, shown = rank(scores, test_users, test_items, seen_users, seen_items, num_items, k)
    _, user_row, targets = np.unique(users, return_inverse=True, return_counts=True)
    gain = np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)
    perfect = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
    hits = np.bincount(user_row, ranks <= k)
    first = np.full(len(targets), np.inf)
    np.minimum.at(first, user_row, ranks)
    return {
        f"HR@{k}": float(np.mean(hits > 0)),
        f"recall@{k}": float(np.mean(hits / targets)),
        f"NDCG@{k}": float(np.mean(np.bincount(user_row, gain) / perfect[np.minimum(targets, k) - 1])),
        "MRR": float(np.mean(1 / first)),
        f"coverage@{k}": float(len(np.unique(shown[shown > 0])) / (num_items - 1)),
        "users": len(targets),
    }


def rank(scores, test_users, test_items, seen_users, seen_items, num_items: int, k: int = 10):
    """The rank of each test pair, and the list that each test user is shown.

    Returns:
      ranks: float [N'], 1 for the top of the list, inf for an item that cannot be shown. Pairs that occur twice in the
        test, or that the user had already seen, are asked for once and not at all.
      users: int [N'], whose rank it is.
      shown: int [U, min(k, num_items - 1)], best first, one row for each distinct test user in ascending order; 0
        where a user has seen nearly everything.
    """
    test_users, test_items = np.asarray(test_users, np.int64), np.asarray(test_items, np.int64)
    seen_users, seen_items = np.asarray(seen_users, np.int64), np.asarray(seen_items, np.int64)
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

    order = np.random.default_rng(0).permutation(np.arange(1, num_items))  # tie-breaking; item 0 is never shown
    column_of = np.empty(num_items, np.int64)
    column_of[order] = np.arange(num_items - 1)
    by_user = np.argsort(seen_users, kind="stable")
    seen_users, seen_items = seen_users[by_user], seen_items[by_user]
    users = np.unique(test_users)
    k = min(k, num_items - 1)
    shown, ranks = np.zeros((len(users), k), np.int64), np.empty(len(known))
    size = max(1, min(BLOCK, CELLS // num_items))
    for begin in range(0, len(users), size):
        block = users[begin : begin + size]
        score = np.asarray(scores(block), np.float32)
        if score.shape != (len(block), num_items):
            raise ValueError(f"scores gave shape {score.shape} for {len(block)} users and {num_items} items")
        score = score[:, order]
        if np.isnan(score).any():
            row, column = np.argwhere(np.isnan(score))[0]
            raise ValueError(f"the score of user {block[row]} for item {order[column]} is NaN; the training diverged")
        low, high = np.searchsorted(seen_users, [block[0], block[-1] + 1])
        row, item = np.searchsorted(block, seen_users[low:high]), seen_items[low:high]
        of_block = (block[np.minimum(row, len(block) - 1)] == seen_users[low:high]) & (item > 0)
        score[row[of_block], column_of[item[of_block]]] = -np.inf

        shown[begin : begin + len(block)] = _top(score, order, k)
        low, high = np.searchsorted(known[:, 0], [block[0], block[-1] + 1])
        row, column = np.searchsorted(block, known[low:high, 0]), column_of[known[low:high, 1]]
        for piece in np.array_split(np.arange(high - low), max(1, (high - low) // size)):
            others, own = score[row[piece]], score[row[piece], column[piece]][:, None]
            earlier = np.arange(num_items - 1) < column[piece][:, None]
            place = 1 + ((others > own) | ((others == own) & earlier)).sum(1)
            ranks[low + piece] = np.where(np.isneginf(own[:, 0]), np.inf, place)
    ranks = np.concatenate([ranks, np.full(len(missing), np.inf)])
    return ranks, np.concatenate([known[:, 0], missing]), shown


def _top(score: np.ndarray, order: np.ndarray, k: int) -> np.ndarray:
    """Items of the k highest scores, best first; the lower column first where scores are equal; 0 for -inf."""
    threshold = np.partition(score, -k, axis=1)[:, -k][:, None]
    # Of the columns at the threshold keep the first ones, as many as are needed to make k.
    at, above = score == threshold, score > threshold
    keep = above | (at & (np.cumsum(at, 1) <= k - above.sum(1, keepdims=True)))
    columns = np.nonzero(keep)[1].reshape(len(score), k)
    best = np.take_along_axis(score, columns, 1)
    best_first = np.argsort(-best, axis=1, kind="stable")
    items = np.where(np.isneginf(best), 0, order[columns])
    return np.take_along_axis(items, best_first, 1)
