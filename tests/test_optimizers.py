"""Do the row-sparse optimizers follow their equations, touch nothing else, and refuse what would make them dense?"""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import UninitializedVariable

from recsys_common.embeddings import Embeddings, Table
from recsys_common.optimizers import Adagrad, LazyAdam, RowWiseAdagrad, check_sparse, stochastic_bfloat16

keras = tf.keras.optimizers
ROWS, DIM = 40, 3
decay = keras.schedules.ExponentialDecay


def steps(count=12, seed=0, rows=ROWS, batch=16, dim=DIM):
    """`count` batches of ids, many of them twice or more, and gradients [batch, dim] of very different sizes."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, rows // 2, batch), (random.normal(size=(batch, dim)) * 10.0 ** random.integers(-3, 2)))
        for _ in range(count)
    ]


def trained(optimizer, gradients, start, dtype="float32"):
    """A table after these gradients, all of one shape, and its variable."""
    variable = tf.Variable(tf.cast(start, dtype), name="table")

    @tf.function  # with the loop in it: a call costs more than a step
    def train(all_ids, all_values):
        for step in tf.range(len(gradients)):
            slices = tf.IndexedSlices(all_values[step], all_ids[step], tf.constant(start.shape))
            optimizer.apply_gradients([(slices, variable)])

    all_ids, all_values = (np.stack(part) for part in zip(*gradients, strict=True))
    train(tf.constant(all_ids), tf.constant(all_values, dtype))
    return tf.cast(variable, tf.float32).numpy(), variable


def start_rows(rows=ROWS, dim=DIM, seed=9):
    return np.random.default_rng(seed).uniform(-0.05, 0.05, (rows, dim)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make", [LazyAdam, RowWiseAdagrad, Adagrad])
def test_static_shapes_change_nothing(make, jit_compile, dtype):
    """Duplicate ids summed by a sort, for XLA, and not by tf.unique: the same table, and slots."""
    gradients, found = steps(), []
    for static in (False, True):
        optimizer = make(0.05, clip_norm=0.7, weight_decay=0.1)
        optimizer.static_shapes = static
        variable = tf.Variable(tf.cast(start_rows(), dtype), name="table")
        optimizer.build([variable])

        @tf.function(jit_compile=jit_compile and static)
        def train(ids, values, optimizer=optimizer, variable=variable):
            optimizer.apply_gradients([(tf.IndexedSlices(values, ids, tf.constant([ROWS, DIM])), variable)])

        for ids, values in gradients:
            train(tf.constant(ids), tf.constant(values, dtype))
        found.append([tf.cast(each, tf.float32).numpy() for each in (variable, *optimizer.slots(variable))])
    for plain, static in zip(*found, strict=True):
        # A last digit more or less of a sum may round to the other neighbour in bfloat16.
        np.testing.assert_allclose(plain, static, rtol=1e-4, atol=1e-6 if dtype == "float32" else 4e-3)
    assert abs(found[0][0] - start_rows()).max() > 0.05


# --- the equations ----------------------------------------------------------------------------------------------


def by_hand(gradients, start, rule, rate=lambda step: 0.05, clip_norm=None, weight_decay=0.0, **settings):
    """The equations in float64, row after row, each row's state in a dict; `rule` gives what to take off the row."""
    table, state = start.astype(np.float64), {}
    for step, (ids, values) in enumerate(gradients):
        summed = {row: values[ids == row].sum(0) for row in set(ids.tolist())}
        norm = np.sqrt(sum((g**2).sum() for g in summed.values()))
        for row, g in summed.items():
            g = g * min(1, clip_norm / norm) if clip_norm else g
            change = rule(state.setdefault(row, {}), g, step + 1, **settings) * rate(step)
            table[row] -= change + rate(step) * weight_decay * table[row]
    return table


def adam(
    state, g, t, b1=0.9, b2=0.999, epsilon=1e-7, second_moment="element", correct_skipped=False, sum_inside_sqrt=False
):
    skipped = t - 1 - state.get("t", 0) if correct_skipped else 0
    m, v = state.get("m", 0 * g), state.get("v", 0 * g if second_moment == "element" else 0.0)
    missed = sum((b1 / b2**0.5) ** step for step in range(1, skipped + 1))  # what dense Adam moved the row meanwhile
    middle = state.get("t", 0) + min(skipped, 1 / (1 - b1)) / 2 + 1
    state["m"] = b1 * b1**skipped * m + (1 - b1) * g
    state["v"] = b2 * b2**skipped * v + (1 - b2) * (g**2 if second_moment == "element" else (g**2).mean())
    state["t"] = t

    def direction(m, v):
        return m / (np.sqrt(v + epsilon**2) if sum_inside_sqrt else np.sqrt(v) + epsilon)

    b1, b2 = np.float32([b1, b2]).astype(np.float64)  # 1 - 0.999 is what float32 makes of it, as in tf-keras

    def correction(t):
        return np.sqrt(1 - b2**t) / (1 - b1**t)

    return correction(middle) * missed * direction(m, v) + correction(t) * direction(state["m"], state["v"])


def adagrad(state, g, t, initial=0.1, epsilon=1e-7):
    state["a"] = state.get("a", initial) + g**2
    return g / np.sqrt(state["a"] + epsilon)


def row_wise(state, g, t, initial=0.1, epsilon=1e-7):
    state["a"] = state.get("a", initial) + (g**2).mean()
    return g / np.sqrt(state["a"] + epsilon)


@pytest.mark.parametrize(
    ("kind", "rule", "shared", "own"),
    [
        (LazyAdam, adam, {}, {}),
        (LazyAdam, adam, {}, {"second_moment": "row"}),
        (LazyAdam, adam, {}, {"correct_skipped": True}),
        (LazyAdam, adam, {}, {"second_moment": "row", "correct_skipped": True, "epsilon": 1e-3}),
        (LazyAdam, adam, {}, {"sum_inside_sqrt": True, "epsilon": 1e-2}),
        (LazyAdam, adam, {"weight_decay": 0.3, "clip_norm": 0.7}, {}),
        (Adagrad, adagrad, {}, {}),
        (Adagrad, adagrad, {"weight_decay": 0.3, "clip_norm": 0.7}, {"initial": 0.5, "epsilon": 0.1}),
        (RowWiseAdagrad, row_wise, {}, {}),
        (RowWiseAdagrad, row_wise, {"weight_decay": 0.3, "clip_norm": 0.7}, {"initial": 0.5, "epsilon": 0.1}),
    ],
)
def test_rows_follow_the_equations_and_the_others_stay(kind, rule, shared, own):
    gradients, start = steps(), start_rows()
    schedule = decay(0.05, decay_steps=3, decay_rate=0.5)
    optimizer = kind(schedule, **shared, **own)
    table, variable = trained(optimizer, gradients, start)
    expected = by_hand(gradients, start, rule, lambda step: 0.05 * 0.5 ** (step / 3), **shared, **own)
    np.testing.assert_allclose(table, expected, rtol=2e-5, atol=1e-6)
    touched = sorted(set(np.concatenate([ids for ids, _ in gradients]).tolist()))
    untouched = np.setdiff1d(np.arange(ROWS), touched)
    assert (table[touched] != start[touched]).all() and len(untouched) >= ROWS // 2
    np.testing.assert_array_equal(table[untouched], start[untouched])
    for slot in optimizer.slots(variable):
        fresh = optimizer.slots(variable)[0].numpy()[-1] if slot.dtype == tf.float32 else 0
        np.testing.assert_array_equal(
            slot.numpy()[untouched], np.broadcast_to(fresh, [len(untouched), *slot.shape[1:]])
        )


def test_tables_can_be_left_out_of_weight_decay():
    optimizer = RowWiseAdagrad(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["table"])
    kept, plain = (trained(either, steps(), start_rows())[0] for either in (optimizer, RowWiseAdagrad(0.1)))
    np.testing.assert_array_equal(kept, plain)


@pytest.mark.parametrize("rows_dim", [(7, 4), (5, 1)])
def test_where_every_row_is_touched_lazy_adam_is_adam(rows_dim):
    rows, dim = rows_dim
    start, random = start_rows(rows, dim), np.random.default_rng(1)
    gradients = []
    for _ in range(20):
        ids = np.concatenate([random.permutation(rows), random.integers(0, rows, 6)])
        gradients.append((ids, random.normal(size=(len(ids), dim)) * 0.01))
    lazy, dense = LazyAdam(0.01), keras.Adam(0.01)
    mine, variable = trained(lazy, gradients, start)
    other, _ = trained(dense, gradients, start)
    np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
    moments = lazy.slots(variable)[0].numpy()
    np.testing.assert_allclose(moments[:, :dim], dense._momentums[0].numpy(), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments[:, dim:], dense._velocities[0].numpy(), rtol=1e-5, atol=1e-12)
    pair = [trained(kind(0.01), gradients, start)[0] for kind in (Adagrad, keras.Adagrad)]
    np.testing.assert_allclose(*pair, rtol=1e-6)


def test_correct_skipped_gives_the_moments_of_dense_adam():
    gradients, start = steps(), start_rows()
    lazy, dense = LazyAdam(0.01, correct_skipped=True), keras.Adam(0.01)
    _, variable = trained(lazy, gradients, start)
    plain = LazyAdam(0.01)
    _, other = trained(plain, gradients, start)
    last = np.unique(gradients[-1][0])  # rows of the last step: nothing is still owed
    trained(dense, gradients, start)
    m, v = dense._momentums[0].numpy()[last], dense._velocities[0].numpy()[last]
    np.testing.assert_allclose(lazy.slots(variable)[0].numpy()[last], np.hstack([m, v]), rtol=1e-5, atol=1e-9)
    assert abs(plain.slots(other)[0].numpy()[last] - np.hstack([m, v])).max() > 0.01
    assert lazy.slots(variable)[1].numpy()[last].tolist() == [12] * len(last)


@pytest.mark.parametrize("apart", [1, 3, 10, 100])
def test_correct_skipped_keeps_rows_close_to_those_of_dense_adam(apart):
    """A row that is touched every so many steps, 30 times, of which the last is compared."""
    random, start = np.random.default_rng(5), start_rows()
    gradients = [
        (np.array([0 if step % apart == 0 else 1]), random.normal(1, 1, [1, DIM])) for step in range(30 * apart)
    ]
    gradients = gradients[: 29 * apart + 1]
    ways = {"dense": keras.Adam(1e-3), "corrected": LazyAdam(1e-3, correct_skipped=True), "lazy": LazyAdam(1e-3)}
    moved = {name: (trained(optimizer, gradients, start)[0] - start)[0] for name, optimizer in ways.items()}
    assert np.abs(moved["corrected"] / moved["dense"] - 1).max() < 0.05
    if apart > 1:
        assert np.abs(moved["lazy"] / moved["dense"] - 1).min() > 0.15


@pytest.mark.parametrize("pair", [(LazyAdam, keras.Adam), (Adagrad, keras.Adagrad)])
@pytest.mark.parametrize("shape", [[], [5], [4, 3], [2, 3, 4]])
def test_dense_gradients_follow_tf_keras(pair, shape):
    """Weight decay too: tf-keras decays in full, which for a dense variable is what is meant."""
    random, results = np.random.default_rng(3), []
    start, gradients = random.normal(size=shape), random.normal(size=[5, *shape])
    for kind in pair:
        variable, optimizer = tf.Variable(start, dtype=tf.float32), kind(0.02, weight_decay=0.1)
        for gradient in gradients:
            optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [[6], [6, 2, 2]])
def test_tables_of_other_ranks(shape):
    """A bias [rows], and rows that are matrices: the same as the flat table."""
    ids, values = np.array([1, 4, 1]), np.random.default_rng(0).normal(size=[3, *shape[1:]])
    flat = [(ids, values.reshape(3, -1))] * 3
    for make in (lambda: LazyAdam(0.1), lambda: LazyAdam(0.1, second_moment="row"), lambda: RowWiseAdagrad(0.1)):
        table, _ = trained(make(), [(ids, values)] * 3, np.zeros(shape, np.float32))
        expected, _ = trained(make(), flat, np.zeros([6, flat[0][1].shape[1]], np.float32))
        np.testing.assert_array_equal(table.reshape(6, -1), expected)


# --- a TPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_the_tpu_optimizer_makes_the_same_updates(inside):
    """A TPU's update as optimization_parameters.proto has it: no bias correction, the learning rate from outside."""
    gradients, start = steps(), start_rows()
    optimizer = LazyAdam(decay(0.05, 3, 0.5), 0.8, 0.99, 1e-3, sum_inside_sqrt=inside)
    made, table, m, v = (
        tf.Variable(0, dtype=tf.int64),
        start.astype(np.float64),
        np.zeros_like(start),
        np.zeros_like(start),
    )
    tpu = optimizer.tpu(made)
    assert (tpu.lazy_adam, tpu.use_gradient_accumulation, tpu.weight_decay_factor) == (True, True, None)
    for ids, values in gradients:
        rate = float(tpu.learning_rate())
        for row in set(ids.tolist()):
            g = values[ids == row].sum(0)
            m[row] = tpu.beta_1 * m[row] + (1 - tpu.beta_1) * g
            v[row] = tpu.beta_2 * v[row] + (1 - tpu.beta_2) * g * g
            root = np.sqrt(v[row] + tpu.epsilon**2) if tpu.sum_inside_sqrt else np.sqrt(v[row]) + tpu.epsilon
            table[row] -= rate * m[row] / root
        made.assign_add(1)
    np.testing.assert_allclose(trained(optimizer, gradients, start)[0], table, rtol=2e-5, atol=1e-6)
    assert float(optimizer.tpu().learning_rate()) == rate * 0 + float(optimizer.tpu(made).learning_rate())


def test_adagrad_for_a_tpu():
    tpu = Adagrad(0.3, 0.2).tpu()
    assert isinstance(tpu, tf.tpu.experimental.embedding.Adagrad)
    assert (float(tpu.learning_rate()), tpu.initial_accumulator_value) == (pytest.approx(0.3), 0.2)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: LazyAdam(second_moment="row"), "LazyAdam: TPU embeddings have no second_moment='row'"),
        (lambda: LazyAdam(correct_skipped=True), "no correct_skipped=True"),
        (lambda: LazyAdam(clip_norm=1.0), "no clip_norm=1.0"),
        (lambda: Adagrad(weight_decay=0.1), "Adagrad: TPU embeddings have no weight_decay=0.1"),
        (lambda: Adagrad(epsilon=1e-3), "no epsilon, found 0.001"),
        (RowWiseAdagrad, "no row-wise Adagrad; use Adagrad or LazyAdam"),
    ],
)
def test_what_a_tpu_cannot_do(optimizer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer().tpu()


def test_settings():
    with pytest.raises(ValueError, match="second_moment is 'col', expected 'element' or 'row'"):
        LazyAdam(second_moment="col")
    for wrong in ({"beta_1": 0.9, "beta_2": 0.81}, {"beta_2": 0.5}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match=r"correct_skipped: beta_1 is 0.9, .*expected beta_1 below sqrt\(beta_2\)"):
            LazyAdam(correct_skipped=True, **wrong)
        LazyAdam(**wrong)
    LazyAdam(correct_skipped=True, beta_2=0.82)
    for optimizer in (
        LazyAdam(0.1, 0.5, correct_skipped=True, clip_norm=2.0),
        RowWiseAdagrad(0.2, 0.3, weight_decay=0.1),
    ):
        again = type(optimizer).from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()
    assert type(LazyAdam.from_config(LazyAdam(decay(0.1, 2, 0.5)).get_config())._learning_rate) is decay


# --- bfloat16 ---------------------------------------------------------------------------------------------------


def test_stochastic_rounding_has_the_right_mean_and_only_the_neighbours():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=62), [1.0, -3.5]]).astype(np.float32)[None].repeat(20_000, 0)
    rounded = stochastic_bfloat16(values, tf.range(20_000), tf.constant(7, tf.int64))
    assert rounded.dtype == tf.bfloat16
    wide = tf.cast(rounded, tf.float32).numpy()
    low = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = ((values.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    assert ((wide == low) | (wide == high)).all() and (wide[:, 62:] == values[:, 62:]).all()
    up = (values[0] - low[0]) / (high[0] - low[0])
    np.testing.assert_allclose((wide == high).mean(0), up, atol=5 * 0.5 / np.sqrt(20_000))
    noise = (wide[:, :62] == high[:, :62]) - up[:62]  # neighbours in a row and in a column are independent
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.001 and abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.001
    np.testing.assert_array_equal(rounded, stochastic_bfloat16(values, tf.range(20_000), tf.constant(7, tf.int64)))
    assert not np.array_equal(wide, tf.cast(stochastic_bfloat16(values, tf.range(20_000), 8), tf.float32))
    odd = np.float32([[np.nan, np.inf, -np.inf, -np.nan]])
    np.testing.assert_array_equal(tf.cast(stochastic_bfloat16(odd, [0], 1), tf.float32), odd)


@pytest.mark.parametrize("make", [lambda rate: LazyAdam(rate), lambda rate: RowWiseAdagrad(rate, initial=1.0)])
def test_small_updates_of_bfloat16_rows_add_up(make):
    """200 steps of about 1e-4 on ones, whose bfloat16 neighbours are 1/128 and 1/256 away: nearest would stay at 1."""
    start, gradients = np.ones([64, 8], np.float32), [(np.arange(64), np.full([64, 8], 1e-2))] * 200
    rate = 1e-4 if isinstance(make(1.0), LazyAdam) else 1e-2
    optimizer = make(rate)
    stored, variable = trained(optimizer, gradients, start, "bfloat16")
    expected, _ = trained(
        make(rate), [(ids, tf.cast(tf.cast(g, tf.bfloat16), tf.float32)) for ids, g in gradients], start
    )
    moved = 1 - expected.mean()
    assert 0.015 < moved < 0.025
    assert 1 - stored.mean() == pytest.approx(moved, rel=0.1) and stored.std() > 0.001
    assert variable.dtype == tf.bfloat16 and all(slot.dtype == tf.float32 for slot in optimizer.slots(variable))
    np.testing.assert_array_equal(stored, trained(make(rate), gradients, start, "bfloat16")[0])


def test_the_gradients_of_a_popular_bfloat16_row_add_up():
    ids, values = np.array([1] * 3000 + [2]), np.ones([3001, 2])
    optimizer = Adagrad(0.1, initial=0.5)
    _, variable = trained(optimizer, [(ids, values)], np.zeros([4, 2], np.float32), "bfloat16")
    assert optimizer.slots(variable)[0].numpy()[:, 0].tolist() == [0.5, 3000.0**2, 1.5, 0.5]


# --- in a model -------------------------------------------------------------------------------------------------


class Model(tf.keras.Model):
    """Two tables, one of them shared by a history, and a dense layer; `wrong` may add what it should not."""

    def __init__(self, dtype="float32", wrong=None):
        super().__init__()
        item = Table("items", 30, 4, dtype=dtype)
        self.embeddings = Embeddings({"user": Table("users", 50, 4, dtype=dtype), "item": item, "seen": item}, seed=3)
        self.dense, self.wrong = tf.keras.layers.Dense(1, kernel_initializer="ones"), wrong

    def call(self, batch):
        vectors = self.embeddings(batch)
        score = self.dense((vectors["user"] + vectors["seen"]) * vectors["item"])
        if self.wrong is not None:
            score += self.wrong(self.embeddings.tables["users"], vectors["user"])
        return score


def data():
    """Four batches of 16."""
    random = np.random.default_rng(0)
    batch = {
        "user": random.integers(0, 25, 64).astype(np.int32),
        "item": random.integers(0, 30, 64).astype(np.int32),
        "seen": random.integers(1, 30, (64, 5)).astype(np.int32),
        "seen_length": random.integers(0, 6, 64).astype(np.int32),
    }
    label = random.normal(size=(64, 1)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((batch, label)).batch(16, drop_remainder=True)


def fitted(make, strategy=None, dtype="float32", **compiled):
    """Variables after eight steps, and the model."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model = Model(dtype)
        model.compile(optimizer=make(model), loss=tf.keras.losses.MeanSquaredError(), **compiled)
    model.fit(data(), epochs=2, verbose=0, shuffle=False)
    tables = model.embeddings.tables
    variables = [tables["users"], tables["items"], model.dense.kernel, model.dense.bias]
    return [tf.cast(variable, tf.float32).numpy() for variable in variables], model


def composite(model):
    import tensorflow_recommenders as tfrs

    return tfrs.experimental.optimizers.CompositeOptimizer(
        [
            (LazyAdam(0.01), lambda: model.embeddings.trainable_variables),
            (keras.Adam(0.02), lambda: model.dense.trainable_variables),
        ]
    )


MAKE = {
    "lazy": lambda model: LazyAdam(0.01),
    "every option": lambda model: LazyAdam(
        0.01, second_moment="row", correct_skipped=True, weight_decay=0.1, clip_norm=0.5
    ),
    "schedule": lambda model: Adagrad(decay(0.1, 2, 0.5)),
    "composite": composite,
}


def assert_same(one, other, tolerance=1e-6):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", ["every option", "composite"])
def test_several_steps_an_execution_change_nothing(name):
    (one, model), (several, _) = fitted(MAKE[name]), fitted(MAKE[name], steps_per_execution=4)
    assert_same(one, several, 0)
    assert abs(one[0][:25] - Model().embeddings.tables["users"].numpy()[:25]).max() > 1e-3
    np.testing.assert_array_equal(one[0][25:], Model().embeddings.tables["users"].numpy()[25:])
    assert int(model.optimizer.iterations) == 8


def test_xla_changes_nothing():
    one, xla = (fitted(MAKE["every option"], dtype="bfloat16", jit_compile=compiled)[0] for compiled in (False, True))
    assert_same(one, xla)


def test_composite_trains_each_part_by_its_own():
    one, model = fitted(MAKE["composite"])
    lazy, adam = model.optimizer.optimizers
    assert {len(lazy.row_slots), len(adam._momentums)} == {2}
    assert one[2].std() > 0 and abs(one[2] - 1).max() == pytest.approx(8 * 0.02, rel=0.3)  # Adam's eight steps


MIRRORED = """
import sys
sys.path.insert(0, "tests")
import numpy as np
from test_optimizers import MAKE, fitted, data, assert_same, tf
from recsys_common.embeddings import Table, create, read_rows, write_rows
from recsys_common.optimizers import check_sparse

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name, dtype in (("every option", "bfloat16"), ("composite", "float32")):
    one, (two, model) = fitted(MAKE[name], dtype=dtype)[0], fitted(MAKE[name], strategy, dtype)
    assert_same(one, two)
    optimizer = getattr(model.optimizer, "optimizers", [model.optimizer])[0]
    for table in model.embeddings.tables.values():
        for variable in (table, *optimizer.slots(table)):
            first, second = (tf.cast(copy, tf.float32).numpy() for copy in variable.values)
            np.testing.assert_array_equal(first, second)
check_sparse(model, data().element_spec, at_least=30)
with strategy.scope():
    table = create(Table("items", 10, 2))
write_rows(table, 4, np.ones([2, 2], np.float32))
for copy in table.values:
    assert (copy.numpy()[4:6] == 1).all() and (copy.numpy()[6:] != 1).all()
np.testing.assert_array_equal(read_rows(table, 3, 7), table.values[1].numpy()[3:7])
print("mirrored equals single")
"""


@pytest.fixture(scope="module", autouse=True)
def mirrored():
    """The script's process, beside the tests before the one that waits for it."""
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen([sys.executable, "-c", MIRRORED], cwd=root, stdout=-1, stderr=-1, text=True) as process:
        yield process
        process.kill()


def test_two_replicas_equal_one(mirrored):
    told, words = mirrored.communicate(timeout=240)
    assert told == "mirrored equals single\n", words[-3000:]


@pytest.mark.parametrize("name", ["every option", "composite"])
def test_a_checkpoint_holds_the_slots(tmp_path, name):
    first, model = fitted(MAKE[name])
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ck")
    restored, again = fitted(MAKE[name])[1], None
    parts = getattr(restored.optimizer, "optimizers", [restored.optimizer])
    for variable in (*restored.trainable_variables, *[variable for part in parts for variable in part.variables]):
        variable.assign(tf.zeros_like(variable))
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).restore(path).assert_consumed()
    for either in (model, restored):
        either.fit(data(), verbose=0, shuffle=False)
        now = [variable.numpy() for variable in either.trainable_variables]
        again = now if again is None else assert_same(again, now, 0)
    assert abs(now[0][:25] - first[0][:25]).max() > 1e-3


def test_a_step_costs_the_rows_touched():
    """Median of 15 steps on 20 thousand and on 4 million rows, in turn; dense Adam is over 50 times slower on these."""
    makes = [lambda: LazyAdam(0.01), lambda: LazyAdam(0.01, second_moment="row", correct_skipped=True), RowWiseAdagrad]
    random = np.random.default_rng(0)
    for make in makes:
        run = {}
        for rows in (20_000, 4_000_000):
            variable, optimizer = tf.Variable(tf.zeros([rows, 8])), make()
            ids = tf.constant(random.zipf(1.2, 4096) % rows)
            gradient = tf.IndexedSlices(tf.ones([4096, 8]), ids, tf.constant([rows, 8]))
            run[rows] = tf.function(lambda o=optimizer, g=gradient, v=variable: o.apply_gradients([(g, v)]))
        seconds = {rows: [] for rows in run}
        for _ in range(18):
            for rows, step in run.items():
                start = time.perf_counter()
                step()
                seconds[rows].append(time.perf_counter() - start)
        small, large = (np.median(times[3:]) for times in seconds.values())
        assert large < 5 * small, f"{optimizer.name}: {1000 * small:.2f} and {1000 * large:.2f} ms"


# --- the guard --------------------------------------------------------------------------------------------------


def spec():
    return data().element_spec


def sum_of_all(table, rows):
    return tf.reduce_sum(table * 2.0)  # line A


def score_of_all(table, rows):
    return tf.matmul(rows, table, transpose_b=True)[:, :1]  # line B


def sometimes(table, rows):
    return tf.cond(tf.reduce_sum(rows) > 0, lambda: tf.reduce_sum(table * 3.0), lambda: 0.0)  # line C


class DenseGradient(Model):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(batch[0]) - batch[1]) ** 2)
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self.trainable_variables)]  # line D
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


@pytest.mark.parametrize(
    ("optimizer", "model", "told"),
    [
        (keras.Adam, Model, r"optimizer Adam \(adam.py, line \d+\)\n +cure: tf-keras Adam updates every row; "),
        (keras.SGD, Model, r"optimizer SGD \(sgd.py.*cure: tf-keras SGD updates every row"),
        (keras.legacy.Adam, Model, r"optimizer Adam \(.*cure: tf-keras Adam updates every row"),
        (lambda: keras.Adagrad(weight_decay=0.1), Model, r"optimizer Adagrad .*cure: weight_decay of tf-keras Ada"),
        (lambda: keras.Adagrad(use_ema=True), Model, r"optimizer Adagrad .*cure: use_ema of Adagrad averages"),
        (LazyAdam, lambda: Model(wrong=sum_of_all), r"test_optimizers.py, line \d+: .*# line A\n.*cure: read rows by"),
        (LazyAdam, lambda: Model(wrong=score_of_all), r"test_optimizers.py, line \d+: .*# line B\n.*cure: read rows"),
        (LazyAdam, lambda: Model(wrong=sometimes), r"test_optimizers.py, line \d+: .*# line C\n.*cure: read rows by"),
        (LazyAdam, DenseGradient, r"test_optimizers.py, line \d+: .*# line D\n.*cure: .*leave the gradient"),
    ],
)  # fmt: skip
def test_what_makes_a_step_dense_is_named(optimizer, model, told):
    model, optimizer = model(), optimizer()
    model.compile(optimizer=optimizer, loss="mse")
    with pytest.raises(
        ValueError, match=re.compile(r"table users \(50 rows\): operation \S+ \(\w+\), made .*" + told, re.S)
    ):
        check_sparse(model, spec(), at_least=50)
    check_sparse(model, spec(), at_least=51)
    assert model.optimizer is optimizer and int(optimizer.iterations) == 0
    assert not getattr(optimizer, "_built", False), "slots were made"
    np.testing.assert_array_equal(model.embeddings.tables["users"].numpy(), Model().embeddings.tables["users"].numpy())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"embeddings_regularizer": "l2"}, r"in \S+regularizers.py, .*\n +cure: embeddings_regularizer adds up every"),
        ({"embeddings_constraint": "non_neg"}, r"by optimizer LazyAdam .*\n +cure: a constraint reads and writes"),
    ],
)  # fmt: skip
def test_what_keras_adds_to_a_table_is_named(option, told):
    model = tf.keras.Sequential([tf.keras.layers.Embedding(50, 4, name="users", **option), tf.keras.layers.Dense(1)])
    model.compile(LazyAdam(), loss="mse")
    with pytest.raises(ValueError, match=r"table users/embeddings \(50 rows\): .*made " + told):
        check_sparse(model, (tf.TensorSpec([8], tf.int32), tf.TensorSpec([8, 1])), at_least=50)


class Warm(keras.schedules.LearningRateSchedule):
    """A schedule that Keras cannot make again from its config."""

    def __call__(self, step):
        return 0.1 * tf.cast(step, tf.float32)

    def get_config(self):
        return {}


def with_frequencies(model):
    """A constant as long as the table, of which rows are taken, costs a step nothing."""
    constant = tf.range(50.0)
    model.wrong = lambda table, rows: tf.gather(constant, tf.ones([16, 1], tf.int32))
    return LazyAdam()


@pytest.mark.parametrize(
    "make",
    [MAKE["every option"], composite, with_frequencies,
     lambda model: RowWiseAdagrad(Warm(), weight_decay=0.1, clip_norm=1.0),
     lambda model: keras.Adagrad(global_clipnorm=1.0), lambda model: keras.legacy.SGD(0.1)],
)  # fmt: skip
def test_what_stays_sparse_passes(make):
    model = Model()
    model.compile(optimizer=make(model), loss="mse")
    check_sparse(model, spec(), at_least=30)
    assert int(model.optimizer.iterations) == 0


def test_a_checked_model_trains_and_can_be_checked_again():
    model = Model()
    model.compile(optimizer=LazyAdam(0.01), loss="mse")
    check_sparse(model, spec(), at_least=30)
    model.fit(data(), epochs=2, verbose=0, shuffle=False)
    check_sparse(model, spec(), at_least=30)
    table, expected = model.embeddings.tables["users"], fitted(MAKE["lazy"])[0][0]
    np.testing.assert_array_equal(table.numpy(), expected)


def test_a_function_is_checked_as_well():
    model = Model()
    model(next(iter(data()))[0])

    def step(optimizer):
        optimizer.build(model.trainable_variables)

        def run(batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum((model(batch[0]) - batch[1]) ** 2)
            optimizer.minimize(loss, model.trainable_variables, tape=tape)

        return run

    def one_argument(run):
        return lambda *batch: run(batch if len(batch) == 2 else batch[0])

    check_sparse(one_argument(step(LazyAdam())), spec(), at_least=30)
    with pytest.raises(ValueError, match=r"table items \(30 rows\)(.|\n)*table users \(50 rows\)"):
        check_sparse(one_argument(step(keras.Adam())), spec(), at_least=30)
    with pytest.raises(ValueError, match="has no optimizer; compile it first"):
        check_sparse(Model(), spec())


def test_the_guard_needs_no_memory():
    """A table of 10^11 rows that has no memory: nothing of its size could be allocated, let alone computed."""

    class Huge(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.table = UninitializedVariable(shape=[10**11, 64], dtype=tf.float32, name="huge", trainable=True)

        def call(self, ids):
            return tf.reduce_sum(tf.nn.embedding_lookup(self.table, ids), 1)

    batch = (tf.TensorSpec([32], tf.int64), tf.TensorSpec([32], tf.float32))
    for optimizer in (keras.Adam(), keras.Adagrad(use_ema=True)):
        model = Huge()
        model.compile(optimizer=optimizer, loss="mse")
        with pytest.raises(ValueError, match=r"table huge \(100,000,000,000 rows\)"):
            check_sparse(model, batch)
    for optimizer in (LazyAdam(correct_skipped=True), RowWiseAdagrad(), keras.Adagrad()):
        model = Huge()
        model.compile(optimizer=optimizer, loss="mse")
        check_sparse(model, batch)
