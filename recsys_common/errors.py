"""What does this error mean, and what would fail later?

    report = preflight(model, dataset, steps=steps, manifest=manifest)  # before: all faults, in one ValueError
    with decoding(model=model, dataset=dataset):                        # during: cause, line and mend, as a note
        model.fit(dataset, ...)
    print(explained("Please provide a TPU Name to connect to."))        # after: from a log

Some messages of TensorFlow name a victim, not a cause; the worst hides the true error altogether. `KNOWN` lists them
with their causes. The type and the traceback of an error stay what they are: code that catches it goes on to work.

Needs: scale.py embeddings.py optimizers.py
"""

from __future__ import annotations

import contextlib
import linecache
import re
import traceback
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from recsys_common import scale
from recsys_common.embeddings import history
from recsys_common.optimizers import check_sparse

MACHINERY = ("errors.py", "embeddings.py", "optimizers.py", "training_step.py", "training.py")  # not the reader's code
# ? what the message says (the first that fits counts), then what that means, -> and what to do.
KNOWN = r"""
? 'outputs' must be defined before the loop|_steps_per_execution\).*None values not supported
This is not the true error. With steps_per_execution above 1 Keras runs steps in a loop. AutoGraph traces it once to
learn what `outputs` is, swallows what goes wrong in the step, and complains about its own variable.
-> Set steps_per_execution=1 and run again to see the error in full; mend it, and set it back.
? Input tensors for TPU embeddings must be placed on the CPU
The batch was moved to the TPU, but TPUEmbedding takes ids on the host. `fit` always moves a plain dataset.
-> strategy.experimental_distribute_dataset(dataset, tf.distribute.InputOptions(experimental_fetch_to_device=False)).
? does not have the .?_tpu_input_identity
A cast, a reshape, a tf.keras.Input of another dtype or a changing batch size stands between batch and TPUEmbedding.
-> Hand the ids to the layer as they come, int32, in batches of a fixed size (drop_remainder=True).
? (data type for TPU: string|string\S* is not a supported TPU infeed type|No registered '\w+' OpKernel for '?\w*TPU)
A string or uint8 is in the batch or made in the step. A TPU takes neither, not even in a column that nothing uses.
-> Leave the column out (`columns=` of input_pipeline.batches), or hash it, or cast it, on the host in Dataset.map.
? Detected unsupported operations when trying to compile
XLA has no such operation: strings, ragged tensors, hash tables, tf.py_function and the like are TensorFlow's alone.
-> Do it on the host in Dataset.map, or in SQL, and hand the step its numbers.
? TPU has inputs with dynamic shapes|Dynamic concatenation is not supported|bounded dynamic|XlaSetDynamicDimensionSize
Batches have no fixed shape (a smaller last batch, ragged rows), and a TPU program is compiled for one.
-> batch(..., drop_remainder=True), and pad histories to one length (`lengths=` of input_pipeline.batches).
? File system scheme '\[local\]' not implemented
The TPU's host, which is another machine, was asked for a file of this one.
-> Keep files in gs://, work on the TPU VM (tpu='local'), or save with experimental_io_device='/job:localhost'.
? Please provide a TPU Name to connect to
TPUClusterResolver() found no name in the environment; on a TPU VM there is none.
-> On a TPU VM TPUClusterResolver(tpu='local'), elsewhere the TPU's name; without a TPU no TPUStrategy.
? could not find registered transfer manager for platform Host
TensorFlow and libtpu do not fit together, or Keras 3 compiled an operation for the host of a TPU.
-> Install one tensorflow-tpu with the libtpu that it asks for, and stay on tf-keras (import recsys_common).
? [Rr]an out of memory in memory space hbm|HbmOom|Exceeded hbm capacity|OOM when allocating tensor with shape
The device is full. If it is a table's shape, an optimizer or a gradient became dense. TPU cores hold whole tables.
-> An optimizer of optimizers.py, row-wise Adagrad, bfloat16, TPUEmbedding, a smaller batch. `preflight` adds it up.
? End of sequence|[Rr]an out of data
The dataset ended before the steps that were asked for. At the end of a pass TensorFlow logs it too, as a warning.
-> Steps from input_pipeline.steps_per_epoch(manifest, batch_size), and as many epochs in batches(...) as in `fit`.
? Could not infer the size of the data
Keras must know the length if steps_per_execution is above 1; no TFRecordDataset, filter, flat_map, interleave does.
-> dataset.apply(tf.data.experimental.assert_cardinality(steps)), or steps_per_epoch=. input_pipeline.batches knows it.
? Expected input data to be non-empty|Empty logs
A dataset has no batch: nothing matched, or drop_remainder left all its rows out; often it is the validation data.
-> Count rows against the batch size; for validation pad: batches(..., remainder='pad').
? Could not interpret optimizer identifier|'_unique_id'|of class Layer.*keras\.src|be Keras version 2|'c', 'o', 'u'
Keras 3 (`import keras`) and Keras 2 (tf.keras here, TensorFlow Recommenders) do not take each other's objects.
-> Take all of them from tf.keras, and import recsys_common before tf.keras is first used.
? larger than 2GB|maximum protobuf size of 2GB|Failed to serialize proto
An array became a constant of the graph, which holds 2 GB: an initial table, a Python list, what a tf.function uses.
-> Make tables in slices (embeddings.create), keep vocabularies in the warehouse, read arrays from files in tf.data.
? indices\S* = -?\d+ is not in \[0, \d+\)
An id is outside its table. On a CPU this stops. A GPU takes zeros, XLA (a TPU) the nearest row, and say nothing.
-> Map ids that training never saw to row 0, take vocabulary and rows from one export, run `preflight` first.
? DataLossError|(corrupted|truncated) record
A file of the dataset is damaged or was cut short while copied. TensorFlow does not say which.
-> record_batches.verify(Manifest.load(folder)) reads all of them and names it; then copy or export it again.
? FloatingPointError|Tensor had (NaN|Inf|-Inf)|[Ll]oss\b.{0,40}\b(nan|inf)\b
A number is no longer finite: a label or feature is NaN, a logarithm or division of 0, too large a learning rate.
-> `preflight` finds NaN in a batch; tf.debugging.enable_check_numerics() the operation. Lower rate, or clip_norm.
? Converting sparse IndexedSlices
The gradient of a table became dense: every step now costs the whole table, not the rows of the batch.
-> An optimizer of optimizers.py; its `check_sparse` names the operation.
"""
KNOWN = [re.fullmatch(r"(.+?)\n(.+)\n-> (.+)", entry.strip(), re.DOTALL).groups() for entry in KNOWN.split("\n? ")[1:]]

# A trainable variable [rows, dim]: columns of the batch that are its ids, GB (1e9 bytes) of it and of its slots.
TableMemory = namedtuple("TableMemory", "name rows dim dtype columns gb slots_gb")


@dataclass(frozen=True)
class Report:
    """What `preflight` saw: a batch's columns, the tables, the device's memory in GB, what is odd but no fault."""

    batch: dict[str, str]
    tables: list[TableMemory]
    memory_gb: float
    warnings: list[str]

    def __str__(self):
        lines = ["batch: " + ", ".join(f"{name} {kind}" for name, kind in self.batch.items())]
        row = f"{{:<{max([5, *(len(table.name) for table in self.tables)])}}} {{:>13}} {{:>5}} {{:>8}} {{:>8}} {{:>8}}"
        lines.append(row.format("table", "rows", "dim", "dtype", "GB", "slots GB"))
        for t in self.tables:
            lines.append(row.format(t.name, f"{t.rows:,}", t.dim, t.dtype, f"{t.gb:.3f}", f"{t.slots_gb:.3f}"))
        lines.append(f"in all {sum(t.gb + t.slots_gb for t in self.tables):.3f} GB of {self.memory_gb:.1f} GB")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def explained(error: BaseException | str, model=None, dataset=None) -> str | None:
    """Cause, line of the reader's code and mend of an error, or of a message from a log; None if it is not in `KNOWN`.

    Args:
      model, dataset: of the `fit` that failed. With them an error that AutoGraph hid is found: the training step is
        traced once more on the shapes of a batch, outside the loop and without running it.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    found = next((entry for entry in KNOWN if re.search(entry[0], text, re.DOTALL)), None)
    if found is None:
        return None
    (_, cause, mend), place = found, _place(error)
    dataset = dataset if hasattr(dataset, "element_spec") else None  # `fit` takes arrays and generators, too
    if found is KNOWN[0]:
        if hidden := re.search(r"automatically, but ran into an? (\w+: .*)", text, re.DOTALL):
            cause += f"\nHere it hid {hidden[1].strip()}"
        if model is not None and dataset is not None:
            true, place, _ = _traced(model, _spec(dataset))
            cause += f"\nThe true error: {true}" if true else ""
    elif (outside := re.search(r"= (-?\d+) is not in \[0, (\d+)\)", text)) and model is not None:
        row, rows = map(int, outside.groups())
        columns = {} if dataset is None else _traced(model, _spec(dataset))[2]
        tables = [table for table in _tables(model, columns) if table.rows == rows]
        names = " or ".join(f"{table.name} (ids: {', '.join(table.columns) or 'not known'})" for table in tables)
        cause += f"\nHere id {row:,}, and the table of {rows:,} rows is {names or 'not known'}."
    return f"What it means: {cause}\nWhere: {place or 'not in code of yours'}\nWhat to do: {mend}"


@contextlib.contextmanager
def decoding(model=None, dataset=None):
    """Adds what `explained` knows to an error that passes, as a note, and to Keras's warning that data ran out.

    Args: as for `explained`; of the dataset only the `element_spec` is looked at.
    """

    def with_meaning(record) -> bool:
        message = record.getMessage()
        if "ran out of data" in message:
            record.msg, record.args = f"{message}\n{explained(message)}", ()
        return True

    tf.get_logger().addFilter(with_meaning)
    try:
        yield
    except Exception as error:
        if meaning := explained(error, model, dataset):
            error.add_note(meaning)
        raise
    finally:
        tf.get_logger().removeFilter(with_meaning)


def preflight(
    model: tf.keras.Model, dataset, strategy: tf.distribute.Strategy | None = None, *, steps: int | None = None,
    manifest=None, memory_gb: float | None = None, device: str | None = None,
) -> Report:  # fmt: skip
    """Looks at one batch and traces one training step for what would fail later. No weight changes.

    Args:
      model: compiled.
      dataset: the `tf.data.Dataset`, perhaps distributed, that `fit` will get; one batch of a fresh iterator is read.
      strategy: that the run will use; None for the model's own.
      steps: batches that the run will take from `dataset`, of all its epochs; None for all that there are.
      manifest: `record_batches.Manifest` of the files, where the dataset does not know its length.
      memory_gb: of the device, in GB of 1e9 bytes; None for this machine's.
      device: "TPU" checks for one where there is none.

    Raises:
      ValueError: all faults, numbered: where, what was found, what was expected, what to do.
    """
    own, memory_gb = model.distribute_strategy, memory_gb or scale.machine()["memory_gb"] * 2**30 / 1e9
    strategy, spec, batch = strategy or own, _spec(dataset), next(iter(dataset), None)
    tables, faults, warnings = _tables(model), [], []
    if own is not strategy:
        faults.append(f"model: of {own}, expected {strategy}. Make and compile it in strategy.scope().")
    if model.optimizer is None:
        faults.append("model: not compiled. Call model.compile(optimizer=...) first.")
    elif _fit(tables, memory_gb, faults):
        true, place, columns = _traced(model, spec)
        tables = _tables(model, columns)
        _fit(tables, memory_gb, faults)  # with those of layers that make their tables in the first step
        if true:
            faults.append(f"training step: {true}, at {place or 'no line of yours'}. Mend that line.")
        else:
            try:
                check_sparse(model, spec)
            except ValueError as error:
                faults.append(f"training step: {error}")
    if device == "TPU" or isinstance(strategy, tf.distribute.TPUStrategy):
        ragged_fits = any("TPUEmbedding" in type(layer).__name__ for layer in model.submodules)
        _check_for_tpu(_columns(spec), ragged_fits, faults, warnings)
    if batch is None:
        faults.append("dataset: no batch, expected one or more. Count its rows against the batch size.")
    else:
        parts = strategy.experimental_local_results
        replicas = len(parts(tf.nest.flatten(batch)[0]))  # 1, too, of a batch that `fit` will split
        batch = tf.nest.map_structure(lambda value: parts(value)[0], batch)
        _check_values(_columns(batch), tables, faults, warnings)
        rows = max(1, tf.nest.flatten(batch)[0].shape[0]) * (strategy.num_replicas_in_sync if replicas > 1 else 1)
        _check_steps(model, dataset, steps, manifest and manifest.rows // rows, replicas, faults, warnings)
    if faults:
        raise ValueError("\n".join(["this run would fail:", *(f"{n}. {fault}" for n, fault in enumerate(faults, 1))]))
    return Report({name: _kind(value) for name, value in _columns(spec).items()}, tables, memory_gb, warnings)


def _fit(tables: list[TableMemory], memory_gb: float, faults: list[str]) -> bool:
    needed = sum(table.gb + table.slots_gb for table in tables)
    if needed > memory_gb > 0:
        told = ", ".join(f"{table.name} {table.gb:.2f} + {table.slots_gb:.2f}" for table in tables)
        wrong = f"{needed:.2f} GB (table + slots: {told}), expected {memory_gb:.2f} at most"
        faults.append(f"memory: {wrong}. Take row-wise Adagrad (one slot a row), bfloat16, a smaller dim, or shard it.")
    return not needed > memory_gb > 0


def _check_for_tpu(spec: dict, ragged_fits: bool, faults: list[str], warnings: list[str]) -> None:
    for name, value in spec.items():
        dtype = value.dtype.name
        if dtype not in ("int32", "uint32", "int64", "float32", "bfloat16", "bool"):
            faults.append(f"column {name!r}: {dtype}, expected int32 or float32 on a TPU. Drop, cast or hash it.")
        if dtype == "int64":
            warnings.append(f"column {name!r} is int64, which a TPU does in two halves: cast it to int32")
        ragged = not isinstance(value, tf.TensorSpec)
        if (ragged and not ragged_fits) or not value.shape[: 1 if ragged else None].is_fully_defined():
            faults.append(f"column {name!r}: {_kind(value)}, expected a fixed shape on a TPU. Drop remainders, pad.")


def _check_values(batch: dict, tables: list[TableMemory], faults: list[str], warnings: list[str]) -> None:
    table_of = {column: table for table in tables for column in table.columns}  # the smallest comes last, and counts
    for name, value in batch.items():
        table = table_of.get(name)
        if table and value.shape.rank == 2 and f"{name}_length" in batch and not isinstance(value, tf.RaggedTensor):
            value = history(batch, name)  # padding is not looked up
        values = np.asarray(getattr(value, "flat_values", value))
        if value.dtype.is_floating and not (finite := np.isfinite(values)).all():
            wrong = f"{np.sum(~finite):,} of {values.size:,} values are NaN or inf, expected none"
            faults.append(f"column {name!r}: {wrong}. Filter or fill them in SQL.")
        elif table and values.dtype.kind in "iu" and values.size and not 0 <= values.min() <= values.max() < table.rows:
            wrong = f"{values.min():,} to {values.max():,}, expected 0 to {table.rows - 1:,}, rows of {table.name!r}"
            faults.append(f"column {name!r}: ids from {wrong}. Take vocabulary and table from one export.")
        elif values.size > 1 and name != "weight" and (values == values.flat[0]).all():
            warnings.append(f"column {name!r} is {values.flat[0]} in the whole batch")


def _check_steps(model, dataset, steps, one_pass, replicas, faults: list[str], warnings: list[str]) -> None:
    block = 1 if model._steps_per_execution is None else int(model._steps_per_execution.numpy())
    there, source = getattr(dataset, "cardinality", tf.data.UNKNOWN_CARDINALITY), "the dataset"
    there = int(there() if callable(there) else there)  # a property of distributed ones
    there //= replicas if "FromFunction" in type(dataset).__name__ and there > 0 else 1  # it counts replicas' batches
    if there == tf.data.UNKNOWN_CARDINALITY and steps and one_pass is not None:
        there, source = one_pass, "one pass over the manifest; the dataset knows no length"
    if not steps and (there == tf.data.INFINITE_CARDINALITY or (there < 0 and block > 1)):
        faults.append("steps: the dataset has no known end, expected one. Give steps_per_epoch, or assert_cardinality.")
    elif steps and 0 <= there < steps:
        wrong = f"training would end early at step {there:,} ({source}), expected {steps:,}"
        faults.append(f"steps: {wrong}. Repeat the data, or take input_pipeline.steps_per_epoch.")
    elif steps and there == tf.data.UNKNOWN_CARDINALITY:
        warnings.append("the dataset does not know its length, so steps could not be compared: give manifest=")
    if steps and steps % block:
        warnings.append(f"steps_per_execution {block} does not divide {steps:,} steps: the last block is shorter")


def _traced(model: tf.keras.Model, spec) -> tuple[str | None, str | None, dict[int, tuple[str, ...]]]:
    """Traces a training step alone: what it raises or wrongly returns, and where; the columns that index variables."""
    returned = []

    def trace(autograph: bool):
        def step(batch):
            model.distribute_strategy.run(lambda rows: returned.append(model.train_step(rows)), args=(batch,))

        try:
            return tf.function(step, autograph=autograph).get_concrete_function(spec)
        except Exception as error:  # whatever it is, it is what we look for
            while getattr(error, "_keras_call_info_injected", False) and error.__context__:
                error = error.__context__  # Keras wraps what happens in a layer: a KeyError becomes a RuntimeError
            return error

    if isinstance(error := trace(True), Exception):
        plain = trace(False)  # the same as it is written, so that its lines are the reader's; unless it needs AutoGraph
        error = plain if isinstance(plain, Exception) and str(plain)[:60] in str(error) else error
        name = "KeyError" if isinstance(error, KeyError) else type(error).__name__  # AutoGraph has one of its own
        said = str(error).strip().split("\n\n")[-1].strip().removeprefix(f"{name}: ")  # AutoGraph's frames stand above
        there = f"; a batch has {', '.join(_columns(spec))}" if name == "KeyError" else ""
        return f"{name}: {said[:500]}{there}", _place(error), {}
    code, logs = type(model).train_step.__code__, returned[-1]
    wrong = {name: value for name, value in logs.items() if value is None or isinstance(value, str)} if logs else {}
    if wrong or not logs:
        said = f"train_step returns {wrong or logs!r}, expected a dict of numbers with at least the loss"
        return said, _own(code.co_filename, code.co_firstlineno, "train_step"), {}
    return None, None, _looked_up(error.graph, spec)


def _looked_up(graph, spec) -> dict[int, tuple[str, ...]]:
    """id(handle) of a variable -> columns of the batch whose values, unchanged, say which rows are looked up."""
    names = [name for name, value in _columns(spec).items() for _ in tf.nest.flatten(value, expand_composites=True)]
    name_of = {placeholder.op.name: name for placeholder, name in zip(graph.inputs, names, strict=False)}
    handle_of, found = {inside.op.name: id(outside) for outside, inside in graph.captures}, {}
    for op in graph.get_operations():
        if op.type == "ResourceGather":
            ids, handle = op.inputs[1], handle_of.get(op.inputs[0].op.name)
            while ids.op.type in ("Identity", "Cast", "Reshape", "GatherV2", "Unique", "ExpandDims", "SelectV2"):
                ids = ids.op.inputs[ids.op.type == "SelectV2"]  # tf.where(..., ids, ...): without a history's padding
            if ids.op.name in name_of:
                found[handle] = tuple(dict.fromkeys((*found.get(handle, ()), name_of[ids.op.name])))
    return found


def _place(error: BaseException | str) -> str | None:
    """The innermost line of the reader's own code that an error, or TensorFlow's message, names."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(getattr(error, "__traceback__", None))]
    frames += re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(error))  # further in, where there are any
    return next(filter(None, (_own(*frame) for frame in reversed(frames))), None)


def _own(file: str, line: int | str, function: str) -> str | None:
    libraries = (
        "site-packages",
        "dist-packages",
        "__autograph_generated",
        "<frozen",
        traceback.__file__.rpartition("/")[0],
    )
    beside = any(file == __file__.replace("errors.py", name) for name in MACHINERY)
    if beside or (any(part in file for part in libraries) and not file.startswith(__file__.removesuffix("errors.py"))):
        return None
    return f"{file}, line {line}, in {function}: {linecache.getline(file, int(line)).strip()}"


def _spec(dataset):
    """The shapes of a batch, of one replica where the dataset is distributed."""
    return tf.nest.map_structure(lambda value: getattr(value, "_value_specs", [value])[0], dataset.element_spec)


def _columns(batch) -> dict:
    """{name: value} of a batch: a dict, or (inputs, label, weight) with inputs perhaps a dict."""
    inputs, *others = batch if isinstance(batch, tuple) else [batch]
    inputs = dict(sorted(inputs.items())) if isinstance(inputs, dict) else {"inputs": inputs}  # in tf.nest's order
    return inputs | dict(zip(("label", "weight"), others, strict=False))


def _kind(spec) -> str:
    return f"{spec.dtype.name} {spec.shape}" + " ragged" * isinstance(spec, tf.RaggedTensorSpec)


def _tables(model: tf.keras.Model, columns: dict[int, tuple[str, ...]] | None = None) -> list[TableMemory]:
    """Tables with the slots that a copy of the optimizer builds on a few rows; columns by the variable's id(handle)."""
    few, found = 6, []
    variables = [v for v in tf.train.TrackableView(model).descendants() if isinstance(v, tf.Variable) and v.trainable]
    for table in [variable for variable in variables if variable.shape.rank == 2]:
        a_row, (rows, dim) = 0, table.shape
        if copy := _optimizer_of(table, model.optimizer):
            copy = type(copy).from_config(copy.get_config() | {"learning_rate": 0.0})  # a schedule is not always copied
            build = copy.build if hasattr(copy, "build") else copy._create_all_weights  # of tf.keras.optimizers.legacy
            build([tf.Variable(tf.zeros([few, dim], table.dtype))])
            a_row = sum(int(np.prod(s.shape[1:])) * s.dtype.size for s in copy.variables() if s.shape[:1] == [few])
        of = (columns or {}).get(id(getattr(table, "values", [table])[0].handle), ())
        sizes = rows * dim * table.dtype.size / 1e9, rows * a_row / 1e9
        found.append(TableMemory(table.name.split(":")[0], rows, dim, table.dtype.name, of, *sizes))
    return sorted(found, key=lambda table: -table.rows)


def _optimizer_of(table: tf.Variable, optimizer):
    """The one that trains a table; None where that cannot be known before the first step."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not hasattr(optimizer, "_optimizers_and_vars"):  # of tfrs.experimental.optimizers.CompositeOptimizer
        return optimizer
    with contextlib.suppress(ValueError):  # a Sequential that was not called yet cannot list its variables
        return next((one for one, of in optimizer._optimizers_and_vars if any(v is table for v in of())), None)
    return None
