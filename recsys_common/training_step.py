"""What happens in a training step, and what was wrong when its loss is not finite?

    chosen = optimizer(config, model, steps)                  # row-sparse for tables, another for dense layers
    step = executed(model, lambda batch: trained(model, chosen, batch))
    seen = step(iter(dataset), tf.constant(10))               # ten steps at once: [10, 1 + variables]
    print(not_finite(model, batch, seen[-1]))

Needs: embeddings.py optimizers.py
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from recsys_common import optimizers
from recsys_common.embeddings import Embeddings

ROWS = {"lazy_adam": optimizers.LazyAdam, "row_wise_adagrad": optimizers.RowWiseAdagrad, "adagrad": optimizers.Adagrad}
DENSE = {"adam": tf.keras.optimizers.Adam, "adagrad": tf.keras.optimizers.Adagrad}


@tf.keras.utils.register_keras_serializable("recsys_common")
class Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """`rate`, rising linearly in `warmup_steps`, then falling to 0 at step `steps` unless `decay` is "none".

    Steps count from `begin`: a variable, since an optimizer that was warm-started has counted before.
    """

    def __init__(self, rate: float, warmup_steps: int, decay: str, steps: int, begin: tf.Variable | int = 0):
        self.rate, self.warmup_steps, self.decay, self.steps, self.begin = rate, warmup_steps, decay, steps, begin

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of the step that follows on `step` steps."""
        done = tf.cast(tf.cast(step, tf.int64) - tf.cast(self.begin, tf.int64), tf.float32)
        rate = self.rate * tf.minimum((done + 1) / max(self.warmup_steps, 1), 1)
        past = tf.clip_by_value((done - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 0, 1)
        return rate * {"none": 1.0, "linear": 1 - past, "cosine": (1 + tf.cos(math.pi * past)) / 2}[self.decay]

    def get_config(self) -> dict:
        """The arguments."""
        named = {"rate": self.rate, "warmup_steps": self.warmup_steps, "decay": self.decay, "steps": self.steps}
        return named | {"begin": int(self.begin)}


def optimizer(config, model: tf.keras.Model, steps: int) -> tfrs.experimental.optimizers.CompositeOptimizer:
    """The optimizer of a config: a row-sparse one for the tables of `model`, another for its dense layers.

    Tables are the variables of its layers `Embeddings` and `tf.keras.layers.Embedding`.

    Args:
      config: a `config.Config`.
      steps: of the whole run, for the decay.
    """
    chosen, begin = config.optimizer, tf.Variable(0, dtype=tf.int64, trainable=False)

    def rate(of: float) -> float | Schedule:
        if not chosen.warmup_steps and chosen.decay == "none":
            return of
        return Schedule(of, chosen.warmup_steps, chosen.decay, steps, begin)

    def variables(tables: bool) -> list[tf.Variable]:
        layers = [part for part in model.submodules if isinstance(part, Embeddings | tf.keras.layers.Embedding)]
        found = {variable.ref() for layer in layers for variable in layer.trainable_weights}
        return [variable for variable in model.trainable_variables if (variable.ref() in found) is tables]

    options = {"weight_decay": chosen.weight_decay, "clip_norm": chosen.clip_norm}
    if chosen.name == "lazy_adam":
        options |= {"second_moment": chosen.second_moment, "correct_skipped": chosen.correct_skipped}
    rows = ROWS[chosen.name](rate(chosen.learning_rate), **options)
    rows.begin = begin  # is saved with it
    rows.static_shapes = config.training.jit_compile or isinstance(
        tf.distribute.get_strategy(), tf.distribute.TPUStrategy
    )
    dense_rate = rate(chosen.dense_learning_rate or chosen.learning_rate)
    dense = DENSE[chosen.dense_name](dense_rate, clipnorm=chosen.clip_norm)
    parts = [(rows, functools.partial(variables, True)), (dense, functools.partial(variables, False))]
    return tfrs.experimental.optimizers.CompositeOptimizer(parts)


def made(config, model: tfrs.Model | Callable[[], tfrs.Model]) -> tfrs.Model:
    """The model itself, or what the function makes, with the seed and the dtype policy of a config.

    Raises:
      ValueError: no `tfrs.Model`, or one with a step of its own; mixed precision, and its layers are made already.
    """
    mixed = config.training.mixed_precision
    if not isinstance(model, tf.keras.Model):
        policy = tf.keras.mixed_precision.global_policy()
        tf.keras.utils.set_random_seed(config.seed)
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if mixed else policy)
        try:
            model = model()
        finally:
            tf.keras.mixed_precision.set_global_policy(policy)
    elif mixed:
        raise ValueError("training.mixed_precision: layers take it when they are made, so give a function, not a model")
    if getattr(type(model), "train_step", None) is not tfrs.Model.train_step:
        raise ValueError(f"{type(model).__name__}: expected a tfrs.Model, whose step is all in `compute_loss`")
    return model


def loss_of(model: tfrs.Model, batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
    """float32 [], the loss of a batch with the penalties of layers."""
    loss = tf.reduce_sum(tf.cast(model.compute_loss(batch, training=training), tf.float32))
    return loss + sum(tf.reduce_sum(tf.cast(penalty, tf.float32)) for penalty in model.losses)


def trained(model: tfrs.Model, chosen: tf.keras.optimizers.Optimizer, batch: dict[str, tf.Tensor]) -> tf.Tensor:
    """One step. Returns float32 [1 + trainable variables]: the loss, and of each gradient the sum.

    If any of them is not finite, the gradients are made zeros: what was finite before stays so.
    """
    with tf.GradientTape() as tape:
        loss = loss_of(model, batch, training=True)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    sums = [tf.zeros([]) if value is None else tf.cast(tf.reduce_sum(value), tf.float32) for value in values]
    seen, there = tf.stack([loss, *sums]), [value for value in values if value is not None]
    finite = tf.reduce_all(tf.math.is_finite(seen))
    kept = tf.cond(finite, lambda: [tf.identity(g) for g in there], lambda: [tf.zeros_like(g) for g in there])
    pairs = [(g, variable) for g, variable in zip(gradients, variables, strict=True) if g is not None]
    chosen.apply_gradients(
        (tf.IndexedSlices(value, g.indices, g.dense_shape) if isinstance(g, tf.IndexedSlices) else value, variable)
        for value, (g, variable) in zip(kept, pairs, strict=True)
    )
    return seen


def executed(
    step: Callable[[dict], tf.Tensor], strategy: tf.distribute.Strategy | None = None, jit_compile: bool = False
) -> Callable:
    """A function (iterator, count: int32 []) -> [count, ...]: what `step` returned, summed over the replicas.

    Its loop is `tf.while_loop`, since AutoGraph's hides the errors of its body (errors.py).
    """
    strategy = strategy or tf.distribute.get_strategy()
    one = tf.function(step, jit_compile=True) if jit_compile else step

    @tf.function
    def execution(iterator, count):
        def body(number, seen):
            each = strategy.run(one, args=(next(iterator),))
            return number + 1, seen.write(number, strategy.reduce("SUM", each, axis=None))

        return tf.while_loop(lambda number, _: number < count, body, (0, tf.TensorArray(tf.float32, count)))[1].stack()

    return execution


def name_of(variable: tf.Variable) -> str:
    """Its name, without what TensorFlow adds: ":0", and where it was made."""
    return variable.name.partition(":")[0].removeprefix("while/")


def not_finite(model: tfrs.Model, batch: dict[str, tf.Tensor]) -> list[str]:
    """What is not finite, each in a line: columns of a batch, the rows of tables that it touches, dense layers."""
    found = []
    for name, values in batch.items():
        if values.dtype.is_floating and (bad := ~np.isfinite(values)).any():
            found.append(f"column {name!r}: {bad.sum():,} of {bad.size:,} values are not finite")
    copies = [getattr(variable, "values", [variable])[0] for variable in model.trainable_variables]  # one replica's
    with tf.GradientTape() as tape:
        loss = loss_of(model, batch, training=True)
    for variable, gradient in zip(copies, tape.gradient(loss, copies), strict=True):
        sparse, name = isinstance(gradient, tf.IndexedSlices), name_of(variable)
        ids = np.unique(gradient.indices) if sparse else None
        values = variable.sparse_read(ids) if sparse else variable.read_value()
        bad = ~np.isfinite(np.asarray(tf.cast(values, tf.float32)))
        if sparse and bad.any():
            rows = ids[bad.any(1)]
            found.append(f"table {name!r}: {len(rows):,} of the {len(ids):,} rows that it touches, first row {rows[0]}")
        elif bad.any():
            found.append(f"layer {name!r}: {bad.sum():,} of {bad.size:,} numbers")
    return found
