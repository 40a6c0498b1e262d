"""Is a table what its description says, bit for bit, without ever being in memory twice?"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common.embeddings import (
    BLOCK,
    Embeddings,
    Table,
    create,
    history,
    initial_rows,
    lookup,
    read_rows,
    tpu_features,
    write_rows,
)  # fmt: skip
from recsys_common.optimizers import LazyAdam, RowWiseAdagrad

# What is freed is not given back to the system, so the peak is measured in a process of its own, small things first.
MEMORY = """
import json, re
from pathlib import Path
import numpy as np
from recsys_common.embeddings import Table, create, read_rows, write_rows
from recsys_common.optimizers import LazyAdam, RowWiseAdagrad
import tensorflow as tf

def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

def peak(do):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    value = do()
    return value, resident("VmHWM") - before

def slots(optimizer, variable):
    optimizer.build([variable])
    optimizer.slots(variable)[0].scatter_update(tf.IndexedSlices(optimizer.slots(variable)[0].sparse_read([1]), [1]))
    return optimizer

create(Table("warm", 1000, 8))
create(Table("warm", 1000, 8, dtype="bfloat16"))
told = {}
_, told["bfloat16"] = peak(lambda: create(Table("a", 4_000_000, 8, dtype="bfloat16"), slice_rows=1 << 17))
table, told["float32"] = peak(lambda: create(Table("b", 6_000_000, 8), slice_rows=1 << 17))
table.scatter_update(tf.IndexedSlices(tf.ones([1, 8]), [3]))  # from here on a plain read copies
_, told["write"] = peak(lambda: write_rows(table, 1_000_000, np.full([1000, 8], 7, np.float32)))
rows, told["read"] = peak(lambda: read_rows(table, 999_999, 1_001_001).numpy())
assert rows[[0, 1, 1000, 1001], 0].tolist() != [7] * 4 and rows[1:1001].min() == 7
_, told["adagrad"] = peak(lambda: slots(RowWiseAdagrad(), table))
keep, told["adam"] = peak(lambda: slots(LazyAdam(), table))
_, told["plain read"] = peak(lambda: table[:10].numpy())
print(json.dumps(told))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from /proc")
def test_memory_never_holds_a_table_twice():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peak, rows = json.loads(done.stdout), 1e6 / 2**20
    for case, size in (("bfloat16", 64 * rows), ("float32", 192 * rows), ("adam", 384 * rows)):
        assert size * 0.5 < peak[case] < size * 1.1 + 20, case
    assert peak["adagrad"] < 24 * rows * 1.1 + 20
    assert max(peak["read"], peak["write"]) < 20
    assert peak["plain read"] > 150, "variable[a:b] copies no more: read_rows is not needed"


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_rows", [BLOCK // 3, BLOCK, 3 * BLOCK])
def test_the_slices_do_not_change_the_table(slice_rows):
    table = Table("item", 2 * BLOCK + 1000, 3)
    variable = create(table, 5)
    rows = variable.numpy()
    assert (variable.name, variable.dtype, variable.shape) == ("item:0", tf.float32, [table.rows, 3])
    np.testing.assert_array_equal(rows, create(table, 5, slice_rows).numpy())
    for begin, end in ((0, 1), (BLOCK - 1, BLOCK + 2), (2 * BLOCK, 2 * BLOCK + 1000)):
        np.testing.assert_array_equal(rows[begin:end], initial_rows(table, 5, begin, end).numpy())


def test_initial_rows_are_uniform_and_depend_on_seed_name_and_row():
    rows = create(Table("item", 100_000, 8, initial=0.2), 1).numpy()
    assert rows.dtype == np.float32 and abs(rows).max() <= 0.2
    assert rows.mean() == pytest.approx(0, abs=5 * 0.2 / np.sqrt(3 * rows.size))
    share, _ = np.histogram(rows, 20, (-0.2, 0.2))
    np.testing.assert_allclose(share / rows.size, 1 / 20, atol=5 * np.sqrt(0.05 / rows.size))
    assert len(np.unique(rows.astype(np.float64) @ np.arange(1, 9))) > 99_000, "rows repeat"
    for other in (create(Table("item", 100_000, 8, initial=0.2), 2), create(Table("user", 100_000, 8, initial=0.2), 1)):
        assert abs(np.corrcoef(rows.ravel(), other.numpy().ravel())[0, 1]) < 0.01
    assert not create(Table("bias", 1000, 1, initial=0.0)).numpy().any()


@pytest.mark.parametrize("shape", [[10], [10, 3], [10, 2, 3]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int64"])
def test_read_and_write_any_rank_and_dtype(shape, dtype):
    start = np.arange(np.prod(shape)).reshape(shape)
    variable = tf.Variable(tf.cast(start, dtype))
    write_rows(variable, 4, tf.cast(100 + start[4:7], dtype))
    expected = np.concatenate([start[:4], 100 + start[4:7], start[7:]])
    for begin, end in ((0, 10), (3, 5), (9, 10), (6, 6)):
        rows = read_rows(variable, begin, end)
        assert rows.dtype == dtype and rows.shape[0] == end - begin
        np.testing.assert_array_equal(tf.cast(rows, tf.int64), expected[begin:end])


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (8, 11), (5, 4)])
def test_rows_that_are_not_there(begin, end):
    variable = tf.Variable(tf.zeros([10, 2]), name="small")
    with pytest.raises(IndexError, match=f"small:0: rows {begin} to {end} asked for, it has 10"):
        read_rows(variable, begin, end)
    with pytest.raises(IndexError, match="rows 9 to 11"):
        write_rows(variable, 9, tf.zeros([2, 2]))
    assert not variable.numpy().any()


@pytest.mark.parametrize("shape", [[2, 1], [2], [], [2, 3], [1, 2, 2]])
def test_rows_of_another_shape_are_not_repeated(shape):
    variable = tf.Variable(tf.zeros([10, 2]), name="small")
    with pytest.raises(ValueError, match=re.escape(f"small:0: rows are of shape ({', '.join(map(str, shape))}")):
        write_rows(variable, 4, np.ones(shape, np.float32))
    assert not variable.numpy().any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "table 'item': rows is 0, expected an integer, 1 or more"),
        ({"rows": 1e8}, "rows is 100000000.0, expected an integer"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 16.0}, "dim is 16.0"),
        ({"combiner": "max"}, "combiner is 'max', expected sum, mean or sqrtn"),
        ({"dtype": "float16"}, "dtype is 'float16', expected float32 or bfloat16"),
        ({"initial": -1.0}, "initial is -1.0"),
    ],
)
def test_a_table_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Table(**{"name": "item", "rows": 3, "dim": 2, **wrong})


# --- look-ups ---------------------------------------------------------------------------------------------------


def batch_of(ids, lengths):
    """Two features and a history of `ids`, left-padded with 0."""
    width = max(map(len, ids))
    padded = [[0] * (width - len(row)) + row for row in ids]
    return {
        "user": tf.constant([4, 0, 4]),
        "item": tf.constant([1, 2, 9], tf.int64),
        "seen": tf.constant(padded, tf.int32),
        "seen_length": tf.constant(lengths),
        "label": tf.constant(["not", "a", "feature"]),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_lookups_by_hand(combiner, dtype):
    item = Table("items", 10, 3, combiner, dtype)
    layer = Embeddings({"user": Table("users", 5, 2), "item": item, "seen": item, "absent": item})
    seen = [[3, 7, 3, 1], [], [5]]
    batch = batch_of(seen, [9 if dtype == "float32" else 4, 0, 1])  # longer than it is padded to: cut before
    users, items = (layer.tables[name].numpy().astype(np.float64) for name in ("users", "items"))
    divisor = {"sum": [1, 1, 1], "mean": [4, 1, 1], "sqrtn": [2, 1, 1]}[combiner]
    combined = np.stack([items[row].sum(0) / d for row, d in zip(seen, divisor, strict=True)])
    for form in (batch["seen"], tf.ragged.constant(seen, dtype=tf.int32), history(batch, "seen")):
        vectors = layer({**batch, "seen": form})
        assert set(vectors) == {"user", "item", "seen"} and set(layer.tables) == {"users", "items"}
        assert all(vector.dtype == tf.float32 and vector.shape[0] == 3 for vector in vectors.values())
        np.testing.assert_array_equal(vectors["user"], users[[4, 0, 4]].astype(np.float32))
        np.testing.assert_array_equal(vectors["item"], items[[1, 2, 9]].astype(np.float32))
        np.testing.assert_allclose(vectors["seen"], combined, rtol=1e-6, atol=1e-8)
    assert len(layer.trainable_variables) == 2
    assert lookup(layer.tables["items"], [[1, 2]]).shape == [1, 2, 3]


@pytest.mark.parametrize("ragged", [False, True])
def test_padding_touches_no_row(ragged):
    layer = Embeddings({"seen": Table("items", 10, 3)})
    batch = batch_of([[3, 7, 3, 1], [], [5]], [4, 0, 1])
    batch["seen"] = history(batch, "seen") if ragged else batch["seen"]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(batch)["seen"] * [[1.0], [2.0], [3.0]])
    gradient = tape.gradient(loss, layer.tables["items"])
    assert isinstance(gradient, tf.IndexedSlices)
    assert set(gradient.indices.numpy().tolist()) == {1, 3, 5, 7}
    dense = tf.convert_to_tensor(gradient).numpy()[:, 0]
    np.testing.assert_allclose(dense, [0, 1 / 4, 0, 2 / 4, 0, 3, 0, 1 / 4, 0, 0])


def test_what_a_layer_refuses():
    with pytest.raises(ValueError, match=r"feature 'b'.*rows=9.*rows=8.*have the same name"):
        Embeddings({"a": Table("items", 8, 3), "b": Table("items", 9, 3)})
    layer = Embeddings({"seen": Table("items", 8, 3)})
    with pytest.raises(ValueError, match=r"'seen' is padded, of shape \(2, 3\); the batch must have seen_length"):
        layer({"seen": tf.ones([2, 3], tf.int32)})


# --- the same on a TPU ------------------------------------------------------------------------------------------


def test_tpu_embedding_on_cpu_gives_and_learns_the_same():
    import tensorflow_recommenders as tfrs  # after recsys_common has asked for tf-keras

    user, item, bag = Table("users", 30, 4), Table("items", 40, 4, "sqrtn"), Table("bags", 20, 4, "sum")
    features = {"user": user, "item": item, "seen": item, "bag": bag}
    ours = Embeddings(features)
    theirs = tfrs.layers.embedding.TPUEmbedding(tpu_features(features, LazyAdam(0.01)), optimizer=None)
    random = np.random.default_rng(0)

    def ids(rows):
        return tf.RaggedTensor.from_row_lengths(random.integers(0, rows, 24), [3, 0, 5, 1, 7, 2, 4, 2])

    batches = [
        {"user": tf.constant(random.integers(0, 30, 8)), "item": tf.constant(random.integers(0, 40, 8)),
         "seen": ids(40), "bag": ids(20)}
        for _ in range(4)
    ]  # fmt: skip
    theirs(batches[0])  # makes its tables
    for config, table in theirs.embedding_tables.items():
        assert abs(table.numpy()).max() <= 0.05 and table.numpy().std() == pytest.approx(0.05 / 3**0.5, rel=0.15)
        table.assign(ours.tables[config.name])

    def train(layer, optimizer, variables):
        for batch in batches:
            with tf.GradientTape() as tape:
                vectors = layer(batch)
                loss = tf.reduce_sum((vectors["user"] * vectors["seen"] - vectors["item"] * vectors["bag"] - 1) ** 2)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {name: vector.numpy() for name, vector in layer(batches[0]).items()}

    named = {config.name: table for config, table in theirs.embedding_tables.items()}
    before = {name: table.numpy() for name, table in named.items()}
    mine = train(ours, LazyAdam(0.01), [ours.tables[name] for name in named])
    other = train(theirs, LazyAdam(0.01), list(named.values()))
    for name in features:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, atol=1e-7)
    for name, table in named.items():
        np.testing.assert_allclose(ours.tables[name].numpy(), table.numpy(), rtol=1e-5, atol=1e-7)
        assert (table.numpy() != before[name]).mean() > 0.3, "nothing was learned"


def test_tpu_configs_say_what_the_tables_say():
    item = Table("items", 40, 4, "sqrtn", initial=0.3)
    configs = tpu_features({"item": item, "seen": item, "user": Table("users", 30, 8)}, LazyAdam(0.25))
    assert configs["item"].table is configs["seen"].table and configs["item"].max_sequence_length == 0
    table = configs["seen"].table
    assert (table.vocabulary_size, table.dim, table.combiner, table.name) == (40, 4, "sqrtn", "items")
    assert isinstance(table.optimizer, tf.tpu.experimental.embedding.Adam) and table.optimizer.lazy_adam
    rows = table.initializer([1000, 4]).numpy()
    assert rows.min() == pytest.approx(-0.3, abs=0.01) and rows.max() == pytest.approx(0.3, abs=0.01)
    plain = tf.tpu.experimental.embedding.SGD(0.5)
    assert tpu_features({"item": item}, plain)["item"].table.optimizer is plain
    with pytest.raises(ValueError, match="table 'items' is stored as bfloat16; TPU embedding tables are float32"):
        tpu_features({"item": Table("items", 4, 4, dtype="bfloat16")}, None)
    with pytest.raises(ValueError, match="no row-wise Adagrad"):
        tpu_features({"item": item}, RowWiseAdagrad())
