"""Which items are had by the same people? Neighbours of items, summed over a history.

    score(u, i) = sum_(j in history of u) s(i, j),   s(i, j) = 0 unless j is one of i's `neighbours` nearest        (1)
    cosine:  s(i, j) = n_ij / (sqrt(n_i n_j) + shrinkage)                                                           (2)
    bm25:    s(i, j) = sum_u w_ui w_uj,   w_ui = log(I / n_u) (K + 1) / (K (1 - b + b n_i / mean n) + 1)            (3)

n_ij people had both i and j, n_i had i, and person u had n_u of the I items. Shrinkage takes weight from neighbours
that few people vouch for (Bell & Koren, "Scalable Collaborative Filtering with Jointly Derived Neighborhood
Interpolation Weights", ICDM 2007, section 3.1; Ferrari Dacrema et al., RecSys 2019, section 3.2, tune it). BM25
(Robertson & Zaragoza 2009) takes an item for a document and the people for its words: who has had everything says
little.

Needs: interactions.py declared_features.py
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from recsys_common.declared_features import NotNegative, Positive, Rows, Section, field
from recsys_common.interactions import Interactions

CELLS = 25_000_000  # similarities held at once: 100 MB


class Parameters(Section):
    """The settings."""

    weighting: Literal["cosine", "bm25"] = field("cosine", "(2) or (3)")
    neighbours: Rows = field(200, "items that an item is compared with")
    shrinkage: NotNegative = field(20.0, "of (2), in people")
    k1: Positive = field(1.2, "K of (3): how soon more people say no more")
    b: Annotated[float, Field(ge=0, le=1)] = field(0.75, "b of (3): how much popularity is discounted")


SEARCH = {
    "weighting": ["cosine", "bm25"],
    "neighbours": (10, 1000, "log"),
    "shrinkage": (0.1, 1000.0, "log"),
    "b": (0.0, 1.0, "linear"),
}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> ItemKNN:
    """Compute (2) or (3) a block of items at a time, and keep the nearest. `seed` and `after_epoch` are of others."""
    from scipy import sparse

    had = train.matrix().tocsc()  # [U, I]
    n_i, n_u = np.diff(had.indptr), np.bincount(had.indices, minlength=train.num_users)
    weighted = had
    if parameters.weighting == "bm25":
        idf = np.log((train.num_items - 1) / np.maximum(n_u, 1))
        length = 1 - parameters.b + parameters.b * n_i / max(n_i[1:].mean(), 1e-9)
        of_item = (parameters.k1 + 1) / (parameters.k1 * length + 1)
        weighted = (sparse.diags(idf) @ had @ sparse.diags(of_item)).tocsc().astype(np.float32)  # (3), w
    keep, size = min(parameters.neighbours, train.num_items - 1), max(1, CELLS // train.num_items)
    root, by_user, rows = np.sqrt(n_i), weighted.tocsr(), []
    for begin in range(0, train.num_items, size):
        block = np.arange(begin, min(begin + size, train.num_items))
        s = (weighted[:, block].T @ by_user).toarray()  # [items of the block, I]: n_ij of (2), s of (3)
        if parameters.weighting == "cosine":
            s /= np.maximum(np.outer(root[block], root) + parameters.shrinkage, 1e-9)  # (2)
        s[np.arange(len(block)), block] = 0  # no item is its own neighbour
        nearest = np.argpartition(s, -keep, axis=1)[:, -keep:]
        values = np.take_along_axis(s, nearest, 1)
        pointer = np.arange(0, nearest.size + 1, keep)
        rows.append(sparse.csr_matrix((values.ravel(), nearest.ravel(), pointer), (len(block), train.num_items)))
    similarity = sparse.vstack(rows, format="csr")
    similarity.eliminate_zeros()
    return ItemKNN(similarity)


class ItemKNN:
    """Neighbours.

    Attributes:
      similarity: float32 CSR [num_items, num_items]; row i has the neighbours of item i.
    """

    folds_in = True

    def __init__(self, similarity):
        self.similarity = similarity
        self._transposed = similarity.T.tocsr()

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """Int [B] rows of `seen` -> float32 [B, num_items], equation (1)."""
        return (seen.rows(rows).matrix() @ self._transposed).toarray()
