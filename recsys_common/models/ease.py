"""What does the best linear model from items to items reach? One matrix, in closed form.

    min_B |X - X B|^2 + l2 |B|^2   with diag(B) = 0                                           (1)
    P = (X'X + l2 I)^-1,    B_ij = -P_ij / P_jj,    B_jj = 0                                  (2)
    score(u, .) = X_u B                                                                       (3)

X [users, items] is 1 where somebody had something (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW
2019, equations 1, 8). No seed, no passes, one setting. Memory and time are those of a dense items x items matrix and
its inverse: .05 GB for ml-1m, 40 GB for 100,000 items.

Needs: interactions.py declared_features.py scale.py
"""

from __future__ import annotations

import numpy as np

from recsys_common.declared_features import Positive, Section, field
from recsys_common.interactions import Interactions

CELLS = 25_000_000  # of X'X made at once: 100 MB


class Parameters(Section):
    """The settings."""

    l2: Positive = field(500.0, "of (1): what keeps B small")


SEARCH = {"l2": (10.0, 10_000.0, "log")}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> Ease:
    """Solve (2) in place. `seed` and `after_epoch` are of other models.

    Raises:
      ValueError: items x items numbers do not fit in this machine's memory.
    """
    from scipy.linalg import lapack

    from recsys_common import scale

    needed, there = train.num_items**2 * 4 / 2**30, scale.machine()["memory_gb"]
    if needed * 1.2 > (there or np.inf):
        raise ValueError(
            f"ease needs {needed:.1f} GB for {train.num_items:,} x {train.num_items:,} items, found {there} GB. Leave "
            "out rare items, or take ials, whose memory grows with the items alone."
        )
    X = train.matrix()
    transposed, size = X.T.tocsr(), max(1, CELLS // train.num_items)
    G = np.empty((train.num_items, train.num_items), np.float32, order="F")
    for begin in range(0, train.num_items, size):
        block = slice(begin, begin + size)
        G[:, block] = (transposed @ X[:, block]).toarray()  # X'X
    G[np.diag_indices_from(G)] += parameters.l2
    # X'X + l2 I = LL', and its inverse from L, both in the memory of G: the upper triangle stays as it was.
    P, failed = lapack.spotrf(G, lower=True, overwrite_a=True, clean=False)
    P, failed_too = lapack.spotri(P, lower=True, overwrite_c=True) if not failed else (P, failed)
    if failed or failed_too:
        raise ValueError(
            f"model.l2: found {parameters.l2}, at which X'X + l2 I is singular in float32; take a larger one"
        )
    diagonal = P.diagonal().copy()
    for column in range(train.num_items - 1):  # the other triangle
        P[column, column + 1 :] = P[column + 1 :, column]
    B = P.T  # the same, since it is symmetric, and its rows lie in one piece: a product with X would copy it else
    B /= -diagonal  # (2): column j by P_jj
    B[np.diag_indices_from(B)] = 0
    return Ease(B)


class Ease:
    """The matrix.

    Attributes:
      weights: float32 [num_items, num_items], B.
    """

    folds_in = True

    def __init__(self, weights: np.ndarray):
        self.weights = weights

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """Int [B] rows of `seen` -> float32 [B, num_items], equation (3)."""
        return seen.rows(rows).matrix() @ self.weights
