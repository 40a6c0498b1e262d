"""What does the TPU compiler say of each model of this repository, at full size and on each generation of chip?

    python benchmarks/tpu_rehearsal.py          (make bench)

No TPU is needed: libtpu compiles for chips that are not there (recsys_common/tpu.py). The same steps, with smaller
tables, run on this CPU through XLA, to see how far FLOPs and bytes predict seconds; with --gpu on a GPU too, where JAX
has one. Writes benchmarks/tpu_rehearsal.json; takes about 12 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _finish import finish, quoted
from tqdm import tqdm

from recsys_common import scale, tpu, tpu_compiler
from recsys_common.config import Config

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("models", "variants", "slices", "here", "tensorflow")
USERS, ITEMS = 100_000_000, 1_000_000
ONE_CHIP = [chip["topology"] for chip in tpu.CHIPS.values() if isinstance(chip, dict)]
HISTORY = ["features.history.kind=history", "features.history.column=history", "features.history.length=50"]
MODELS = {
    "matrix factorization": [],
    "two-tower": ["model.architecture=two_tower", *HISTORY, "features.history.table=item"],
}
DIMS = (16, 64, 128)
FIXED = ["training.batch_size=8192"]


def config(model: str, *overrides: str, users: int = USERS, items: int = ITEMS) -> Config:
    """The config of a model, its tables at full size unless said otherwise."""
    return Config.default("full").override(*MODELS[model], *FIXED, *overrides).with_rows({"user": users, "item": items})


def row(case: str, model: str, report: tpu.Report, **more) -> dict:
    """A line of the result file."""
    largest = [[count, operation, what] for count, operation, what, _ in report.moves[:3]]
    error = {} if report.compiles else {"error": report.error.splitlines()[0][:300]}
    return {**report.row(case), "model": model, "moves": largest, **error, **more}


def models_rows() -> list[dict]:
    """Each model and dimension on one chip of each generation."""
    grid = [(model, dim, topology) for model in MODELS for dim in DIMS for topology in ONE_CHIP]
    rows = []
    for model, dim, topology in tqdm(grid, desc="models", unit="program"):
        [report] = tpu.rehearse(config(model, f"model.embedding_dim={dim}"), [topology])
        rows.append(row(f"{model}, dimension {dim}, {topology}", model, report, dim=dim))
    return rows


def variants_rows() -> list[dict]:
    """Matrix factorization on a v6e, 16 numbers a row, and on a v5p, 128: what another batch or optimizer changes."""
    adagrad = ["optimizer.name=row_wise_adagrad", "optimizer.second_moment=element"]
    changes = {
        "batch 2,048": ["training.batch_size=2048"],
        "batch 32,768": ["training.batch_size=32768"],
        "bfloat16 tables": ["model.embedding_dtype=bfloat16"],
        "both moments of each number": ["optimizer.second_moment=element"],
        "row-wise Adagrad": adagrad,
        "mixed precision": ["training.mixed_precision=true"],
    }
    grid = [(name, 16, "v6e:1x1", overrides) for name, overrides in changes.items()]
    grid += [("row-wise Adagrad", dim, "v5p:1x1x1", adagrad) for dim in DIMS]
    rows = []
    for name, dim, topology, overrides in tqdm(grid, desc="variants", unit="program"):
        changed = config("matrix factorization", f"model.embedding_dim={dim}", *overrides)
        [report] = tpu.rehearse(changed, [topology])
        case = f"variant {name}, dimension {dim}, {topology}"
        rows.append(row(case, "matrix factorization", report, dim=dim))
    return rows


def slices_rows() -> list[dict]:
    """The tables that no single chip has room for, on slices: the batch split, tables whole or split by rows."""
    matrix, tower = MODELS
    adagrad = ["optimizer.name=row_wise_adagrad", "optimizer.second_moment=element"]
    grid = [(matrix, [], 64, "v5e:2x2", False), (matrix, [], 64, "v5e:2x2", True), (matrix, [], 64, "v6e:2x2", True)]
    grid += [
        (model, [], dim, topology, True)
        for model in (matrix, tower)
        for dim in (64, 128)
        for topology in ("v5e:4x4", "v5p:2x2x1", "v6e:4x4")
    ]
    grid.append((matrix, adagrad, 128, "v5e:4x4", True))
    rows = []
    for model, optimizer, dim, topology, split in tqdm(grid, desc="slices", unit="program"):
        changed = config(model, f"model.embedding_dim={dim}", *optimizer)
        [report] = tpu.rehearse(changed, [topology], split_tables=split)
        case = f"{model}, {'row-wise Adagrad, ' if optimizer else ''}dimension {dim}, {topology}, "
        case += f"tables {'split' if split else 'whole'}"
        rows.append(row(case, model, report, dim=dim, split_tables=split))
    return rows


def here_rows(topology: str = "cpu") -> list[dict]:
    """Steps that run here: measured seconds beside those that FLOPs and bytes predict, in rounds."""
    rng, found = np.random.default_rng(1), {}
    cases = [(model, dim, batch) for model in MODELS for dim, batch in ((16, 2048), (64, 2048), (128, 1024))]
    for _ in tqdm(range(3), desc=topology, unit="round"):
        machine = tpu.this_machine(topology)
        for name, value in machine.items():
            found.setdefault((f"{topology}: {name}", "a second"), []).append(value)
        for model, dim, batch in cases:
            changed = config(
                model, f"model.embedding_dim={dim}", f"training.batch_size={batch}", users=10**6, items=10**5
            )
            [report] = tpu.rehearse(changed, [topology], seconds=3, example=example(changed, rng))
            measured, predicted = statistics.median(report.steps), tpu.predicted(report, machine)
            case = f"{topology}: {model}, dimension {dim}, batch {batch:,}"
            found.setdefault((f"{case}: step", "s"), []).append(measured)
            found.setdefault((f"{case}: predicted", "s"), []).append(predicted)
            found.setdefault((f"{case}: measured / predicted", "ratio"), []).append(measured / predicted)
    return [scale.spread(case, values, unit) for (case, unit), values in found.items()]


def example(of: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch of random rows of tables, histories full."""
    spec = of.features.batch_spec(of.training.batch_size)
    ids = {name: rng.integers(0, 10**5, each.shape).astype(np.int32) for name, each in spec.items()}
    return ids | {name: np.full(each.shape, 50, np.int32) for name, each in spec.items() if name.endswith("_length")}


def tensorflow_rows() -> list[dict]:
    """The step as `training.train` runs it on a CPU, by TensorFlow and not by XLA, in rounds."""
    import tensorflow as tf

    from recsys_common import training_step

    rng, steps, found = np.random.default_rng(1), {}, {}
    for model in MODELS:
        for dim in (16, 128):
            changed = config(model, f"model.embedding_dim={dim}", users=10**6, items=10**5)
            made = training_step.made(changed, changed.build)
            trained = functools.partial(training_step.trained, made, training_step.optimizer(changed, made, steps=1000))
            batches = [{name: tf.constant(ids) for name, ids in example(changed, rng).items()} for _ in range(8)]
            case = f"cpu by TensorFlow: {model}, dimension {dim}, batch {changed.training.batch_size:,}: step"
            steps[case] = tf.function(trained), batches
    for _ in tqdm(range(3), desc="tensorflow", unit="round"):
        for case, (step, batches) in steps.items():
            seconds = []
            for batch in [*batches[:2], *batches]:  # two to warm up
                start = time.perf_counter()
                step(batch).numpy()
                seconds.append(time.perf_counter() - start)
            found.setdefault(case, []).append(statistics.median(seconds[2:]))
    return [scale.spread(case, values, "s") for case, values in found.items()]


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row for row in content["rows"]}
    lines = [
        "The training step of 100 million users and a million items, batch 8,192, through the TPU's own compiler "
        "([benchmarks/tpu_rehearsal.json](benchmarks/tpu_rehearsal.json)): GB of HBM that it needs, and the least "
        "milliseconds that a step can take. No TPU was there.",
        "",
        f"| model, numbers in a row | {' | '.join(tpu.CHIPS[name.partition(':')[0]]['name'] for name in ONE_CHIP)} |",
        "|---|" + "---|" * len(ONE_CHIP),
    ]
    for model in MODELS:
        for dim in DIMS:
            cells = []
            for topology in ONE_CHIP:
                found = of[f"{model}, dimension {dim}, {topology}"]
                fits = found["compiles"] and found["fits"]
                cells.append(
                    f"{found['hbm_bytes'] / 1e9:.1f} GB, {found['step_seconds_at_least'] * 1e3:.1f} ms"
                    if fits
                    else "does not fit"
                )
            lines.append(f"| {model}, {dim} | {' | '.join(cells)} |")
    ms = {}
    for dim in DIMS:
        ms[dim] = of[f"variant row-wise Adagrad, dimension {dim}, v5p:1x1x1"]["step_seconds_at_least"] * 1e3
    lines += [
        "",
        "These have LazyAdam with one second moment a row. With row-wise Adagrad on a v5p, rows of 128 numbers, which "
        f"fill the lanes of its memory, take {ms[128]:.2f} ms, and rows of 64, which do not, {ms[64]:.0f} ms.",
    ]
    return quoted(text, "tpu_rehearsal", lines, 5, of.get("chapter 5", {}).get("value"))


def main() -> None:
    """Compile and measure everything, and write the result file."""
    parser = argparse.ArgumentParser(description="Compile for TPUs that are not there; writes tpu_rehearsal.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts, and keep the others as they are")
    parser.add_argument("--gpu", action="store_true", help="run the steps on a GPU too; JAX must have one")
    arguments = parser.parse_args()
    started_from, path = scale.commit(), ROOT / "benchmarks" / "tpu_rehearsal.json"
    rows = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        tpu.CACHE = Path(folder)  # what was compiled before would take no seconds
        for part in arguments.only or PARTS:
            start = time.perf_counter()
            found = [line | {"part": part} for line in globals()[f"{part}_rows"]()]
            if part == "here" and arguments.gpu:
                found += [line | {"part": part} for line in here_rows("gpu")]
            print(f"{part} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            rows = [line for line in rows if line.get("part") != part] + found
            memory = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
            rows = [line for line in rows if line["case"] != f"{part}: peak memory of TensorFlow's process"]
            case = f"{part}: peak memory of TensorFlow's process"
            rows.append({"case": case, "value": int(memory) / 1e6, "unit": "GB", "part": part})
            content = scale.result("tpu_rehearsal", rows, scale="benchmark", dataset="shapes alone")
            compiler = {name: importlib.metadata.version(name) for name in tpu_compiler.TESTED}
            content |= {"commit": started_from, "compiler": compiler}
            scale.write_json(path, content)
    finish(5, content, readme)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
