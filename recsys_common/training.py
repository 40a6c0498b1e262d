"""How does a run start and report?

    history = fit(model, dataset, epochs=5, steps_per_epoch=steps, batch_size=1024)
    milliseconds = 1000 * seconds_per_step(model, dataset)

Needs: scale.py
"""

from __future__ import annotations

import sys
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from recsys_common.scale import progress


class _Progress(tf.keras.callbacks.Callback):
    """One line on stderr: steps, loss, rows/s, time left."""

    def __init__(self, batch_size: int, steps: int):
        super().__init__()
        self.bar = tqdm(
            total=steps * batch_size, unit="row", unit_scale=True, file=sys.stderr, desc="training",
            mininterval=0.5, disable=not progress(),
        )  # fmt: skip
        self.batch_size = batch_size

    def on_epoch_begin(self, epoch, logs=None):
        self.last = -1

    def on_train_batch_end(self, batch, logs=None):
        # tf-keras calls once for each execution, with the last of its steps.
        self.bar.update((batch - self.last) * self.batch_size)
        self.last = batch

    def on_epoch_end(self, epoch, logs=None):
        self.bar.set_postfix_str(f"epoch {epoch + 1}, loss {logs['loss']:.4g}")

    def on_train_end(self, logs=None):
        self.bar.close()


def fit(
    model: tf.keras.Model, dataset: tf.data.Dataset, epochs: int, steps_per_epoch: int, batch_size: int
) -> list[float]:
    """Train, with a progress bar that names rows/s and the time left.

    Args:
      model: compiled.
      dataset: yields `epochs * steps_per_epoch` batches, as `input_pipeline.batches` does.

    Returns:
      The loss of the last batch of each epoch, as the model reports it.

    Raises:
      FloatingPointError: the loss of an epoch is not finite.
    """
    history = model.fit(
        dataset,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        verbose=0,
        callbacks=[_Progress(batch_size, epochs * steps_per_epoch)],
    )
    losses = [float(loss) for loss in history.history["loss"]]
    for epoch, loss in enumerate(losses):
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss}; try a smaller learning rate")
    return losses


def rows_per_second(dataset: tf.data.Dataset, batch_size: int, seconds: float = 1.5, warm_up: int = 2) -> float:
    """Rows that a dataset delivers a second, over and over for about `seconds`; the first batches do not count."""
    batches = iter(dataset.repeat())
    for _ in range(warm_up):
        next(batches)
    start, read = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        read += batch_size
    return read / (time.perf_counter() - start)


def seconds_per_step(model: tf.keras.Model, dataset: tf.data.Dataset, steps: int = 12, warm_up: int = 3) -> float:
    """Median seconds of a training step, after `warm_up` steps that also trace the function and create slots."""
    step, batches = model.make_train_function(), iter(dataset.repeat())
    seconds = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        logs = step(batches)
        float(logs["loss"])  # wait for the step to end
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[warm_up:]))
