"""Which items have the highest scores for a user, exactly or nearly?

    places, scores = item_index.exact(vectors, users, 100)                     # the yardstick: reads every vector
    about = item_index.build("index.usearch", vectors, sample_of_users, k=100)  # as artifact.Index has it
    index = item_index.load("index.usearch", about["expansion_search"])
    places, scores = item_index.search(index, users, 100, vectors)

The graph is HNSW (Malkov & Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical
navigable small world graphs", 2016) by usearch, whose files other languages read too. Chosen at the search, and
not stored in the file, is `expansion_search`: more candidates are slower and find more. `build` measures it.

A score is an inner product, by which a long vector is near to everyone; where lengths differ much, the graph has a few
hubs, and some items are never reached. Then each item gets one number more, which makes all of them equally long, and a
user a 0: no inner product of a user and an item changes, but items are now neighbours where they are alike (Bachrach et
al., "Speeding Up the Xbox Recommender System Using a Euclidean Transformation for Inner-Product Spaces", RecSys 2014).
That is no better in general: one item far longer than all others makes the others alike. So it is the second choice.

Needs: nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CONNECTIVITY, EXPANSION_ADD = 16, 64  # neighbours of an item, and candidates for them; enough for a million items
SEARCHES = (64, 128, 256, 512, 1024, 2048)  # expansion_search that are tried
BLOCK = 1 << 16  # items whose scores are in memory at once


def exact(vectors: np.ndarray, users: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items with the highest inner products, best first; of equal scores the lower place first.

    Args:
      vectors: float32 [I, D]; may be mapped.
      users: float32 [n, D].

    Returns:
      Places int64 and scores float32, [n, min(k, I)].

    Raises:
      ValueError: a user's vector has a number that is infinite or none: it is near to no item.
    """
    _refuse_strange(users)
    k = min(k, len(vectors))
    scores, places = np.full((len(users), k), -np.inf, np.float32), np.zeros((len(users), k), np.int64)
    for begin in range(0, len(vectors), BLOCK):
        block = users @ np.asarray(vectors[begin : begin + BLOCK]).T
        for user, row in enumerate(block):
            better = np.flatnonzero(row > scores[user, -1])
            if len(better) > k:
                better = better[row[better] >= np.partition(row[better], -k)[-k]]
            joined = np.concatenate([scores[user], row[better]])
            best = np.argsort(-joined, kind="stable")[:k]
            places[user] = np.concatenate([places[user], begin + better])[best]
            scores[user] = joined[best]
    return places, scores


def build(
    path: str | Path, vectors: np.ndarray, users: np.ndarray, k: int = 100, recall: float = 0.95, threads: int = 1
) -> dict:
    """Write an index, and find how it has to be searched.

    Args:
      vectors: float32 [I, D]; may be mapped.
      users: float32 [n, D], vectors of real users, by which the recall is measured.
      k: length of their lists.
      recall: `expansion_search` becomes the smallest of `SEARCHES` that reaches it; if none does, the best one.
      threads: the file is the same at every build with 1 only.

    Returns:
      What artifact.Index has, but the file.
    """
    k, best = min(k, len(vectors)), {}
    right, _ = exact(vectors, users, k)
    for lengthened in (False, True):
        index = _index(vectors, lengthened, threads)
        for expansion in SEARCHES:
            index.expansion_search = expansion
            found = recall_of(search(index, users, k)[0], right)
            if not best or found > best["recall"]["value"]:
                best = {
                    "metric": "ip",
                    "dtype": "f32",
                    "dim": index.ndim,
                    "connectivity": CONNECTIVITY,
                    "expansion_add": EXPANSION_ADD,
                    "expansion_search": expansion,
                    "recall": {"k": k, "value": found, "users": len(users)},
                }
            if found >= recall:
                break
        if best["dim"] == index.ndim:
            index.save(str(path))
        if found >= recall:
            break
    return best


def _index(vectors: np.ndarray, lengthened: bool, threads: int):
    from usearch.index import Index

    dim = vectors.shape[1] + lengthened
    index = Index(ndim=dim, metric="ip", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD)
    blocks = range(0, len(vectors), BLOCK)
    squares = [np.square(vectors[begin : begin + BLOCK], dtype=np.float64).sum(1) for begin in blocks]
    longest = max(each.max() for each in squares)
    for begin, square in zip(blocks, squares, strict=True):
        block = np.zeros((len(square), dim), np.float32)
        block[:, : vectors.shape[1]] = vectors[begin : begin + BLOCK]
        if lengthened:
            block[:, -1] = np.sqrt(longest - square)
        index.add(np.arange(begin, begin + len(block)), block, threads=threads)
    return index


def load(path: str | Path, expansion_search: int):
    """An index of `build`, mapped from its file."""
    from usearch.index import Index

    index = Index.restore(str(path), view=True)
    index.expansion_search = expansion_search
    return index


def search(index, users: np.ndarray, k: int, vectors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `exact`, nearly.

    The graph may lead to fewer items than there are.

    Args:
      index: of `load`.
      vectors: of `exact`: the list of a user for whom fewer are found is taken from there. None: place -1 and score
        -inf fill it up.

    Returns:
      Places int64 and scores float32, [n, min(k, I)].

    Raises:
      ValueError: as `exact`.
    """
    _refuse_strange(users)
    longer, k = np.zeros((len(users), index.ndim), np.float32), min(k, len(index))
    longer[:, : users.shape[1]] = users
    found = index.search(longer, k)
    counts = np.asarray(found.counts if len(users) != 1 else [len(found)])  # of one user it gives just what is found
    there = np.arange(k) < counts[:, None]
    places, scores = np.full(there.shape, -1), np.full(there.shape, -np.inf, np.float32)
    keys, distances = (each if len(users) == 1 else each[there] for each in (found.keys, found.distances))
    places[there], scores[there] = keys, 1 - distances
    if vectors is not None and (few := counts < k).any():
        places[few], scores[few] = exact(vectors, users[few], k)
    return places, scores


def _refuse_strange(users: np.ndarray) -> None:
    if not (finite := np.isfinite(users).all(1)).all():
        raise ValueError(f"users: row {finite.argmin()} has a number that is not finite, expected finite numbers")


def recall_of(found: np.ndarray, right: np.ndarray) -> float:
    """Share of each row of `right` [n, k] that is in the same row of `found`; the mean of the rows.

    Place -1 in `found` stands for none.
    """
    return float(np.mean([np.isin(theirs, ours).mean() for ours, theirs in zip(found, right, strict=True)]))
