"""How would this user rate this item, if what they chose to rate says something too? SVD++.

    model = fit(train)                                      # train: `Interactions` with values, the ratings
    model.ratings(users, items)                             # float32 [N]

To biased_mf.py's prediction it adds, for each item j of N(u), those that the user has rated, a vector y_j:

    r_ui = μ + b_u + b_i + <q_i, p_u + |N(u)|^-½ Σ_(j in N(u)) y_j>                           (1)
    min Σ_(u,i) (r_ui - (1))² + λ_b (b_u² + b_i²) + λ (|p_u|² + |q_i|²) + λ_y Σ_(j in N(u)) |y_j|²    (2)

Koren, "Factorization Meets the Neighborhood: a Multifaceted Collaborative Filtering Model", KDD 2008: (1) is equation
15. With e = r_ui - (1) and the rate γ, one rating changes (section 4)

    b_u += γ (e - λ_b b_u)      p_u += γ (e q_i - λ p_u)                                      (3)
    b_i += γ (e - λ_b b_i)      q_i += γ (e (p_u + |N(u)|^-½ Σ y_j) - λ q_i)
    y_j += γ (e |N(u)|^-½ q_i - λ_y y_j)                for every j of N(u)                   (4)

(4) touches as many vectors as the user has ratings, for each of their ratings: n² of them. Here a user's ratings come
one after the other, and (4) is put off to the end of the user. It is the same for all j: with a = 1 - γ λ_y and
c = γ e |N(u)|^-½ q_i it takes y_j to a y_j + c, so it takes the sum z = Σ y_j to a z + |N(u)| c, which is all that (1)
and (3) need; and n such steps take y_j to aⁿ y_j + C, where each step took C, at first 0, to a C + c.          (5)
The result is that of (3) and (4) in the same order, at the cost of n.

One thread; the same bits for the same seed on the same machine.

Needs: interactions.py declared_features.py models/biased_mf.py
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from recsys_common.declared_features import Section, field
from recsys_common.interactions import Interactions
from recsys_common.models.biased_mf import ANY_ORDER, INITIAL, TASK, BiasedMF  # noqa: F401  TASK is this model's too


class Parameters(Section):
    """The settings."""

    dim: int = field(128, "length of p_u, q_i and y_j", ge=1)
    epochs: int = field(45, "passes over the ratings", ge=1)
    learning_rate: float = field(0.01, "γ of (3) and (4) in the first epoch", gt=0)
    decay: float = field(0.97, "what γ is multiplied by after each epoch", gt=0, le=1)
    l2: float = field(0.05, "λ of (2), of factors", ge=0)
    l2_bias: float = field(0.005, "λ_b of (2), of biases", ge=0)
    l2_implicit: float = field(0.002, "λ_y of (2), of the items that a user has rated", ge=0)


SEARCH = {
    "dim": [64, 128],
    "learning_rate": (0.005, 0.02, "log"),
    "l2": (0.02, 0.1, "log"),
    "l2_bias": (0.002, 0.1, "log"),
    "l2_implicit": (0.0005, 0.02, "log"),
}


def fit(
    train: Interactions,
    parameters: Parameters = Parameters(),
    seed: int = 0,
    after_epoch: Callable[[BiasedMF, int], bool | None] | None = None,
) -> BiasedMF:
    """Fit (1) to the ratings `train.values`.

    Args:
      after_epoch: called with the model and the number of the epoch, from 1, after each; returns True to stop.

    Returns:
      A `BiasedMF` whose `users` are p_u + |N(u)|^-½ Σ y_j: that is all a prediction needs.

    Raises:
      ValueError: no ratings, or ratings that are no numbers.
      FloatingPointError: SGD diverged.
    """
    generator = np.random.default_rng(seed)
    model = BiasedMF.before_training(train, parameters.dim, generator)
    own = model.users  # p_u
    scale = np.float32(INITIAL / parameters.dim**0.5)
    implicit = generator.standard_normal(model.items.shape, np.float32) * scale  # y_j
    had = train.matrix()  # N(u): an item that was rated twice is in it once
    share = (1 / np.sqrt(np.maximum(np.diff(had.indptr), 1))).astype(np.float32)  # |N(u)|^-½
    l2s = np.array([parameters.l2_bias, parameters.l2, parameters.l2_implicit], np.float32)
    for number in range(1, parameters.epochs + 1):
        rate = parameters.learning_rate * parameters.decay ** (number - 1)
        order = generator.permutation(train.num_users)
        # Each user's ratings in another order: sorting is stable.
        shuffled = generator.permutation(len(train))
        shuffled = shuffled[np.argsort(train.users[shuffled], kind="stable")]
        history = (train.offsets, train.items, train.values, had.indptr, had.indices)
        tables = (model.mean, model.user_bias, model.item_bias, own, model.items, implicit)
        _epoch(order, shuffled, *history, share, *tables, np.float32(rate), *l2s)
        if after_epoch or number == parameters.epochs:
            model.users = own + share[:, None] * (had @ implicit)
            model.check(number, rate)
            if after_epoch and after_epoch(model, number):
                break
    return model


@numba.njit(fastmath=ANY_ORDER, cache=True)
def _epoch(
    order, shuffled, offsets, items, values, had_offsets, had, share, mean, user_bias, item_bias, p, q, y,
    rate, l2_bias, l2, l2_implicit,
):  # fmt: skip
    dim = p.shape[1]
    total, change = np.empty(dim, np.float32), np.empty(dim, np.float32)  # z and C of (5)
    keep = np.float32(1) - rate * l2_implicit  # a
    for u in order:
        size = np.float32(had_offsets[u + 1] - had_offsets[u])
        total[:], change[:] = 0, 0
        for j in had[had_offsets[u] : had_offsets[u + 1]]:
            for f in range(dim):
                total[f] += y[j, f]
        for t in shuffled[offsets[u] : offsets[u + 1]]:
            i = items[t]
            product = np.float32(0)
            for f in range(dim):
                product += q[i, f] * (p[u, f] + share[u] * total[f])
            error = values[t] - (mean + user_bias[u] + item_bias[i] + product)  # (1)
            user_bias[u] += rate * (error - l2_bias * user_bias[u])  # (3)
            item_bias[i] += rate * (error - l2_bias * item_bias[i])
            for f in range(dim):
                step = rate * error * share[u] * q[i, f]  # c
                whole = p[u, f] + share[u] * total[f]
                p[u, f] += rate * (error * q[i, f] - l2 * p[u, f])
                q[i, f] += rate * (error * whole - l2 * q[i, f])
                total[f] = keep * total[f] + size * step  # (5)
                change[f] = keep * change[f] + step
        kept = keep ** np.float32(offsets[u + 1] - offsets[u])
        for j in had[had_offsets[u] : had_offsets[u + 1]]:
            for f in range(dim):
                y[j, f] = kept * y[j, f] + change[f]  # (4), for all of the user's ratings
