"""How does an architecture of the config train on plain interactions? By record batches, as in all chapters.

    config = Config(model={"architecture": "matrix_factorization"}, training={"epochs": 8})
    model = fit(config, parts["test"].train, seed=1)
    model.scores(parts["test"].seen, rows)               # float32 [B, num_items]; model.model is the architecture's own

Features may have these columns, one row of which is made of each interaction:

    user_index   the row of a user in `Interactions`, plus 1: row 0 of a table is for users without training rows
    item_index   the item, which has its number there: 0 is none
    history      what the user had before, the latest last

The files lie in a temporary folder while it trains. There are no checkpoints and no run's folder: training.py has them.

Needs: training_step.py errors.py config.py declared_features.py plain_yaml.py masking.py features.py embeddings.py
optimizers.py record_batches.py input_pipeline.py interactions.py scale.py models/
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import tensorflow as tf

from recsys_common import errors, record_batches
from recsys_common.config import Config
from recsys_common.features import hash_bucket, pad_histories
from recsys_common.input_pipeline import batches, steps_per_epoch
from recsys_common.interactions import Interactions
from recsys_common.training_step import executed, made, optimizer, trained

COLUMNS = ("user_index", "item_index", "history")
VALUES = 1 << 24  # numbers of a column in a file, at most: 64 MB


def fit(config: Config, train: Interactions, seed: int = 0, after_epoch: Callable | None = None) -> Fitted:
    """Train an architecture on interactions.

    Args:
      config: of it the features, the architecture, the optimizer, and how to train; the rows of tables may be open.
        What says where data is, how it is split and when to stop does not count.
      train: interactions; fewer of them than a batch are one batch.
      seed: in place of the config's.
      after_epoch: `after_epoch(model, epoch)` after each pass, from 1; True ends the training.

    Raises:
      ValueError: a feature with another column, or no feature of the column item_index; others as `config.build`.
      FloatingPointError: the loss is not finite.
    """
    config = _with_rows(config.override(f"seed={seed}"), train)
    item_rows, settings = _item_rows(config, train.num_items), config.training
    frequency = np.bincount(item_rows, train.frequency, config.tables()[_item(config)].rows)
    size = min(settings.batch_size, len(train), config.data.limit or len(train))
    how = {"remainder": settings.remainder, "limit": config.data.limit}
    read = {"columns": config.sql_columns(), "lengths": config.lengths(), "features": config.transform()}
    with tempfile.TemporaryDirectory() as folder:
        tables = _tables(train, max(config.lengths().values(), default=0), config.seed)
        files = record_batches.write(folder, tables, config.record_columns(), seed=config.seed)
        steps = steps_per_epoch(files, size, **how)
        of_run = {"epochs": settings.epochs, "seed": config.seed, "window": config.data.window}
        dataset = batches(files, size, **of_run, **how, **read)
        model = made(config, functools.partial(config.build, frequency))
        chosen = optimizer(config, model, steps * settings.epochs)
        model.compile(chosen)
        step = executed(functools.partial(trained, model, chosen), jit_compile=settings.jit_compile)
        fitted, iterator = Fitted(config, model, train, item_rows), iter(dataset)
        with errors.decoding(model, dataset):
            for epoch in range(1, settings.epochs + 1):
                for done in range(0, steps, settings.steps_per_execution):
                    seen = step(iterator, tf.constant(min(settings.steps_per_execution, steps - done)))
                    if not np.isfinite(seen[:, 0]).all():
                        raise FloatingPointError(f"the loss of epoch {epoch} is not finite: lower the learning rate")
                if after_epoch and after_epoch(fitted, epoch):
                    break
    return fitted


class Fitted:
    """A trained architecture that scores rows of `Interactions`.

    Attributes:
      config: with the rows of its tables.
      model: the architecture's own, which `saving.export` takes.
      folds_in: whether it scores users that it was not trained on: by their histories, without a table of users.
    """

    def __init__(self, config: Config, model: tf.keras.Model, train: Interactions, item_rows: np.ndarray):
        self.config, self.model = config, model
        self._trained, self._item_rows = train.lengths > 0, item_rows
        self._hashed = not np.array_equal(item_rows, np.arange(len(item_rows)))  # else no copy of the scores is needed
        self.folds_in = "user_index" not in config.record_columns()

    def scores(self, seen: Interactions, rows) -> np.ndarray:
        """float32 [B, num_items] for int [B] rows of `seen`."""
        rows, dtypes = np.asarray(rows), self.config.record_columns()
        had = seen.rows(rows)
        histories = tf.RaggedTensor.from_row_splits(had.items, had.offsets)
        columns = {"user_index": np.where(self._trained[rows], rows + 1, 0), "item_index": np.zeros(len(rows))}
        columns = {name: tf.cast(column, dtypes[name]) for name, column in columns.items() if name in dtypes}
        for name, length in self.config.lengths().items():
            columns[name], columns[f"{name}_length"] = pad_histories(histories, length)
        scores = self.model.scores(self.config.transform()(columns))  # [B, rows of the item table]
        return scores[:, self._item_rows] if self._hashed else scores[:, : len(self._item_rows)]


def _item(config: Config) -> str:
    """The feature that is what is recommended."""
    found = [name for name, feature in config.features.items() if feature.column == "item_index"]
    if not found:
        raise ValueError(f"features: none has the column item_index; there are {', '.join(config.features)}")
    return found[0]


def _item_rows(config: Config, num_items: int) -> np.ndarray:
    """The row of each item in its table: int [num_items]."""
    feature, items = _item(config), np.arange(num_items)
    owner = config.features[feature].table or feature
    table = config.features[owner]
    return hash_bucket(items, table.rows, owner).numpy() if table.kind == "hash" else items


def _with_rows(config: Config, train: Interactions) -> Config:
    """The config with the rows of its tables."""
    rows = {"user_index": train.num_users + 1, "item_index": train.num_items, "history": train.num_items}
    for name, feature in config.features.items():
        if feature.column not in COLUMNS or (feature.column == "history") != (feature.kind == "history"):
            raise ValueError(
                f"features.{name}: found column {feature.column!r}, kind {feature.kind}; of plain interactions "
                "user_index and item_index are of kind index or hash, history of kind history"
            )
    return config.with_rows({name: rows[each.column] for name, each in config.features.items()})


def _tables(train: Interactions, length: int, seed: int) -> Iterator[pa.Table]:
    """All interactions, dealt out at random; with `length`, the column history has as many items at most."""
    order = np.random.default_rng(seed).permutation(len(train))
    size = VALUES // max(length, 1)
    for begin in range(0, len(order), size):
        of = order[begin : begin + size]
        columns = {"user_index": train.users[of] + 1, "item_index": train.items[of]}
        if length:
            first = np.maximum(train.offsets[train.users[of]], of - length)
            ends = np.cumsum(of - first)
            values = np.arange(ends[-1]) + np.repeat(of - ends, of - first)  # places in train.items
            offsets = np.concatenate([[0], ends]).astype(np.int32)
            columns["history"] = pa.ListArray.from_arrays(offsets, train.items[values])
        yield pa.table(columns)
