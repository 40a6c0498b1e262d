"""How would this user rate this item? The mean, what the user and the item add to it, and what their tastes share.

    model = fit(train)                                      # train: `Interactions` with values, the ratings
    model.ratings(users, items)                             # float32 [N]

A rating is predicted, and the parameters are fitted, by

    r_ui = μ + b_u + b_i + <p_u, q_i>                                                         (1)
    min Σ_(u,i) (r_ui - (1))² + λ_b (b_u² + b_i²) + λ (|p_u|² + |q_i|²)                       (2)

Koren, Bell & Volinsky, "Matrix Factorization Techniques for Recommender Systems", IEEE Computer 42(8), 2009: (1) is
their equation 4, (2) their equation 5. The sum is over ratings, so a user of n ratings is regularised n times, λ n
|p_u|²: the weighted λ of Zhou et al., "Large-Scale Parallel Collaborative Filtering for the Netflix Prize", AAIM 2008,
section 3.1. Both solvers minimise (2). With e = r_ui - (1) and the rate γ,

    sgd: b_u += γ (e - λ_b b_u)     p_u += γ (e q_i - λ p_u)     and the same for the item    (3)
    als: (Σ_i x_i x_i' + n_u Λ) [b_u, p_u] = Σ_i x_i (r_ui - μ - b_i),    x_i = [1, q_i]      (4)

(3) takes one rating after the other, each epoch in another order. (4) solves for all users while the items stand
still, then for all items: Λ = diag(λ_b, λ, ..., λ), and (2) never rises. With dim 0 only the biases are left, the row
that belongs in every table of ratings.

SGD runs in one thread and als in all; both give the same bits for the same seed on the same machine.

Needs: interactions.py declared_features.py
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numba
import numpy as np
import scipy.linalg  # noqa: F401 - its BLAS is numba's; threadpool_limits reaches only what is loaded

from recsys_common.declared_features import Section, field
from recsys_common.interactions import Interactions

TASK = "rating"
INITIAL = 0.1  # length of a vector of factors at the start, about
LEAST = 1e-6  # added to the diagonal of (4): without regularisation, few ratings do not determine many factors
BLOCK = 1024  # ratings of one row that (4) gathers at a time
ROWS = 64  # that a thread solves before it asks for more
ANY_ORDER = {"reassoc", "contract"}  # sums may be vectorised; unlike fastmath=True, NaN stays NaN


class Parameters(Section):
    """The settings."""

    dim: int = field(128, "length of p_u and q_i; 0: biases alone", ge=0)
    solver: Literal["sgd", "als"] = field("sgd", "sgd: one rating at a time; als: users, then items, exactly")
    epochs: int = field(30, "passes over the ratings; als needs about 10", ge=1)
    learning_rate: float = field(0.015, "γ of (3) in the first epoch; als has none", gt=0)
    decay: float = field(0.97, "what γ is multiplied by after each epoch", gt=0, le=1)
    l2: float = field(0.04, "λ of (2), of factors; als, which ends at the minimum, wants about 0.1", ge=0)
    l2_bias: float = field(0.01, "λ_b of (2), of biases", ge=0)
    biases: bool = field(True, "false: b_u and b_i stay 0")


SEARCH = {
    "dim": [64, 128, 256],
    "learning_rate": (0.007, 0.03, "log"),
    "l2": (0.02, 0.2, "log"),
    "l2_bias": (0.002, 0.1, "log"),
}


def fit(
    train: Interactions,
    parameters: Parameters = Parameters(),
    seed: int = 0,
    after_epoch: Callable[[BiasedMF, int], bool | None] | None = None,
) -> BiasedMF:
    """Fit (1) to the ratings `train.values`.

    Args:
      after_epoch: called with the model and the number of the epoch, from 1, after each; returns True to stop. The
        next epoch changes the same arrays: copy what is to be kept.

    Raises:
      ValueError: no ratings, or ratings that are no numbers.
      FloatingPointError: SGD diverged.
    """
    generator = np.random.default_rng(seed)
    model = BiasedMF.before_training(train, parameters.dim, generator)
    epoch = _sgd if parameters.solver == "sgd" else _als(train)
    for number in range(1, parameters.epochs + 1):
        rate = parameters.learning_rate * parameters.decay ** (number - 1)
        epoch(model, train, parameters, rate, generator)
        model.check(number, rate)
        if after_epoch and after_epoch(model, number):
            break
    return model


class BiasedMF:
    """Biases and factors; all float32.

    Attributes:
      mean: μ, the mean of the ratings of training.
      low, high: the range of the ratings of training, to which predictions are clipped.
      user_bias, item_bias: b_u [num_users] and b_i [num_items].
      users, items: p_u [num_users, dim] and q_i [num_items, dim]. Who has no ratings in training has zeros.
    """

    folds_in = False

    def __init__(self, mean, low, high, user_bias, item_bias, users, items):
        self.mean, self.low, self.high = np.float32(mean), np.float32(low), np.float32(high)
        self.user_bias, self.item_bias, self.users, self.items = user_bias, item_bias, users, items

    @classmethod
    def before_training(cls, train: Interactions, dim: int, generator: np.random.Generator) -> BiasedMF:
        """Biases of zero, factors that are random and small."""
        values = train.values
        if values is None or not len(values):
            raise ValueError("these interactions have no ratings (`values`), expected at least one")
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise ValueError(f"rating {row}, of item {train.items[row]}, is {values[row]}, expected a finite number")
        tables = []
        for counts in (train.lengths, train.frequency):
            table = generator.standard_normal((len(counts), dim), np.float32) * np.float32(INITIAL / max(dim, 1) ** 0.5)
            table[counts == 0] = 0  # nothing would ever move it
            tables.append(table)
        biases = (np.zeros(len(table), np.float32) for table in tables)
        return cls(values.mean(dtype=np.float64), values.min(), values.max(), *biases, *tables)

    def ratings(self, users, items) -> np.ndarray:
        """(1) for int [N] rows of users and int [N] items, clipped: float32 [N].

        User -1 and item 0 are not known: what is left is μ and the bias of the other. So it is for those without
        ratings in training.

        Raises:
          IndexError: a user or an item outside the tables.
        """
        users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
        for name, rows, low, high in (("user", users, -1, len(self.users)), ("item", items, 0, len(self.items))):
            if len(rows) and not low <= rows.min() <= rows.max() < high:
                raise IndexError(f"found {name}s {rows.min()} to {rows.max()}, expected {low} to {high - 1}")
        predicted = np.empty(np.broadcast(users, items).shape, np.float32)
        _predict(users, items, self.mean, self.user_bias, self.item_bias, self.users, self.items, predicted)
        return np.clip(predicted, self.low, self.high)

    def check(self, epoch: int, rate: float) -> None:
        """Raise FloatingPointError where training has left the numbers."""
        for table in (self.user_bias, self.item_bias, self.users, self.items):
            if not np.isfinite(table).all():
                raise FloatingPointError(f"epoch {epoch}, learning rate {rate:.3g}: diverged; take a smaller one")


@numba.njit(fastmath=ANY_ORDER, cache=True)
def _predict(users, items, mean, user_bias, item_bias, p, q, predicted):
    for t in range(len(users)):
        u, i = users[t], items[t]
        total = mean + (user_bias[u] if u >= 0 else np.float32(0)) + (item_bias[i] if i > 0 else np.float32(0))
        if u >= 0 and i > 0:
            for f in range(p.shape[1]):
                total += p[u, f] * q[i, f]
        predicted[t] = total  # (1)


def _sgd(model: BiasedMF, train: Interactions, parameters: Parameters, rate: float, generator) -> None:
    order = generator.permutation(len(train))
    tables = (model.mean, model.user_bias, model.item_bias, model.users, model.items)
    rates = np.array([rate * parameters.biases, parameters.l2_bias, rate, parameters.l2], np.float32)
    _sgd_epoch(order, train.users, train.items, train.values, *tables, *rates)


@numba.njit(fastmath=ANY_ORDER, cache=True)
def _sgd_epoch(order, users, items, values, mean, user_bias, item_bias, p, q, bias_rate, l2_bias, rate, l2):
    for t in order:
        u, i = users[t], items[t]
        product = np.float32(0)
        for f in range(p.shape[1]):
            product += p[u, f] * q[i, f]
        error = values[t] - (mean + user_bias[u] + item_bias[i] + product)  # (1)
        user_bias[u] += bias_rate * (error - l2_bias * user_bias[u])  # (3)
        item_bias[i] += bias_rate * (error - l2_bias * item_bias[i])
        for f in range(p.shape[1]):
            before = p[u, f]
            p[u, f] += rate * (error * q[i, f] - l2 * before)
            q[i, f] += rate * (error * before - l2 * q[i, f])


def _als(train: Interactions) -> Callable:
    """One epoch of (4). It reads ratings by user and by item: the second is a copy."""
    by_item = np.argsort(train.items, kind="stable")
    item_offsets = np.concatenate([[0], np.cumsum(train.frequency)])
    of_items = (item_offsets, train.users[by_item], train.values[by_item])
    of_users = (train.offsets, train.items, train.values)

    def epoch(model, train, parameters, rate, generator):
        users, items = (model.user_bias, model.users), (model.item_bias, model.items)
        settings = (model.mean, float(parameters.biases), parameters.l2_bias, parameters.l2)
        _als_half(*of_users, *users, *items, *settings)
        _als_half(*of_items, *items, *users, *settings)

    return epoch


def _als_half(offsets, *tables) -> None:
    """(4) for all rows of one side, in threads: what numba compiles here holds no lock."""
    from threadpoolctl import threadpool_limits

    parts = range(0, len(offsets) - 1, ROWS)  # many, since popular items take longer
    with threadpool_limits(1), ThreadPoolExecutor(numba.get_num_threads()) as pool:  # BLAS: no threads within threads
        for _ in pool.map(lambda first: _als_rows(first, offsets[first : first + ROWS + 1], *tables), parts):
            pass


@numba.njit(nogil=True, cache=True)
def _als_rows(first, offsets, others, values, bias, p, other_bias, q, mean, one, l2_bias, l2):
    """(4) for rows from `first` on of `bias` and `p`, whose ratings are `values` of `others`, between two offsets."""
    dim = p.shape[1] + 1
    for row in range(first, first + len(offsets) - 1):
        begin, end = offsets[row - first], offsets[row - first + 1]
        if begin == end:
            continue
        left, right = np.zeros((dim, dim)), np.zeros(dim)
        for start in range(begin, end, BLOCK):
            x = np.empty((min(BLOCK, end - start), dim))
            for n in range(len(x)):
                other = others[start + n]
                wanted = values[start + n] - mean - other_bias[other]
                x[n, 0] = one  # 0 without biases: then b_u = 0 solves it
                right[0] += one * wanted
                for f in range(dim - 1):
                    x[n, f + 1] = q[other, f]
                    right[f + 1] += q[other, f] * wanted
            left += np.dot(x.T, x)
        for f in range(dim):
            left[f, f] += (end - begin) * (l2 if f else l2_bias) + LEAST
        lower = np.linalg.cholesky(left)
        for f in range(dim):  # L y = right
            for g in range(f):
                right[f] -= lower[f, g] * right[g]
            right[f] /= lower[f, f]
        for f in range(dim - 1, -1, -1):  # L' x = y
            for g in range(f + 1, dim):
                right[f] -= lower[g, f] * right[g]
            right[f] /= lower[f, f]
        bias[row], p[row] = right[0], right[1:]
