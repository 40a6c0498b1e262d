"""What does matrix factorization learn from pairs of items, the one a user took and one that they did not?

Rendle, Freudenthaler, Gantner & Schmidt-Thieme, "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009:

    x(u, i) = <p_u, q_i> + b_i                                                                  (1)
    x(u, i, j) = x(u, i) - x(u, j)            u took i and not j                                (2)
    minimise sum over (u, i, j) of -ln sigmoid(x(u, i, j)) + l2 / 2 |rows|^2                    (3), section 4.1
    row += rate (sigmoid(-x(u, i, j)) d x(u, i, j) / d row - l2 row)                            (4), LearnBPR, figure 4

One triple after the other: a pair (u, i) drawn with replacement, and a j that the user did not take. All j alike as in
the paper, or in proportion to frequency^negative_power: then popular items are compared with each other more often.
One thread, so that a seed gives one model.

Needs: interactions.py declared_features.py
"""

from __future__ import annotations

import numba
import numpy as np

from recsys_common.declared_features import NotNegative, Rows, Section, field
from recsys_common.interactions import Interactions

ATTEMPTS = 50  # draws of j; who took nearly all items is passed over then
ANY_ORDER = {"reassoc", "contract"}  # sums may be vectorised; unlike fastmath=True, infinity stays infinity


class Parameters(Section):
    """The settings."""

    dim: Rows = field(64, "length of p_u and q_i")
    epochs: Rows = field(60, "passes; each draws as many triples as there are pairs")
    learning_rate: float = field(0.05, "rate of (4) in the first pass", gt=0)
    decay: float = field(0.97, "what the rate is multiplied by after each pass", gt=0, le=1)
    l2_user: NotNegative = field(0.02, "of p_u")
    l2_positive: NotNegative = field(0.003, "of q_i, taken")
    l2_negative: NotNegative = field(0.02, "of q_j, not taken")
    l2_bias: NotNegative = field(0.005, "of b_i and b_j")
    bias: bool = field(True, "whether items have a bias")
    negative_power: NotNegative = field(0.25, "j is drawn in proportion to frequency to this power; 0: all alike")


SEARCH = {
    "dim": [32, 64, 128],
    "learning_rate": (0.02, 0.2, "log"),
    "l2_user": (0.001, 0.1, "log"),
    "l2_positive": (0.0003, 0.03, "log"),
    "l2_negative": (0.001, 0.1, "log"),
    "negative_power": (0.0, 0.75, "linear"),
}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> Bpr:
    """Fit. `after_epoch(model, epoch)` is called after each pass, epochs from 1, and returns True to stop."""
    random, taken = np.random.default_rng(seed), train.matrix()  # its rows are sorted, each pair once
    users = np.repeat(np.arange(train.num_users, dtype=np.int32), np.diff(taken.indptr))
    model = Bpr(
        random.normal(0, 0.1, (train.num_users, parameters.dim)).astype(np.float32),
        random.normal(0, 0.1, (train.num_items, parameters.dim)).astype(np.float32),
        np.zeros(train.num_items, np.float32),
    )
    model.users[train.lengths == 0] = 0  # nothing is learned of them: the bias is left
    negatives = draws(train, parameters.negative_power)
    l2 = [np.float32(getattr(parameters, f"l2_{of}")) for of in ("user", "positive", "negative", "bias")]
    rows = model.users, model.items, model.item_bias
    for epoch in range(parameters.epochs):
        rate = np.float32(parameters.learning_rate * parameters.decay**epoch)
        _epoch(*rows, taken.indptr, taken.indices, users, *negatives, rate, *l2, parameters.bias, random)
        if after_epoch and after_epoch(model, epoch + 1):
            break
    return model


@numba.njit(cache=True, fastmath=ANY_ORDER)
def _epoch(
    p, q, b, indptr, items, users, ends, first, marks, rate, l2_user, l2_positive, l2_negative, l2_bias, bias, random
):  # fmt: skip
    """As many steps (4) as there are pairs: changes p [users, dim], q [items, dim] and b [items].

    Args:
      indptr, items: of the CSR matrix of pairs; users: int32 [N], the row of each pair.
      ends, first, marks: as `draws` gives them.
    """
    for _ in range(len(items)):
        pair = int(random.random() * len(items))
        u, i = users[pair], items[pair]
        j = other(u, items[indptr[u] : indptr[u + 1]], ends, first, marks, random)
        if j == 0:
            continue
        x = b[i] - b[j]
        for d in range(p.shape[1]):
            x += p[u, d] * (q[i, d] - q[j, d])  # (2)
        slope = rate / (np.float32(1) + np.exp(x))  # rate times sigmoid(-x)
        for d in range(p.shape[1]):  # (4)
            pu, qi, qj = p[u, d], q[i, d], q[j, d]
            p[u, d] = pu + slope * (qi - qj) - rate * l2_user * pu
            q[i, d] = qi + slope * pu - rate * l2_positive * qi
            q[j, d] = qj - slope * pu - rate * l2_negative * qj
        if bias:
            b[i] += slope - rate * l2_bias * b[i]
            b[j] -= slope + rate * l2_bias * b[j]


def draws(train: Interactions, power: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `other` draws by: in proportion to frequency^power, never what the user took.

    Returns:
      ends: float64 [num_items], where each item's share of 0 to 1 ends.
      first: int32 [num_items], the item in whose share n / num_items lies: from there it is not far to any number's.
      marks: bool [2^m], True at `_mark` of each pair: most items are seen at once not to be among those taken.
    """
    share = np.maximum(train.frequency, 1.0) ** power  # what nobody took counts as taken once
    share[0] = 0
    ends = np.cumsum(share)
    ends /= ends[-1] or 1
    first = np.searchsorted(ends, np.arange(len(ends)) / len(ends), side="right").astype(np.int32)
    marks = np.zeros(1 << (8 * len(train)).bit_length(), np.bool_)
    marks[_mark(train.users.astype(np.int64), train.items.astype(np.int64), len(marks))] = True
    return ends, first, marks


@numba.njit(cache=True)
def other(user, taken, ends, first, marks, random):
    """An item that the user did not take; 0 if none was found. `taken`: the user's items, sorted."""
    for _ in range(ATTEMPTS):
        place = random.random()
        j = first[int(place * len(first))]
        while ends[j] <= place:
            j += 1
        if not marks[_mark(np.int64(user), np.int64(j), len(marks))]:
            return j
        at = np.searchsorted(taken, j)
        if at == len(taken) or taken[at] != j:
            return j
    return 0


@numba.njit(cache=True)
def _mark(user, item, size):
    """A place in an array of `size`, a power of two; of int64, here and in NumPy alike."""
    return (user * 2654435761 + item * 40503) & (size - 1)


class Bpr:
    """The fitted model (1).

    Attributes:
      users: float32 [num_users, dim], p.
      items: float32 [num_items, dim], q.
      item_bias: float32 [num_items], b.
    """

    folds_in = False

    def __init__(self, users: np.ndarray, items: np.ndarray, item_bias: np.ndarray):
        self.users, self.items, self.item_bias = users, items, item_bias

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """float32 [B, num_items] of (1), for int [B] rows of users. `seen` is of no use here."""
        return self.users[rows] @ self.items.T + self.item_bias
