"""What does the simplest model with embeddings look like? A dot product of two table rows, plus an item bias.

    score(u, i) = <p_u, q_i> + b_i                                                            (1)

Trained as retrieval with in-batch softmax: in a batch of B pairs (u, i) the other B - 1 items are the negatives,

    loss = -sum_(u,i) log( exp(s(u,i) - log Q(i)) / sum_j exp(s(u,j) - log Q(j)) ),           (2)

where Q(j) is the probability that item j turns up in the batch, which is its share of the training rows. Without
that log-Q correction (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019, section 3) popular items are punished for being frequent negatives. A row of the tables is updated only
when a batch touches it, provided that the optimizer is row-sparse: tf-keras Adagrad is, Adam is not (chapter 4). The
tables are filled slice by slice: memory never holds them twice.

Needs: config.py declared_features.py plain_yaml.py masking.py embeddings.py
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from pydantic import Field

from recsys_common.config import Config, Model
from recsys_common.embeddings import Embeddings, Table, write_rows

SLICE = 1 << 16  # rows that are written at once


class Parameters(Model):
    """The section `model` of a config."""

    user: str = Field("user", description="name of the feature that is the user")
    item: str = Field("item", description="name of the feature that is the item")
    log_q: bool = Field(True, description="correct for the items' frequency, where it is known")


SEARCH = {
    "model.embedding_dim": [32, 64, 128],
    "optimizer.learning_rate": (0.001, 0.03, "log"),
    "optimizer.weight_decay": (0.01, 3.0, "log"),
}


def build(config: Config, frequency=None) -> MatrixFactorization:
    """The model of a config; `frequency`, training rows of each item, is for log Q.

    Raises:
      ValueError: no such features, both of one table, or their rows are not known yet.
    """
    own, tables = config.model, config.tables()
    if missing := {own.user, own.item} - set(tables):
        raise ValueError(f"model.user, model.item: {missing.pop()!r} is no feature with a table; there are {[*tables]}")
    if tables[own.user] is tables[own.item]:
        raise ValueError(f"model.user, model.item: {own.user!r} and {own.item!r} share a table; each needs its own")
    rows, frequency = (tables[own.user].rows, tables[own.item].rows), frequency if own.log_q else None
    how = {"dtype": own.embedding_dtype, "initial": own.embedding_initial}
    return MatrixFactorization(*rows, own.embedding_dim, frequency, config.seed, own.user, own.item, **how)


class MatrixFactorization(tfrs.Model):
    """Matrix factorization (1) trained by in-batch softmax (2).

    Args:
      num_users: rows of the user table; row 0 is for users that training never saw.
      num_items: rows of the item table; row 0 likewise.
      dim: length of p_u and q_i.
      item_frequency: float or int [num_items], training rows of each item, for log Q; None leaves it out.
      seed: of the initial tables.
      user, item: what they are called in a batch, a dict of int [B].
      dtype, initial: of the tables, as in `embeddings.Table`.
    """

    def __init__(
        self, num_users: int, num_items: int, dim: int = 32, item_frequency=None, seed: int = 0,
        user: str = "user_index", item: str = "item_index", dtype: str = "float32", initial: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        self.user, self.item = user, item
        how = {"dtype": dtype, "initial": initial}
        tables = {user: Table("user_table", num_users, dim, **how), item: Table("item_table", num_items, dim, **how)}
        tables["item_bias"] = Table("item_bias", num_items, 1, initial=0.0)
        self.rows = Embeddings(tables, seed)
        self.ids_of = {"item_bias": item}  # the feature whose ids a table's rows are, where it is not of that name
        self.user_table, self.item_table, self.item_bias = self.rows.tables.values()
        self.sampling_probability = None
        if item_frequency is not None:
            frequency = np.asarray(item_frequency, np.float32)
            if frequency.shape != (num_items,):
                raise ValueError(
                    f"item_frequency has shape {frequency.shape}, expected ({num_items},): one for each item row"
                )
            # An item that training never saw is never in a batch; any positive number keeps the logarithm finite.
            self.sampling_probability = tf.constant(np.maximum(frequency, 1) / max(frequency.sum(), 1))
        self.task = tfrs.tasks.Retrieval(remove_accidental_hits=True)

    @classmethod
    def of_factors(cls, users: np.ndarray, items: np.ndarray, item_bias=None, **more) -> MatrixFactorization:
        """The model of factors that something else has fitted, such as models/ials.py: so they leave (saving.py).

            model = MatrixFactorization.of_factors(fitted.users, fitted.items)
            saving.export("model", model, {"user_index": split.user_ids, "item_index": split.item_ids[1:]})

        Args:
          users: float32 [U, dim]; row r becomes row r + 1 of the table. Row 0, of unknown users, becomes their mean: it
            scores an item as users do on average.
          items: float32 [I, dim], of the rows that they have here; row 0 is of unknown items.
          item_bias: float32 [I]; None for zeros.
          **more: `user` and `item`, names of features.

        Raises:
          ValueError: shapes that do not fit together.
        """
        bias = np.zeros(len(items), np.float32) if item_bias is None else np.asarray(item_bias)
        if (
            np.ndim(users) != 2
            or not len(users)
            or np.shape(items)[1:] != users.shape[1:]
            or bias.shape != items.shape[:1]
        ):
            found = f"users {np.shape(users)}, items {np.shape(items)}, item_bias {bias.shape}"
            raise ValueError(f"found {found}; expected [U, dim], [I, dim] and [I], U of 1 or more")
        model = cls(len(users) + 1, *items.shape, initial=0.0, **more)
        write_rows(model.user_table, 0, users.mean(0, keepdims=True))
        tables = (model.user_table, 1, users), (model.item_table, 0, items), (model.item_bias, 0, bias[:, None])
        for table, first, rows in tables:
            for begin in range(0, len(rows), SLICE):
                write_rows(table, first + begin, rows[begin : begin + SLICE])
        return model

    def users(self, users: tf.Tensor | dict[str, tf.Tensor]) -> tf.Tensor:
        """Int [B], or a dict that has it under the user's name -> [B, dim + 1]: p_u and a 1 that meets the bias."""
        user_index = users[self.user] if isinstance(users, dict) else users
        rows = self.rows({self.user: user_index})[self.user]
        return tf.concat([rows, tf.ones_like(rows[:, :1])], 1)

    def items(self, item_index: tf.Tensor) -> tf.Tensor:
        """[B] -> [B, dim + 1]: q_i and b_i."""
        rows = self.rows({self.item: item_index, "item_bias": item_index})
        return tf.concat([rows[self.item], rows["item_bias"]], 1)

    def compute_loss(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Equation (2), summed over the batch."""
        items = inputs[self.item]
        vectors = self.items(items)
        if self.sampling_probability is not None:
            # Taken off the bias, since the task's own correction knows no probability below 1e-6.
            log_q = tf.math.log(tf.gather(self.sampling_probability, items))
            vectors = tf.concat([vectors[:, :-1], vectors[:, -1:] - log_q[:, None]], 1)
        return self.task(
            self.users(inputs[self.user]),
            vectors,
            candidate_ids=items,
            compute_metrics=False,  # ranking against all items happens after training, exactly
        )

    def scores(self, users: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """Int [U], or a dict as for `users` -> float32 [U, num_items], equation (1) for every item."""
        users = users[self.user] if isinstance(users, dict) else users
        every_item = self.items(tf.range(self.item_table.shape[0]))
        return tf.matmul(self.users(tf.constant(users)), every_item, transpose_b=True).numpy()
