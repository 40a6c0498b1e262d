"""Does the compile check say what the real TPU compiler says, catch what a TPU would refuse, and take no memory?"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common import devices, hlo, lowering, tpu, tpu_compiler
from recsys_common.embeddings import Table
from recsys_common.models.matrix_factorization import MatrixFactorization
from recsys_common.optimizers import LazyAdam

ROOT = Path(__file__).parent.parent
BATCH = {"user_index": tf.TensorSpec([256], tf.int32), "item_index": tf.TensorSpec([256], tf.int32)}
compiler = pytest.mark.skipif(bool(tpu_compiler.missing()), reason=tpu_compiler.missing())


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, or nothing would be compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "CACHE", tmp_path_factory.mktemp("cache"))
        yield tpu.CACHE


def at(mark: str) -> str:
    """How a report names the line of this file that ends in `# mark`."""
    lines = Path(__file__).read_text().splitlines()
    [number] = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return f"test_tpu.py, line {number}: {lines[number - 1].strip()[:80]}"


def python(code: str, given: str = "", **environment) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def large(shape: list[int], dtype="float32", name="table") -> tf.Variable:
    with lowering.shapes_only():
        return tf.Variable(lambda: tf.zeros(shape, dtype), name=name)


# A report -----------------------------------------------------------------------------------------------

V5E = {"flops": 197e12, "bandwidth": 819e9, "interconnect": 200e9}


def test_the_slowest_of_compute_memory_and_interconnect_bounds_a_step():
    counts = {"flops": 197e12 * 0.002, "bytes": 819e9 * 0.005, "between_chips": 200e9 * 0.001}
    report = tpu.Report("v5e:2x2", True, rows=8192, chips=4, peak=V5E, **counts)
    assert report.times == pytest.approx({"compute": 0.002, "memory": 0.005, "interconnect": 0.001})
    assert (report.bound, report.step_seconds_at_least) == ("memory", pytest.approx(0.005))
    assert report.rows_per_second_at_most == pytest.approx(8192 / 0.005)
    assert tpu.Report("v5e:2x2", True, peak=V5E, **{**counts, "between_chips": 2e9}).bound == "interconnect"  # 10 ms
    assert tpu.Report("v5e:1x1", True, peak=V5E, flops=197e10, bytes=1.0).bound == "compute"
    assert "at least 5 ms, at most 1.64 M rows/s" in str(report)


def test_a_program_fits_if_all_that_it_needs_is_there():
    needs = {"arguments": 10, "temporaries": 5, "outputs": 2, "code": 1}
    assert tpu.Report("v5e:1x1", True, available=18, **needs).fits
    over = tpu.Report("v5e:1x1", True, available=17, **needs)
    assert over.hbm_bytes == 18 and not over.fits and "does NOT fit" in str(over)
    assert tpu.Report("cpu", True, **needs).fits  # of this machine nothing is known
    failed = tpu.Report("v5e:1x1", False, "why", available=18)
    assert (failed.fits, failed.bound, failed.step_seconds_at_least, failed.rows_per_second_at_most) == (
        False,
        "",
        0,
        0,
    )
    assert str(failed) == "v5e:1x1: does NOT compile\n  why"


def test_a_row_of_a_result_file():
    row = tpu.Report("v5e:1x1", True, arguments=3, temporaries=4, flops=197e12, peak=V5E, rows=7).row("a case")
    wanted = {"case": "a case", "topology": "v5e:1x1", "compiles": True, "hbm_bytes": 7, "flops": 197e12, "bytes": 0.0}
    wanted |= {"bound": "compute", "step_seconds_at_least": 1.0, "seconds_to_compile": 0.0, "rows": 7}
    assert {name: row[name] for name in wanted} == wanted
    assert json.loads(json.dumps(row)) == row


def test_seconds_on_this_machine_are_predicted_one_after_the_other():
    report = tpu.Report("cpu", True, flops=3e9, bytes=4e9)
    assert tpu.predicted(report, {"flops": 6e9, "bandwidth": 16e9}) == pytest.approx(0.5 + 0.25)


def test_tables_on_sparse_cores_by_hand():
    tables = [Table("user", 1000, 12), Table("item", 40, 16)]  # both rows are stored as 16 numbers, 64 bytes
    found = tpu.sparse_core(tables, 1, {"user": 4096, "item": 1024}, "v5p:2x2x1", chips=4)
    moved, sent = 5120 * 64 * (2 + 2 * 2) / 4, 2 * 5120 * 64 * (3 / 4) / 4
    expected = {"hbm_bytes": 1040 * 64 * 2 / 4, "bytes": moved, "between_chips": sent}
    assert found == pytest.approx(expected | {"step_seconds_at_least": max(moved / 2765e9, sent / 600e9)})
    assert tpu.sparse_core(tables, 2, {"user": 1, "item": 1}, "v6e:1x1")["between_chips"] == 0
    with pytest.raises(ValueError, match="v5e has no SparseCore"):
        tpu.sparse_core(tables, 1, {"user": 1, "item": 1}, "v5e:1x1")


# What is caught before the compiler ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (tf.TensorSpec([None, 8]), r"x has the shape \(None, 8\).*drop_remainder=True"),
        (tf.TensorSpec([64], tf.string), "x is string: leave it out, or hash or cast it"),
        (tf.TensorSpec([64], tf.uint8), "x is uint8: leave it out, or hash or cast it"),
        (tf.RaggedTensorSpec([64, None]), "x is a RaggedTensor: pad it to one length"),
    ],
)
def test_an_argument_that_a_tpu_does_not_take(spec, says):
    with pytest.raises(lowering.Refused, match=says):
        lowering.lower(lambda batch: batch["x"], [{"x": spec, "fine": tf.TensorSpec([64])}])


@compiler
def test_what_is_refused_is_in_the_report():
    report = tpu.aot_compile(lambda title: title, [tf.TensorSpec([64], tf.string)])
    assert not report.compiles and "argument 0 is string" in report.error and "does NOT compile" in str(report)


def hashes(x):
    text = tf.strings.as_string(x)  # a string
    return tf.strings.to_hash_bucket_fast(text, 10)


def calls_python(x):
    return tf.py_function(lambda values: values, [x], tf.float32)  # python


def looks_up(x):
    table = looks_up.table
    return table.lookup(x)  # looked up


def branches(x):
    def one():
        return tf.strings.length(
            tf.strings.as_string(x[0])  # within a branch, and a statement of several lines
        )

    return tf.cond(x[0] > 0, one, lambda: 0)


@pytest.mark.parametrize(
    ("step", "dtype", "line"),
    [
        (hashes, tf.float32, "# a string"),
        (calls_python, tf.float32, "# python"),
        (looks_up, tf.int32, "# looked up"),
        (branches, tf.float32, "return tf.strings.length("),
    ],
)
def test_an_operation_that_xla_lacks_is_named_with_its_line_and_the_mend(step, dtype, line):
    looks_up.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2]), 0)
    with pytest.raises(lowering.Refused) as refused:
        lowering.lower(step, [tf.TensorSpec([64], dtype)])
    error = str(refused.value)
    [made] = [each for each in error.splitlines() if each.startswith("Made in ")]
    assert made.startswith("Made in test_tpu.py, line ") and made.endswith(line)
    assert "XLA has no such operation" in error and "on the host in Dataset.map" in error


def test_a_shape_that_is_known_only_at_run_time_is_named_with_its_line():
    def step(x):
        def positive(rows):
            return tf.boolean_mask(rows, rows[:, 0] > 0)  # masked

        return tf.reduce_sum(tf.cond(x[0, 0] > 0, lambda: positive(x), lambda: x[:3]))

    [warning] = lowering.lower(step, [tf.TensorSpec([64, 8])]).warnings
    assert "(Where) has a shape that is known only when it runs" in warning and at("masked") in warning


@pytest.mark.parametrize(("rows", "warned"), [(1_000_000, True), (999_999, False)])
def test_a_gradient_as_long_as_a_large_table_is_a_warning_with_optimizer_and_table(rows, warned):
    with lowering.shapes_only():
        model = MatrixFactorization(rows, 1000, 16)
        step = lowering.step_of(model, tf.keras.optimizers.Adam(1e-3))
    found = lowering.lower(step, [BATCH]).warnings
    assert len(found) == warned
    if warned:
        assert "table user_table (1,000,000 rows)" in found[0] and "made by optimizer Adam" in found[0]
        assert "LazyAdam" in found[0]


def test_a_batch_that_is_not_in_a_list():
    with pytest.raises(TypeError, match=r"arguments is a dict, expected a list of what the step takes: \[batch\]"):
        lowering.lower(lambda batch: batch["x"], {"x": tf.TensorSpec([64])})


def test_errors_of_the_step_itself_pass():
    with pytest.raises(KeyError, match="nowhere"):
        lowering.lower(lambda batch: batch["nowhere"], [{"x": tf.TensorSpec([64])}])


# Lines, names, shapes -----------------------------------------------------------------------------------


def test_lines_of_functions_branches_loops_layers_and_gradients():
    kernel, layer = tf.Variable(tf.ones([8, 8])), tf.keras.layers.Dense(8, name="layer")
    layer.build([None, 8])

    @tf.function
    def called(x):
        return tf.tanh(x @ kernel)  # called

    def step(x):
        with tf.GradientTape() as tape:
            y = tf.sigmoid(x @ kernel)  # not called
            y = called(y)
            y = tf.cond(y[0, 0] > 0, lambda: tf.exp(y), lambda: called(y))  # branch
            for _ in tf.range(7):
                y = tf.sin(y)  # loop
            loss = tf.reduce_sum(layer(y))  # layer
        kernel.assign_sub(tape.gradient(loss, kernel))  # gradient

    lowered = lowering.lower(step, [tf.TensorSpec([64, 8])])
    expected = {
        "matmul": "not called",
        "Sigmoid": "not called",
        "StatefulPartitionedCall/Tanh": "called",
        "cond/Exp": "branch",
        "Greater": "branch",
        "while/Sin": "loop",
        "layer/MatMul": "layer",
        "call.1/layer/MatMul": "layer",  # the compiler puts more in front
        "Relu;layer/MatMul": "layer",
    }
    assert {name: lowered.line(name) for name in expected} == {name: at(mark) for name, mark in expected.items()}
    assert lowered.line("gradient_tape/layer/MatMul/MatMul_1") == f"the gradient of {at('layer')}"
    assert lowered.line("AssignSubVariableOp") == at("gradient")
    assert lowered.line("nothing of ours") == ""


def test_names_and_order_of_what_the_program_takes():
    first, second = tf.Variable(tf.ones([8, 9]), name="first"), tf.Variable(tf.ones([10, 3]), name="second")
    constant = tf.constant(np.ones([9, 10], np.float32))

    def step(batch, more):
        first.assign_add(first * tf.reduce_sum(batch["x"] @ first @ constant @ second) * more)

    lowered = lowering.lower(step, [{"unused": tf.TensorSpec([64], tf.int32), "x": np.ones([64, 8], "float32")}, 2.0])
    assert list(lowered.batch) == ["unused", "x", "argument 1"]
    assert list(lowered.values) == [1]
    assert [(name, tuple(shape)) for name, shape, _ in lowered.variables] == [
        ("first", (8, 9)),
        ("a constant", (9, 10)),
        ("second", (10, 3)),
    ]
    entry = lowered.text.partition("entry_computation_layout={(")[2].partition(")->")[0]
    assert [each.split("{")[0] for each in entry.replace("/*index=5*/", "").split(", ")] == [
        "s32[64]", "f32[64,8]", "f32[]", "f32[8,9]", "f32[9,10]", "f32[10,3]"
    ]  # fmt: skip


def test_small_variables_keep_their_values_and_large_ones_their_shape():
    def layers():
        tf.keras.utils.set_random_seed(3)
        made = [tf.keras.layers.Dense(4), tf.keras.layers.Dense(2)]
        for layer in made:
            layer.build([None, 3])
        return [layer.kernel.numpy() for layer in made]

    plain = layers()
    with warnings.catch_warnings(), lowering.shapes_only():
        warnings.simplefilter("error")  # of initializers that are called twice
        np.testing.assert_array_equal(np.concatenate(plain, 1), np.concatenate(layers(), 1))
        random, numbers = tf.Variable(lambda: tf.random.normal([2, 2])), tf.Variable([1, 2])
        below, table = tf.Variable(tf.ones([2**20 - 1])), tf.Variable(lambda: tf.ones([2**20], tf.bfloat16))
    assert len(set(random.numpy().flat)) == 4 and numbers.numpy().tolist() == [1, 2]
    assert below.numpy().all() and not hasattr(below, "shapes_only")
    assert table.shapes_only and (table.shape, table.dtype) == ([2**20], tf.bfloat16)


def test_steps_of_compiled_models_and_of_several_optimizers():
    import tensorflow_recommenders as tfrs  # after recsys_common has asked for tf-keras

    with lowering.shapes_only():
        model = MatrixFactorization(2**20, 1000, 8)
        model.compile(optimizer=LazyAdam(1e-3))
        steps = [model.train_step, lowering.step_of(model, model.optimizer)]
        tables, rest = [model.user_table, model.item_table], [model.item_bias]
        parts = [(LazyAdam(1e-3), lambda: tables), (tf.keras.optimizers.Adagrad(1e-3), lambda: rest)]
        steps.append(lowering.step_of(model, tfrs.experimental.optimizers.CompositeOptimizer(parts)))
    variables = [lowering.lower(step, [BATCH]).variables for step in steps]
    shapes = [sorted(tuple(shape) for _, shape, _ in each if shape.rank) for each in variables]
    both = [(2**20, 8), (1000, 8), (1000, 1), (2**20, 16), (1000, 16)]
    assert shapes[0] == shapes[1] == sorted([*both, (1000, 2)])
    assert shapes[2] == sorted([*both, (1000, 1)])


def test_mixed_precision_and_variables_of_the_first_call():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = tf.keras.Sequential([tf.keras.layers.Dense(8), tf.keras.layers.Dense(1)])
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    lowered = lowering.lower(tf.function(lambda x: tf.reduce_sum(model(x))), [tf.TensorSpec([64, 4])])
    assert "bf16[64,8]" in lowered.text
    assert {tuple(shape) for _, shape, _ in lowered.variables} == {(4, 8), (8,), (8, 1), (1,)}


# A process of its own: logical devices are chosen before TensorFlow starts, and memory is measured from nothing.
ELSEWHERE = """
    import json, re
    import numpy as np
    from recsys_common import lowering, tpu

    strategy, found = tpu.get_strategy("cpus:2"), {}
    import tensorflow as tf, tensorflow_recommenders as tfrs
    from recsys_common.embeddings import Embeddings, Table
    from recsys_common.optimizers import LazyAdam

    x = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
    with strategy.scope():
        kernel = tf.Variable([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]])

    def gradient(rows):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.tanh(rows @ kernel) ** 2)
        return tape.gradient(loss, kernel)

    half = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant(x[replica.replica_id_in_sync_group :: 2])
    )
    found["two"] = strategy.reduce("SUM", strategy.run(gradient, args=(half,)), axis=None).numpy().tolist()
    found["one"] = gradient(tf.constant(x)).numpy().tolist()
    found["replicas"] = strategy.num_replicas_in_sync, tpu.get_strategy("cpus:2").num_replicas_in_sync
    try:
        tpu.get_strategy("cpus:4")
    except RuntimeError as error:
        found["refused"] = str(error)

    class Model(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.own = Embeddings({"user": Table("user", 100_000_000, 64)})
            self.keras = tf.keras.layers.Embedding(100_000_000, 32, name="item")
            self.keras.build(None)

        def compute_loss(self, batch, training=False):
            return tf.reduce_sum(self.own(batch)["user"]) + tf.reduce_sum(self.keras(batch["item"]))

    batch = {name: tf.TensorSpec([256], tf.int32) for name in ("user", "item")}
    for optimizer in LazyAdam(1e-3), tf.keras.optimizers.Adam(1e-3):
        with lowering.shapes_only():
            model = Model()
            step = lowering.step_of(model, optimizer)
        lowered = lowering.lower(step, [batch])
        name = type(optimizer).__name__
        found[name] = sum(shape.num_elements() * dtype.size for _, shape, dtype in lowered.variables)
        found[f"{name} warned"] = lowered.warnings
    found["memory"] = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    exec(json.loads(input()))
    found["text"] = text
    print(json.dumps(found))
"""
TEXT = """
called = tf.function(lambda x: tf.tanh(x @ weights))

def step(x):
    with tf.GradientTape() as tape:
        y = tf.cond(x[0, 0] > 0, lambda: called(x), lambda: x)
        _, y = tf.while_loop(lambda i, v: i < 7, lambda i, v: (i + 1, v @ weights), [0, y], maximum_iterations=7)
        y = tf.switch_case(tf.cast(x[0, 1], tf.int32), [lambda: y, lambda: called(y)])
        loss = tf.reduce_sum(y)
    weights.assign_sub(tape.gradient(loss, weights))

weights = tf.Variable(tf.ones([8, 8]))
text = lowering.lower(step, [tf.TensorSpec([64, 8])]).text
"""


@pytest.fixture(scope="module")
def elsewhere():
    return json.loads(python(ELSEWHERE, given=json.dumps(TEXT)))


def test_tables_of_a_hundred_million_rows_take_no_memory(elsewhere):
    tables = 100_000_000 * (64 + 32) * 4
    assert elsewhere["LazyAdam"] == elsewhere["Adam"] == 3 * tables + 8 + 4  # two moments each, the step, the rate
    assert elsewhere["memory"] < 2e9
    assert elsewhere["LazyAdam warned"] == []
    assert "100,000,000 rows" in elsewhere["Adam warned"][0] and "optimizer Adam" in elsewhere["Adam warned"][0]


def test_the_same_step_has_the_same_text_in_every_process(elsewhere):
    tf.function(lambda x: tf.cond(x > 0, lambda: x, lambda: -x))(tf.constant(1.0))  # a number more in all names
    here = {"tf": tf, "lowering": lowering}
    exec(TEXT, here)
    assert here["text"] == elsewhere["text"]


# The compiler -------------------------------------------------------------------------------------------

SHAPES = {
    "narrow": ([1_000_000, 16], "float32"),
    "one": ([4_000_000, 1], "float32"),
    "seventeen": ([1_000_000, 17], "float32"),
    "two": ([1_000_001, 2], "int32"),
    "wide": ([250_000, 64], "float32"),
    "lanes": ([130_000, 128], "float32"),
    "over": ([100_003, 129], "float32"),
    "half": ([1_000_000, 16], "bfloat16"),
    "half_wide": ([250_000, 64], "bfloat16"),
    "numbers": ([3_000_001], "int32"),
    "three": ([1000, 50, 40], "float32"),
}


@compiler
def test_hbm_of_arguments_is_what_the_compiler_says():
    variables = [large(shape, dtype, name) for name, (shape, dtype) in SHAPES.items()]
    for variable in variables[-1:]:
        assert variable.shape.rank == 3

    def step(ids):
        return sum(tf.reduce_sum(tf.cast(tf.gather(each, ids), tf.float32)) for each in variables)

    report = tpu.aot_compile(step, [tf.TensorSpec([64], tf.int32)])
    counted = {name: hlo.compact(tuple(shape), dtype) for name, (shape, dtype) in SHAPES.items()}
    stored = {name: found for name, _, _, _, found in report.parameters[1:]}
    assert {name: stored[name] / bytes_ for name, bytes_ in counted.items()} == pytest.approx(
        dict.fromkeys(SHAPES, 1.0), rel=0.02
    )
    assert report.arguments == pytest.approx(sum(counted.values()), rel=0.02)
    assert stored["lanes"] == 130_000 * 128 * 4  # no padding
    assert stored["narrow"] == 16 * 1_000_064 * 4  # 16 rows of a million, which is no padding worth the name


def moves_rows(table):
    def step(ids):
        rows = tf.gather(table, ids)
        table.scatter_update(tf.IndexedSlices(rows * 2.0, ids))  # rows
        return tf.reduce_sum(rows)

    return step


@compiler
def test_the_padding_of_narrow_rows_is_in_the_moves():
    ids = tf.TensorSpec([8192], tf.int32)
    narrow = tpu.aot_compile(moves_rows(large([2**20, 16])), [ids])
    lanes = tpu.aot_compile(moves_rows(large([2**17, 128])), [ids])  # as many numbers
    padded = 2**20 * 128 * 4
    count, _, what, _ = narrow.moves[0]
    assert what == "copy of f32[1,048,576,16] into another layout, 537 MB as stored for 67 MB of numbers"
    assert count == padded + 2**20 * 16 * 4
    assert narrow.temporaries >= padded and narrow.bytes > 2 * padded
    assert lanes.temporaries < 2**17 * 128 * 4 and lanes.bytes < 5 * 8192 * 128 * 4  # rows alone, in place
    assert lanes.step_seconds_at_least == pytest.approx(lanes.bytes / 819e9)
    assert at("rows") in [line for *_, line in lanes.moves]


@compiler
def test_more_than_the_chip_has_is_said_in_gb_with_the_largest_arguments(cache, monkeypatch):
    table, kernel = large([100_000_000, 64], name="user_table"), tf.Variable(tf.ones([64, 8]), name="kernel")
    step, before = (lambda ids: tf.reduce_sum(tf.gather(table, ids) @ kernel)), list(cache.iterdir())
    report = tpu.aot_compile(step, [tf.TensorSpec([256], tf.int32)])
    assert not report.compiles and not report.fits
    assert "HbmOom" in report.error and "exceeds available HBM (15.75G)" in report.error
    assert "Arguments alone are 25.6 GB of 16.9: user_table 25.60 GB, kernel 0.00 GB" in report.error
    assert "What to do: An optimizer of optimizers.py" in report.error
    assert report.arguments == pytest.approx(25.6e9, rel=0.001) and report.available == 15.75 * 2**30
    assert list(cache.iterdir()) == before  # an error may be this machine's
    monkeypatch.setattr(tpu.subprocess, "Popen", started)
    with pytest.raises(ChildProcessError):
        tpu.aot_compile(step, [tf.TensorSpec([256], tf.int32)])


def started(*_, **__):
    raise ChildProcessError("a process is started")


@pytest.fixture(scope="module")
def looped():
    """A step with a loop of seven trips over an array that no on-chip memory holds."""
    kernel = tf.Variable(tf.ones([128, 128]), name="kernel")

    def step(x):
        for _ in tf.range(7):  # seven
            x = tf.nn.relu(x @ kernel)  # product
        return tf.reduce_sum(x)

    return step, tpu.aot_compile(step, [tf.TensorSpec([1_000_000, 128])])


@compiler
def test_a_loop_costs_its_trips(looped):
    _, report = looped
    [products] = [count for count, _, _, line in report.moves if line == at("product") and count > 1e9]
    assert products / (1_000_000 * 128 * 4) == pytest.approx(7, rel=0.01)  # of a trip, what it writes
    assert report.warnings == (f"of a loop the compiler counts the FLOPs of one trip, {at('seven')}",)
    assert report.flops == pytest.approx(2 * 1_000_000 * 128 * 128, rel=0.05)


@compiler
def test_what_was_compiled_once_is_not_compiled_again(looped, cache, monkeypatch):
    step, report = looped
    assert list(cache.glob("*.json.gz")) and not [each for each in cache.iterdir() if each.suffix != ".gz"]
    monkeypatch.setattr(tpu.subprocess, "Popen", started)
    assert tpu.aot_compile(step, [tf.TensorSpec([1_000_000, 128])]) == report
    for changed in (
        lambda: tpu.aot_compile(step, [tf.TensorSpec([1_000_001, 128])]),
        lambda: tpu.aot_compile(step, [tf.TensorSpec([1_000_000, 128])], "v6e:1x1"),
        lambda: tpu.aot_compile(lambda x: step(x) + 1.0, [tf.TensorSpec([1_000_000, 128])]),
    ):
        with pytest.raises(ChildProcessError):
            changed()


@compiler
def test_a_slice_splits_the_batch_and_if_asked_the_tables():
    table, kernel = large([2**20, 8]), tf.Variable(tf.ones([8, 8]), name="kernel")

    def step(batch):
        rows = tf.gather(table, batch["ids"])
        table.scatter_sub(tf.IndexedSlices(rows * 0.1, batch["ids"]))
        kernel.assign_sub(tf.matmul(rows, batch["x"], transpose_a=True))

    batch = {"ids": tf.TensorSpec([4096], tf.int32), "x": tf.TensorSpec([4096, 8])}
    whole = tpu.aot_compile(step, [batch], "v5e:2x2")
    fewer = {"ids": tf.TensorSpec([4094], tf.int32), "x": tf.TensorSpec([4094, 8])}
    split = tpu.aot_compile(step, [fewer], "v5e:2x2", split_tables=True)
    for report, rows in (whole, "1,048,576"), (split, "262,144"):
        assert report.compiles and report.chips == 4
        assert {name: shape for name, shape, *_ in report.parameters} == {
            "ids": "s32[1,024]", "x": "f32[1,024,8]", "table": f"f32[{rows},8]", "kernel": "f32[8,8]"
        }  # fmt: skip
        assert report.between_chips > 0 and "interconnect" in report.times
    assert (whole.rows, whole.warnings) == (4096, ())
    assert split.warnings == ("4094 rows do not divide by 4 chips: on TPUs the batch has to",)
    assert split.arguments < whole.arguments / 3.9


@compiler
def test_what_a_chip_of_a_slice_lacks_is_of_its_share_of_the_tables():
    table = large([2**29, 64])  # 137 GB

    def step(ids):
        table.scatter_sub(tf.IndexedSlices(tf.gather(table, ids) * 0.1, ids))

    ids = [tf.TensorSpec([4096], tf.int32)]
    whole = tpu.aot_compile(step, ids, "v5e:2x2")
    split = tpu.aot_compile(step, ids, "v5e:2x2", split_tables=True)
    assert (whole.compiles, split.compiles, whole.chips, split.chips) == (False, False, 4, 4)
    assert (whole.arguments, split.arguments) == (2**37 + 4096, 2**35 + 4096)
    assert "Arguments alone are 34.4 GB of" in split.error and "table 34.36 GB" in split.error


@compiler
@pytest.mark.parametrize(
    ("topology", "says"), [("v5e:3x5", "not divisible"), ("v9:1x1", "no such"), ("note:1", "no such")]
)
def test_a_topology_that_does_not_exist(topology, says):
    with pytest.raises(ValueError, match=f"topology '{topology}': .*{says}"):
        tpu.aot_compile(lambda x: x + 1, [tf.TensorSpec([8])], topology)


def test_other_versions_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "TESTED", {"jax": "9.9.9", "no-such-package": "1.0"})
    with pytest.raises(
        RuntimeError, match=r"jax 9.9.9 is needed, found .*no-such-package 1.0 is needed, found none.*pip"
    ):
        tpu.aot_compile(lambda x: x, [tf.TensorSpec([8])])


@compiler
def test_programs_run_here_and_give_the_rates_of_this_machine(monkeypatch):
    reports, compile_ = [], tpu.aot_compile

    def shorter(*what, seconds):
        reports.append(compile_(*what, seconds=seconds / 10))
        return reports[-1]

    monkeypatch.setattr(tpu, "aot_compile", shorter)
    machine = tpu.this_machine()
    product, total = reports
    assert product.compiles and len(product.steps) >= 4
    assert product.flops == pytest.approx(2 * 2048**3, rel=0.01) and product.rows == 2048
    assert total.moves[0][0] == 3 * 2**25 * 4  # two arrays are read, one is written
    assert machine == {"flops": product.flops / min(product.steps), "bandwidth": total.bytes / min(total.steps)}
    assert machine["flops"] > 1e9 and machine["bandwidth"] > 1e8
    assert tpu.predicted(product, machine) >= min(product.steps)


@compiler
def test_the_command_line_varies_a_config(capsys):
    arguments = ["--rows", "user=1000", "item=500", "--set", "training.batch_size=64", "--topology", "v5e:1x1"]
    assert tpu.main([*arguments, "--vary", "model.embedding_dim=8,16"]) == 0
    printed = capsys.readouterr().out
    for dim in 8, 16:
        assert f"model.embedding_dim={dim}\nv5e:1x1: compiles\n" in printed
    assert printed.count("  bound   memory: at least") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], r"features\.\w+\.rows: not known yet"),
        (["--rows", "user=many", "item=5"], "many"),
        (["--rows", "usr=5"], "usr"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--set", "model.embeding_dim=5"], "nearest: model.embedding_dim"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_a_config_and_ends(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        tpu.main(arguments)
    assert ended.value.code == 2 and re.search(says, capsys.readouterr().err)


def test_the_command_line_has_help():
    done = subprocess.run(
        [sys.executable, "-m", "recsys_common.tpu", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--topology" in done.stdout and "v5e:1x1 v5p:1x1x1 v6e:1x1" in done.stdout


# A strategy ---------------------------------------------------------------------------------------------


def test_a_strategy_of_this_cpu():
    for device in "cpu", "auto":
        strategy = tpu.get_strategy(device)
        assert strategy.num_replicas_in_sync == 1


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(RuntimeError, match="no GPU: TensorFlow sees none; `nvidia-smi`"):
        tpu.get_strategy("gpu")


def test_a_strategy_on_another_device_than_asked_for_is_refused():
    with pytest.raises(RuntimeError, match=r"asked for TPU, and the strategy has .*CPU:0.*nothing was trained"):
        devices._asserted(tf.distribute.OneDeviceStrategy("/cpu:0"), "TPU")


def test_replicas_on_this_cpu_sum_to_one_device(elsewhere):
    assert elsewhere["replicas"] == [2, 2]
    np.testing.assert_allclose(elsewhere["two"], elsewhere["one"], rtol=1e-5)
    assert elsewhere["refused"].startswith("cpus:4: TensorFlow has started with 2 logical CPU")
    assert "restart the kernel" in elsewhere["refused"]


@pytest.mark.skipif(bool(devices._chips()), reason="there is a TPU, or a device like one")
def test_a_tpu_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"no TPU chip in this machine.*Runtime, Change runtime type.*rehearse"):
        tpu.get_strategy("tpu")


def test_a_tensorflow_without_tpus_and_one_that_was_imported_too_early(monkeypatch):
    monkeypatch.setattr(devices, "_chips", lambda: [Path("/dev/accel0")])
    monkeypatch.setattr(importlib.metadata, "version", without_tpu)
    with pytest.raises(RuntimeError, match=r"tensorflow-tpu is not installed.*pip install --no-deps --require-hashes"):
        tpu.get_strategy("tpu")
    monkeypatch.setattr(importlib.metadata, "version", {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.52"}.get)
    with pytest.raises(RuntimeError, match=r"libtpu 0.0.52: tensorflow-tpu 2.20.0 would abort on import"):
        tpu.get_strategy("tpu")
    monkeypatch.setattr(importlib.metadata, "version", {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.14"}.get)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(
        RuntimeError, match=r"imported without PJRT_DEVICE, .*Restart Python and call get_strategy first"
    ):
        tpu.get_strategy("tpu")


def without_tpu(name):
    raise importlib.metadata.PackageNotFoundError(name)


# What TensorFlow would find when it is imported, on a machine that seems to have a TPU. A real one would go on:
# TPUClusterResolver("local"), initialize_tpu_system, TPUStrategy, and 1 + 1 on each of its cores.
ENVIRONMENT = """
    import importlib.metadata, json, os, sys
    from recsys_common import devices, tpu

    class Stop:
        def find_spec(self, name, *_):
            if name == "tensorflow":
                print(json.dumps({key: os.environ.get(key, "") for key in sorted(devices.ENVIRONMENT)}))
                print(os.path.exists(os.environ["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"]))
                raise SystemExit(0)

    assert "tensorflow" not in sys.modules
    devices._chips = lambda: ["/dev/accel0"]
    version = importlib.metadata.version
    there = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.14"}
    importlib.metadata.version = lambda name: there.get(name) or version(name)
    sys.meta_path.insert(0, Stop())
    tpu.get_strategy("tpu")
"""


@compiler
def test_the_environment_of_a_tpu_is_set_before_tensorflow_is_imported():
    environment, library = python(ENVIRONMENT, PJRT_DEVICE="mine").splitlines()
    assert json.loads(environment) == devices.ENVIRONMENT | {"PJRT_DEVICE": "mine"}  # what is set stays
    assert library == "True"
