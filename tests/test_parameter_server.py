"""Tables in shards on parameter servers, real processes of this machine: it learns, what it costs, what it survives."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from recsys_common import record_batches
from recsys_common.parameter_server import LocalCluster

USERS, ITEMS, GROUPS, BATCH = 400, 300, 10, 200

# In processes of their own, since TensorFlow's context stays bound to a cluster, and does not survive its end.
TRAINS = """
    import contextlib, json, os, sys, threading, time
    from recsys_common.parameter_server import LocalCluster, measure, rows, train
    told, (folder, scratch, *sizes) = {}, sys.argv[1:]
    with LocalCluster(workers=2, servers=2, shard_bytes=1024) as cluster:
        import numpy as np
        import tensorflow as tf
        from recsys_common import optimizers
        from recsys_common.embeddings import Embeddings, Table
        from recsys_common.input_pipeline import Worker, batches
        from recsys_common.models.matrix_factorization import MatrixFactorization
        from recsys_common.record_batches import Manifest

        manifest, (users, items, size) = Manifest.load(folder), map(int, sizes)

        def build():
            return MatrixFactorization(users, items, 8), tf.keras.optimizers.Adagrad(0.3)

        def shares(index, count):
            return batches(manifest, size, seed=1, epochs=9, worker=Worker(index, count))

        one, both = (train(build, shares, 200, where) for where in (None, cluster))
        told["losses"] = [run.losses.tolist() for run in (one, both)]
        told["speed"], told["bytes"] = both.examples_per_second, both.bytes_per_step
        told["shards"] = [
            [[shard.shape[0], shard.device] for shard in table.variables]
            for table in (both.model.user_table, both.model.item_table)
        ]
        table = both.model.user_table
        slot = next(slot for slot in both.optimizer.variables if slot.shape == table.shape)
        pairs = zip(table.variables, slot.variables, strict=True)
        told["together"] = [a.device == b.device and a.shape == b.shape for a, b in pairs]
        told["best"] = both.model.scores(np.arange(users)).argmax(1).tolist()
        ids = np.random.default_rng(0).integers(0, 150, (12, 50)).astype("int32")

        class Squares(tf.keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = Embeddings({"id": Table("t", 200, 8)}, seed=3)

            def compute_loss(self, batch, training):
                return tf.reduce_sum(tf.square(self.layer(batch)["id"] - 1))

        def few(*_):
            return tf.data.Dataset.from_tensor_slices({"id": ids}).repeat()

        def square():
            return Squares(), optimizers.LazyAdam(0.05)

        class Shares(Squares):
            def compute_loss(self, batch, training):
                return super().compute_loss(batch, training) * 0 + tf.reduce_mean(tf.cast(batch["id"], tf.float32))

        def numbered(index, count):
            return tf.data.Dataset.from_tensors({"id": tf.fill([8], 10 * count + index)}).repeat()

        run = train(lambda: (Shares(), optimizers.Adagrad(0.1)), numbered, 60, cluster)
        told["shares"] = sorted(set(run.losses.tolist()))
        told["measured"] = measure(cluster, square, few, steps=60, rounds=1)
        single = train(square, few, 1)
        told["single"] = len(single.losses), single.examples_per_second
        with contextlib.suppress(ValueError):
            train(square, few, 0)
            told["single"] = "no step is one, too"
        os.kill(cluster.processes["worker"][0], 9)
        start = time.monotonic()
        told["without"] = train(square, few, 60, cluster).losses.tolist()
        told["seconds without"], told["lost"] = time.monotonic() - start, [cluster.lost("worker"), cluster.lost("ps")]

        # One worker is left, so that steps follow each other as they do in one process.
        seen = []

        def same(optimizer, **options):
            class Seen(optimizer):
                def update_step(self, gradient, variable):
                    seen.append([type(gradient).__name__, variable.shape[0]])
                    return super().update_step(gradient, variable)

            def build():
                return Squares(), Seen(0.05, **options)

            seen.clear()
            alone = train(build, few, 30, cluster)
            found = {"seen": [list(x) for x in seen]}
            one = train(build, few, 30)
            table = alone.model.layer.tables["t"]
            found["differ"], found["moved"] = (
                float(abs(rows(table) - rows(model.layer.tables["t"])).max()) for model in (one.model, Squares())
            )
            path = tf.train.Checkpoint(model=alone.model, optimizer=alone.optimizer).save(f"{scratch}/a")
            for where, scope in ("cluster", cluster.strategy.scope()), ("one process", contextlib.nullcontext()):
                with scope:
                    again, new = build()
                    new.build(again.trainable_variables)
                try:
                    tf.train.Checkpoint(model=again, optimizer=new).restore(path).assert_existing_objects_matched()
                    pairs = zip([again.layer.tables["t"], *new.variables], [table, *alone.optimizer.variables])
                    found[where] = max(float(abs(rows(x) - rows(y)).max()) for x, y in pairs if x.shape.rank)
                except ValueError as error:
                    found[where] = str(error)
            return found

        told["same"] = {
            "tf-keras Adagrad": same(tf.keras.optimizers.Adagrad),
            "Adagrad": same(optimizers.Adagrad), "RowWiseAdagrad": same(optimizers.RowWiseAdagrad),
            "LazyAdam": same(optimizers.LazyAdam, correct_skipped=True),
        }

        def kill():
            told["killed"] = time.monotonic()
            os.kill(cluster.processes["ps"][1], 9)

        threading.Timer(1, kill).start()
        try:
            while True:
                train(square, few, 300, cluster)
        except RuntimeError as error:
            told["seconds"], told["error"] = time.monotonic() - told["killed"], str(error)
        try:
            train(square, few, 1, cluster)  # which has no variables to begin with
        except RuntimeError as error:
            told["error before"] = str(error)
    print(json.dumps(told))
"""

LOSES = """
    import json, os, threading, time
    from recsys_common.parameter_server import LocalCluster, train
    with LocalCluster(workers=1, servers=1) as cluster:
        import tensorflow as tf

        class Square(tf.keras.Model):
            def __init__(self):
                super().__init__()
                self.table = tf.keras.layers.Embedding(9, 2)

            def compute_loss(self, batch, training):
                return tf.reduce_sum(self.table(batch) ** 2)

        def kill():
            global killed
            killed = time.monotonic()
            os.kill(cluster.processes["worker"][0], 9)

        threading.Timer(2, kill).start()
        try:
            while True:
                build = lambda: (Square(), tf.keras.optimizers.Adagrad(0.1))
                train(build, lambda *_: tf.data.Dataset.range(9).batch(9).repeat(), 300, cluster)
        except RuntimeError as error:
            told = {"seconds": time.monotonic() - killed, "error": str(error), "processes": cluster.processes}
        print(json.dumps(told), flush=True)
        os.kill(os.getpid(), 9)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)


def answer(process: subprocess.Popen) -> dict:
    out, words = process.communicate(timeout=240)
    assert out, words
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two scripts tell; they run at the same time, since most of their time is TensorFlow's import."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("servers")
    group = random.integers(0, GROUPS, 40_000)  # whose users meet only its items
    columns = {
        f"{name}_index": random.integers(0, rows // GROUPS, len(group)) * GROUPS + group
        for name, rows in (("user", USERS), ("item", ITEMS))
    }
    dtypes = dict.fromkeys(columns, "int32")
    manifest = record_batches.write(folder / "rows", [pa.table(columns)], dtypes, rows_per_record=1000)
    processes = start(TRAINS, manifest.folder, folder, USERS, ITEMS, BATCH), start(LOSES)
    yield [answer(process) for process in processes]


@pytest.fixture(scope="module")
def told(both):
    return both[0]


def test_the_tables_and_their_slots_are_cut_over_the_servers(told):
    for table, rows in zip(told["shards"], (USERS, ITEMS), strict=True):
        assert [shard[0] for shard in table] == [rows // 2] * 2
        assert {shard[1] for shard in table} == {f"/job:ps/replica:0/task:{i}/device:CPU:0" for i in (0, 1)}
    assert told["together"] == [True, True]


def test_each_worker_reads_its_own_share(told):
    assert told["shares"] == [20, 21]


def test_it_learns_what_one_process_learns(told):
    one, cluster = np.array(told["losses"])
    possible = BATCH * np.log(BATCH / GROUPS)  # about: of 200 items in a batch those of the user's group are left
    for losses in (one, cluster):
        assert len(losses) == 200 and losses[:3].mean() > 0.97 * BATCH * np.log(BATCH)
        assert losses[-50:].mean() == pytest.approx(possible, rel=0.03)
    assert cluster[-50:].mean() == pytest.approx(one[-50:].mean(), rel=0.02)
    assert np.mean(np.array(told["best"]) % GROUPS == np.arange(USERS) % GROUPS) > 0.95


def test_what_it_costs_is_measured(told):
    # The least that a step can send are its rows, 8 + 8 + 1 columns of float32; those of its gradients are distinct.
    assert told["bytes"] > BATCH * (8 + 8 + 1) * 4 and told["speed"] > 0
    measured = told["measured"]
    assert measured["bytes"] > 50 * 8 * 4
    assert measured["one process"] > 2 * measured["cluster"] > 0
    steps, speed = told["single"]
    assert steps == 1 and speed > 0


@pytest.mark.parametrize("optimizer", ["tf-keras Adagrad", "Adagrad", "RowWiseAdagrad", "LazyAdam"])
def test_each_shard_is_updated_row_sparsely_as_one_table_would_be(told, optimizer):
    found = told["same"][optimizer]
    assert found["seen"] == [["IndexedSlices", 100]] * 2
    assert found["differ"] < 1e-6 and found["moved"] > 0.1


@pytest.mark.parametrize("optimizer", ["tf-keras Adagrad", "Adagrad", "RowWiseAdagrad", "LazyAdam"])
def test_which_checkpoints_fit_one_process(told, optimizer):
    """All fit a cluster that cuts alike. Slots of our optimizers are saved as shards, and do not become one table."""
    found = told["same"][optimizer]
    assert found["cluster"] == 0
    if optimizer == "tf-keras Adagrad":
        assert found["one process"] == 0
    else:
        assert "Received incompatible tensor with shape (100," in found["one process"]


def test_training_goes_on_without_a_worker_and_ends_with_an_error_without_a_server(told):
    assert told["lost"] == [[0], []] and told["seconds without"] < 60
    assert len(told["without"]) == 60 and told["without"][-1] < 0.1 * told["without"][0]
    assert told["error"].startswith("parameter servers [1] of 2 ended, and with them their shards of the tables")
    assert told["seconds"] < 20
    assert told["error before"] == told["error"], "a server that is lost before the model is built"


def test_the_last_worker_lost_is_an_error_and_no_process_outlives_the_coordinator(both):
    told = both[1]
    assert told["error"].startswith("all workers, [0], ended") and told["seconds"] < 20
    left = [psutil.Process(i) for job in told["processes"].values() for i in job if psutil.pid_exists(i)]
    assert psutil.wait_procs(left, timeout=5)[1] == []


def test_a_cluster_that_does_not_start_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"(?s)worker ps ps did not start. Its last words:\nout of memory"):
        LocalCluster(workers=1, servers=2)
