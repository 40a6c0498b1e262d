"""What does one reach that knows nobody? What most people have had, or have had lately.

    score(i) = sum_(u had i) 2^(-(t_end - t_ui) / h)                                          (1)

With a half-life h of days, an interaction counts half as much as one that is h days later; without one, or without a
clock, each counts 1. The floor under every table (Ji, Sun et al., "A Re-visit of the Popularity Baseline in
Recommender Systems", SIGIR 2020, has decayed and recent popularity).

Needs: interactions.py declared_features.py
"""

from __future__ import annotations

import numpy as np

from recsys_common.declared_features import Positive, Section, field
from recsys_common.interactions import Interactions

DAY = 86_400


class Parameters(Section):
    """The settings."""

    half_life: Positive | None = field(None, "days after which an interaction counts half; null: all count alike")


SEARCH = {"half_life": (1.0, 1000.0, "log")}


def fit(train: Interactions, parameters: Parameters = Parameters(), seed: int = 0, after_epoch=None) -> Popularity:
    """Count. `seed` and `after_epoch` are of other models."""
    weights = None
    if parameters.half_life is not None and train.times is not None and len(train):
        weights = np.exp2((train.times - train.times.max()) / (parameters.half_life * DAY))  # (1)
    return Popularity(np.bincount(train.items, weights, train.num_items).astype(np.float32))


class Popularity:
    """The same list for everybody.

    Attributes:
      item_bias: float32 [num_items], equation (1).
    """

    folds_in = True

    def __init__(self, item_bias: np.ndarray):
        self.item_bias = item_bias

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """Int [B] rows of `seen` -> float32 [B, num_items]."""
        return np.tile(self.item_bias, (len(rows), 1))
