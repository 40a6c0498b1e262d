"""What does each route from a BigQuery table to tensors deliver? Writes benchmarks/data_export.json.

    python benchmarks/data_export.py          (make bench)

The table is simulated ratings: two int64 ids, a float32, an int64. The routes of `recsys_common/routes.py` are measured
side by side on 2 million rows, in rounds, so that a slow minute of the machine meets all of them; then 50 million rows
go through route 4, their checks are compared with the warehouse's own, and the conversion is killed ten times. Takes
about 12 minutes on 2 cores, and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorflow as tf
from _finish import finish, quoted
from tqdm import tqdm

from recsys_common import bigquery, conversion, input_pipeline, ratings_table, record_batches, routes, scale
from recsys_common.datasets import simulated

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
ROWS, LARGE, SHARDS, UNIT = 2_000_000, 50_000_000, 8, 1_000_000
BATCH_SIZE = 4096  # of the routes that must batch rows themselves
ROUNDS, KILLS = 9, 10
ROUTES = ("csv.gz", "csv", "tfrecord row", "packed", "parquet")
NAMES = {
    "csv.gz": "gzipped CSV",
    "csv": "CSV",
    "tfrecord row": "TFRecord, one Example a row",
    "packed": "batches packed by BigQuery in SQL",
    "parquet": "Parquet through a Python generator",
    "table stream": "the table itself, no files",
    "record batches ZLIB": "record batches, compressed",
    "record batches, shuffled": "record batches, shuffled, batches of 4,096",
    "record batches": "**record batches** (route 4)",
}


def rate(rows: int, work: Callable) -> float:
    """M rows/s."""
    start = time.perf_counter()
    work()
    return rows / (time.perf_counter() - start) / 1e6


def interleaved(what: dict[str, tuple[int, Callable]], rounds: int) -> dict[str, list[float]]:
    """Measure every case once a round, in another order each time: case -> M rows/s of each round.

    A case is (rows, work); a first round, which fills caches and traces graphs, is not counted.
    """
    found: dict[str, list[float]] = {case: [] for case in what}
    dice = random.Random(1)
    for number in tqdm(range(rounds + 1), desc=f"{', '.join(what)}"[:60], unit="round"):
        for case in dice.sample(list(what), len(what)):
            value = rate(*what[case])
            if number:
                found[case].append(value)
    return found


def folder_bytes(paths: list[str]) -> int:
    """Bytes of files."""
    return sum(os.path.getsize(path) for path in paths)


def parquet_batches(paths: list[str]) -> tf.data.Dataset:
    """Parquet without a conversion: pyarrow's batches through a Python generator."""
    source = conversion.ParquetFiles(paths)

    def batches():
        for number in range(len(paths)):
            for block in source.blocks(number, list(COLUMNS)):
                yield {name: block.column(name).cast(dtype).to_numpy() for name, dtype in COLUMNS.items()}

    spec = {name: tf.TensorSpec([None], dtype) for name, dtype in COLUMNS.items()}
    return tf.data.Dataset.from_generator(batches, output_signature=spec).prefetch(tf.data.AUTOTUNE)


def storage_read(warehouse: bigquery.Warehouse) -> None:
    """All streams of the table into Arrow, in parallel, and no further."""
    assert warehouse.read("export_rows", list(COLUMNS)).num_rows == ROWS


def raw_read(manifest: record_batches.Manifest, then: Callable | None = None) -> tf.data.Dataset:
    """What `record_batches.read` does, with something else in place of the decoding, or with nothing."""

    def records(path: tf.Tensor) -> tf.data.Dataset:
        dataset = tf.data.TFRecordDataset(path)
        return dataset.map(then) if then else dataset

    return tf.data.Dataset.from_tensor_slices(manifest.paths).interleave(
        records, cycle_length=record_batches.FILES_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE
    )


def parsed(manifest: record_batches.Manifest) -> Callable:
    """The first half of decoding: each feature copied out of its record, and not yet into a tensor of numbers."""
    spec = {feature: tf.io.FixedLenFeature([], tf.string) for c in manifest.columns for feature in c.features}
    return lambda record: tf.io.parse_single_example(record, spec)


def through(dataset: tf.data.Dataset, passes: int = 1) -> tuple[int, Callable]:
    """A case that reads a data set of all rows; several passes where one is too short to be timed."""

    def work() -> None:
        for _ in dataset.repeat(passes):
            pass

    return passes * ROWS, work


def routes_rows(warehouse: bigquery.Warehouse, folder: Path) -> list[dict]:
    """Routes side by side on `ROWS` rows: making the files, reading them, their size."""
    ratings_table.upload(warehouse, "ratings", simulated.stream(ROWS))
    warehouse.run("export_rows.sql", shards=SHARDS)
    source = conversion.TableShards(warehouse, "export_rows")
    made: dict[str, list[str]] = {}

    def export(route: str, work: Callable) -> tuple[int, Callable]:
        def keep() -> None:
            made[route] = work(warehouse, "export_rows", f"{warehouse.storage}/{route.replace(' ', '-')}")

        return ROWS, keep

    exports = {
        "export csv.gz": export("csv.gz", lambda *to: routes.export_csv(*to, COLUMNS, gzip=True)),
        "export csv": export("csv", lambda *to: routes.export_csv(*to, COLUMNS, gzip=False)),
        "export parquet": export("parquet", lambda *to: routes.export_parquet(*to, COLUMNS)),
        "export packed": export("packed", routes.export_packed),
        "export storage read": (ROWS, lambda: conversion.convert(folder / "stored", source, COLUMNS)),
    }
    by_row = export("tfrecord row", lambda *to: routes.export_rows(*to, COLUMNS))
    rows = [scale.spread(case, values, "M rows/s") for case, values in interleaved(exports, 3).items()]
    rows.append({"case": "export tfrecord row", "value": rate(*by_row), "unit": "M rows/s", "repeats": 1})

    files = conversion.ParquetFiles(made["parquet"])
    writes = {
        "write record batches": (ROWS, lambda: conversion.convert(folder / "rows", files, COLUMNS)),
        "write record batches ZLIB": (
            ROWS,
            lambda: conversion.convert(folder / "gzip", files, COLUMNS, compression="ZLIB"),
        ),
    }
    rows += [scale.spread(case, values, "M rows/s") for case, values in interleaved(writes, 5).items()]
    plain, gzip = (record_batches.Manifest.load(folder / name) for name in ("rows", "gzip"))
    assert [f.sha256 for f in plain.files] == [f.sha256 for f in record_batches.Manifest.load(folder / "stored").files]

    shuffled = input_pipeline.batches(plain, BATCH_SIZE, seed=1, remainder="pad")
    # What is divided by each other stands close together in time: few cases, one round after the other.
    found = interleaved(
        {
            "csv.gz": through(routes.read_csv(made["csv.gz"], COLUMNS, BATCH_SIZE)),
            "record batches": through(record_batches.read(plain), 40),
            "raw read": through(raw_read(plain), 40),
            "raw read, parsed": through(raw_read(plain, parsed(plain)), 40),
        },
        ROUNDS,
    )
    others = {
        "csv": through(routes.read_csv(made["csv"], COLUMNS, BATCH_SIZE)),
        "tfrecord row": through(routes.read_rows(made["tfrecord row"], COLUMNS, BATCH_SIZE)),
        "parquet": through(parquet_batches(made["parquet"])),
        "storage read": (ROWS, lambda: storage_read(warehouse)),
        "table stream": through(routes.table_stream(warehouse, "export_rows", COLUMNS, BATCH_SIZE)),
        "packed": through(routes.read_packed(made["packed"])),
        "record batches ZLIB": through(record_batches.read(gzip), 5),
        "record batches, shuffled": through(shuffled, 5),
    }
    rows += [scale.spread(case, values, "M rows/s") for case, values in (found | interleaved(others, 5)).items()]
    for other in ("csv.gz", "raw read", "raw read, parsed"):
        ratios = [fast / slow for fast, slow in zip(found["record batches"], found[other], strict=True)]
        rows.append(scale.spread(f"record batches / {other}", ratios, "ratio"))
    sizes = {route: folder_bytes(paths) for route, paths in made.items()}
    sizes |= {"storage read": plain.bytes, "record batches": plain.bytes, "record batches ZLIB": gzip.bytes}
    widths = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
    rows += [{"case": f"bytes/row {route}", "value": size / ROWS, "unit": "bytes"} for route, size in sizes.items()]
    return [*rows, {"case": "bytes/row columns", "value": widths, "unit": "bytes"}]


def conversion_process(parquet: str, to: Path) -> subprocess.Popen:
    """This file as a process of its own, which converts Parquet files and prints seconds and peak memory."""
    command = [sys.executable, __file__, "--convert", parquet, str(to)]
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "RECSYS_PROGRESS": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet)


def convert_here(parquet: str, to: str) -> None:
    """What that process does."""
    print("begins", flush=True)
    start = time.perf_counter()
    source = conversion.ParquetFiles(f"{parquet}/*.parquet")
    manifest = conversion.convert(to, source, COLUMNS)
    # Not ru_maxrss, in which Linux hands a child its parent's peak.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000
    print(json.dumps({"rows": manifest.rows, "seconds": time.perf_counter() - start, "peak": peak}))


def memory_rows(warehouse: bigquery.Warehouse, folder: Path, rows: int) -> tuple[list[dict], str]:
    """Parquet files of a million rows each into record batches, in a process of its own."""
    warehouse.run("export_rows.sql", shards=rows // UNIT)
    paths = routes.export_parquet(warehouse, "export_rows", f"{warehouse.storage}/memory", COLUMNS)
    parquet = os.path.dirname(paths[0])
    done = json.loads(conversion_process(parquet, folder / f"memory-{rows}").communicate()[0].removeprefix("begins"))
    assert done["rows"] == rows
    name = f"{rows // 1_000_000}M rows"
    measured = [
        {"case": f"write record batches, {name}", "value": rows / done["seconds"] / 1e6, "unit": "M rows/s"},
        {"case": f"write record batches, {name}: peak memory", "value": done["peak"], "unit": "MB"},
    ]
    return measured, parquet


def kill_rows(parquet: str, undisturbed: Path, folder: Path) -> list[dict]:
    """Kill the same conversion at ten random moments, let it finish, and compare with one that nobody disturbed."""
    dice, finished = random.Random(1), []
    for _ in tqdm(range(KILLS), desc="kills", unit="kill"):
        process = conversion_process(parquet, folder)
        assert process.stdout.readline() == "begins\n"  # it has imported TensorFlow
        time.sleep(2 * dice.random())
        process.kill()
        process.wait()
        finished.append(len(list(folder.glob("unit-*.json"))))
    assert not (folder / "manifest.json").exists(), "it was not killed in time"
    process = conversion_process(parquet, folder)
    assert process.wait() == 0
    end, whole = (record_batches.Manifest.load(place) for place in (folder, undisturbed))
    assert end.files == whole.files and end.columns == whole.columns
    assert sorted(os.listdir(folder)) == sorted([*(file.name for file in end.files), record_batches.MANIFEST])
    units = len(list(Path(parquet).glob("*.parquet")))
    print("units finished at each kill:", *finished, "of", units)
    assert 0 < finished[-1] < units and finished == sorted(finished), (
        "the kills came too early, too late, or undid work"
    )
    return [
        {"case": "kills, then equal to an undisturbed conversion", "value": KILLS, "unit": "kills"},
        {"case": "units finished at the last kill", "value": finished[-1], "unit": f"of {units} units"},
    ]


def large_rows(warehouse: bigquery.Warehouse, folder: Path) -> list[dict]:
    """50 million rows through route 4, compared with the warehouse's own checks."""
    warehouse.run("export_rows.sql", shards=LARGE // conversion.ROWS_PER_FILE + 1)
    start = time.perf_counter()
    source = conversion.TableShards(warehouse, "export_rows")
    manifest = conversion.convert(folder / "large", source, COLUMNS)
    seconds = time.perf_counter() - start
    total: dict[str, int] = {}
    for batch in tqdm(record_batches.read(manifest), desc="checking", unit="batch"):
        for name, value in ratings_table.column_checks(
            {name: column.numpy() for name, column in batch.items()}
        ).items():
            total[name] = total.get(name, 0) + value
    own = warehouse.run("column_checks.sql").to_pylist()[0]
    equal = [name for name in own if own[name] == total[name]]
    assert len(equal) == len(own) == len(total), (own, total)
    return [
        {"case": "storage read, 50M rows", "value": manifest.rows / seconds / 1e6, "unit": "M rows/s"},
        {"case": "storage read, 50M rows: rows", "value": manifest.rows, "unit": "rows"},
        {"case": "storage read, 50M rows: checks equal", "value": len(equal), "unit": f"of {len(own)} checks"},
    ]


def in_units(tables, rows: int):
    """The simulator's tables in pieces of about `rows` rows: fewer load jobs."""
    held = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= rows:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row["value"] for row in content["rows"]}
    lines = [
        "From a BigQuery table to tensors, chapter 2: two int64 ids, a float32, an int64 "
        f"([benchmarks/data_export.json](benchmarks/data_export.json), {content['machine']['cores']} cores, "
        "embedded BigQuery).",
        "",
        "| route | M rows/s, every epoch | bytes a row | M rows/s, made once |",
        "|---|---|---|---|",
    ]
    for route in (*ROUTES, "table stream", "record batches ZLIB", "record batches, shuffled", "record batches"):
        once = of.get("export storage read" if route == "record batches" else f"export {route}")
        size = of.get(f"bytes/row {route}")
        name = NAMES.get(route, route)
        lines.append(
            f"| {name} | {of[route]:.2f} | {'' if size is None else f'{size:.1f}'} | "
            f"{'' if once is None else f'{once:.2f}'} |"
        )
    lines += [
        "",
        f"Text, TFRecords by row and the table come in batches of {BATCH_SIZE:,} rows, the others as they are stored.",
    ]
    return quoted(text, "data_export", lines, 2, of["chapter 2"])


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the routes of chapter 2; writes benchmarks/data_export.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--convert", nargs=2, metavar=("PARQUET", "TO"), help="only convert a folder of Parquet files")
    arguments = parser.parse_args()
    if arguments.convert:
        convert_here(*arguments.convert)
        return
    started_from = scale.commit()
    os.environ["RECSYS_PROGRESS"] = "0"  # bars of its own
    with bigquery.connect() as warehouse, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = routes_rows(warehouse, folder)
        rows += memory_rows(warehouse, folder, ROWS)[0]
        stream = in_units(simulated.stream(LARGE), 5_000_000)
        ratings_table.upload(warehouse, "ratings", tqdm(stream, total=10, desc=f"{LARGE:,} rows into the warehouse"))
        measured, parquet = memory_rows(warehouse, folder, LARGE)
        rows += measured + kill_rows(parquet, folder / f"memory-{LARGE}", folder / "killed")
        shutil.rmtree(parquet)
        shutil.rmtree(folder / "killed")
        rows += large_rows(warehouse, folder)
    content = scale.result("data_export", rows, scale="benchmark", dataset="simulated")
    finish(2, content | {"commit": started_from}, readme)


if __name__ == "__main__":
    main()
