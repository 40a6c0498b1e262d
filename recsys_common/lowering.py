"""What does TensorFlow hand to XLA for a training step, when tables of any size are shapes alone?

    with shapes_only():
        model = MatrixFactorization(100_000_000, 1_000_000, dim=128)    # 51 GB that nobody allocates
        step = step_of(model, LazyAdam(1e-3))
    lowered = lower(step, [{"user": tf.TensorSpec([8192], tf.int32), ...}])
    lowered.hlo                                                      # bytes of a serialized HloModuleProto

tpu.py compiles it. What no compiler will take is refused here, with the argument or the line of Python it is about.

Needs: training_step.py optimizers.py embeddings.py
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from recsys_common import optimizers
from recsys_common.training_step import trained

# tf-keras sums duplicate ids by tf.unique, whose length XLA bounds by that of its argument.
BOUNDED = ("Unique", "UniqueV2", "UnsortedSegmentSum", "Placeholder")
CALLS = ("PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "While", "StatelessWhile", "Case")
REFUSED = ("string", "uint8", "resource", "variant", "float64", "complex128")  # by a TPU, as an argument of a step


def nothing(shape: Sequence[int], dtype) -> object:
    """A tensor whose pages do not exist until they are written: a shape that TensorFlow takes for a value.

    The kernel is asked for addresses without memory behind them, which even overcommit's rules allow.
    """
    dtype = tf.as_dtype(dtype).base_dtype
    length = int(np.prod(shape, dtype=np.int64)) * dtype.size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
    raw = np.frombuffer(mmap.mmap(-1, max(length, 1), flags=flags), np.uint8)[:length]
    numbers = raw.view(np.dtype(f"u{dtype.size}")).reshape(shape)
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(numbers.__dlpack__()), dtype)


@contextlib.contextmanager
def shapes_only(at_least: int = 2**20) -> Iterator[None]:
    """Variables that are made in here have their shape and dtype, but no memory from `at_least` numbers on.

    Their values are zeros and mean nothing. Training on them would be real, and take the memory after all.
    """

    def creator(make, initial_value=None, dtype=None, shape=None, **options):
        value = initial_value
        given = shape is not None and tf.TensorShape(shape).is_fully_defined() and dtype is not None
        if callable(value) and not given:  # traced for its shape, not computed
            with tf.__internal__.FuncGraph("shape").as_default():
                value = tf.convert_to_tensor(value(), dtype)
        size = tf.TensorShape(shape if given else getattr(value, "shape", np.shape(value)))
        symbolic = tf.is_tensor(value) and not callable(initial_value) and not hasattr(value, "numpy")
        if (size.num_elements() or 0) >= at_least or symbolic:
            with tf.init_scope():
                value = nothing(size, dtype or value.dtype)
                variable = make(initial_value=value, dtype=dtype, shape=shape, **options)
            variable.shapes_only = True  # `embeddings.create` does not fill it
            return variable
        return make(initial_value=initial_value, dtype=dtype, shape=shape, **options)

    with tf.variable_creator_scope(creator):
        yield


def step_of(model, optimizer) -> Callable:
    """The training step of a `tfrs.Model` that `training.train` runs (`training_step.trained`): a function of a batch.

    The optimizer's slots are made here, without memory where they are large, and its shapes are static, as XLA wants.
    """
    with shapes_only(), tf.__internal__.FuncGraph("slots").as_default():  # initial values are not computed
        parts = getattr(optimizer, "_optimizers_and_vars", [(optimizer, lambda: model.trainable_variables)])
        for part, variables in parts:
            build = part.build if hasattr(part, "build") else part._create_all_weights  # of tf.keras.optimizers.legacy
            build(variables() if callable(variables) else variables)
            part.static_shapes = True  # those of optimizers.py know it
    return functools.partial(trained, model, optimizer)


class Refused(Exception):
    """What no TPU would take, seen before the compiler: which argument or line it is, and the mend."""


@dataclass(frozen=True)
class Lowered:
    """A step as XLA gets it."""

    hlo: bytes  # a serialized HloModuleProto; its parameters are the batch, then the variables
    text: str  # the same to read, without what differs from one process to the next
    batch: dict[str, tf.TensorSpec]
    values: dict[int, np.ndarray]  # of parameters that were given as tensors or arrays
    variables: list[tuple[str, tf.TensorShape, tf.DType]]
    lines: dict[str, str]  # operation -> "file.py, line 12: code"
    warnings: tuple[str, ...]

    def line(self, operation: str) -> str:
        """The line of Python that made an operation of the compiled program; "" if none is known."""
        return _line(operation, self.lines)


def lower(step: Callable, arguments: Sequence) -> Lowered:
    """Trace a step and lower it for XLA.

    Args:
      step: a function or `tf.function`, with its variables made already.
      arguments: what it is called with: nests of `tf.TensorSpec`, or of tensors and arrays as examples of them.

    Raises:
      Refused: an argument that a TPU does not take, or an operation that XLA does not have.
      TypeError: `arguments` is no list.
      Others of the step pass: they are the step's own.
    """
    if not isinstance(arguments, list | tuple):  # of a dict, its keys would be taken
        raise TypeError(f"arguments is a {type(arguments).__name__}, expected a list of what the step takes: [batch]")
    given = tf.nest.flatten(list(arguments))
    values = {n: np.asarray(each) for n, each in enumerate(given) if isinstance(each, tf.Tensor | np.ndarray)}
    arguments = tf.nest.map_structure(_spec, list(arguments))
    names = [".".join(map(str, path[1:])) or f"argument {path[0]}" for path in _paths(arguments)]
    batch = dict(zip(names, tf.nest.flatten(arguments), strict=True))
    if faults := [fault for name, spec in batch.items() if (fault := _fault(name, spec))]:
        raise Refused("a TPU does not take these arguments:\n  " + "\n  ".join(faults))
    call = getattr(step, "python_function", step)
    specs = [*batch.values()]  # the compiler's way in takes no nests
    function = tf.function(lambda *flat: call(*tf.nest.pack_sequence_as(arguments, flat)), jit_compile=True)
    concrete, warnings = function.get_concrete_function(*specs), []
    try:
        optimizers.check_sparse(lambda given: call(*given), arguments)
    except ValueError as error:
        warnings.append(str(error))
    lines = _lines(concrete.graph)
    for outside, inside in concrete.graph.captures:
        data = outside._handle_data
        if outside.dtype == tf.resource and not (data and data.shape_and_type):
            used = [each.name for each in inside.consumers()] or [inside.op.name]
            table = f"Detected unsupported operations when trying to compile: a lookup table in {{{{node {used[0]}}}}}"
            raise Refused(explained(table, lines))
    for name, operation in _operations(concrete.graph):
        vague = [output.shape for output in operation.outputs if not _known(output)]
        if vague and all(map(_known, operation.inputs)) and operation.type not in (*BOUNDED, *CALLS):
            where = lines.get(name, "a library")
            warnings.append(
                f"{name} ({operation.type}) has a shape that is known only when it runs, {vague[0]}: {where}\n"
                "  XLA computes with the largest that it can have, and some operations on it are wrong without a word"
            )
    try:
        text, hlo = (function.experimental_get_compiler_ir(*specs)(stage=each) for each in ("hlo", "hlo_serialized"))
    except Exception as error:  # TensorFlow's errors here are of every type
        raise Refused(explained(f"{type(error).__name__}: {error}", lines)) from None
    named = {id(each.handle): each.name.partition(":")[0] for each in concrete.graph.variables}
    variables = [_captured(each, named) for each in concrete.captured_inputs]
    text = re.sub(r"__inference_\w+|a_inference_\w+(\.\d+)?", "step", text)
    text = re.sub(r"((?:cond|while|case)_(?:true|false|cond|body|branch\d+))(?:_\d+)?(_grad)?_\d+", r"\1\2", text)
    return Lowered(hlo, text, batch, values, variables, lines, tuple(warnings))


def explained(message: str, lines: dict[str, str]) -> str:
    """A message of TensorFlow or of the compiler in short, with the lines of Python that it is about, and the mend."""
    from recsys_common import errors

    short = re.sub(r"\*\*\* Begin stack trace.*?\*\*\* End stack trace \*\*\*", "", message, flags=re.DOTALL)
    short = re.sub(r"\s*The op is created at:.*", "", short, flags=re.DOTALL)  # `lines` knows better
    short = "\n".join(line for line in short.splitlines() if line.strip() and "stack trace" not in line)[:1200]
    named = re.findall(r"\{\{node ([^}]*)\}\}", message) + re.findall(r'op_name="([^"]*)"', message)
    made = dict.fromkeys(line for name in named if (line := _line(name, lines)))
    meaning = re.sub(r"\nWhere: .*", "", errors.explained(message) or "")  # of lowering.py, or of no file at all
    return "\n".join(filter(None, [short, *(f"Made in {line}" for line in made), meaning]))


def _spec(value) -> tf.TypeSpec:
    return value if isinstance(value, tf.TypeSpec) else tf.type_spec_from_value(tf.nest.map_structure(_tensor, value))


def _tensor(value):
    return value if isinstance(value, tf.__internal__.CompositeTensor) else tf.convert_to_tensor(value)


def _fault(name: str, spec: tf.TypeSpec) -> str:
    if not isinstance(spec, tf.TensorSpec):
        return f"{name} is a {type(spec).__name__.removesuffix('Spec')}: pad it to one length on the host"
    if spec.dtype.name in REFUSED:
        return f"{name} is {spec.dtype.name}: leave it out, or hash or cast it to int32 or float32 on the host"
    if not spec.shape.is_fully_defined():
        return (
            f"{name} has the shape {spec.shape}: a TPU program is compiled for one shape; batch(..., "
            "drop_remainder=True), and pad histories to one length"
        )
    return ""


def _captured(tensor: tf.Tensor, named: dict[int, str]) -> tuple[str, tf.TensorShape, tf.DType]:
    if tensor.dtype != tf.resource:
        return "a constant", tensor.shape, tensor.dtype
    [held] = tensor._handle_data.shape_and_type  # of a variable
    return named.get(id(tensor), "a variable"), tf.TensorShape(held.shape), tf.as_dtype(held.dtype)


def _known(tensor: tf.Tensor) -> bool:
    return tensor.dtype in (tf.resource, tf.variant) or tensor.shape.is_fully_defined()


def _paths(nest, path=()) -> Iterator[tuple]:
    if isinstance(nest, dict):
        for key in sorted(nest):
            yield from _paths(nest[key], (*path, key))
    elif isinstance(nest, list | tuple):
        for number, each in enumerate(nest):
            yield from _paths(each, (*path, number))
    else:
        yield path


def _operations(graph, within: str = "") -> Iterator[tuple[str, tf.Operation]]:
    """Those of a graph and of the functions that it calls, by the names that XLA gives them."""
    for operation in graph.get_operations():
        yield within + operation.name, operation
        for value in operation.node_def.attr.values() if operation.type in CALLS else ():
            for called in (value.func, *value.list.func):
                if function := graph._functions.get(called.name):  # names in a branch or a loop begin with the call's
                    inside = f"{within}{operation.name}/" if "PartitionedCall" in operation.type else within
                    yield from _operations(function.graph, inside)


def _lines(graph) -> dict[str, str]:
    """Operation -> line: the innermost one of the step that is no library's, or else a library's."""
    found, library = {}, re.compile(r"site-packages|dist-packages|/lib/python")
    for name, operation in _operations(graph):
        frames = list(operation.traceback or [])  # what TensorFlow puts in to match up two branches has none
        begin = max((number for number, frame in enumerate(frames) if frame.filename == __file__), default=-1)
        frames = [frame for frame in frames[begin + 1 :] if "/tensorflow/python/" not in frame.filename]
        frames = [frame for frame in frames if not library.search(frame.filename)] or frames
        if frames:
            number = _statement(frames[-1].filename, frames[-1].lineno)
            code = linecache.getline(frames[-1].filename, number).strip()
            cell = "ipykernel_" in frames[-1].filename  # whose file has another name in each process
            place = f"{'a cell' if cell else Path(frames[-1].filename).name}, line {number}"
            place = f"{place}: {code[:80]}" if code else place
            # Both branches of a condition may have an operation of this name.
            found[name] = place if found.get(name, place) == place else f"{found[name]}, or {place}"
    return found


def _line(operation: str, lines: dict[str, str]) -> str:
    """Of an operation as XLA calls it: behind what called it, and after others that it was found equal to."""
    for name in reversed(operation.split(";")):
        _, _, forward = name.partition("gradient_tape/")
        while forward := forward.rpartition("/")[0]:
            if line := lines.get(forward):
                return f"the gradient of {line}"
        parts = name.split("/")
        for begin in range(len(parts)):
            if line := lines.get("/".join(parts[begin:])):
                return line
    return ""


def _statement(file: str, line: int) -> int:
    """The first line of the statement; AutoGraph gives its last one."""
    with contextlib.suppress(SyntaxError):  # a cell with a magic in it
        starts = [each.lineno for each in _statements(file) if each.lineno <= line <= each.end_lineno]
        return max(starts, default=line)
    return line


@functools.cache
def _statements(file: str) -> list[ast.stmt]:
    nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
    return [node for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")]
