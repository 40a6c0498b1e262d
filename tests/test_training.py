"""Training: a run that was stopped, killed or poisoned says so and goes on as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import checkpoints, input_pipeline, record_batches, training, training_step
from recsys_common.config import Config
from recsys_common.embeddings import Embeddings

USERS, ITEMS, ROWS, BATCH = 200, 50, 1000, 32
STEPS = ROWS // BATCH  # 31 an epoch
COLUMNS = {"user_index": "int32", "item_index": "int32", "rating": "float32"}


def config(**training_) -> Config:
    """Two epochs of 31 steps; every step in the log, a checkpoint every 10."""
    features = {
        "user": {"kind": "index", "column": "user_index", "rows": USERS},
        "item": {"kind": "index", "column": "item_index", "rows": ITEMS},
        "rating": {"kind": "label", "column": "rating"},
    }
    usual = {"batch_size": BATCH, "epochs": 2, "log_every": 1, "checkpoint_every": 10, "tensorboard": False}
    return Config(features=features, model={"embedding_dim": 4}, training=usual | training_)


LONG = config(epochs=3, checkpoint_every=25)


class Regression(training_step.tfrs.Model):
    """A dense layer on two rows, squared error summed over the batch."""

    def __init__(self, config: Config):
        super().__init__()
        self.rows = Embeddings(
            {name: table for name, table in config.tables().items() if name in ("user", "item")}, config.seed
        )
        self.dense = tf.keras.layers.Dense(1)

    def compute_loss(self, inputs, training=False):
        rows = self.rows(inputs)
        predicted = self.top(tf.concat([rows["user"], rows["item"]], 1), training)[:, 0]
        return tf.reduce_sum((tf.cast(predicted, tf.float32) - inputs["rating"]) ** 2)

    def top(self, rows, training):
        return self.dense(rows)


class Dropping(Regression):
    """With dropout, whose random numbers have to go on after a resume."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.dense = tf.keras.Sequential([tf.keras.layers.Dropout(0.3), self.dense])

    def top(self, rows, training):
        return self.dense(rows, training=training)


def export(folder, rows: int = ROWS, seed: int = 0, scale: float = 1) -> record_batches.Manifest:
    numbers = np.random.default_rng(seed)
    tables = [
        pa.table(
            {
                "user_index": numbers.integers(1, USERS, rows // 4).astype("int32"),
                "item_index": numbers.integers(1, ITEMS, rows // 4).astype("int32"),
                "rating": (scale * numbers.random(rows // 4)).astype("float32"),
            }
        )
        for _ in range(4)
    ]
    return record_batches.write(folder, tables, COLUMNS, rows_per_record=32)


def trained(config: Config, manifest, folder, model=Regression, **options) -> training.Run:
    return training.train(config, lambda: model(config), {"train": manifest}, folder=folder, **options)


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[tuple]:
    return [(line["step"], line["loss"]) for line in log(folder) if "loss" in line]


def weights(run: training.Run) -> dict[str, bytes]:
    found = checkpoints.variables({"model": run.model, "optimizer": run.optimizer})
    return {name: variable.numpy().tobytes() for name, variable in found.items()}


def stopped_at(*steps: int):
    """SIGTERM to this process in the execution that reaches each of these steps, once: as it comes from outside."""
    left, bar = list(steps), training._bar

    def with_signal(total, initial=0):
        made = bar(total, initial)
        done, update = initial // BATCH, made.update

        def reached(rows):
            nonlocal done
            done += rows // BATCH
            if left and done >= left[0]:
                left.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return update(rows)

        made.update = reached
        return made

    patch = pytest.MonkeyPatch()
    patch.setattr(training, "_bar", with_signal)
    return patch


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return export(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    trained(config(epochs=1), manifest, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_PROGRESS", "0")
        yield


def test_a_run_and_its_folder(manifest, tmp_path):
    asked = config(log_every=7, tensorboard=True, checkpoint_every=25, keep=2)
    seen = []

    def evaluate(model):
        seen.append(model.rows.tables["user"].numpy().copy())
        return {"NDCG@10": 0.25 * len(seen), "MRR": np.float32(0.5)}

    datasets = {"train": manifest, "validation": manifest}
    run = training.train(asked, lambda: Regression(asked), datasets, folder=tmp_path, evaluate=evaluate)
    assert (run.steps, run.stopped, run.folder) == (62, "end", tmp_path)
    lines = log(tmp_path)
    # every 7th step, and the end of each epoch, where there is the evaluation too
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 31, 31, 35, 42, 49, 56, 62, 62]
    assert [line["epoch"] for line in lines] == [1] * 6 + [2] * 6
    assert lines[0].keys() == {"step", "epoch", "loss", "rows_per_second", "seconds"}
    assert lines[5] == run.evaluations[0] and lines[11] == run.evaluations[1]
    assert {"NDCG@10": 0.5, "MRR": 0.5}.items() < lines[11].items()
    assert lines[10]["loss"] < 0.9 * lines[0]["loss"]

    # validation: the mean loss of the batches with the model as it is
    read = input_pipeline.batches(manifest, BATCH, lengths={}, features=asked.transform())
    expected = np.mean([float(run.model.compute_loss(batch)) for batch in read])
    assert lines[11]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert (seen[1] == run.model.rows.tables["user"].numpy()).all() and (seen[0] != seen[1]).any()

    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-000000050", "step-000000062"]
    assert Config.load(tmp_path / "config.yaml") == asked
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["stopped"], about["steps"], about["config"]) == ("end", 62, asked.hash)
    assert about["versions"]["tensorflow"] == tf.__version__ and about["evaluations"] == run.evaluations

    events = {}
    for file in (tmp_path / "tensorboard").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                events[event.step, value.tag] = tf.make_ndarray(value.tensor).item()
    assert events[7, "loss"] == pytest.approx(lines[0]["loss"]) and events[62, "NDCG@10"] == 0.5

    # again: done already, the evaluation is made anew and the log stays as it was
    again = training.train(asked, lambda: Regression(asked), datasets, folder=tmp_path, evaluate=lambda m: {"MRR": 1})
    assert (again.steps, again.stopped) == (62, "end") and weights(again) == weights(run)
    assert log(tmp_path)[:11] == lines[:11] and len(log(tmp_path)) == 12


def test_losses_are_those_of_plain_keras(manifest, tmp_path):
    """The same model, batches and optimizer in Keras's own `fit`: the step here is no other."""
    asked = config()
    trained(asked, manifest, tmp_path)
    tf.keras.utils.set_random_seed(asked.seed)
    model = Regression(asked)
    model.compile(training_step.optimizer(asked, model, 62))
    read = input_pipeline.batches(manifest, BATCH, epochs=2, seed=asked.seed, lengths={}, features=asked.transform())
    expected = []
    keep = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: expected.append(logs["loss"]))
    model.fit(read, epochs=2, steps_per_epoch=31, verbose=0, callbacks=[keep])
    np.testing.assert_allclose([loss for _, loss in losses(tmp_path)], expected, rtol=1e-6)


def test_another_config_and_other_files_are_refused(manifest, finished, tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)step-000000031 is of another config:\n  training.epochs: 1, now 2\nTake"
    ):
        trained(config(epochs=2), manifest, finished)
    other = export(tmp_path / "other", rows=1200)
    with pytest.raises(ValueError, match=r"trained on other files than \S+ has: 1,000 rows \(hash \w{12}\), now 1,200"):
        trained(config(epochs=1), other, finished)


def test_one_process_at_a_time_trains_in_a_folder(manifest, tmp_path):
    with (
        checkpoints.alone(tmp_path),
        pytest.raises(BlockingIOError, match=f"{tmp_path}: another process trains in it. Wait"),
    ):
        trained(config(), manifest, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_validation_that_cannot_be_read_does_not_cost_an_epoch(manifest, tmp_path):
    datasets = {"train": manifest, "validation": export(tmp_path / "small", rows=20)}
    with pytest.raises(ValueError, match=r"batch_size 32 is more than the 20 rows of \S+small: not one full batch"):
        training.train(config(), lambda: Regression(config()), datasets, folder=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_sigterm_is_heard_in_the_main_thread_alone_and_its_handler_goes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), training._sigterm() as asked:
        assert not asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():
        with training._sigterm() as asked:
            handlers.append((signal.getsignal(signal.SIGTERM), list(asked)))

    handlers = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [(before, [])]


def test_early_stopping_keeps_the_best(manifest, tmp_path):
    scores, tables = iter([0.2, 0.5, 0.4, 0.5, 0.9]), []

    def evaluate(model):
        tables.append(model.rows.tables["item"].numpy().copy())
        return {"NDCG@10": next(scores)}

    asked = config(epochs=5, early_stopping=2)
    run = trained(asked, manifest, tmp_path, evaluate=evaluate)
    assert (run.stopped, run.steps) == ("early stopping", 4 * STEPS)
    assert (run.model.rows.tables["item"].numpy() == tables[1]).all()
    assert checkpoints.latest(tmp_path / "best").name == "step-000000062"
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-000000124"
    again = trained(asked, manifest, tmp_path, evaluate=evaluate)  # has stopped already
    assert (again.stopped, again.steps, len(tables)) == ("early stopping", 4 * STEPS, 4)
    assert (again.model.rows.tables["item"].numpy() == tables[1]).all()
    with pytest.raises(ValueError, match=r"`evaluate` has to return NDCG@10"):
        trained(asked, manifest, tmp_path / "other")
    with pytest.raises(ValueError, match=r"evaluate returned .*MRR; early stopping goes by NDCG@10"):
        trained(asked, manifest, tmp_path / "other", evaluate=lambda model: {"MRR": 1.0})


def test_a_nan_stops_the_run_and_names_step_batch_and_table(manifest, tmp_path):
    read = input_pipeline.batches(manifest, BATCH, epochs=2, seed=1, lengths={})
    users = [batch["user_index"].numpy() for batch in read]
    first = {user: step for step, ids in reversed([*enumerate(users, 1)]) for user in ids.tolist()}
    user, step = next((user, step) for user, step in first.items() if step > 11)  # it is in no batch before
    ids = users[step - 1]
    poisoned = []

    def poison(objects):
        poisoned.append(objects["model"].rows.tables["user"])
        objects["model"].rows.tables["user"].scatter_nd_update([[user, 2]], [np.nan])

    asked = config(steps_per_execution=4, log_every=50)
    with pytest.raises(FloatingPointError) as caught:
        trained(asked, manifest, tmp_path, initialise=poison)
    message = str(caught.value)
    assert message.startswith(
        f"step {step:,}, epoch {(step - 1) // STEPS + 1}: the loss is nan; the gradients of item, user, dense"
    )
    assert f"'user': {ids[:3].tolist()}" in message
    assert f"table 'user': 1 of the {len(set(ids))} rows that it touches, first row {user}" in message
    assert "table 'item'" not in message and "layer" not in message
    latest = checkpoints.latest(tmp_path / "checkpoints")
    assert latest.name == f"step-{(step - 1) // 10 * 10:09d}" and f"{latest} is from before" in message
    assert "FloatingPointError" not in message and caught.value.__notes__  # explained, by errors.py
    # nothing that is not finite was applied: what was finite is so still
    assert np.isnan(poisoned[0].numpy()).sum() == 1
    for file in latest.glob("*.npy"):
        assert np.isnan(np.load(file)).sum() == (file.name == "model.rows.tables.user.npy"), file


def test_what_is_not_finite_is_found_in_columns_and_layers():
    asked = config()
    model = Regression(asked)
    batch = {"user": tf.constant([1, 2, 2]), "item": tf.constant([3, 3, 3]), "rating": tf.constant([1, np.nan, np.inf])}
    assert training_step.not_finite(model, batch) == ["column 'rating': 2 of 3 values are not finite"]
    model.dense.kernel.assign(tf.fill([8, 1], np.inf))
    found = training_step.not_finite(model, batch)
    assert len(found) == 2 and re.fullmatch(r"layer '\S*kernel': 8 of 8 numbers", found[1])


def test_learning_rates_rise_and_fall():
    def rates(*of, begin=0):
        schedule = training_step.Schedule(*of, begin)
        return [round(float(schedule(tf.constant(step, tf.int64))), 6) for step in range(8)]

    assert rates(2.0, 0, "none", 8) == [2] * 8
    assert rates(2.0, 4, "none", 8) == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert rates(2.0, 4, "linear", 8) == [0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5]
    half = [2 * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
    assert rates(2.0, 0, "cosine", 8) == pytest.approx(half, abs=2e-6)
    assert rates(2.0, 0, "linear", 4) == [2, 1.5, 1, 0.5, 0, 0, 0, 0]  # past the end
    assert rates(2.0, 2, "none", 8, begin=tf.Variable(3, dtype=tf.int64))[3:6] == [1, 2, 2]


def test_each_variable_has_its_optimizer():
    asked = config().override(
        "optimizer.name=row_wise_adagrad", "optimizer.dense_name=adam", "optimizer.learning_rate=0.5",
        "optimizer.dense_learning_rate=0.25", "optimizer.clip_norm=3.0",
    )  # fmt: skip
    model = Regression(asked)
    model.dense.build([None, 8])
    chosen = training_step.optimizer(asked, model, 100)
    rows, dense = chosen.optimizers
    assert type(rows).__name__ == "RowWiseAdagrad" and type(dense) is tf.keras.optimizers.Adam
    assert (float(rows.learning_rate), float(dense.learning_rate)) == (0.5, 0.25)
    assert (rows.clip_norm, dense.clipnorm) == (3.0, 3.0)
    (_, tables), (_, layers) = chosen._optimizers_and_vars
    assert {variable.name for variable in tables()} == {"user:0", "item:0"}
    assert {variable.shape.as_list()[0] for variable in layers()} == {8, 1}  # kernel, bias
    warm = asked.override("optimizer.warmup_steps=4", "optimizer.decay=linear")
    rates = [part._learning_rate for part in training_step.optimizer(warm, model, 100).optimizers]
    assert [(rate.rate, rate.warmup_steps, rate.decay, rate.steps) for rate in rates] == [
        (0.5, 4, "linear", 100), (0.25, 4, "linear", 100),
    ]  # fmt: skip


def test_a_warm_start_keeps_the_count_and_begins_the_schedule(manifest, finished, tmp_path):
    asked = config(epochs=1).override("optimizer.decay=linear", "optimizer.learning_rate=0.5")
    path, seen, ids = checkpoints.latest(finished / "checkpoints"), {}, np.arange(1, USERS)

    def start(objects):
        checkpoints.warm_start(path, objects, {"user": (ids, ids[::-1])})
        seen["user"] = objects["model"].rows.tables["user"].numpy().copy()

    run = trained(asked, manifest, tmp_path, initialise=start)
    then = np.load(path / "model.rows.tables.user.npy")
    assert (seen["user"][0] == then[0]).all() and (seen["user"][1:] == then[:0:-1]).all()
    rows = run.optimizer.optimizers[0]
    assert (run.steps, int(rows.iterations), int(rows.begin)) == (31, 62, 31)
    assert float(rows.learning_rate) == pytest.approx(0.5 * (1 - 30 / 31))  # of the last step; 0 if it had gone on
    assert (seen["user"] != run.model.rows.tables["user"].numpy()).any()


def test_mixed_precision_and_xla(manifest, finished, tmp_path):
    asked = config(mixed_precision=True, epochs=1, jit_compile=True)
    run = trained(asked, manifest, tmp_path)
    assert run.model.dense.compute_dtype == "bfloat16" and run.model.dense.kernel.dtype == tf.float32
    assert tf.keras.mixed_precision.global_policy().name == "float32"
    mixed, plain = ([loss for _, loss in losses(folder)] for folder in (tmp_path, finished))
    np.testing.assert_allclose(mixed, plain, rtol=0.02)
    assert mixed != plain
    with pytest.raises(ValueError, match="so give a function, not a model"):
        training.train(asked, run.model, {"train": manifest}, folder=tmp_path / "other")
    plain_keras = tf.keras.Sequential([tf.keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"Sequential: expected a tfrs\.Model"):
        training.train(config(), plain_keras, {"train": manifest}, folder=tmp_path / "other")


def test_an_error_of_the_step_is_explained(manifest, tmp_path):
    asked, zeros = config(steps_per_execution=4), export(tmp_path / "zeros", rows=64, scale=0)

    class Wrong(Regression):
        """Ids that `preflight` cannot know, as they are made in the step."""

        def compute_loss(self, inputs, training=False):
            return super().compute_loss(inputs | {"user": inputs["user"] + USERS}, training)

    with (
        pytest.warns(UserWarning, match=r"column 'rating' is 0\.0 in the whole batch"),
        pytest.raises(tf.errors.InvalidArgumentError) as caught,
    ):
        training.train(asked, lambda: Wrong(asked), {"train": zeros}, folder=tmp_path / "wrong")
    assert "An id is outside its table" in "".join(caught.value.__notes__)

    class Missing(Regression):
        def compute_loss(self, inputs, training=False):
            return super().compute_loss(inputs | {"rating": inputs["raiting"]}, training)

    with pytest.raises(ValueError, match=r"fail:\n1\. training step: KeyError: 'raiting'.* at \S*test_training\.py"):
        training.train(asked, lambda: Missing(asked), {"train": manifest}, folder=tmp_path / "missing")
    assert list((tmp_path / "missing").iterdir()) == []  # before anything was done


# What takes a process of its own: kills, one thread, two devices ------------------------------------------


def one_thread() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def child_train(folder: str) -> None:
    """Three epochs, until somebody kills this process."""
    one_thread()
    manifest = record_batches.Manifest.load(Path(folder) / "data")
    trained(LONG, manifest, Path(folder) / "killed", Dropping)


def kill_within(lines: int, folder: Path, log_file: Path) -> None:
    """Start `child_train`, and kill it once it has logged so many steps."""
    process = subprocess.Popen([sys.executable, __file__, "child_train", str(folder)])
    while process.poll() is None and not (log_file.exists() and log_file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def child_compare(folder: str) -> None:
    """Everything that has to be the same bit for bit; prints it as JSON."""
    one_thread()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    folder, found = Path(folder), {}
    manifest = export(folder / "data", rows=4000)
    log_file = folder / "killed" / "metrics.jsonl"
    killing = threading.Thread(target=kill_within, args=(random.SystemRandom().randint(25, 250), folder, log_file))
    killing.start()
    alone = trained(LONG, manifest, folder / "alone", Dropping)
    killing.join()
    lines = log_file.read_bytes().count(b"\n")
    again = trained(LONG, manifest, folder / "killed", Dropping)
    same = losses(folder / "killed") == losses(folder / "alone")
    found["killed"] = [lines, same, weights(again) == weights(alone), [step for step, _ in losses(folder / "killed")]]

    manifest = export(folder / "small")
    alone = trained(config(log_every=3), manifest, folder / "one step at a time")
    asked, ends = config(log_every=3, steps_per_execution=4), []
    patch = stopped_at(7, 31, 47)  # within an epoch, at its end, and in the next one
    while not ends or ends[-1][0] == "SIGTERM":
        run = trained(asked, manifest, folder / "stopped")
        ends.append((run.stopped, run.steps))
    patch.undo()
    same = losses(folder / "stopped") == losses(folder / "one step at a time")
    found["stopped"] = [same, weights(run) == weights(alone), ends]

    strategy, ends = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), []
    asked, patch = config(batch_size=16, log_every=3, steps_per_execution=4), stopped_at(34)
    while not ends or ends[-1][0] == "SIGTERM":
        run = trained(asked, manifest, folder / "mirrored", strategy=strategy)
        ends.append((run.stopped, run.steps))
    patch.undo()
    copies = [copy.numpy() for copy in run.model.rows.tables["user"].values]
    found["mirrored"] = [ends, len(copies), bool((copies[0] == copies[1]).all())]
    found["losses"] = [[loss for _, loss in losses(folder / name)] for name in ("mirrored", "one step at a time")]
    print(json.dumps(found))


@pytest.fixture(scope="module", autouse=True)
def child(tmp_path_factory):
    """A process that compares while the other tests run."""
    folder = tmp_path_factory.mktemp("compared")
    with open(folder / "stderr", "w") as stderr:
        arguments = [sys.executable, __file__, "child_compare", str(folder)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=stderr, text=True)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def compared(child):
    process, folder = child
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, (folder / "stderr").read_text()[-3000:]
    return json.loads(said.splitlines()[-1])


def test_a_killed_run_ends_as_an_undisturbed_one(compared, tell):
    lines, equal_losses, equal_weights, steps = compared["killed"]
    tell(f"training killed after step {lines} of 375, resumed: the same losses and weights, bit for bit")
    assert 25 <= lines < 375 and equal_losses and equal_weights
    assert steps == list(range(1, 376))  # no step left out, none trained twice


def test_a_stopped_run_resumes_bit_for_bit_whatever_steps_are_executed_at_once(compared):
    assert compared["stopped"] == [True, True, [["SIGTERM", 8], ["SIGTERM", 31], ["SIGTERM", 48], ["end", 62]]]


def test_two_mirrored_devices(compared):
    assert compared["mirrored"] == [[["SIGTERM", 35], ["end", 62]], 2, True]
    # a step of two replicas with 16 rows each is one of 32 rows: the rows of an epoch come in the same order
    mirrored, alone = compared["losses"]
    np.testing.assert_allclose(mirrored, alone, rtol=1e-4)


if __name__ == "__main__":
    os.environ["RECSYS_PROGRESS"] = "0"
    globals()[sys.argv[1]](*sys.argv[2:])
