"""Errors: each made to happen in `fit` where a CPU can, and explained; a run looked at before it starts."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common import errors, optimizers, record_batches
from recsys_common.embeddings import Embeddings, Table
from recsys_common.models.matrix_factorization import MatrixFactorization

TENSORFLOW = Path(tf.__file__).parent
SOURCES = {  # TensorFlow's own words, where a TPU would be needed to hear them
    "python/tpu/tpu_embedding_v2.py": (
        'Input "\n            "tensors for TPU embeddings must be placed on the CPU.',
        "which does not have the `_tpu_input_identity` attr.",
    ),
}


class Model(tf.keras.Model):
    """One table, one dense layer; `fault` says what goes wrong in its step."""

    def __init__(self, fault="", rows=7):
        super().__init__()
        self.fault = fault
        self.items = tf.keras.layers.Embedding(rows, 4)
        self.top = tf.keras.layers.Dense(1)

    def call(self, batch):
        x = self.items(batch["item"])
        if self.fault == "matmul":
            x = tf.matmul(x, tf.zeros([9, 3]))  # here: matmul
        return self.top(x)

    def train_step(self, batch):
        if self.fault == "key":
            batch["user"]  # here: key
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(batch) ** 2)
        if self.fault == "reshape":
            loss = tf.reshape(loss, [3])  # here: reshape
        if self.fault == "autograph" and loss > 1e9:  # a tensor as a condition: only AutoGraph can
            loss = batch["nothing"]
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        logs = {"loss": loss}
        return {"none": logs | {"m": None}, "str": logs | {"m": "abc"}, "empty": {}}.get(self.fault, logs)


def data(rows=64, ids=7, dtype="int32"):
    return tf.data.Dataset.from_tensor_slices({"item": (np.arange(rows) % ids).astype(dtype)}).batch(8, True)


def compiled(fault="", steps_per_execution=4, optimizer="adagrad", **options):
    model = Model(fault, **options)
    model.compile(optimizer, steps_per_execution=steps_per_execution)
    return model


def note_of(model, dataset, kind=ValueError, **options):
    """The note on the error that `fit` raises, and the error."""
    with pytest.raises(kind) as caught, errors.decoding(model=model, dataset=dataset):
        model.fit(dataset, verbose=0, **options)
    (note,) = caught.value.__notes__
    assert re.match("What it means: .*\nWhere: .*\nWhat to do: ", note, re.DOTALL)
    return note, caught.value


def line_of(mark):
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# here: {mark}"))


@pytest.mark.parametrize(
    ("fault", "true"),
    [
        ("key", "KeyError: 'user'; a batch has item"),
        ("matmul", "ValueError: Dimensions must be equal, but are 4 and 9"),
        ("reshape", "ValueError: Cannot reshape a tensor with 1 elements to shape [3]"),
    ],
)
def test_the_error_that_autograph_hides_is_found_with_its_line(fault, true):
    model, dataset = compiled(fault), data()
    note, error = note_of(model, dataset)
    assert "'outputs' must be defined before the loop" in str(error) and type(error) is ValueError
    assert f"The true error: {true}" in note
    assert f"test_errors.py, line {line_of(fault)}, in " in note and f"# here: {fault}" in note
    assert model.optimizer.iterations == 0


@pytest.mark.parametrize(
    ("fault", "true"),
    [
        ("none", "train_step returns {'m': None}, expected a dict of numbers"),
        ("str", "train_step returns {'m': 'abc'}, expected a dict of numbers"),
        ("empty", "train_step returns {}, expected a dict of numbers with at least the loss"),
    ],
)
def test_a_step_that_returns_what_a_loop_cannot_hold(fault, true):
    note, _ = note_of(compiled(fault), data())
    assert true in note and "in train_step: def train_step(self, batch):" in note


def test_a_step_that_needs_autograph_is_traced_with_it():
    note, _ = note_of(compiled("autograph"), data())
    assert "The true error: KeyError: 'nothing'" in note


def test_without_the_model_the_note_says_what_autograph_let_through():
    model = compiled("reshape")
    with pytest.raises(ValueError) as caught, errors.decoding():
        model.fit(data(), verbose=0)
    (note,) = caught.value.__notes__
    assert "Here it hid ValueError: Cannot reshape a tensor with 1 elements" in note and "steps_per_execution=1" in note


def test_an_error_on_arrays_is_not_covered_by_one_of_the_decoder():
    with pytest.raises(ValueError, match="'outputs' must be defined") as caught, errors.decoding(compiled("key"), {}):
        compiled("key").fit({"item": np.zeros(64, np.int32)}, batch_size=8, verbose=0)
    assert "Here it hid KeyError: 'user'" in caught.value.__notes__[0]


def test_an_id_outside_its_table_names_table_and_line():
    note, _ = note_of(compiled(), data(ids=9), tf.errors.InvalidArgumentError)
    assert re.search(r"Here id 7, and the table of 7 rows is \S+/embeddings \(ids: item\)\.", note)
    assert "test_errors.py, line" in note and 'in call: x = self.items(batch["item"])' in note


def test_a_dataset_of_unknown_length():
    note, _ = note_of(compiled(), data().filter(lambda batch: True))
    assert "assert_cardinality" in note


def test_a_dataset_without_a_batch():
    note, _ = note_of(compiled(), data(rows=7))
    assert "has no batch" in note and "Where: /" in note
    note, _ = note_of(compiled(steps_per_execution=1), data().filter(lambda batch: False))
    assert "has no batch" in note
    note, _ = note_of(compiled(), data(), validation_data=data(rows=7))
    assert "often it is the validation data" in note


def test_the_warning_that_data_ran_out_says_what_to_do(caplog):
    with errors.decoding():
        compiled().fit(data(), steps_per_epoch=20, verbose=0)
    assert "Your input ran out of data; interrupting" in caplog.text and "steps_per_epoch(manifest" in caplog.text
    caplog.clear()
    compiled().fit(data(), steps_per_epoch=20, verbose=0)
    assert "manifest" not in caplog.text  # the filter is gone


def test_the_end_of_data_in_a_loop_of_ones_own():
    batches = iter(data(rows=8))

    @tf.function
    def two():
        return next(batches), next(batches)

    with pytest.raises(tf.errors.OutOfRangeError) as caught, errors.decoding():
        two()
    assert "ended before the steps" in caught.value.__notes__[0]


def test_a_damaged_file_names_the_call_that_finds_it(tmp_path):
    import pyarrow as pa

    table = pa.table({"item": pa.array(np.arange(64) % 7, pa.int32())})
    manifest = record_batches.write(tmp_path, [table, table], {"item": "int32"})
    path = Path(manifest.paths[1])
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    dataset = record_batches.read(manifest).unbatch().batch(8, True)
    note, _ = note_of(compiled(steps_per_execution=1), dataset, tf.errors.DataLossError)
    assert "record_batches.verify(Manifest.load(folder))" in note
    with pytest.raises(ValueError, match=path.name):  # as the note promises
        record_batches.verify(record_batches.Manifest.load(tmp_path))
    path.write_bytes(content[:50])
    note, _ = note_of(compiled(steps_per_execution=1), dataset, tf.errors.DataLossError)
    assert "cut short" in note


def test_keras_2_and_keras_3_meet():
    import keras

    with pytest.raises(ValueError) as caught, errors.decoding():
        Model().compile(keras.optimizers.Adam())
    assert "Keras 3 (`import keras`) and Keras 2" in caught.value.__notes__[0]
    layer = keras.layers.Dense(1)
    layer.build((None, 3))
    with pytest.raises(AttributeError) as caught, errors.decoding():
        tf.keras.optimizers.Adam().apply_gradients([(tf.zeros([3, 1]), layer.kernel)])
    assert "Keras 3 (`import keras`) and Keras 2" in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught, errors.decoding():
        tf.keras.Sequential([layer])
    assert "Keras 3 (`import keras`) and Keras 2" in caught.value.__notes__[0]


def test_more_than_2_gb_in_a_graph():
    zeros = np.broadcast_to(np.float32(0), (2**29 + 1,))  # takes no memory
    with pytest.raises(ValueError) as caught, errors.decoding():
        tf.function(lambda: tf.constant(zeros)).get_concrete_function()
    assert "a constant of the graph" in caught.value.__notes__[0]


def test_numbers_that_are_not_finite():
    with pytest.raises(tf.errors.InvalidArgumentError) as caught, errors.decoding():
        tf.debugging.check_numerics(tf.constant([1.0, np.nan]), "loss")
    assert "no longer finite" in caught.value.__notes__[0]
    assert "no longer finite" in errors.explained(FloatingPointError("the loss of epoch 2 is nan"))


def test_a_gradient_that_becomes_dense():
    def dense(values):
        return tf.convert_to_tensor(tf.IndexedSlices(values, tf.zeros([2], tf.int32), tf.constant([10**8, 3])))

    with pytest.warns(UserWarning, match="Converting sparse IndexedSlices") as caught:
        tf.function(dense).get_concrete_function(tf.TensorSpec([2, 3]))
    assert "`check_sparse` names the operation" in errors.explained(str(caught[0].message))


def test_a_tpu_that_is_not_there():
    with pytest.raises(ValueError) as caught, errors.decoding():
        tf.distribute.cluster_resolver.TPUClusterResolver()
    assert "tpu='local'" in caught.value.__notes__[0]


def test_a_file_that_is_not_on_the_tpu_host():
    with pytest.raises(tf.errors.UnimplementedError) as caught:
        tf.io.read_file("elsewhere://file")  # the same words for another scheme; `[local]` needs a TPU
    assert errors.explained(caught.value) is None
    assert "gs://" in errors.explained(str(caught.value).replace("elsewhere", "[local]", 1))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (SOURCES["python/tpu/tpu_embedding_v2.py"][0], "experimental_fetch_to_device=False"),
        (SOURCES["python/tpu/tpu_embedding_v2.py"][1], "drop_remainder=True"),
    ],
)
def test_what_only_a_tpu_says_from_its_source(words, answer):
    assert words in (TENSORFLOW / "python/tpu/tpu_embedding_v2.py").read_text()
    said = re.sub(r'"\n\s+"', "", words)
    with pytest.raises(ValueError) as caught, errors.decoding():
        raise ValueError(said)
    assert answer in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("words", "answer"),
    [  # from C++ that is not in a CPU's wheel: as users reported them, they could not be made to happen here
        ("InvalidArgumentError: Unsupported data type for TPU: string, caused by output Pad_1:0", "hash it"),
        ("NotFoundError: No registered 'Identity' OpKernel for 'TPU' devices compatible with node", "uint8"),
        ("Compilation failure: Dynamic concatenation is not supported yet: %reshape.3993", "drop_remainder"),
        ("TPU has inputs with dynamic shapes: [<tf.Tensor 'while/cond_8/Identity:0'", "drop_remainder"),
        ("Compilation failure: Ran out of memory in memory space hbm. Used 8.38G of 8.00G hbm.", "row-wise Adagrad"),
        ("Error: OOM when allocating tensor with shape[1099511627776,1024] and type float", "smaller batch"),  # 10 s
        ("NotFoundError: could not find registered transfer manager for platform Host", "libtpu"),
        ("[libprotobuf ERROR] tensorflow.GraphDef exceeded maximum protobuf size of 2GB", "constant of the graph"),
    ],
)
def test_what_only_cpp_says(words, answer):
    assert answer in errors.explained(words)


def test_an_error_that_is_not_known_passes_as_it_is():
    assert errors.explained(ValueError("'x' must be defined before the loop")) is None  # a loop of the reader's
    with pytest.raises(ZeroDivisionError) as caught, errors.decoding():
        1 / 0  # noqa: B018
    assert not hasattr(caught.value, "__notes__")


def test_an_operation_that_xla_lacks():
    with pytest.raises(tf.errors.OpError) as caught:
        tf.function(tf.strings.as_string, jit_compile=True)(tf.constant([1, 2]))
    told = errors.explained(caught.value)
    assert "XLA has no such operation: strings, ragged tensors" in told and "Do it on the host" in told


def test_every_entry_is_one_that_these_tests_reach():
    reached = {line for line, _, _ in errors.KNOWN}
    assert len(reached) == len(errors.KNOWN) == 19
    for pattern, cause, mend in errors.KNOWN:
        re.compile(pattern)
        assert cause.strip().endswith(".") and mend.strip().endswith(".")


# What `preflight` sees


class Scores(tf.keras.Model):
    """Two tables behind three features, trained on a label."""

    def __init__(self, rows=100, features=None, dim=8):
        super().__init__()
        users, items = Table("users", rows, dim), Table("items", 50, dim)
        self.look_up = Embeddings(features or {"user": users, "item": items, "history": items})

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            rows = self.look_up(batch)
            scores = tf.reduce_sum(rows["user"] * (rows["item"] + rows.get("history", 0.0)), 1)
            loss = tf.reduce_mean((scores - batch["rating"]) ** 2)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss}


def ratings(rows=64, **columns):
    dice = np.random.default_rng(1)
    batch = {
        "user": dice.integers(0, 100, rows, np.int32),
        "item": dice.integers(0, 50, rows, np.int32),
        "history": dice.integers(0, 50, (rows, 3), np.int32),
        "history_length": dice.integers(0, 4, rows, np.int32),
        "rating": dice.random(rows, np.float32),
    }
    return tf.data.Dataset.from_tensor_slices(batch | columns).batch(16, drop_remainder=True)


def scores(optimizer=None, steps_per_execution=2, **options):
    model = Scores(**options)
    model.compile(optimizer or optimizers.LazyAdam(1e-3), steps_per_execution=steps_per_execution)
    return model


def faults(*arguments, **options):
    """The numbered lines of the ValueError that `preflight` raises."""
    with pytest.raises(ValueError) as caught:
        errors.preflight(*arguments, **options)
    lines = re.split(r"\n(?=\d+\. )", str(caught.value))[1:]
    assert [int(line.split(".")[0]) for line in lines] == list(range(1, len(lines) + 1))
    return lines


def test_a_run_that_will_work_is_reported_and_left_as_it_is():
    model = scores()
    before = [value.numpy() for value in model.variables]
    report = errors.preflight(model, ratings(), steps=4)
    assert all((old == new.numpy()).all() for old, new in zip(before, model.variables, strict=True))
    assert model.optimizer.iterations == 0 and model._train_counter == 0
    assert report.batch["history"] == "int32 (16, 3)" and report.warnings == []
    assert [table.name for table in report.tables] == ["users", "items"]
    assert [set(table.columns) for table in report.tables] == [{"user"}, {"item", "history"}]
    assert [table.gb for table in report.tables] == pytest.approx([100 * 8 * 4 / 1e9, 50 * 8 * 4 / 1e9])
    assert "users" in str(report) and "float32" in str(report) and f"of {report.memory_gb:.1f} GB" in str(report)
    assert model.fit(ratings(), verbose=0).history["loss"]


@pytest.mark.parametrize(
    ("optimizer", "a_row"),  # bytes of slots of a row of 8 floats
    [
        (lambda: optimizers.LazyAdam(), 2 * 8 * 4),
        (lambda: optimizers.LazyAdam(second_moment="row"), (8 + 1) * 4),
        (lambda: optimizers.RowWiseAdagrad(), 4),
        (lambda: tf.keras.optimizers.Adam(), 2 * 8 * 4),
        (lambda: tf.keras.optimizers.Adagrad(), 8 * 4),
        (lambda: tf.keras.optimizers.legacy.SGD(), 0),
    ],
)
def test_slots_are_what_the_optimizer_builds(optimizer, a_row):
    model = scores(optimizer())
    report = errors.preflight(model, ratings())
    assert [table.slots_gb for table in report.tables] == pytest.approx([100 * a_row / 1e9, 50 * a_row / 1e9])
    built = [slot for slot in model.optimizer.variables() if slot.shape.rank]
    assert sum(int(np.prod(slot.shape)) * slot.dtype.size for slot in built) == 150 * a_row


def test_slots_of_two_optimizers():
    import tensorflow_recommenders as tfrs

    model = Scores()
    dense, tables = tf.keras.optimizers.legacy.Adam(), tf.keras.optimizers.legacy.Adagrad()
    model.compile(
        tfrs.experimental.optimizers.CompositeOptimizer(
            [(dense, lambda: []), (tables, lambda: model.trainable_variables)]
        )
    )
    assert errors.preflight(model, ratings()).tables[0].slots_gb == pytest.approx(100 * 8 * 4 / 1e9)


def test_all_faults_are_told_at_once():
    dice = np.random.default_rng(2)
    rating = dice.random(64, np.float32)
    rating[[3, 5]] = np.nan, np.inf
    user = dice.integers(0, 100, 64, np.int32)
    user[7] = 100
    said = faults(scores(), ratings(rating=rating, user=user, note=["a"] * 64), steps=5, device="TPU")
    assert len(said) == 4
    assert "column 'note': string, expected int32 or float32 on a TPU" in said[0]
    assert re.search(r"column 'user': ids from \d+ to 100, expected 0 to 99, rows of 'users'", said[2])
    assert "column 'rating': 2 of 16 values are NaN or inf, expected none" in said[1]
    assert "training would end early at step 4 (the dataset), expected 5" in said[3]


def test_a_label_that_is_nan_in_bfloat16():
    rating = np.full(64, 0.5, np.float32)
    rating[3] = np.nan
    dataset = ratings(rating=rating).map(lambda batch: batch | {"rating": tf.cast(batch["rating"], tf.bfloat16)})
    said = faults(scores(), dataset)
    assert "column 'rating': 1 of 16 values are NaN or inf, expected none" in said[-1]


def test_padding_is_no_id():
    history = np.full((64, 3), -1, np.int32)
    history[:, 2] = np.arange(64) % 50
    lengths = np.ones(64, np.int32)
    errors.preflight(scores(), ratings(history=history, history_length=lengths))
    (said,) = faults(scores(), ratings(history=history, history_length=lengths + 1))
    assert "column 'history': ids from -1 to 15, expected 0 to 49" in said


def test_tables_that_are_plain_variables():
    """TFRS's Retrieval also takes `len` of a tensor, which only AutoGraph allows: that is no fault."""
    model = MatrixFactorization(20, 10, 4)
    model.compile(optimizers.LazyAdam(1e-3))
    batch = {"user_index": np.arange(16, dtype=np.int32), "item_index": np.arange(16, dtype=np.int32) % 10}
    report = errors.preflight(model, tf.data.Dataset.from_tensors(batch))
    columns = {table.name: table.columns for table in report.tables}
    assert columns == {"user_table": ("user_index",), "item_table": ("item_index",), "item_bias": ("item_index",)}
    batch["item_index"][3] = 10
    (said,) = faults(model, tf.data.Dataset.from_tensors(batch))
    assert "column 'item_index': ids from 0 to 10, expected 0 to 9" in said


def test_columns_that_a_tpu_refuses():
    wide = np.ones(64)
    batches = ratings(wide=wide, small=wide.astype(np.uint8), rating=wide.astype(np.float32), long=np.arange(64))
    said = faults(scores(), batches.unbatch().batch(16), device="TPU")
    assert sum("expected a fixed shape on a TPU" in line for line in said) == 8  # every column: the last batch is open
    assert [line.split(": ")[1].split(",")[0] for line in said if "int32 or float32" in line] == ["uint8", "float64"]
    report = errors.preflight(scores(), ratings(long=np.arange(64), rating=wide.astype(np.float32)), device="TPU")
    assert report.warnings == ["column 'long' is int64, which a TPU does in two halves: cast it to int32",
                               "column 'rating' is 1.0 in the whole batch"]  # fmt: skip


def test_steps_against_the_rows():
    model, known = compiled(), data(rows=32)  # 4 steps
    unknown = known.filter(lambda batch: True)
    (said,) = faults(model, unknown)
    assert "the dataset has no known end" in said
    (said,) = faults(model, known.repeat())
    assert "the dataset has no known end" in said
    manifest = record_batches.Manifest("", [], [record_batches.File("a", 35, 1, "")], 8)
    (said,) = faults(model, unknown, steps=8, manifest=manifest)
    assert "end early at step 4 (one pass over the manifest; the dataset knows no length), expected 8" in said
    assert errors.preflight(model, unknown, steps=4, manifest=manifest).warnings == []
    assert "could not be compared" in errors.preflight(model, unknown, steps=4).warnings[0]
    assert "does not divide 3 steps" in errors.preflight(model, known, steps=3).warnings[0]
    (said,) = faults(model, data(rows=7))
    assert "dataset: no batch" in said


def test_the_step_is_tried():
    (said,) = faults(compiled("key"), data())
    assert "training step: KeyError: 'user'; a batch has item" in said and f"line {line_of('key')}" in said
    (said,) = faults(Scores(), ratings())
    assert "model: not compiled" in said


def test_memory_is_added_up_before_it_is_taken():
    model = scores(rows=1_000_000)
    start = time.process_time()
    report = errors.preflight(model, ratings())
    assert time.process_time() - start < 10  # the processor's: others may be at work
    assert report.tables[0].gb == pytest.approx(0.032) and report.tables[0].slots_gb == pytest.approx(0.064)
    (said,) = faults(model, ratings(), memory_gb=0.05)
    assert "0.10 GB (table + slots: users 0.03 + 0.06, items 0.00 + 0.00), expected 0.05 at most" in said


def test_memory_of_a_table_that_the_first_step_makes():
    (said,) = faults(compiled(rows=10_000, optimizer=optimizers.LazyAdam()), data(), memory_gb=2e-4)
    assert re.match(r"1\. memory: 0.00 GB \(table \+ slots: \S+/embeddings 0.00 \+ 0.00", said)


def test_a_gradient_that_would_become_dense_is_a_fault():
    (said,) = faults(scores(tf.keras.optimizers.Adam(), rows=1_000_000), ratings())
    assert "training step: " in said and "users" in said


def test_labels_beside_inputs_and_a_model_of_another_strategy():
    model = tf.keras.Sequential([tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    labels = np.ones((16, 1), np.float32)
    batches = tf.data.Dataset.from_tensors((np.random.default_rng(1).random((16, 3), np.float32), labels))
    report = errors.preflight(model, batches)
    assert report.batch == {"inputs": "float32 (16, 3)", "label": "float32 (16, 1)"}
    assert report.warnings == ["column 'label' is 1.0 in the whole batch"]
    labels[3] = np.nan
    batches = tf.data.Dataset.from_tensors((np.zeros((16, 3), np.float32), labels))
    said = faults(model, batches, tf.distribute.MirroredStrategy(["CPU:0"]))
    assert "in strategy.scope()" in said[0] and "column 'label': 1 of 16" in said[1]


TWO = """
import sys
import recsys_common, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, {folder!r})
import test_errors as own
from recsys_common import errors
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model, faulty = own.scores(), own.compiled("key")
batches = strategy.experimental_distribute_dataset(own.ratings())
report = errors.preflight(model, batches, strategy, steps=4)
print(report.batch["user"], report.warnings)
print(own.faults(model, strategy.distribute_datasets_from_function(lambda _: own.ratings()), strategy, steps=3))
unknown = strategy.experimental_distribute_dataset(own.ratings().filter(lambda batch: True))
manifest = own.record_batches.Manifest("", [], [own.record_batches.File("a", 70, 1, "")], 8)
print(own.faults(model, unknown, strategy, steps=8, manifest=manifest))
for dataset in own.data(), strategy.experimental_distribute_dataset(own.data()):
    note, error = own.note_of(faulty, dataset, steps_per_epoch=4)
    print(note)
"""


def test_under_a_strategy_of_two_devices():
    program = TWO.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    said = done.stdout
    assert "int32 (8,) []" in said, done.stderr[-2000:]
    assert "end early at step 2 (the dataset), expected 3" in said  # each replica takes one of the four batches
    assert "end early at step 4 (one pass" in said
    assert said.count("The true error: KeyError: 'user'; a batch has item") == 2
    assert said.count("# here: key") == 2
