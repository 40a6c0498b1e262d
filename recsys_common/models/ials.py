"""Which vectors explain all pairs, those that happened and, with less weight, those that did not?

    min  sum_((u,i) in S) (<p_u, q_i> - 1)^2 + alpha0 sum_u sum_i <p_u, q_i>^2
         + l2 (sum_u (n_u + alpha0 I)^nu |p_u|^2 + sum_i (n_i + alpha0 U)^nu |q_i|^2)                             (1)

n_u of I items were taken by user u, item i was taken by n_i of U users. With the items fixed, a user's row is the
solution of a linear system,

    (sum_(i in S_u) q_i q_i' + alpha0 Q'Q + l2 (n_u + alpha0 I)^nu) p_u = sum_(i in S_u) q_i                      (2)

and the second sum of (1) costs one Gramian Q'Q for all users (Hu, Koren & Volinsky, ICDM 2008). Regularisation scaled
by frequency, and how to tune it: Rendle, Krichene, Zhang & Koren, "Revisiting the Performance of iALS on Item
Recommendation Benchmarks", RecSys 2022, equations 2 to 5. Solving all of (2) takes d^2 an interaction. A block of
the row at a time, from where it stands, takes d times the block, and is as good after as many passes: iALS++, Rendle
et al., arXiv 2110.14044,

    p_u[b] -= H_bb^-1 g_b,    g_b the gradient of (1) for the block, H_bb that part of the matrix of (2)          (3)

Users are independent of each other, so threads share them; a seed gives one model, whatever their number.

Needs: interactions.py declared_features.py
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.linalg  # noqa: F401 - its BLAS is numba's; threadpool_limits reaches only what is loaded
from threadpoolctl import threadpool_limits

from recsys_common.declared_features import NotNegative, Positive, Rows, Section, field
from recsys_common.interactions import Interactions

TILE = 512  # rows that are gathered at a time: they stay in the cache
PIECES = 32  # of the users, dealt to threads one after the other
FAST = {"fastmath": True, "nogil": True, "error_model": "numpy", "cache": True}


class Parameters(Section):
    """The settings."""

    dim: Rows = field(128, "length of p_u and q_i")
    alpha0: Positive = field(0.1, "of (1): the weight of all pairs, beside 1 for those that happened")
    l2: NotNegative = field(0.01, "of (1)")
    nu: NotNegative = field(1.0, "of (1): 0 regularises all rows alike, 1 in proportion to their frequency")
    epochs: Rows = field(16, "passes over users and items")
    block: Rows = field(32, "of (3): numbers of a row that are solved at a time")
    initial: Positive = field(0.1, "standard deviation of the initial rows, times sqrt(dim)")


SEARCH = {
    "dim": [64, 128, 256],
    "alpha0": (0.01, 1.0, "log"),
    "l2": (0.001, 0.03, "log"),
}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> IALS:
    """Fit (1): all users, then all items, `epochs` times.

    `after_epoch(model, epoch)` is called after each pass, epochs from 1, and returns True to stop.
    """
    random, by_user = np.random.default_rng(seed), train.matrix()
    by_item = by_user.T.tocsr()
    shape = (train.num_users + train.num_items, parameters.dim)
    rows = random.standard_normal(shape, np.float32) * np.float32(parameters.initial / parameters.dim**0.5)
    model = IALS(rows[: train.num_users].copy(), rows[train.num_users :].copy(), parameters)
    model.items[np.diff(by_item.indptr) == 0] = 0
    for epoch in range(1, parameters.epochs + 1):
        _solved(model.users, model.items, by_user, parameters, parameters.block)
        _solved(model.items, model.users, by_item, parameters, parameters.block)
        if after_epoch and after_epoch(model, epoch):
            break
    return model


class IALS:
    """Vectors.

    Attributes:
      users: float32 [num_users, dim], of the users of training.
      items: float32 [num_items, dim].
      parameters: the settings.
    """

    folds_in = True

    def __init__(self, users: np.ndarray, items: np.ndarray, parameters: Parameters):
        self.users, self.items, self.parameters = users, items, parameters

    def fold_in(self, seen: Interactions, rows) -> np.ndarray:
        """The solution of (2) for int [B] rows of `seen`, of anybody -> float32 [B, dim]."""
        vectors = np.zeros((len(rows), self.items.shape[1]), np.float32)
        _solved(vectors, self.items, seen.rows(rows).matrix(), self.parameters, self.items.shape[1])
        return vectors

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """Int [B] rows of `seen` -> float32 [B, num_items], <p_u, q_i> with p_u by their history."""
        return self.fold_in(seen, rows) @ self.items.T


def _solved(rows: np.ndarray, others: np.ndarray, taken, parameters: Parameters, block: int) -> None:
    """Change `rows` by (3), with `others` fixed. `taken`: CSR [rows, others]."""
    gram = np.float32(parameters.alpha0) * (others.T @ others)
    others_there = np.count_nonzero(others.any(1))
    l2 = (parameters.l2 * (np.diff(taken.indptr) + parameters.alpha0 * others_there) ** parameters.nu).astype(
        np.float32
    )
    # Pieces of about equal work: interactions, and a solution for each row.
    work = taken.indptr + np.arange(len(taken.indptr), dtype=np.int64) * rows.shape[1]
    borders = np.unique(np.searchsorted(work, np.linspace(0, work[-1], PIECES + 1)))
    pieces = list(itertools.pairwise(borders))

    def piece(of: tuple[int, int]) -> None:
        _half(rows, others, taken.indptr.astype(np.int64), taken.indices, gram, l2, *of, min(block, rows.shape[1]))

    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # BLAS must not have threads of its own
        list(pool.map(piece, pieces))


@numba.njit(**FAST)
def _half(rows, others, offsets, items, gram, l2, begin, end, block):
    """(3) for each block of rows[begin:end]; a row without interactions becomes 0.

    Args:
      rows: float32 [R, d]; others: float32 [O, d]; offsets, items: of the CSR matrix; gram: alpha0 others' others.
      l2: float32 [R], the factor of |row|^2.
    """
    d, longest = rows.shape[1], 1
    for u in range(begin, end):
        longest = max(longest, offsets[u + 1] - offsets[u])
    error = np.empty(longest, np.float32)  # <p_u, q_i> - 1 of each interaction
    gathered, of_tile = np.empty(TILE * block, np.float32), np.empty(block * block, np.float32)
    hessian = np.empty(block * block, np.float32)
    for u in range(begin, end):
        own, row = items[offsets[u] : offsets[u + 1]], rows[u]
        if len(own) == 0:
            row[:] = 0
            continue
        error[: len(own)] = -1
        change, changed_from = row, 0  # what `error` does not know yet: at first the whole row
        for start in range(0, d, block):
            width = min(block, d - start)
            H = hessian[: width * width].reshape(width, width)
            part = of_tile[: width * width].reshape(width, width)
            g = np.empty(width, np.float32)
            for i in range(width):
                of_pairs = gram[start + i]
                total = l2[u] * row[start + i]
                for j in range(d):
                    total += of_pairs[j] * row[j]
                g[i] = total
                for j in range(width):
                    H[i, j] = of_pairs[start + j]
                H[i, i] += l2[u]
            for first in range(0, len(own), TILE):
                count = min(TILE, len(own) - first)
                x, e = gathered[: count * width].reshape(count, width), error[first : first + count]
                for k in range(count):
                    other = others[own[first + k]]
                    known, now, x_k = (
                        other[changed_from : changed_from + len(change)],
                        other[start : start + width],
                        x[k],
                    )
                    total = np.float32(0)
                    for j in range(len(change)):
                        total += known[j] * change[j]
                    e[k] += total
                    for j in range(width):
                        x_k[j] = now[j]
                np.dot(x.T, x, part)
                for i in range(width):
                    for j in range(width):
                        H[i, j] += part[i, j]
                for k in range(count):
                    e_k, x_k = e[k], x[k]
                    for j in range(width):
                        g[j] += e_k * x_k[j]
            _solve(H, g)
            for j in range(width):
                g[j] = -g[j]
                row[start + j] += g[j]
            change, changed_from = g, start


@numba.njit(**FAST)
def _solve(H, g):
    """H x = g for positive definite H, by Cholesky in place: H becomes garbage and g becomes x.

    Written out, since a call of LAPACK takes longer than so small a system.
    """
    d = len(g)
    for i in range(d):  # row i of U, where U'U = H; and of U'^-1 g
        row, total, k = H[i, i:], g[i], 0
        while k + 4 <= i:  # four rows at a time
            a, b, c, e = H[k, i], H[k + 1, i], H[k + 2, i], H[k + 3, i]
            of_a, of_b, of_c, of_e = H[k, i:], H[k + 1, i:], H[k + 2, i:], H[k + 3, i:]
            for j in range(len(row)):
                row[j] -= a * of_a[j] + b * of_b[j] + c * of_c[j] + e * of_e[j]
            total -= a * g[k] + b * g[k + 1] + c * g[k + 2] + e * g[k + 3]
            k += 4
        while k < i:
            a, of_a = H[k, i], H[k, i:]
            for j in range(len(row)):
                row[j] -= a * of_a[j]
            total -= a * g[k]
            k += 1
        scale = np.float32(1) / np.sqrt(row[0])
        for j in range(len(row)):
            row[j] *= scale
        g[i] = total * scale
    for i in range(d - 1, -1, -1):
        row, known, total = H[i, i + 1 :], g[i + 1 :], g[i]
        for j in range(len(known)):
            total -= row[j] * known[j]
        g[i] = total / H[i, i]
