"""How does a run start, report, survive and resume?

    run = train(config, config.build, {"train": manifest}, folder="runs/mf", evaluate=exact_ranking)

The call that was killed, made again, goes on from the latest checkpoint as if nothing had happened: same batches, same
losses, bit for bit where the device computes them so. The folder of a run:

    config.yaml               what was asked for
    metrics.jsonl             a line every `log_every` steps: step, epoch, loss (the mean since the last line),
                              rows_per_second, seconds; one for each evaluation. Each step is in it once.
    checkpoints/step-<n>/     variables of model and optimizer, and the place in the input (checkpoints.py)
    best/step-<n>/            with early stopping: the same at the best evaluation
    tensorboard/              the same numbers for TensorBoard
    run.json                  how it ended, on which machine, with which versions

`python -m recsys_common train` is this with the data made, the test asked and more in the folder (runs.py). A short run
needs none of that: `losses = fit(model, dataset, epochs=5, steps_per_epoch=steps, batch_size=1024)`.

Needs: scale.py config.py declared_features.py plain_yaml.py masking.py features.py record_batches.py
input_pipeline.py embeddings.py optimizers.py training_step.py checkpoints.py errors.py
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from recsys_common import checkpoints, errors, scale
from recsys_common.config import Config, differences
from recsys_common.input_pipeline import Worker, batches, position, steps_per_epoch
from recsys_common.record_batches import Manifest
from recsys_common.training_step import executed, loss_of, made, name_of, not_finite, optimizer, trained


@dataclass(frozen=True)
class Run:
    """What `train` did.

    Attributes:
      folder: of the run.
      model: trained; with early stopping its best evaluation's weights.
      optimizer: with its slots, of the same step.
      steps: that are done, of all its processes.
      stopped: "end", "early stopping" or "SIGTERM".
      evaluations: of each epoch its step, epoch, and what `evaluate` returned.
      seconds: of training, of all its processes, without evaluations.
    """

    folder: Path
    model: tf.keras.Model
    optimizer: tf.keras.optimizers.Optimizer
    steps: int
    stopped: str
    evaluations: list[dict]
    seconds: float


def train(
    config: Config,
    model: tf.keras.Model | Callable[[], tf.keras.Model],
    datasets: dict[str, Manifest],
    strategy: tf.distribute.Strategy | None = None,
    *,
    folder: str | os.PathLike,
    evaluate: Callable[[tf.keras.Model], dict[str, float]] | None = None,
    initialise: Callable[[dict], object] | None = None,
) -> Run:
    """Train until the last epoch, early stopping or SIGTERM; resume if the folder has a checkpoint of this run.

    Args:
      config: what to do; all of it decides whether a checkpoint is of this run.
      model: a `tfrs.Model` whose `compute_loss` sums over the rows of a batch; or a function that makes it, which is
        called in the strategy's scope, with the random seed and the dtype policy of the config. After a resume, layers
        such as Dropout go on with their random numbers only if such a function made them.
      datasets: {"train": manifest}, and perhaps "validation", whose loss is then logged after each epoch.
      strategy: `tf.distribute` in one process, such as MirroredStrategy; None for one device. The config's batch size
        is that of a replica; losses and gradients are sums over the replicas.
      folder: of the run, local.
      evaluate: exact ranking, called after each epoch, outside the step; has to return the same for the same model.
      initialise: what to do with {"model": model, "optimizer": optimizer} before the first step of a run that does not
        resume, such as `checkpoints.warm_start`. The schedule of the learning rate begins after it.

    Raises:
      ValueError: the folder's checkpoint is of another config or other files, names what differs; a model of another
        kind; early stopping without its metric; what `errors.preflight` finds, before the first step of a new run.
      BlockingIOError: another process trains in the folder.
      FloatingPointError: a loss or gradient is not finite. Names step, batch, and tables or columns. What is not
        finite is not applied, and nothing of the step is saved: the checkpoints are older.
      OSError: no room for a checkpoint; the earlier ones are whole.
      Others of the step pass with a note that explains them (errors.py).
    """
    if config.training.early_stopping and evaluate is None:
        raise ValueError(f"training.early_stopping: `evaluate` has to return {config.evaluation.metric}")
    with checkpoints.alone(folder):
        run = _Running(config, model, datasets, strategy or tf.distribute.get_strategy(), Path(folder), evaluate)
        if not run.latest:
            for text in errors.preflight(run.model, run.dataset, run.strategy, steps=run.total).warnings:
                warnings.warn(text, stacklevel=2)
        with _sigterm() as asked, errors.decoding(run.model, run.dataset):
            return run.until(asked, initialise)


class _Running:
    """A run: what `train` was given, what follows from it, and how far it is."""

    def __init__(self, config, model, datasets, strategy, folder, evaluate):
        self.config, self.manifest = config, datasets["train"]
        self.strategy, self.folder, self.evaluate, self.size = strategy, folder, evaluate, config.training.batch_size
        self.order = {"epochs": config.training.epochs, "seed": config.seed, "remainder": config.training.remainder}
        self.order |= {"window": config.data.window, "limit": config.data.limit}
        self.latest = checkpoints.latest(folder / "checkpoints")
        self.state = self._comparable() if self.latest else {}
        self.validation, self.workers = None, []  # workers: of each input pipeline its share, as the strategy deals
        self.dataset = self._distributed(self.manifest, self.state.get("position", 0))
        self.steps = self._steps(self.manifest, self.order["limit"])
        self.total = self.steps * config.training.epochs
        if validation := datasets.get("validation"):  # now, so that what is wrong with it does not cost an epoch
            dataset = self._distributed(validation, epochs=1, seed=None, limit=None)
            self.validation = dataset, tf.constant(self._steps(validation, None))
        tf.keras.backend.experimental.enable_tf_random_generator()  # dropout's state is a variable, for checkpoints
        with strategy.scope():
            self.model = made(config, model)
            self.optimizer = optimizer(config, self.model, self.total)
            self.model.compile(self.optimizer)
        self.objects = {"model": self.model, "optimizer": self.optimizer}
        step = functools.partial(trained, self.model, self.optimizer)
        self.train = executed(step, strategy, config.training.jit_compile)
        self.validate = executed(lambda batch: loss_of(self.model, batch, training=False), strategy)

    def _steps(self, manifest: Manifest, limit: int | None) -> int:
        worker, remainder = self.workers[0], self.order["remainder"]
        return steps_per_epoch(manifest, self.size, worker=worker, remainder=remainder, limit=limit)

    def _comparable(self) -> dict:
        """The state of the latest checkpoint, if it is one of this run."""
        state = checkpoints.content(self.latest)["state"]
        if state["hash"] != self.config.hash:
            found = differences(Config.parse(state["config"]), self.config)
            listed = "\n  ".join(f"{path}: {then!r}, now {now!r}" for path, then, now in found)
            raise ValueError(
                f"{self.latest} is of another config:\n  {listed}\nTake another folder for another run; "
                "checkpoints.warm_start begins it with what this one knows."
            )
        then, now = state["position"]["files"], position(self.manifest, self.size, 0)["files"]
        if then != now:
            raise ValueError(
                f"{self.latest} was trained on other files than {self.manifest.folder} has: {state['rows']:,} rows "
                f"(hash {then[:12]}), now {self.manifest.rows:,} ({now[:12]}). Train on the same export, or in another "
                "folder."
            )
        return state

    def _read(self, manifest: Manifest, worker: Worker, start: int | dict = 0, **other) -> tf.data.Dataset:
        if isinstance(start, dict):
            start = start | {"worker": [worker.index, *start["worker"][1:]]}
        read = {"columns": self.config.sql_columns(), "lengths": self.config.lengths()}
        read |= {"features": self.config.transform(), "worker": worker, "start": start}
        return batches(manifest, self.size, **read, **(self.order | other))

    def _distributed(self, *of, **other):
        """The batches of every replica, as its strategy hands them out."""

        def read(context):
            self.workers.append(Worker.of(context))
            return self._read(of[0], self.workers[-1], *of[1:], **other)

        return self.strategy.distribute_datasets_from_function(read)

    def until(self, asked: list, initialise) -> Run:
        """Go on from where the run is, until it is done or `asked` to stop."""
        settings, iterator = self.config.training, iter(self.dataset)
        self.train.get_concrete_function(iterator, tf.TensorSpec([], tf.int32))  # makes all variables, changes none
        self._begin(initialise)
        rows = self.size * self.workers[0].count * self.workers[0].replicas
        self.bar = _bar(self.total * rows, self.step * rows)
        saved = self.step
        with self.bar, self.log:
            while True:
                done = self.step == self.total
                if self.step > saved and (done or self.step % settings.checkpoint_every == 0):
                    saved = self._save()
                if self.step == self.steps * (len(self.evaluations) + 1) and not asked:
                    self._end_epoch()
                if self._stale() or done or asked:
                    stopped = "SIGTERM" if asked else "early stopping" if self._stale() else "end"
                    break
                ends = (self.steps, settings.checkpoint_every)  # an execution does not run past one
                count = min(settings.steps_per_execution, *(end - self.step % end for end in ends))
                self.results.append(self.train(iterator, tf.constant(count)))
                self.step += count
                self.bar.update(count * rows)
                if self.step % settings.log_every < count or self.step % self.steps == 0:
                    self._report()
            if self.step > saved:
                self._save()
        return self._finish(stopped)

    def _begin(self, initialise) -> None:
        """Restore, or initialise; and cut the log back to the checkpoint, since the steps after it come again."""
        path, state = self.folder / "metrics.jsonl", self.state
        if self.latest:
            checkpoints.restore(self.latest, self.objects)
        else:  # of a run that was killed before its first checkpoint
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            (self.folder / "config.yaml").write_text(self.config.dump(), encoding="utf-8")
        if initialise and not self.latest:
            initialise(self.objects)
            self.optimizer.optimizers[0].begin.assign(self.optimizer.iterations)
        self.step, self.losses = state.get("step", 0), state.get("losses", [])
        self.evaluations, self.seconds = state.get("evaluations", []), state.get("seconds", 0.0)
        self.results, self.mark = [], time.perf_counter()
        self.log = open(path, "a")  # noqa: SIM115 - closed by `until`
        self.log.truncate(min(path.stat().st_size, state.get("log_bytes", 0)))
        self.board = tf.summary.create_noop_writer()
        if self.config.training.tensorboard:
            self.board = tf.summary.create_file_writer(str(self.folder / "tensorboard"))

    def _write(self, line: dict) -> None:
        """A line of the log, and its numbers for TensorBoard."""
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        # What tf.summary.scalar writes; that one needs the package tensorboard, which only looks at files.
        kind = tf.compat.v1.SummaryMetadata(data_class=1, plugin_data={"plugin_name": "scalars"})
        with self.board.as_default(step=line["step"]):
            for name in line.keys() - {"step", "epoch"}:
                tf.summary.write(name, np.float32(line[name]), metadata=kind)

    def _report(self) -> None:
        """Wait for the steps since the last report; a line in the log for every `log_every`, and at an epoch's end."""
        if not self.results:
            return
        seen = np.concatenate([result.numpy() for result in self.results])
        self.results, first = [], self.step - len(seen)
        elapsed, self.mark = time.perf_counter() - self.mark, time.perf_counter()
        self.seconds += elapsed
        if not (finite := np.isfinite(seen).all(1)).all():
            at = int(np.argmin(finite))
            raise FloatingPointError(self._not_finite(first + at, seen[at]))
        speed = len(seen) * self.bar.total / self.total / elapsed
        for step, loss in enumerate(seen[:, 0], first + 1):
            self.losses.append(float(loss))
            if step % self.config.training.log_every == 0 or step % self.steps == 0:
                mean, self.losses = float(np.mean(self.losses)), []
                timing = {"rows_per_second": round(speed), "seconds": round(self.seconds, 3)}
                self._write({"step": step, "epoch": (step - 1) // self.steps + 1, "loss": mean} | timing)
                self.bar.set_postfix_str(f"loss {mean:.4g}")

    def _save(self) -> int:
        """A checkpoint of this step; returns the step."""
        self._report()
        os.fsync(self.log.fileno())
        state = {
            "step": self.step,
            "hash": self.config.hash,
            "config": self.config.dump(),
            "rows": self.manifest.rows,
            "position": position(self.manifest, self.size, self.step, worker=self.workers[0], **self.order),
            "losses": self.losses,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "log_bytes": os.fstat(self.log.fileno()).st_size,
        }
        checkpoints.save(self.folder / "checkpoints", self.objects, state, keep=self.config.training.keep)
        self.mark = time.perf_counter()
        return self.step

    def _end_epoch(self) -> None:
        """Evaluate; with early stopping, keep the model if it is the best so far."""
        line, metric = {"step": self.step, "epoch": self.step // self.steps}, self.config.evaluation.metric
        if self.validation:
            dataset, count = self.validation
            line["validation_loss"] = float(tf.reduce_mean(self.validate(iter(dataset), count)))
        if self.evaluate:
            line |= {name: float(value) for name, value in self.evaluate(self.model).items()}
        self.evaluations.append(line)
        if len(line) > 2:
            self._write(line)
        self.mark, there = time.perf_counter(), checkpoints.latest(self.folder / "best")
        if not self.config.training.early_stopping:
            return
        if metric not in line:
            raise ValueError(f"evaluate returned {', '.join(line)}; early stopping goes by {metric}")
        if self._best() is line and (not there or checkpoints.content(there)["state"]["step"] < self.step):
            checkpoints.save(self.folder / "best", self.objects, line, keep=1)

    def _best(self) -> dict:
        return max(self.evaluations, key=lambda line: line[self.config.evaluation.metric])

    def _stale(self) -> bool:
        epochs = self.config.training.early_stopping if self.evaluations else None
        return epochs is not None and self.evaluations[-1]["epoch"] - self._best()["epoch"] >= epochs

    def _finish(self, stopped: str) -> Run:
        self.board.close()
        if self.config.training.early_stopping and stopped != "SIGTERM":
            checkpoints.restore(checkpoints.latest(self.folder / "best"), self.objects)
        path, rows = self.folder / "run.json", [{"case": "training", "value": self.seconds, "unit": "s"}]
        known = json.loads(path.read_text()) if path.exists() else {}  # what runs.py wrote
        known |= scale.result(self.config.name, rows, scale="", dataset=self.manifest.folder)
        ended = {"stopped": stopped, "steps": self.step, "config": self.config.hash, "evaluations": self.evaluations}
        scale.write_json(path, known | ended)
        return Run(self.folder, self.model, self.optimizer, self.step, stopped, self.evaluations, self.seconds)

    def _not_finite(self, done: int, seen: np.ndarray) -> str:
        """What is wrong in the step after `done`: its batch is read again, and the rows of tables that it touches."""
        worker, variables = self.workers[0], self.model.trainable_variables
        read = list(self._read(self.manifest, worker, done).take(worker.replicas))
        begins = {name: values[:3].numpy().tolist() for name, values in read[0].items()}
        found = dict.fromkeys(line for batch in read for line in not_finite(self.model, batch))
        totals = zip(variables, seen[1:], strict=True)
        gradients = [name_of(variable) for variable, total in totals if not np.isfinite(total)]
        latest = checkpoints.latest(self.folder / "checkpoints")
        return (
            f"step {done + 1:,}, epoch {done // self.steps + 1}: the loss is {seen[0]}; the gradients of "
            f"{', '.join(gradients) or 'none'} are not finite. The batch begins with {begins}. Not finite are:\n  "
            + "\n  ".join(found or ["none of its values, nor of what it reads of tables and layers"])
            + "\nWhat is not finite was not applied, and nothing of the step is saved. Leave such rows out in SQL, "
            "lower optimizer.learning_rate, set optimizer.clip_norm, or find a division by 0: "
            "tf.debugging.enable_check_numerics() names it. "
            + (f"{latest} is from before." if latest else "There is no checkpoint yet.")
        )


@contextlib.contextmanager
def _sigterm() -> Iterator[list]:
    """A list that is empty until SIGTERM comes; only a process's main thread can listen."""
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar(total: int, initial: int = 0) -> tqdm:
    """One line on stderr: rows, rows/s, time left."""
    return tqdm(
        total=total, initial=initial, unit="row", unit_scale=True, file=sys.stderr, desc="training", mininterval=0.5,
        disable=not scale.progress(),
    )  # fmt: skip


class _Progress(tf.keras.callbacks.Callback):
    """One line on stderr: steps, loss, rows/s, time left."""

    def __init__(self, batch_size: int, steps: int):
        super().__init__()
        self.bar = _bar(steps * batch_size)
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
      Others pass with a note that explains them (errors.py).
    """
    bar = _Progress(batch_size, epochs * steps_per_epoch)
    with errors.decoding(model, dataset):
        history = model.fit(dataset, epochs=epochs, steps_per_epoch=steps_per_epoch, verbose=0, callbacks=[bar])
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
