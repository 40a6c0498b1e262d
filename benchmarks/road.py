"""What does the road reach, and how long does it take? Writes benchmarks/road.json.

    python benchmarks/road.py --data-dir path/to/data          (make bench DATA_DIR=path/to/data)

Runs chapter 1 on the simulated ratings, MovieLens latest-small and MovieLens 1M (the folders must be in the data
folder), compares the simulator with MovieLens 100K, times what must start fast, and runs `make book` in a fresh clone
of the committed state. Takes about 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _finish import quoted

from recsys_common import bigquery, datasets, ratings_table, scale

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
QUANTILES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
ROADS = (  # dataset, scale, EXTRA
    ("simulated", "small", ""),
    ("ml-latest-small", "medium", ""),
    ("ml-latest-small", "medium", "split=leave-one-out"),
    ("ml-1m", "medium", ""),
)


def chapter_rows(data_dir: str) -> list[dict]:
    """Chapter 1 end to end on each data set: quality, seconds, memory."""
    rows = []
    for dataset, size, extra in ROADS:
        name = f"{dataset}{' ' + extra if extra else ''}"
        print(f"chapter 1 on {name}", flush=True)
        book = [sys.executable, str(ROOT / "tools/book.py"), "run", "1", "--force", "--scale", size]
        book += ["--dataset", dataset, "--data-dir", data_dir, "--extra", extra]
        subprocess.run(book, check=True, stdout=subprocess.DEVNULL)
        folder = ROOT / "runs" / size / "chapter-1"
        run = json.loads((folder / "run.json").read_text())
        rows.append({"case": f"{name}: chapter 1", "value": run["seconds"], "unit": "s"})
        rows.append({"case": f"{name}: peak memory", "value": run["peak_memory_mb"], "unit": "MB"})
        for row in json.loads((folder / "metrics.json").read_text())["rows"]:
            if "@10" in row["case"] or row["case"].endswith(("rows", "users", "MRR", "tensors", "fit")):
                rows.append(row | {"case": f"{name}: {row['case']}"})
    return rows


def resemblance_rows(data_dir: str) -> list[dict]:
    """The simulator beside MovieLens 100K: popularity, activity, and what matrix factorization gains."""
    import tensorflow as tf

    from recsys_common import evaluation, input_pipeline, record_batches, training
    from recsys_common.models.matrix_factorization import MatrixFactorization

    rows = []
    for name in ("ml-100k", "simulated"):
        print(f"resemblance: {name}", flush=True)
        tables = datasets.load(name, data_dir)
        users, items = (np.unique(tables.ratings[c].to_numpy(), return_counts=True)[1] for c in ("user_id", "item_id"))
        ordered = np.sort(items)
        gini = 2 * (np.arange(1, len(items) + 1) * ordered).sum() / (len(items) * items.sum()) - 1 - 1 / len(items)
        rows.append({"case": f"{name}: popularity Gini", "value": gini, "unit": ""})
        for q, value in zip(QUANTILES, np.quantile(users, QUANTILES), strict=True):
            rows.append({"case": f"{name}: ratings a user, {q:.0%}", "value": value, "unit": "ratings"})

        gains = []
        with bigquery.connect() as warehouse, tempfile.TemporaryDirectory() as folder:
            ratings_table.load(warehouse, tables)
            warehouse.run("leave_last_out.sql", holdout=5)  # the last five asked for, the five before kept out
            warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=1)
            warehouse.run("examples.sql", shards=4)
            columns = {"user_index": "int32", "item_index": "int32"}
            train = record_batches.write(folder, warehouse.shards("examples", {"split": "train"}), columns)
            vocabulary = warehouse.read("item_vocabulary").sort_by("item_index").to_pandas()
            frequency = np.concatenate([[0], vocabulary["frequency"][vocabulary["item_index"] > 0]])
            every = warehouse.read("examples").to_pandas()
            test, seen = (
                every[mask][["user_index", "item_index"]].to_numpy().T
                for mask in (every["split"] == "test", every["split"] != "test")
            )
            popular = evaluation.evaluate(lambda u, f=frequency: np.tile(f, (len(u), 1)), *test, *seen, len(frequency))
            popularity = popular["NDCG@10"]
            steps = input_pipeline.steps_per_epoch(train, 1024)
            for seed in range(REPEATS):
                model = MatrixFactorization(len(users) + 1, len(frequency), 32, frequency, seed=seed)
                model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
                batches = input_pipeline.batches(train, 1024, epochs=5, seed=seed)
                training.fit(model, batches, 5, steps, 1024)
                gains.append(evaluation.evaluate(model.scores, *test, *seen, len(frequency))["NDCG@10"] / popularity)
        rows.append({"case": f"{name}: popularity NDCG@10, last 5", "value": popularity, "unit": ""})
        rows.append(scale.spread(f"{name}: gain of matrix factorization over popularity", gains, "ratio of NDCG@10"))
    return rows


def start_rows() -> list[dict]:
    """Seconds to import and to start, interleaved."""
    print("what must start fast", flush=True)
    timed = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    programs = {
        "import tensorflow": timed.format("import tensorflow"),
        "import recsys_common after tensorflow": "import tensorflow; " + timed.format("import recsys_common"),
        "warehouse start": timed.format("from recsys_common import bigquery; bigquery.connect()"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, "make doctor")}
    for _ in range(REPEATS):
        for name, program in programs.items():
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            seconds[name].append(float(done.stdout))
        start = time.perf_counter()
        subprocess.run(["make", "-s", "doctor"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        seconds["make doctor"].append(time.perf_counter() - start)
    return [scale.spread(name, values, "s") for name, values in seconds.items()]


def clone_rows() -> list[dict]:
    """`make book` as a newcomer runs it, and the second call."""
    print("make book in a fresh clone", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{folder}/clone"], check=True)
        seconds = []
        # Without what `make bench` hands down: its DATA_DIR is not the newcomer's.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        for _ in range(2):
            start = time.perf_counter()
            book = ["make", "-s", "book"]
            subprocess.run(book, cwd=f"{folder}/clone", env=clean, stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - start)
    return [
        {"case": "make book, fresh clone", "value": seconds[0], "unit": "s"},
        {"case": "make book, second call", "value": seconds[1], "unit": "s"},
    ]


def values(content: dict) -> dict[str, float]:
    """case -> value of a result file."""
    return {row["case"]: row["value"] for row in content["rows"]}


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = values(content)
    models = ("popularity", "matrix factorization", "best reachable")
    lines = [
        "What chapter 1 reaches: NDCG@10, every item ranked, seen items left out "
        f"([benchmarks/road.json](benchmarks/road.json), {content['machine']['cores']} cores).",
        "",
        "| ratings | asked for | popularity | matrix factorization | best reachable | seconds in all | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for dataset, _, extra in ROADS:
        name = f"{dataset}{' ' + extra if extra else ''}"
        scores = [of.get(f"{name}: {model} NDCG@10") for model in models]
        asked = "the last item" if "one" in extra or dataset == "ml-1m" else "what came after the cut in time"
        lines.append(
            f"| {dataset} | {asked}, {of[f'{name}: matrix factorization users']:,.0f} people | "
            + " | ".join("not known" if score is None else f"{score:.3f}" for score in scores)
            + f" | {of[f'{name}: chapter 1']:.0f} | {of[f'{name}: peak memory'] / 1000:.1f} GB |"
        )
    return quoted(text, "road", lines, 1, of["simulated: chapter 1"])


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the road; writes benchmarks/road.json.")
    parser.add_argument("--data-dir", required=True, help="folder of ml-latest-small, ml-1m and ml-100k")
    data_dir = str(Path(parser.parse_args().data_dir).resolve())
    started_from = scale.commit()
    rows = start_rows() + chapter_rows(data_dir) + resemblance_rows(data_dir) + clone_rows()
    content = scale.result("road", rows, scale="small and medium", dataset="simulated, ml-latest-small, ml-1m, ml-100k")
    print(scale.write_json(ROOT / "benchmarks" / "road.json", content | {"commit": started_from}))
    page = ROOT / "README.md"
    page.write_text(readme(content, page.read_text()))


if __name__ == "__main__":
    main()
