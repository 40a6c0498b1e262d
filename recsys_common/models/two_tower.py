"""What does a retrieval model look like whose users and items are computed, and not only looked up? Two towers.

    u = l2(mlp_u([p_user, mean of q_h over the history])),   v_i = l2(mlp_i(q_i))             (1)
    s(u, i) = <u, v_i> / tau                                                                  (2)

p and q are rows of tables, of a history combined as its feature says; an mlp is dense layers with ReLU between them,
after Covington et al., "Deep Neural Networks for YouTube Recommendations", RecSys 2016, figure 3, where the items have
no tower. l2(x) = x / |x|, and a temperature tau below 1 lets the softmax of cosines become sharp: Yi et al.,
"Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019, section 3, whose loss it
is. In a batch of B rows (u_n, i_n) of weight r_n the items of the others are the negatives of each,

    c(n, m) = s(u_n, i_m) - log Q(i_m)                                                        (3)
    loss = -sum_n r_n log( exp(c(n, n)) / sum_m exp(c(n, m)) ),                               (4)

where Q(i) is the item's share of the training rows. Row m is no negative of row n where both are of the same item, or
where m has weight 0: it pads a last batch. The sum is not divided by B, so that batches and replicas add up.

In a config, `user` and `item` name features with a table. All features of kind history go into the user's tower; they
may share the item's table. Of the others only `weight` counts. All shapes follow from the batch's: XLA compiles a step.

Needs: config.py declared_features.py plain_yaml.py masking.py embeddings.py features.py
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from pydantic import Field

from recsys_common.config import Config, Model
from recsys_common.declared_features import Rows
from recsys_common.embeddings import Embeddings, Table
from recsys_common.features import log_q

BLOCK = 1 << 16  # items that `scores` sends through their tower at once


class Parameters(Model):
    """The section `model` of a config."""

    user: str = Field("user", description="name of the feature that is the user")
    item: str = Field("item", description="name of the feature that is the item")
    hidden: Annotated[tuple[Rows, ...], Field(min_length=1)] = Field(
        (256, 128), description="numbers that each dense layer of a tower gives; the last are what is compared"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(0.05, description="what cosines are divided by")
    log_q: bool = Field(True, description="correct for the items' frequency, where it is known")


def build(config: Config, frequency=None) -> TwoTower:
    """The model of a config; `frequency`, training rows of each item, is for log Q.

    Raises:
      ValueError: no such features, both of one table, or their rows are not known yet.
    """
    own, tables = config.model, config.tables()
    histories = {name: tables[name] for name, feature in config.features.items() if feature.kind == "history"}
    ids = [name for name in tables if name not in histories]
    if missing := {own.user, own.item} - set(ids):
        raise ValueError(f"model.user, model.item: {missing.pop()!r} is no feature of kind index or hash; found {ids}")
    if tables[own.user] is tables[own.item]:
        raise ValueError(f"model.user, model.item: {own.user!r} and {own.item!r} share a table; each needs its own")
    frequency = frequency if own.log_q else None
    towers = {own.user: tables[own.user], **histories}, {own.item: tables[own.item]}
    return TwoTower(*towers, own.hidden, own.temperature, frequency, config.seed)


class TwoTower(tfrs.Model):
    """Two towers (1) trained by in-batch softmax (4). D stands for the last of `hidden`.

    Args:
      user: what the user's tower sees, feature -> table; the first is the user, others are histories.
      item: the same of the item's tower: one feature. Row 0 is for items that training never saw.
      hidden: numbers that the dense layers of a tower give.
      temperature: tau of equation (2).
      item_frequency: float or int [items], training rows of each item, for log Q; None leaves it out.
      seed: of the initial tables and layers.
    """

    def __init__(
        self, user: dict[str, Table], item: dict[str, Table], hidden: tuple[int, ...] = (256, 128),
        temperature: float = 0.05, item_frequency=None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        [(self.item, table)] = item.items()
        self.user_features, self.num_items, self.temperature = tuple(user), table.rows, temperature
        self.rows = Embeddings({**user, **item}, seed)
        self.user_tower = _mlp("user_tower", sum(each.dim for each in user.values()), hidden, 2 * seed)
        self.item_tower = _mlp("item_tower", table.dim, hidden, 2 * seed + 1)
        self.log_q = None
        if item_frequency is not None:
            shape, expected = np.shape(item_frequency), (table.rows,)
            if shape != expected:
                raise ValueError(f"item_frequency has shape {shape}, expected {expected}: one for each item row")
            self.log_q = tf.constant(log_q(item_frequency))  # [items]

    def users(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """User int [B], history int [B, L] and `<history>_length` int [B] -> float32 [B, D], u of equation (1).

        Raises:
          ValueError: a feature of the user's tower is not there.
        """
        if absent := [name for name in self.user_features if name not in inputs]:
            raise ValueError(f"the user's tower needs {', '.join(absent)}; the batch has {', '.join(inputs)}")
        rows = self.rows({name: value for name, value in inputs.items() if name != self.item})
        together = tf.concat([rows[name] for name in self.user_features], 1)  # [B, the dims of its tables]
        return _l2(self.user_tower(together))

    def items(self, item_index: tf.Tensor) -> tf.Tensor:
        """Int [B] -> float32 [B, D], v of equation (1)."""
        return _l2(self.item_tower(self.rows({self.item: item_index})[self.item]))

    def compute_loss(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Equation (4), float32 []."""
        items, weight = inputs[self.item], inputs.get("weight")  # [B], [B]
        logits = tf.matmul(self.users(inputs), self.items(items), transpose_b=True) / self.temperature  # (2) [B, B]
        if self.log_q is not None:
            logits -= tf.gather(self.log_q, items)[None, :]  # (3)
        itself = tf.range(tf.shape(items)[0])
        left_out = items[:, None] == items[None, :]  # [B, B]: which m are no negatives of n
        if weight is not None:
            left_out |= (weight == 0)[None, :]
        left_out &= itself[:, None] != itself[None, :]
        logits = tf.where(left_out, logits.dtype.min / 100, logits)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(itself, logits)  # (4) [B]
        return tf.reduce_sum(losses if weight is None else weight * losses)

    def scores(self, users: dict[str, tf.Tensor] | np.ndarray) -> np.ndarray:
        """Equation (2) of every item: float32 [U, items].

        Args:
          users: int [U] where the user's tower has no history; else what `users` takes, of U users.
        """
        vectors = self.users(users if isinstance(users, dict) else {self.user_features[0]: tf.constant(users)})
        blocks = [range(self.num_items)[begin : begin + BLOCK] for begin in range(0, self.num_items, BLOCK)]
        every_item = tf.concat([self.items(tf.range(block.start, block.stop)) for block in blocks], 0)  # [items, D]
        return (tf.matmul(vectors, every_item, transpose_b=True) / self.temperature).numpy()


def _mlp(name: str, width: int, hidden: tuple[int, ...], seed: int) -> tf.keras.Sequential:
    """[B, width] -> [B, hidden[-1]]; built now, so that optimizers and checkpoints find its variables."""
    layers = [
        tf.keras.layers.Dense(
            units,
            "relu" if number < len(hidden) else None,
            kernel_initializer=tf.keras.initializers.GlorotUniform(1000 * seed + number),
            name=f"{name}_{number}",
        )
        for number, units in enumerate(hidden, 1)
    ]
    return tf.keras.Sequential([tf.keras.Input([width]), *layers], name=name)


def _l2(x: tf.Tensor) -> tf.Tensor:
    return tf.math.l2_normalize(tf.cast(x, tf.float32), 1)  # float32 where the layers compute in bfloat16
