"""Will this training step run on a TPU, does it fit, what bounds it, and where do I get the strategy for one?

    strategy = get_strategy("tpu")                       # or "cpu", "cpus:4", "gpu", the name of a TPU

    with shapes_only():                                  # tables of any size, and no memory for them
        model = MatrixFactorization(100_000_000, 1_000_000, dim=16)
        step = step_of(model, LazyAdam(1e-3))
    report = aot_compile(step, [batch_spec], "v5e:1x1")  # by the real TPU compiler, here, without a TPU
    print(report)

    python -m recsys_common.tpu config.yaml --topology v5e:1x1 v6e:2x2 --set model.embedding_dim=128

The step is lowered by TensorFlow and compiled by libtpu in a process of its own (tpu_compiler.py). The step time that a
report gives is a lower bound, from the compiler's FLOPs, our count of bytes (hlo.py) and the chip's numbers
(chips.json). On a slice the program is that of GSPMD: the batch is split among the chips, tables are on every chip, or
with `split_tables` each chip has a share of their rows. TPUStrategy's own distribution, and tables on SparseCores by
TPUEmbedding, are other programs: the compiler cannot be asked about those here (`sparse_core_bytes`).

Needs: hlo.py tpu_compiler.py optimizers.py errors.py embeddings.py scale.py chips.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recsys_common import hlo, tpu_compiler

CHIPS = json.loads((Path(__file__).parent / "chips.json").read_text())
CACHE = Path(os.environ.get("RECSYS_CACHE", Path.home() / ".cache" / "recsys_common")) / "tpu"
# What TensorFlow's PJRT plugin for TPUs reads at import (keras-io, distributed_embedding_tf, run on a v6e).
ENVIRONMENT = {
    "PJRT_DEVICE": "TPU",
    "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    "TF_XLA_FLAGS": "--tf_mlir_enable_mlir_bridge=true --tf_mlir_enable_convert_control_to_data_outputs_pass=true "
    "--tf_mlir_enable_merge_control_flow_pass=true",
}
REFUSED = ("string", "uint8", "resource", "variant", "float64", "complex128")  # by a TPU, as an argument of a step


@dataclass(frozen=True)
class Report:
    """What the compiler said of a step. Bytes, FLOPs and seconds are those of one chip."""

    topology: str
    compiles: bool
    error: str = ""  # the compiler's, or ours, with the line of Python where it is known, and the mend
    seconds_to_compile: float = 0.0
    chips: int = 1
    rows: int = 0  # of the batch, all chips together
    arguments: int = 0  # HBM bytes: tables, slots, dense layers and the batch, as stored
    temporaries: int = 0
    outputs: int = 0  # those that are no new values of variables
    code: int = 0
    available: int = 0  # HBM that a program may have
    flops: float = 0.0
    bytes: float = 0.0  # through HBM (hlo.py)
    compiler_bytes: float = 0.0  # XLA's own count, which takes gathers for reads of whole tables
    between_chips: float = 0.0  # bytes of collectives
    parameters: tuple = ()  # (name, "f32[1,000,000,16]", layout, bytes of the numbers, bytes as stored)
    moves: tuple = ()  # (bytes, operation, what, line of Python), the largest first
    warnings: tuple[str, ...] = ()
    peak: dict = field(default_factory=dict)  # of the chip: flops, bandwidth, interconnect, per second
    steps: tuple[float, ...] = ()  # seconds, where the program was run

    @property
    def hbm_bytes(self) -> int:
        """What the program needs."""
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step if nothing but this took any."""
        if not self.peak:
            return {}
        amounts = {"compute": (self.flops, "flops"), "memory": (self.bytes, "bandwidth")}
        if self.between_chips:
            amounts["interconnect"] = (self.between_chips, "interconnect")
        return {name: amount / self.peak[rate] for name, (amount, rate) in amounts.items()}

    @property
    def bound(self) -> str:
        """Which takes longest: compute, memory or interconnect; "" if it does not compile."""
        return max(self.times, key=self.times.get) if self.compiles and self.times else ""

    @property
    def step_seconds_at_least(self) -> float:
        """The lower bound of a step."""
        return max(self.times.values(), default=0.0)

    @property
    def rows_per_second_at_most(self) -> float:
        """Of all chips together."""
        return self.rows / self.step_seconds_at_least if self.step_seconds_at_least else 0.0

    def __str__(self):
        lines = [f"{self.topology}: {'compiles' if self.compiles else 'does NOT compile'}"]
        if self.compiles:
            gb = {name: getattr(self, name) / 1e9 for name in ("arguments", "temporaries", "outputs", "code")}
            lines[0] += f" ({self.seconds_to_compile:.1f} s)"
            parts = ", ".join(f"{name} {value:.2f}" for name, value in gb.items() if value >= 0.005)
            available = f" of {self.available / 1e9:.1f}" if self.available else ""
            lines.append(f"  HBM     {self.hbm_bytes / 1e9:.2f} GB{available} ({parts})")
            lines.append(f"  a step  {self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:,.3g} MB through memory")
            if self.between_chips:
                lines[-1] += f", {self.between_chips / 1e6:,.3g} MB between chips"
            if self.peak:
                lines.append(
                    f"  bound   {self.bound}: at least {self.step_seconds_at_least * 1e3:.3g} ms, "
                    f"at most {self.rows_per_second_at_most / 1e6:,.3g} M rows/s"
                )
            lines += [
                f"  {count / 1e6:9,.1f} MB  {what}{f'  <- {operation}' if operation else ''}{f', {line}' if line else ''}"
                for count, operation, what, line in self.moves[:4]
            ]
        else:
            lines.append("  " + self.error.replace("\n", "\n  "))
        return "\n".join([*lines, *(f"  note: {warning}" for warning in self.warnings)])


# The step, and variables that are shapes alone ---------------------------------------------------------


def nothing(shape: Sequence[int], dtype) -> object:
    """A tensor whose pages do not exist until they are written: a shape that TensorFlow takes for a value.

    The kernel is asked for addresses without memory behind them, which even overcommit's rules allow.
    """
    import tensorflow as tf

    dtype = tf.as_dtype(dtype).base_dtype
    length = int(np.prod(shape, dtype=np.int64)) * dtype.size
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    )
    raw = np.frombuffer(mmap.mmap(-1, max(length, 1), flags=flags), np.uint8)[:length]
    numbers = raw.view(np.dtype(f"u{dtype.size}")).reshape(shape)
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(numbers.__dlpack__()), dtype)


@contextlib.contextmanager
def shapes_only(at_least: int = 2**20) -> Iterator[None]:
    """Variables that are made in here have their shape and dtype, but no memory from `at_least` numbers on.

    Their values are zeros and mean nothing. Training on them would be real, and take the memory after all.
    """
    import tensorflow as tf

    def creator(make, initial_value=None, dtype=None, shape=None, **options):
        value = initial_value
        if callable(value):  # traced for its shape, not computed
            with tf.__internal__.FuncGraph("shape").as_default():
                value = tf.convert_to_tensor(value(), dtype)
        size = tf.TensorShape(getattr(value, "shape", ()))
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
    """The training step of a `tfrs.Model` as `training.train` takes it: batch -> loss, gradients applied.

    The optimizer's slots are made here, without memory where they are large.
    """
    import tensorflow as tf

    with shapes_only(), tf.__internal__.FuncGraph("slots").as_default():  # initial values are not computed
        parts = getattr(optimizer, "_optimizers_and_vars", [(optimizer, lambda: model.trainable_variables)])
        for part, variables in parts:
            part.build(variables() if callable(variables) else variables)

    def step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model.compute_loss(batch, training=True)) + sum(model.losses)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return step


# The compile check ------------------------------------------------------------------------------------


def aot_compile(
    step: Callable, arguments: Sequence, topology: str = "v5e:1x1", *,
    split_tables: bool = False, seconds: float = 0.0, progress: bool = True,
) -> Report:  # fmt: skip
    """Compile a training step for a TPU that is not there.

    Args:
      step: a function or `tf.function` that trains, with its variables made already; under `shapes_only`, if large.
      arguments: what it is called with: nests of `tf.TensorSpec`, or of tensors and arrays as examples of them. Their
        first dimension is the batch.
      topology: of libtpu, "v4:1x1x1", "v5e:1x1", "v5p:1x1x1" or "v6e:1x1" for one chip, "v5e:2x2" for four; or "cpu",
        "gpu" for this machine's, by the same compiler.
      split_tables: on a slice, each chip has a share of the rows of every variable of a million numbers or more.
      seconds: to run the step for, where `topology` is this machine.

    Returns:
      The report. What the step does wrong is in it: `compiles` is False and `error` says what, where, and the mend.

    Raises:
      RuntimeError: jax and libtpu are not there in the versions that tpu_compiler.py was tested with.
      ValueError: a topology that libtpu does not know.
    """
    if wrong := tpu_compiler.missing(topology):
        raise RuntimeError(wrong)
    chip = topology.partition(":")[0]
    if topology not in ("cpu", "gpu") and chip not in CHIPS:
        known = ", ".join(each["topology"] for each in CHIPS.values() if isinstance(each, dict))
        raise ValueError(f"topology {topology!r}: no such chip; one chip of each is {known}; four are v5e:2x2")
    try:
        lowered = _lowered(step, arguments)
    except _Refused as refused:
        return Report(topology, False, str(refused))
    rows = lowered["batch"][0].shape[0] if lowered["batch"] and lowered["batch"][0].shape.rank else 0
    shard = {str(number): True for number, spec in enumerate(lowered["batch"]) if spec.shape.rank}
    if split_tables:
        sizes = [np.prod(shape, dtype=float) for _, shape in lowered["variables"]]
        shard |= {str(number): True for number, size in enumerate(sizes, len(lowered["batch"])) if size >= 1e6}
    job = {"topology": topology, "shard": shard, "seconds": seconds}
    result = _compiled(job, lowered, progress)
    if "error" in result:
        return Report(topology, False, _explained(result["error"], lowered), warnings=lowered["warnings"])
    peak = CHIPS.get(chip, {})
    names = [*lowered["names"], *[name for name, _ in lowered["variables"]]]
    moves = sorted(result["moves"], key=lambda move: -move[0])
    return Report(
        topology,
        True,
        chips=result["devices"],
        rows=rows,
        available=peak.get("usable") or peak.get("hbm", 0),
        bytes=sum(move[0] for move in moves if not move[3]),
        between_chips=sum(move[0] for move in moves if move[3]),
        parameters=tuple((name, *found) for name, found in zip(names, result["parameters"], strict=False)),
        moves=tuple(
            (count, op, what, lowered["lines"].get(op.split("/")[-1], "")) for count, op, what, _ in moves[:12]
        ),
        warnings=lowered["warnings"],
        peak={name: peak[name] for name in ("flops", "bandwidth", "interconnect")} if peak else {},
        steps=tuple(result.get("steps", ())),
        **{
            name: result[name]
            for name in ("seconds_to_compile", "arguments", "temporaries", "outputs", "code", "flops")
        },
        compiler_bytes=result["compiler_bytes"],
    )


class _Refused(Exception):
    """What a TPU would refuse, seen before the compiler."""


def _lowered(step, arguments) -> dict:
    import tensorflow as tf

    from recsys_common import optimizers

    def spec(value):
        if isinstance(value, tf.TypeSpec):
            return value
        return (
            tf.TensorSpec.from_tensor(tf.convert_to_tensor(value))
            if not hasattr(value, "_type_spec")
            else value._type_spec
        )

    arguments = tf.nest.map_structure(spec, list(arguments))
    values = [value for value in tf.nest.flatten(arguments)]
    names = [".".join(map(str, path[1:])) or f"argument {path[0]}" for path in _paths(arguments)]
    faults = []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, tf.TensorSpec):
            faults.append(f"{name} is a {type(value).__name__.removesuffix('Spec')}: pad it to one length on the host")
        elif value.dtype.name in REFUSED:
            faults.append(
                f"{name} is {value.dtype.name}: leave it out, hash it or cast it to int32 or float32 on the host"
            )
        elif not value.shape.is_fully_defined():
            faults.append(
                f"{name} has the shape {value.shape}: a TPU program is compiled for one shape; "
                "batch(..., drop_remainder=True), and pad histories to one length"
            )
    if faults:
        raise _Refused("a TPU does not take these arguments:\n  " + "\n  ".join(faults))
    call = getattr(step, "python_function", step)
    function = tf.function(lambda *flat: call(*tf.nest.pack_sequence_as(arguments, flat)), jit_compile=True)
    warnings = []
    try:
        concrete = function.get_concrete_function(*values)
        optimizers.check_sparse(lambda given: call(*given), arguments)
    except Exception as error:
        if not str(error).startswith("a training step would cost"):
            raise
        warnings.append(str(error))
    lines = _lines(concrete.graph)
    for operation in _operations(concrete.graph):
        vague = [each.dtype != tf.resource and not each.shape.is_fully_defined() for each in operation.outputs]
        known = all(each.dtype == tf.resource or each.shape.is_fully_defined() for each in operation.inputs)
        # tf-keras sums duplicate ids by tf.unique, whose length XLA bounds by that of its argument.
        if any(vague) and known and operation.type not in ("Unique", "UniqueV2", "Placeholder", "VarHandleOp"):
            warnings.append(
                f"{operation.name} ({operation.type}) has a shape that is known only when it runs, "
                f"{operation.outputs[vague.index(True)].shape}: {lines.get(operation.name.split('/')[-1], 'in a library')}"
            )
    try:
        text, program = (
            function.experimental_get_compiler_ir(*values)(stage=each) for each in ("hlo", "hlo_serialized")
        )
    except Exception as error:
        raise _Refused(_explained(f"{type(error).__name__}: {error}", {"lines": lines})) from None
    variables = []
    for captured in concrete.captured_inputs:
        of = next((each for each in concrete.graph.variables if each.handle is captured), None)
        variables.append((of.name.partition(":")[0], of.shape) if of is not None else ("a constant", captured.shape))
    key = re.sub(r"__inference_\w+|a_inference_\w+(\.\d+)?", "step", text)
    return {"hlo": program, "key": key, "batch": values, "names": names, "variables": variables, "lines": lines,
            "warnings": tuple(warnings)}  # fmt: skip


def _paths(nest, path=()) -> Iterator[tuple]:
    if isinstance(nest, dict):
        for key in sorted(nest):
            yield from _paths(nest[key], (*path, key))
    elif isinstance(nest, list | tuple):
        for number, each in enumerate(nest):
            yield from _paths(each, (*path, number))
    else:
        yield path


def _operations(graph) -> Iterator:
    for function in graph._functions.values():
        yield from _operations(function.graph)
    yield from graph.get_operations()


def _lines(graph) -> dict[str, str]:
    """Operation -> "file.py, line 12: the code": the innermost line of the step that is no library's, if there is one."""
    import linecache

    found, library = {}, re.compile(r"site-packages|dist-packages|/lib/python")
    for operation in _operations(graph):
        frames = list(operation.traceback)
        begin = max((number for number, frame in enumerate(frames) if frame.filename == __file__), default=-1)
        frames = [frame for frame in frames[begin + 1 :] if "/tensorflow/python/" not in frame.filename]
        own = [frame for frame in frames if not library.search(frame.filename)] or frames
        if own:
            code = linecache.getline(own[-1].filename, own[-1].lineno).strip()
            place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
            found[operation.name.split("/")[-1]] = f"{place}: {code[:80]}" if code else place
    return found


def _compiled(job: dict, lowered: dict, progress: bool) -> dict:
    """Ask the compiler, or the cache of its answers."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (tpu_compiler, hlo))
    key = hashlib.sha256(json.dumps([job, lowered["key"], tpu_compiler.TESTED]).encode() + sources).hexdigest()[:24]
    cached = CACHE / f"{key}.json"
    if cached.exists() and not job["seconds"]:
        return json.loads(cached.read_text())
    if progress and sys.stderr.isatty():
        print(f"compiling for {job['topology']} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "step.hlo").write_bytes(lowered["hlo"])
        job |= {"hlo": str(folder / "step.hlo"), "text": str(folder / "optimized.txt")}
        (folder / "job.json").write_text(json.dumps(job))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "recsys_common.tpu_compiler", str(folder / "job.json"), str(folder / "result.json")],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if not (folder / "result.json").exists():
            raise RuntimeError(f"the compiler ended with {done.returncode}: {done.stderr[-2000:]}")
        text = (folder / "result.json").read_text()
    CACHE.mkdir(parents=True, exist_ok=True)
    beside = cached.with_suffix(f".{os.getpid()}")
    beside.write_text(text)
    beside.rename(cached)
    return json.loads(text)


def _explained(message: str, lowered: dict) -> str:
    """The compiler's message in short, the line of Python where an operation is named, and the mend."""
    from recsys_common import errors

    short = re.sub(r"\s*\*\*\* Begin stack trace \*\*\*.*?\*\*\* End stack trace \*\*\*", "", message, flags=re.S)
    short = "\n".join(line for line in short.splitlines() if line.strip() and "stack trace" not in line)[:1500]
    named = re.findall(r"\{\{node ([^}]*)\}\}", message) + re.findall(r'op_name="([^"]*)"', message)
    lines = dict.fromkeys(lowered["lines"].get(name.split("/")[-1], "") for name in named)
    parts = [short, *[f"made in {line}" for line in lines if line]]
    return "\n".join([*parts, *filter(None, [errors.explained(message)])])


# A strategy -------------------------------------------------------------------------------------------


def get_strategy(device: str = "cpu"):
    """The `tf.distribute` strategy of a device, which has computed something before it is returned.

    Args:
      device: "cpu"; "cpus:4", logical devices that share this CPU, to rehearse replicas; "gpu", all of them; "tpu", the
        chips of this machine (a TPU VM, a Colab TPU runtime); or the name of a TPU. For a TPU call this before anything
        imports TensorFlow, which reads its environment once.

    Raises:
      RuntimeError: the device is not there, not the one asked for, or cannot be used any more in this process.
    """
    if not re.fullmatch(r"cpu|gpu|cpus:\d+", device):
        return _tpu_strategy("local" if device == "tpu" else device)
    import tensorflow as tf

    if device == "gpu":
        found = tf.config.list_physical_devices("GPU")
        if not found:
            raise RuntimeError(
                "no GPU: TensorFlow sees none; `nvidia-smi`, then tensorflow[and-cuda], then its warnings"
            )
        strategy = tf.distribute.MirroredStrategy() if len(found) > 1 else tf.distribute.OneDeviceStrategy("/gpu:0")
    elif device == "cpu":
        strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    else:
        count = int(device.removeprefix("cpus:"))
        [cpu] = tf.config.list_physical_devices("CPU")
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        except RuntimeError:  # TensorFlow has begun; it may have as many already
            if len(tf.config.list_logical_devices("CPU")) < count:
                raise RuntimeError(
                    f"{device}: TensorFlow has started with {len(tf.config.list_logical_devices('CPU'))} logical CPU; "
                    "call get_strategy before anything computes (in a notebook: restart the kernel)"
                ) from None
        strategy = tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(count)])
    return _asserted(strategy, "GPU" if device == "gpu" else "CPU")


def _tpu_strategy(name: str):
    if name == "local" and not (list(Path("/dev").glob("accel*")) or list(Path("/dev/vfio").glob("[0-9]*"))):
        raise RuntimeError(
            "no TPU chip in this machine (no /dev/accel*, no /dev/vfio/*). On Colab: Runtime, Change runtime type, TPU. "
            "Elsewhere give the name of a TPU, or rehearse: python -m recsys_common.tpu config.yaml --topology v5e:1x1"
        )
    try:
        version = importlib.metadata.version("tensorflow-tpu")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "tensorflow-tpu is not installed: this TensorFlow has no TPU support. pip uninstall tensorflow; "
            "pip install tensorflow-tpu==2.20.0 tf-keras==2.20.0 (there is no 2.21)"
        ) from None
    absent = [key for key in ENVIRONMENT if key not in os.environ]
    if absent and "tensorflow" in sys.modules:
        raise RuntimeError(
            f"TensorFlow was imported without {', '.join(absent)} in the environment, which it reads once. Restart Python "
            "and call get_strategy first"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import libtpu

    os.environ.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", libtpu.get_library_path())
    import tensorflow as tf

    from recsys_common import errors

    with errors.decoding():
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        topology = tf.tpu.experimental.initialize_tpu_system(resolver)
        # Some versions place replicas on no core unless they are told.
        assignment = tf.tpu.experimental.DeviceAssignment.build(
            topology, num_replicas=resolver.num_accelerators().get("TPU", 1)
        )
        strategy = tf.distribute.TPUStrategy(resolver, experimental_device_assignment=assignment)
        try:
            return _asserted(strategy, "TPU")
        except RuntimeError as error:
            error.add_note(f"tensorflow-tpu {version}")
            raise


def _asserted(strategy, kind: str):
    """The strategy, once each of its devices has added two numbers and is of the kind that was asked for."""
    import tensorflow as tf

    devices = strategy.extended.worker_devices
    if not all(f":{kind}:" in device.upper() for device in devices):
        raise RuntimeError(f"asked for {kind}, and the strategy has {devices}; nothing was trained")
    seen = strategy.run(tf.function(lambda: tf.constant(1.0) + 1.0))
    for result in strategy.experimental_local_results(seen):
        if float(result) != 2 or f":{kind}:" not in result.device.upper():
            raise RuntimeError(f"asked for {kind}, and 1 + 1 = {float(result)} came from {result.device}")
    return strategy


# The repository's models ------------------------------------------------------------------------------


def rehearse(config, topologies: Sequence[str] = ("v5e:1x1",), **options) -> list[Report]:
    """The step of a config's model, with tables of their full size, compiled for each topology.

    Args:
      config: a `config.Config` whose tables have rows (`with_rows`).
      options: of `aot_compile`.
    """
    from recsys_common import training_step

    with shapes_only():
        model = config.build()
        step = step_of(model, training_step.optimizer(config, model, steps=1000))
    return [aot_compile(step, [config.signature(config.training.batch_size)], each, **options) for each in topologies]
