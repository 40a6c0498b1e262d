"""What does a graph add to matrix factorization? Each user is also the mean of their items, and these of their users.

He, Deng, Wang, Li, Zhang & Wang, "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
SIGIR 2020. A is the graph of users and items, D the number of each one's neighbours:

    E(k+1) = D^-1/2 A D^-1/2 E(k)                                                             (1), equation 8
    E = (E(0) + ... + E(K)) / (K + 1) = P E(0)                                                (2), equations 4, 8
    x(u, i) = <e_u, e_i>                                                                      (3), equation 5
    loss = mean over a batch of -ln sigmoid(x(u, i) - x(u, j)) + l2 / 2 |rows of E(0)|^2      (4), equation 15

Only E(0) is learned, by Adam. P is symmetric and linear, so the gradient of E(0) is P times that of E, which is as many
multiplications as P E(0): two propagations a batch, whatever its size. That is why batches are large here, where the
paper has 2,048, and the rate and l2 higher than its .001 and .0001. (u, i) is drawn of all pairs, where the authors'
code draws u first, and j of the items that u did not take.

Needs: bpr.py interactions.py declared_features.py
"""

from __future__ import annotations

import numba
import numpy as np

from recsys_common.declared_features import NotNegative, Positive, Rows, Section, field
from recsys_common.interactions import Interactions
from recsys_common.models import bpr

MOMENTUM, SQUARES, TINY = np.float32(0.9), np.float32(0.999), np.float32(1e-8)  # of Adam


class Parameters(Section):
    """The settings."""

    dim: Rows = field(64, "length of a row")
    layers: int = field(3, "K of (2); 0: matrix factorization", ge=0)
    epochs: Rows = field(100, "passes; each draws as many triples as there are pairs")
    batch_size: Rows = field(32_768, "triples in a batch")
    learning_rate: Positive = field(0.03, "of Adam")
    l2: NotNegative = field(5e-4, "of (4)")
    negative_power: NotNegative = field(0.25, "j is drawn in proportion to frequency to this power; 0: all alike")


SEARCH = {
    "dim": [32, 64, 128],
    "layers": [1, 2, 3],
    "learning_rate": (0.005, 0.1, "log"),
    "l2": (1e-5, 1e-2, "log"),
    "negative_power": (0.0, 0.75, "linear"),
}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> LightGcn:
    """Fit. `after_epoch(model, epoch)` is called after each pass, epochs from 1, and returns True to stop."""
    random, taken, graph = np.random.default_rng(seed), train.matrix(), _graph(train)
    users = np.repeat(np.arange(train.num_users, dtype=np.int32), np.diff(taken.indptr))
    negatives = bpr.draws(train, parameters.negative_power)
    nodes = train.num_users + train.num_items
    initial = random.normal(0, 0.1, (nodes, parameters.dim)).astype(np.float32)  # E(0)
    initial[: train.num_users][train.lengths == 0] = 0  # nothing is learned of them
    moments = np.zeros((2, *initial.shape), np.float32)
    size, steps = max(min(parameters.batch_size, len(users)), 1), 0
    l2, rate = np.float32(parameters.l2), np.float32(parameters.learning_rate)
    for epoch in range(parameters.epochs):
        for _ in range(-(-len(users) // size)):
            final = _propagated(graph, initial, parameters.layers)
            triples = _triples(size, taken.indptr, taken.indices, users, *negatives, random)
            gradient, counts = _gradient(final, *triples, train.num_users)
            gradient = _propagated(graph, gradient, parameters.layers)
            steps += 1
            _adam(initial, gradient, counts, l2 / np.float32(size), rate, *moments, steps)
        if after_epoch or epoch + 1 == parameters.epochs:
            model = LightGcn(*np.split(_propagated(graph, initial, parameters.layers), [train.num_users]))
            if after_epoch and after_epoch(model, epoch + 1):
                break
    return model


def _graph(train: Interactions):
    """D^-1/2 A D^-1/2 as CSR [users + items, users + items] of float32; users first."""
    from scipy import sparse

    R = train.matrix()
    A = sparse.bmat([[None, R], [R.T, None]], "csr", np.float32)
    D = np.maximum(np.diff(A.indptr), 1).astype(np.float32)
    A.data /= np.sqrt(D[np.repeat(np.arange(len(D)), np.diff(A.indptr))] * D[A.indices])
    return A


def _propagated(graph, rows: np.ndarray, layers: int) -> np.ndarray:
    """P of (2) times rows, float32 [nodes, dim]."""
    total, now = rows.copy(), rows
    for _ in range(layers):
        now = _layer(graph.indptr, graph.indices, graph.data, now)
        total += now
    total /= layers + 1
    return total


@numba.njit(parallel=True, cache=True, fastmath=bpr.ANY_ORDER)
def _layer(indptr, indices, weights, rows):
    """(1): the CSR matrix times rows."""
    out = np.zeros_like(rows)
    for node in numba.prange(len(rows)):
        for at in range(indptr[node], indptr[node + 1]):
            weight, other = weights[at], indices[at]
            for d in range(rows.shape[1]):
                out[node, d] += weight * rows[other, d]
    return out


@numba.njit(cache=True)
def _triples(size, indptr, items, users, ends, first, marks, random):
    """U, i, j: int32 [size] each; j is 0 where none was found."""
    triples = np.empty((3, size), np.int32)
    for n in range(size):
        pair = int(random.random() * len(items))
        u = users[pair]
        triples[0, n], triples[1, n] = u, items[pair]
        triples[2, n] = bpr.other(u, items[indptr[u] : indptr[u + 1]], ends, first, marks, random)
    return triples


@numba.njit(cache=True, fastmath=bpr.ANY_ORDER)
def _gradient(rows, users, items, others, num_users):
    """Of the mean of (4) without l2, by E: float32 [nodes, dim]; and how often each node is there, float32 [nodes]."""
    gradient, counts = np.zeros_like(rows), np.zeros(len(rows), np.float32)
    for n in range(len(users)):
        if others[n] == 0:
            continue
        u, i, j = users[n], num_users + items[n], num_users + others[n]
        x = np.float32(0)
        for d in range(rows.shape[1]):
            x += rows[u, d] * (rows[i, d] - rows[j, d])  # (3)
        slope = np.float32(1) / ((np.float32(1) + np.exp(x)) * np.float32(len(users)))
        for d in range(rows.shape[1]):
            eu, ei, ej = rows[u, d], rows[i, d], rows[j, d]
            gradient[u, d] -= slope * (ei - ej)
            gradient[i, d] -= slope * eu
            gradient[j, d] += slope * eu
        counts[u] += 1
        counts[i] += 1
        counts[j] += 1
    return gradient, counts


@numba.njit(parallel=True, cache=True, fastmath=bpr.ANY_ORDER)
def _adam(rows, gradient, counts, l2, rate, mean, squares, steps):
    """Kingma & Ba, "Adam", ICLR 2015, of all rows: those of no batch have a gradient as well, by the graph."""
    scale = rate * np.sqrt(np.float32(1) - SQUARES**steps) / (np.float32(1) - MOMENTUM**steps)
    for node in numba.prange(len(rows)):
        for d in range(rows.shape[1]):
            g = gradient[node, d] + l2 * counts[node] * rows[node, d]
            mean[node, d] += (np.float32(1) - MOMENTUM) * (g - mean[node, d])
            squares[node, d] += (np.float32(1) - SQUARES) * (g * g - squares[node, d])
            rows[node, d] -= scale * mean[node, d] / (np.sqrt(squares[node, d]) + TINY)


class LightGcn:
    """The fitted model (3).

    Attributes:
      users: float32 [num_users, dim], rows of E.
      items: float32 [num_items, dim], likewise.
    """

    folds_in = False

    def __init__(self, users: np.ndarray, items: np.ndarray):
        self.users, self.items = users, items

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """float32 [B, num_items] of (3), for int [B] rows of users. `seen` is of no use here."""
        return self.users[rows] @ self.items.T
