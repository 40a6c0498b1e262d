"""Will this training step run on a TPU, does it fit, what bounds it, and where do I get the strategy for one?

    strategy = get_strategy("tpu")                       # or "cpu", "cpus:4", "gpu", the name of a TPU

    with shapes_only():                                  # of lowering.py: tables of any size, and no memory for them
        model = MatrixFactorization(100_000_000, 1_000_000, dim=16)
        step = step_of(model, LazyAdam(1e-3))
    report = aot_compile(step, [batch], "v5e:1x1")       # by the real TPU compiler, here, without a TPU
    print(report)

    python -m recsys_common.tpu config.yaml --rows user=100000000 item=1000000 --topology v5e:1x1 v6e:2x2
    python -m recsys_common.tpu config.yaml --vary model.embedding_dim=16,64,128

The step is lowered by TensorFlow and compiled by libtpu in a process of its own (tpu_compiler.py). The step time that a
report gives is a lower bound, from the compiler's FLOPs, our count of bytes (hlo.py) and the chip's numbers
(chips.json). On a slice the program is that of GSPMD: the batch is split among the chips, tables are on every chip, or
with `split_tables` each chip has a share of their rows. TPUStrategy's own distribution, and tables on SparseCores by
TPUEmbedding, are other programs, about which no compiler can be asked here: `sparse_core` models the latter.

Needs: hlo.py tpu_compiler.py lowering.py optimizers.py errors.py embeddings.py scale.py chips.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recsys_common import hlo, scale, tpu_compiler
from recsys_common.devices import get_strategy as get_strategy  # it is asked for as tpu.get_strategy

CHIPS = json.loads((Path(__file__).parent / "chips.json").read_text())
LONG_LOOP = 1000  # trips
CACHE = Path(os.environ.get("RECSYS_CACHE", Path.home() / ".cache" / "recsys_common")) / "tpu"


@dataclass(frozen=True)
class Report:
    """What the compiler said of a step. Bytes, FLOPs and seconds are those of one chip."""

    topology: str
    compiles: bool
    error: str = ""  # the compiler's, or ours, with the line of Python where it is known, and the mend
    seconds_to_compile: float = 0.0
    compiler_memory: int = 0  # bytes that its process had at most
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
    def fits(self) -> bool:
        """It compiles, and the chip has the memory."""
        return self.compiles and (not self.available or self.hbm_bytes <= self.available)

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

    def row(self, case: str) -> dict:
        """For a result file or a table."""
        names = """topology compiles fits hbm_bytes available arguments temporaries flops bytes compiler_bytes
            between_chips seconds_to_compile compiler_memory bound step_seconds_at_least rows chips"""
        return {"case": case, **{name: getattr(self, name) for name in names.split()}}

    def __str__(self):
        lines = [f"{self.topology}: {'compiles' if self.compiles else 'does NOT compile'}"]
        if self.compiles:
            gb = {name: getattr(self, name) / 1e9 for name in ("arguments", "temporaries", "outputs", "code")}
            parts = ", ".join(f"{name} {value:.2f}" for name, value in gb.items() if value >= 0.005)
            available = f" of {self.available / 1e9:.1f}" if self.available else ""
            over = "" if self.fits else ", which does NOT fit"
            lines.append(f"  HBM     {self.hbm_bytes / 1e9:.2f} GB{available}{over}{f' ({parts})' if parts else ''}")
            lines.append(f"  a step  {self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:,.3g} MB through memory")
            if self.between_chips:
                lines[-1] += f", {self.between_chips / 1e6:,.3g} MB between chips"
            if self.peak:
                lines.append(
                    f"  bound   {self.bound}: at least {self.step_seconds_at_least * 1e3:.3g} ms, "
                    f"at most {self.rows_per_second_at_most / 1e6:,.3g} M rows/s"
                )
            for count, operation, what, line in self.moves[:4]:
                made = ", ".join(filter(None, [operation, line]))
                lines.append(f"  {count / 1e6:9,.1f} MB  {what}{f'  <- {made}' if made else ''}")
        else:
            lines.append("  " + self.error.replace("\n", "\n  "))
        return "\n".join([*lines, *(f"  note: {warning}" for warning in self.warnings)])


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
    if told := _cannot_lower():
        return Report(topology, False, told)
    if wrong := tpu_compiler.missing(topology):
        raise RuntimeError(wrong)
    chip = topology.partition(":")[0]
    if topology not in ("cpu", "gpu") and not isinstance(CHIPS.get(chip), dict):
        known = ", ".join(each["topology"] for each in CHIPS.values() if isinstance(each, dict))
        raise ValueError(f"topology {topology!r}: no such chip; one chip of each is {known}; four are v5e:2x2")
    from recsys_common import lowering

    try:
        lowered = lowering.lower(step, arguments)
    except lowering.Refused as refused:
        return Report(topology, False, str(refused))
    specs = [*lowered.batch.values()]
    shapes = [(name, spec.shape, spec.dtype) for name, spec in lowered.batch.items()] + lowered.variables
    shard = {str(number): True for number, spec in enumerate(specs) if spec.shape.rank}
    if split_tables:
        large = [shape.num_elements() >= 1e6 for _, shape, _ in lowered.variables]
        shard |= {str(number): True for number, yes in enumerate(large, len(specs)) if yes}
    chips = math.prod(int(size) for size in re.findall(r"\d+", topology.partition(":")[2]))
    sizes = [  # of one chip
        (hlo.compact(tuple(shape), dtype.name) / (chips if str(number) in shard else 1), name)
        for number, (name, shape, dtype) in enumerate(shapes)
    ]
    known = {
        "rows": specs[0].shape[0] if specs and specs[0].shape.rank else 0,
        "chips": chips,
        "arguments": round(sum(size for size, _ in sizes)),
        "available": CHIPS[chip]["usable"] if chip in CHIPS else 0,
        "warnings": lowered.warnings,
    }
    result = _compiled({"topology": topology, "shard": shard, "seconds": seconds}, lowered, progress)
    if result.get("error", "").startswith("LookupError"):
        raise ValueError(result["error"].removeprefix("LookupError: "))
    if "error" in result:
        error = lowering.explained(result["error"], lowered.lines)
        if "HbmOom" in error:
            error += f"\nArguments alone are {known['arguments'] / 1e9:.1f} GB of {known['available'] / 1e9:.1f}: "
            error += ", ".join(f"{name} {size / 1e9:.2f} GB" for size, name in sorted(sizes)[:-5:-1])
        return Report(topology, False, error, **known)
    program = hlo.Program(result.pop("text"))
    moves = sorted(program.moves(), key=lambda move: -move.bytes)
    known["warnings"] += tuple(_notes(program, lowered, known["rows"], result["chips"]))
    rates = ("flops", "bandwidth", "interconnect")
    return Report(
        topology,
        True,
        **known | result,
        bytes=sum(move.bytes for move in moves if not move.between_chips),
        between_chips=sum(move.bytes for move in moves if move.between_chips),
        parameters=tuple(
            (name, str(found), found.layout, found.plain, found.stored)
            for (name, *_), found in zip(shapes, program.parameters(), strict=True)
        ),
        moves=tuple((move.bytes, move.operation, move.what, lowered.line(move.operation)) for move in moves[:12]),
        peak={name: CHIPS[chip][name] for name in rates} if chip in CHIPS else {},
    )


def _cannot_lower() -> str:
    """What tensorflow-tpu lacks, if that is the TensorFlow here: its XLA has no CPU, for which a step is lowered."""
    import tensorflow as tf

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution("tensorflow-tpu")
        if Path(str(installed.locate_file("tensorflow/__init__.py"))).resolve() == Path(tf.__file__).resolve():
            return f"tensorflow-tpu {installed.version} cannot lower a step: compile with plain tensorflow, train here"
    return ""


def _notes(program: hlo.Program, lowered, rows: int, chips: int) -> Iterator[str]:
    """What the figures of a report leave out."""
    if rows % chips:
        yield f"{rows} rows do not divide by {chips} chips: on TPUs the batch has to"
    for loop in program.counted_once():
        yield f"of a loop the compiler counts the FLOPs of one trip, {lowered.line(loop)}"
    for trips, loop in program.loops():
        if trips >= LONG_LOOP:
            made = lowered.line(loop) or loop
            yield f"a loop of {trips:,} trips, one after the other, which no bound here counts: {made}"


def _compiled(job: dict, lowered, progress: bool) -> dict:
    """Ask the compiler, or the cache of its answers."""
    source = Path(tpu_compiler.__file__).read_bytes()
    key = hashlib.sha256(json.dumps([job, lowered.text, tpu_compiler.TESTED]).encode() + source).hexdigest()[:24]
    cached = CACHE / f"{key}.json.gz"
    if cached.exists() and not job["seconds"]:
        return json.loads(gzip.decompress(cached.read_bytes()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "step.hlo").write_bytes(lowered.hlo)
        job |= {"hlo": str(folder / "step.hlo"), "text": str(folder / "optimized.txt")}
        if job["seconds"]:
            np.savez(folder / "values.npz", **{f"p{number}": value for number, value in lowered.values.items()})
            job["values"] = str(folder / "values.npz")
        (folder / "job.json").write_text(json.dumps(job))
        # Buffers that a run leaves are kept for the next one: fresh pages are slower than any arithmetic on them.
        keep = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | (keep if job["seconds"] else {})
        _run([str(folder / "job.json"), str(folder / "result.json")], environment, progress and job["topology"])
        result = json.loads((folder / "result.json").read_text())
        if "error" not in result:
            result["text"] = (folder / "optimized.txt").read_text()
    if "error" in result or job["seconds"]:  # perhaps this machine's
        return result
    CACHE.mkdir(parents=True, exist_ok=True)
    beside = cached.with_suffix(f".{os.getpid()}")
    beside.write_bytes(gzip.compress(json.dumps(result).encode(), 1))
    beside.rename(cached)
    return result


def _run(files: list[str], environment: dict[str, str], topology: str | bool) -> None:
    """The compiler's process, with a bar that shows that it works on."""
    command = [sys.executable, "-m", "recsys_common.tpu_compiler", *files]
    shown = bool(topology) and scale.progress()
    with (
        tempfile.TemporaryFile("w+") as log,
        tqdm(bar_format="{desc} {elapsed}", desc=f"compiling for {topology}", disable=not shown, leave=False) as bar,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                break
            bar.refresh()
        log.seek(0)
        if process.returncode or not Path(files[1]).exists():
            raise RuntimeError(f"the compiler's process ended with {process.returncode}: {log.read()[-2000:]}")


# The repository's models, this machine, and what the compiler cannot be asked -----------------------------


def rehearse(config, topologies: Sequence[str] = ("v5e:1x1",), example: dict | None = None, **options) -> list[Report]:
    """The step of a config's model, with tables of their full size, compiled for each topology.

    Args:
      config: a `config.Config` whose tables have rows (`with_rows`).
      example: a batch to run the step on, where the topology is this machine.
      options: of `aot_compile`.
    """
    from recsys_common import lowering, training_step

    item = getattr(config.model, "item", None)
    frequency = np.ones(config.tables()[item].rows, np.float32) if item in config.tables() else None  # for log Q
    with lowering.shapes_only():
        model = training_step.made(config, functools.partial(config.build, frequency))
        step = lowering.step_of(model, training_step.optimizer(config, model, steps=1000))
    batch = example or config.features.batch_spec(config.training.batch_size)
    return [aot_compile(step, [batch], topology, **options) for topology in topologies]


def vary(config, topology: str, values: dict[str, Sequence], **options) -> dict[tuple, Report]:
    """What another batch, dtype or dimension would do: the reports of all combinations.

    Args:
      values: {"model.embedding_dim": [16, 128], "training.batch_size": [8192, 65536]}, as a config's overrides.
    """
    found = {}
    for combination in itertools.product(*values.values()):
        changed = config.override(*(f"{name}={value}" for name, value in zip(values, combination, strict=True)))
        found[combination] = rehearse(changed, [topology], **options)[0]
    return found


def this_machine(topology: str = "cpu") -> dict[str, float]:
    """{"flops", "bandwidth"} a second that XLA reaches here: of a float32 product, and of a sum of two long arrays.

    With them `predicted` gives a report's step time here, which says what the same counts are worth for a chip.
    """
    import tensorflow as tf

    square, long = tf.TensorSpec([2048, 2048]), tf.Variable(tf.zeros([1 << 25]))
    product = aot_compile(tf.matmul, [square, square], topology, seconds=2)

    def add(more):
        long.assign_add(more)

    total = aot_compile(add, [tf.TensorSpec(long.shape)], topology, seconds=2)
    return {"flops": product.flops / min(product.steps), "bandwidth": total.bytes / min(total.steps)}


def predicted(report: Report, machine: dict[str, float]) -> float:
    """Seconds of a step where nothing overlaps, as on a CPU: FLOPs and bytes one after the other."""
    return report.flops / machine["flops"] + report.bytes / machine["bandwidth"]


def sparse_core(
    tables: Sequence, slots: int, looked_up: dict[str, int], topology: str = "v5p:1x1x1", chips: int = 1
) -> dict[str, float]:
    """Memory and traffic of tables that TPUEmbedding keeps on SparseCores: a model, not a measurement.

    Rows are dealt out to the SparseCores of all chips, and their columns padded to 8 numbers (32 bytes, the granule of
    their memory accesses). A step reads each row that it looks up, hands it to the TensorCore, takes its gradient back,
    and reads and writes the row and its slots: (2 + 2 (1 + slots)) times the row, all lookups taken as different. Rows
    that another chip asked for cross the interconnect twice.

    Args:
      tables: `embeddings.Table`s.
      slots: numbers that the optimizer keeps for each number of a row: 1 for Adagrad, 2 for Adam.
      looked_up: of each table, by name, the ids of a step, all chips together.

    Returns:
      Of one chip: "hbm_bytes", "bytes" and "between_chips" of a step, "step_seconds_at_least".

    Raises:
      ValueError: the chip has no SparseCore that TensorFlow can use.
    """
    chip = CHIPS[topology.partition(":")[0]]
    if not chip["sparse_cores"]:
        raise ValueError(f"{chip['name']} has no SparseCore: TPUEmbedding needs v5p or v6e")
    stored = sent = moved = 0.0
    for table in tables:
        row = -(-table.dim // 8) * 8 * 4
        ids = looked_up[table.name]
        stored += table.rows * row * (1 + slots) / chips
        moved += ids * row * (2 + 2 * (1 + slots)) / chips
        sent += 2 * ids * row * (chips - 1) / chips / chips
    seconds = max(moved / chip["bandwidth"], sent / chip["interconnect"])
    return {"hbm_bytes": stored, "bytes": moved, "between_chips": sent, "step_seconds_at_least": seconds}


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 if all of it compiles and fits, else 1."""
    one_each = [chip["topology"] for chip in CHIPS.values() if isinstance(chip, dict)]
    parser = argparse.ArgumentParser(
        prog="python -m recsys_common.tpu", description="Compile the training step of a config for a TPU, without one."
    )
    parser.add_argument("config", nargs="?", help="YAML file of a config; the defaults of SCALE=full without one")
    parser.add_argument("--topology", nargs="+", default=one_each, help=f"default: {' '.join(one_each)}")
    parser.add_argument("--rows", nargs="+", default=[], metavar="FEATURE=ROWS", help="rows of tables, user=100000000")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="model.embedding_dim=128")
    parser.add_argument("--vary", nargs="+", default=[], metavar="FIELD=A,B", help="a report for each value")
    parser.add_argument("--split-tables", action="store_true", help="on a slice, each chip has a share of the rows")
    chosen = parser.parse_args(arguments)
    from recsys_common.config import Config

    values = {name: values.split(",") for name, _, values in (each.partition("=") for each in chosen.vary)}
    try:
        config = (Config.load(chosen.config) if chosen.config else Config.default("full")).override(*chosen.set)
        if chosen.rows:
            rows = dict(each.partition("=")[::2] for each in chosen.rows)
            config = config.with_rows({name: int(count) for name, count in rows.items()})
        config.tables()  # all of them have rows
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    fits = True
    for topology in chosen.topology:
        for combination, report in vary(config, topology, values, split_tables=chosen.split_tables).items():
            named = ", ".join(f"{name}={value}" for name, value in zip(values, combination, strict=True))
            print(f"{named}\n{report}\n" if named else f"{report}\n", flush=True)
            fits &= report.fits
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
