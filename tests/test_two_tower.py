"""Does the two-tower model compute what its equations say, learn no more than there is to learn, and fit any batch?"""

import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import evaluation, input_pipeline, lowering, record_batches, training, training_step
from recsys_common.config import Config
from recsys_common.models.two_tower import TwoTower

USERS, ITEMS, LENGTH = 7, 9, 3


def config(features=(), model=(), **sections) -> Config:
    """A user, an item and a history of three items that shares the item's table."""
    declared = {
        "user": {"kind": "index", "column": "user_index", "rows": USERS},
        "item": {"kind": "index", "column": "item_index", "rows": ITEMS},
        "seen": {"kind": "history", "column": "history", "length": LENGTH, "table": "item"},
    } | dict(features)
    own = {"architecture": "two_tower", "embedding_dim": 4, "hidden": [6, 5]} | dict(model)
    return Config(features={name: each for name, each in declared.items() if each}, model=own, **sections)


def batch(rows: int, seed: int = 0, **columns) -> dict[str, tf.Tensor]:
    """Random rows. Padding, at the left of a history, is item 8, which must not matter."""
    random = np.random.default_rng(seed)
    lengths = np.resize([2, 0, 3, 1], rows)
    seen = random.integers(1, ITEMS - 1, [rows, LENGTH])
    seen[np.arange(LENGTH)[None, :] < LENGTH - lengths[:, None]] = 8
    made = {"user": random.integers(0, USERS, rows), "item": random.integers(0, ITEMS - 1, rows)}
    made |= {"seen": seen, "seen_length": lengths}
    return {name: tf.constant(value, tf.int32) for name, value in made.items()} | columns


def with_numbers(made: Config, frequency=None, seed: int = 3) -> TwoTower:
    """The model of a config, with tables and layers, biases too, of numbers large enough to matter."""
    model, random = made.build(frequency), np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.7, variable.shape))
    return model


def by_hand(model: TwoTower, inputs: dict):
    """u [B, D], and v of all items, in float64."""
    tables = {name: table.numpy().astype(float) for name, table in model.rows.tables.items()}

    def tower(layers, x):
        (w1, b1), (w2, b2) = [[each.numpy().astype(float) for each in layer.weights] for layer in layers.layers]
        x = np.maximum(x @ w1 + b1, 0) @ w2 + b2
        return x / math.sqrt(sum(x**2))

    users = []
    for n, user in enumerate(inputs["user"].numpy()):
        kept = inputs["seen"].numpy()[n, LENGTH - int(inputs["seen_length"][n]) :]
        mean = sum((tables["item"][i] for i in kept), np.zeros(4)) / max(len(kept), 1)
        users.append(tower(model.user_tower, np.concatenate([tables["user"][user], mean])))
    return np.array(users), np.array([tower(model.item_tower, row) for row in tables["item"]])


# The equations -----------------------------------------------------------------------------------------


def test_vectors_and_scores_are_equations_1_and_2():
    model, inputs = with_numbers(config(model={"temperature": 0.2})), batch(6)
    u, v = by_hand(model, inputs)
    np.testing.assert_allclose(model.users(inputs), u, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.items(tf.constant([8, 0, 3])), v[[8, 0, 3]], rtol=1e-4, atol=1e-6)
    scores = model.scores(inputs)
    assert (scores.dtype, scores.shape) == (np.float32, (6, ITEMS))
    np.testing.assert_allclose(scores, u @ v.T / 0.2, rtol=1e-4, atol=1e-5)


def test_all_items_go_through_their_tower_in_blocks(monkeypatch):
    model, inputs = with_numbers(config()), batch(3)
    at_once = model.scores(inputs)
    monkeypatch.setattr("recsys_common.models.two_tower.BLOCK", 4)
    np.testing.assert_allclose(model.scores(inputs), at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("items", "frequency", "weight"),
    [
        ([1, 2, 3, 4, 5, 6], None, None),
        ([1, 2, 1, 1, 5, 2], None, None),  # the same item in other rows
        ([1, 2, 3, 4, 5, 6], [0, 500, 300, 100, 60, 30, 10, 0, 0], None),
        ([1, 2, 1, 7, 5, 2], [0, 9e8, 3e8, 100, 60, 30, 10, 0, 0], None),  # 7 was never counted; shares below 1e-6
        ([1, 2, 3, 4, 1, 2], [0, 500, 300, 100, 60, 30, 10, 0, 0], [1, 0.5, 2, 1, 0, 0]),  # the last two are padding
        ([4, 4, 4, 4, 4, 4], None, None),  # nothing to choose from
    ],
)
def test_the_loss_is_equation_4(items, frequency, weight):
    model = with_numbers(config(model={"temperature": 0.3}), frequency)
    inputs = batch(6, item=tf.constant(items), **({"weight": tf.constant(weight, tf.float32)} if weight else {}))
    (u, v), r, total = by_hand(model, inputs), weight or [1] * 6, 0.0
    log_q = np.log(np.maximum(frequency, 1) / np.sum(frequency)) if frequency else np.zeros(ITEMS)
    for n, i in enumerate(items):
        c = {m: u[n] @ v[j] / 0.3 - log_q[j] for m, j in enumerate(items) if m == n or (j != i and r[m])}
        total -= r[n] * (c[n] - math.log(sum(map(math.exp, c.values()))))
    assert float(model.compute_loss(inputs, training=True)) == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_the_padding_of_a_last_batch_trains_nothing():
    """Zeros of weight 0, as `remainder="pad"` adds them, change neither the loss nor a gradient."""
    model, four = with_numbers(config(), np.arange(ITEMS)), batch(4)
    padded = {name: tf.pad(value, [[0, 3]] + [[0, 0]] * (len(value.shape) - 1)) for name, value in four.items()}
    padded["weight"] = tf.constant([1.0] * 4 + [0] * 3)

    def gradients(inputs):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(inputs, training=True)
        return [loss, *map(tf.convert_to_tensor, tape.gradient(loss, model.trainable_variables))]

    for without, with_padding in zip(gradients(four), gradients(padded), strict=True):
        np.testing.assert_allclose(with_padding, without, rtol=1e-4, atol=1e-5)


# What a config says ------------------------------------------------------------------------------------


def test_the_history_may_have_a_table_of_its_own_or_be_absent():
    own = {"kind": "history", "column": "history", "length": LENGTH, "rows": 5, "combiner": "sum"}
    shapes = lambda made: {name: tuple(t.shape) for name, t in made.build().rows.tables.items()}  # noqa: E731
    assert shapes(config()) == {"user": (7, 4), "item": (9, 4)}
    assert shapes(config({"seen": own})) == {"user": (7, 4), "item": (9, 4), "seen": (5, 4)}
    alone = config({"seen": None})
    assert shapes(alone) == {"user": (7, 4), "item": (9, 4)}
    widths = [
        layer.kernel.shape[0] for layer in (*config().build().user_tower.layers, *alone.build().user_tower.layers)
    ]
    assert widths == [8, 6, 4, 6]
    model = with_numbers(alone)
    by_id = model.scores(np.array([3, 0, 3]))
    np.testing.assert_array_equal(by_id, model.scores({"user": tf.constant([3, 0, 3])}))
    assert by_id.shape == (3, ITEMS) and not np.allclose(by_id[0], by_id[1])
    with pytest.raises(ValueError, match="the user's tower needs seen; the batch has user"):
        with_numbers(config()).scores(np.array([3, 0, 3]))


def test_the_seed_decides_tables_and_layers():
    one, same, other = (
        [v.numpy() for v in config(seed=seed).build().trainable_variables if v.shape.rank == 2] for seed in (1, 1, 2)
    )
    assert len(one) == 6 and len({each.tobytes() for each in one}) == 6
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("features", "model", "message"),
    [
        ({}, {"item": "film"}, r"'film' is no feature of kind index or hash; found \['item', 'user'\]"),
        ({}, {"user": "seen"}, r"'seen' is no feature of kind index or hash"),
        ({"user": {"kind": "index", "column": "u", "table": "item"}}, {}, "'user' and 'item' share a table"),
        ({}, {"hidden": []}, "model.hidden"),
        ({}, {"hidden": [0]}, "model.hidden.0"),
        ({}, {"temperature": 0.0}, "model.temperature"),
    ],
)
def test_what_cannot_be_built(features, model, message):
    with pytest.raises(ValueError, match=message):
        config(features, model).build()


def test_frequencies_are_one_for_each_item_row():
    with pytest.raises(ValueError, match=r"item_frequency has shape \(8,\), expected \(9,\)"):
        config().build(np.ones(8))
    assert config(model={"log_q": False}).build(np.ones(8)).log_q is None


# What it learns ----------------------------------------------------------------------------------------


def steps(model: TwoTower, inputs: list[dict], count: int, jit_compile: bool = False) -> list[float]:
    """Losses of `count` steps over the batches in turn."""
    optimizer = tf.keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def step(rows):
        return training_step.trained(model, optimizer, rows)[0]

    return [float(step(inputs[number % len(inputs)])) for number in range(count)]


def test_xla_computes_the_same_and_a_small_batch_is_learned_by_heart():
    model, inputs = config(seed=1).build(np.ones(ITEMS)), batch(6, item=tf.constant([1, 2, 3, 4, 5, 6]))
    before = float(model.compute_loss(inputs, training=True))
    losses = steps(model, [inputs], 150, jit_compile=True)
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert losses[0] > 6 * math.log(6) / 2 and losses[-1] < 0.05


def test_no_more_is_learned_than_there_is_to_learn():
    """Eight tastes of five items: the right items are found, and shuffled ones by chance alone.

    The batches that are asked about hold the true items, as those of training do. A tower that let them through would
    find the shuffled ones too.
    """
    random, rows = np.random.default_rng(5), 3000
    users = random.integers(0, 64, rows)
    of_taste = lambda: 5 * (users % 8) + random.integers(0, 5, rows)  # noqa: E731
    seen, items = np.stack([of_taste() for _ in range(LENGTH)], 1), of_taste()
    made = config({name: {"kind": "index", "column": name, "rows": n} for name, n in (("user", 64), ("item", 40))})
    found = {}
    for name, chosen in (("true", items), ("shuffled", random.permutation(items))):
        columns = {"user": users, "item": chosen, "seen": seen, "seen_length": np.resize([3, 2, 0], rows)}
        columns = {key: tf.constant(value, tf.int32) for key, value in columns.items()}
        batches = [{key: value[at : at + 100] for key, value in columns.items()} for at in range(0, 2000, 100)]
        model = made.build(np.bincount(chosen, minlength=40))
        steps(model, batches, 160)
        asked = {key: value[2000:] for key, value in columns.items()}
        scores, answers = model.scores(asked), chosen[2000:]
        found[name] = np.mean((scores > scores[np.arange(1000), answers][:, None]).sum(1) < 5)
    assert found["true"] > 0.9  # of the five items of the taste each is among the first five
    assert found["shuffled"] == pytest.approx(5 / 40, abs=0.05)


# A run, and a rehearsal --------------------------------------------------------------------------------


def test_it_trains_from_a_config_to_the_last_padded_row(tmp_path):
    """Users take what they took before: after a few steps each finds it, and every layer has moved."""
    random = np.random.default_rng(2)
    taste = random.integers(1, ITEMS, USERS)
    users = random.integers(0, USERS, 90).astype("int32")
    lists = [[int(taste[user])] * int(n) for user, n in zip(users, random.integers(0, 5, 90), strict=True)]
    history = pa.array(lists, pa.list_(pa.int32()))
    rows = pa.table({"user_index": users, "item_index": taste[users].astype("int32"), "history": history})
    short = {"batch_size": 32, "epochs": 30, "remainder": "pad", "tensorboard": False}
    made = config(training=short, optimizer={"learning_rate": 0.02, "second_moment": "row"})
    data = record_batches.write(tmp_path / "data", [rows], made.record_columns(), rows_per_record=16)
    begun = made.build()
    run = training.train(made, made.build, {"train": data}, folder=tmp_path / "run")
    assert run.steps == 30 * 3  # of 32, 32 and 26 rows
    for before, after in zip(begun.trainable_variables, run.model.trainable_variables, strict=True):
        assert before.shape == after.shape and not np.array_equal(before, after)
    asked = {"user": np.arange(USERS, dtype="int32"), "seen": np.zeros([USERS, 3], "int32"), "seen_length": [0] * USERS}
    result = evaluation.evaluate(
        lambda chosen: run.model.scores({name: tf.gather(value, chosen) for name, value in asked.items()}),
        np.arange(USERS), taste, np.array([], int), np.array([], int), ITEMS, k=1,
    )  # fmt: skip
    assert result["HR@1"] == 1


def test_a_batchs_spec_is_that_of_the_input_pipeline(tmp_path):
    made = config({
        "ad": {"kind": "hash", "column": "ad_id", "rows": 10**6}, "price": {"kind": "number", "column": "price"},
        "ads": {"kind": "history", "column": "ads", "length": 2, "table": "ad"},
        "clicked": {"kind": "label", "column": "clicked"}, "weight": {"kind": "weight", "column": "w"},
    })  # fmt: skip
    spec = made.features.batch_spec(64)
    columns = {"user": [64], "item": [64], "seen": [64, 3], "seen_length": [64], "ad": [64], "ads": [64, 2]}
    numbers = dict.fromkeys(["price", "clicked", "weight"], tf.TensorSpec([64], tf.float32))
    assert spec == {n: tf.TensorSpec(s, tf.int32) for n, s in (columns | {"ads_length": [64]}).items()} | numbers
    lists = {"history", "ads"}
    rows = {n: pa.array([[1]] * 70 if n in lists else [1] * 70, pa.list_(pa.int32()) if n in lists else pa.int32())
            for n in made.sql_columns()}  # fmt: skip
    data = record_batches.write(tmp_path, [pa.table(rows)], made.record_columns(), rows_per_record=70)
    dataset = input_pipeline.batches(data, 64, lengths=made.lengths(), features=made.transform())
    assert dataset.element_spec == spec


def test_a_hundred_million_users_are_lowered_without_memory():
    """What `tpu.rehearse` hands to the compiler: tables and slots at full size are parameters, and take no memory."""
    made = config(optimizer={"second_moment": "row"}).override("features.user.rows=null", "model.embedding_dim=64")
    made = made.with_rows({"user": 100_000_000})
    with lowering.shapes_only():
        model = made.build()
        step = lowering.step_of(model, training_step.optimizer(made, model, steps=10))
    lowered = lowering.lower(step, [made.features.batch_spec(128)])
    shapes = {name: tuple(shape) for name, shape, _ in lowered.variables}
    assert shapes["user"] == (100_000_000, 64) and shapes["user/moments"] == (100_000_000, 65)
    assert "f32[100000000,64]" in lowered.text and lowered.warnings == ()  # nothing dense, nothing of unknown shape
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert int(resident[1]) / 1e6 < 4  # GB, where the tables and slots alone are 51.6
