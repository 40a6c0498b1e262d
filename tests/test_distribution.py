"""The same tables under other drivers: TFRS's TPUEmbedding on CPU, two mirrored replicas, several steps at a time."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common.embeddings import Embeddings, Table, tpu_features
from recsys_common.optimizers import Adagrad, LazyAdam

# --- TPUEmbedding on CPU ----------------------------------------------------------------------------------------
# There its tables are ordinary variables, which a Keras optimizer trains. Of those that it can translate for a TPU,
# Adagrad is ours. Adam is dense on CPU and lazy on a TPU: only where each step touches every row are all three equal.

USER, ITEM = Table("users", 12, 4), Table("items", 8, 4, "sqrtn")
FEATURES = {"user": USER, "item": ITEM, "seen": ITEM}


def batches(every_row: bool, steps: int = 6) -> list[dict]:
    random, all_of = np.random.default_rng(0), lambda n: np.r_[np.arange(n), np.arange(16 - n)]
    return [
        {
            "user": tf.constant(all_of(12) if every_row else random.integers(0, 5 if step else 12, 16)),
            "item": tf.constant(all_of(8) if every_row else random.integers(0, 4, 16)),
            "seen": tf.RaggedTensor.from_row_lengths(random.integers(0, 8, 24), [2, 0, 1, 3] * 4),
        }
        for step in range(steps)
    ]


def learned(layer, optimizer, tables: dict, data: list[dict]) -> dict[str, np.ndarray]:
    """Rows of the tables after a step with each batch."""
    variables = list(tables.values())

    @tf.function(reduce_retracing=True)
    def step(batch):
        with tf.GradientTape() as tape:
            found = layer(batch)
            loss = tf.reduce_sum((found["user"] * found["seen"] - found["item"] - found["user"] + 1) ** 2)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    if hasattr(optimizer, "build"):  # none of Keras's legacy ones, the only ones that TPUEmbedding takes
        optimizer.build(variables)
    for batch in data:
        step(batch)
    return {name: table.numpy() for name, table in tables.items()}


def both(ours, keras, every_row: bool):
    """The tables that `Embeddings` learns with our optimizer, and TPUEmbedding with the Keras optimizer it is given."""
    import tensorflow_recommenders as tfrs  # after recsys_common has asked for tf-keras

    data, mine = batches(every_row), Embeddings(FEATURES)
    theirs = tfrs.layers.embedding.TPUEmbedding(tpu_features(FEATURES, None), keras)
    theirs(data[0])  # makes its tables
    tables = {config.name: table for config, table in theirs.embedding_tables.items()}
    for name, table in tables.items():
        table.assign(mine.tables[name])
    mine_too = {name: mine.tables[name] for name in tables}
    return learned(mine, ours, mine_too, data), learned(theirs, keras, tables, data)


@pytest.mark.parametrize("every_row", [True, False])
def test_adagrad_equals_tpu_embedding_on_cpu(every_row):
    mine, theirs = both(Adagrad(0.1), tf.keras.optimizers.legacy.Adagrad(0.1), every_row)
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-7)
        assert abs(mine[name]).max() > 0.1, "nothing was learned"


def test_lazy_adam_equals_tpu_embedding_on_cpu_where_every_row_is_touched():
    mine, theirs = both(LazyAdam(0.01), tf.keras.optimizers.legacy.Adam(0.01), True)
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=3e-6)  # of steps of 0.01
    # Elsewhere the Adam of a CPU moves rows that no batch has touched since, which a TPU's does not.
    mine, theirs = both(LazyAdam(0.01), tf.keras.optimizers.legacy.Adam(0.01), False)
    first = np.setdiff1d(batches(False)[0]["user"], np.arange(5))
    assert len(first) > 3 and abs(mine["users"] - theirs["users"])[first].min(1).max() > 0.005


def test_what_tfrs_asks_of_a_tpu_for_a_keras_adam_is_not_that_adam():
    """It leaves out the bias correction, and adds epsilon inside the root; `LazyAdam.tpu` does neither."""
    import tensorflow_recommenders as tfrs

    theirs = tfrs.layers.embedding.tpu_embedding_layer.translate_keras_optimizer(tf.keras.optimizers.legacy.Adam(0.01))
    ours = LazyAdam(0.01).tpu()
    same = ("beta_1", "beta_2", "lazy_adam", "use_gradient_accumulation")
    assert (
        [getattr(theirs, name) for name in same] == [getattr(ours, name) for name in same] == [0.9, 0.999, True, True]
    )
    assert (theirs.sum_inside_sqrt, ours.sum_inside_sqrt) == (True, False)
    assert theirs.learning_rate == pytest.approx(0.01)
    assert float(ours.learning_rate()) == pytest.approx(0.01 * (1 - 0.999) ** 0.5 / (1 - 0.9), rel=1e-5)


# --- Mirrored replicas, several steps at a time -------------------------------------------------------------------
# tests/test_optimizers.py has each of the two alone, with other optimizers.

CASES = """
    import json
    import numpy as np
    import tensorflow as tf
    from recsys_common.embeddings import Embeddings, Table
    from recsys_common.optimizers import LazyAdam, RowWiseAdagrad
    import tensorflow_recommenders as tfrs

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    random = np.random.default_rng(0)
    columns = {
        "user": random.integers(0, 40, 256), "tag": random.integers(0, 40, 256),
        "seen": random.integers(0, 40, [256, 5]), "seen_length": random.integers(0, 6, 256),
    }
    data = tf.data.Dataset.from_tensor_slices({k: v.astype("int32") for k, v in columns.items()}).batch(32, True)
    user = Table("users", 60, 4, "sqrtn")

    class Model(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.layer = Embeddings({"user": user, "seen": user, "tag": Table("tags", 60, 4, dtype="bfloat16")})
            self.dense = tf.keras.layers.Dense(2, kernel_initializer=tf.keras.initializers.RandomUniform(seed=1))

        def compute_loss(self, batch, training=False):
            found = self.layer(batch)
            return tf.reduce_sum((self.dense(tf.concat([found["user"] * found["seen"], found["tag"]], 1)) - 1) ** 2)

    def rows(variable):
        return [copy.numpy().astype("float32").tolist() for copy in getattr(variable, "values", [variable])]

    told = {}
    for name, make in ("LazyAdam", lambda: LazyAdam(0.02)), ("RowWiseAdagrad", lambda: RowWiseAdagrad(0.1)):
        for replicas, steps in (1, 1), (2, 4):
            strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"][:replicas])
            with strategy.scope() if replicas == 2 else tf.distribute.get_strategy().scope():
                model = Model()
                model.compile(make(), steps_per_execution=steps)
            model.fit(data, epochs=1, verbose=0)
            variables = {**model.layer.tables, "kernel": model.dense.kernel}
            slots = [slot for table in model.layer.tables.values() for slot in model.optimizer.slots(table)]
            told[f"{name} {replicas}"] = {
                **{table: rows(variable) for table, variable in variables.items()},
                **{f"slot {number}": rows(slot) for number, slot in enumerate(slots)},
                "steps": int(model.optimizer.iterations.numpy()),
            }
    told["before"] = {table: rows(variable) for table, variable in Model().layer.tables.items()}
    print(json.dumps(told))
"""


@pytest.fixture(scope="module", autouse=True)
def process():
    """Of the script, beside the tests before those that wait for it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(CASES)]  # devices are split before TensorFlow has begun
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def told(process):
    out, words = process.communicate(timeout=240)
    assert process.returncode == 0, words
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("optimizer", ["LazyAdam", "RowWiseAdagrad"])
def test_two_replicas_of_four_steps_each_learn_what_one_learns_from_the_joined_batches(told, optimizer):
    """Of a row that both have in a step, the gradients are summed before they are squared."""
    one, two = told[f"{optimizer} 1"], told[f"{optimizer} 2"]
    assert one["steps"] == two["steps"] == 8
    for name in sorted(set(one) - {"steps"}):
        first, second = two[name]
        assert first == second, f"{name}: the copies differ"
        # A sum in another order may round a bfloat16 to its neighbour.
        close = {"rtol": 2**-6, "atol": 1e-3} if name == "tags" else {"rtol": 2e-3, "atol": 2e-6}
        np.testing.assert_allclose(first, one[name][0], err_msg=name, **close)
    for table in ("users", "tags"):
        changed = (np.array(one[table][0]) != told["before"][table][0]).any(1)
        assert changed[:40].mean() > 0.9 and not changed[40:].any()
