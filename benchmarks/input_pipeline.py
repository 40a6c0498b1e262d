"""What does the input pipeline deliver, in how much memory, and what does an interruption cost?

    python benchmarks/input_pipeline.py          (make bench)

Writes benchmarks/input_pipeline.json. Speed is measured on 8 million simulated ratings, in rounds, so that a slow
minute of the machine meets all cases; memory on 220 million rows of random numbers, 6.2 GB, each pass in a process of
its own; the order's quality, and what it does to a model, on 300,000 simulated ratings sorted by time. Takes about 25
minutes on 2 cores, and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import tensorflow as tf
from _finish import finish, quoted
from tqdm import tqdm

from recsys_common import (
    evaluation,
    features,
    input_pipeline,
    limited_memory,
    record_batches,
    routes,
    scale,
    shuffle_quality,
    training,
)
from recsys_common.datasets import simulated
from recsys_common.models.matrix_factorization import MatrixFactorization

ROOT = Path(__file__).resolve().parent.parent
ROWS, FILES, BATCH, ROUNDS = 8_000_000, 16, 8192, 7
LARGE, PER_FILE, LIMIT_MB = 220_000_000, 4_000_000, 1500
SORTED, EPOCHS, SEEDS = 300_000, 3, 3
DENSE = {"user_index": "int32", "item_index": "int32", "rating": "float32"}
RAW = {"user_id": "int64", "item_id": "int64", "rating": "float32"}
WIDE = RAW | {"timestamp": "int64"}
BUCKETS = 2**20


# Speed -------------------------------------------------------------------------------------------------


def ratings_files(folder: Path) -> None:
    """The same simulated ratings with dense ids, with raw ids of ten digits, and with dense ids as gzipped CSV."""
    tables = pa.concat_tables(tqdm(simulated.stream(ROWS), desc="simulating", unit="chunk"))
    order = np.random.default_rng(1).permutation(tables.num_rows)  # rows of a file are a random sample
    columns = {name: tables[name].to_numpy()[order] for name in ("user_id", "item_id", "rating")}
    dense = {"user_index": by_frequency(columns["user_id"]), "item_index": by_frequency(columns["item_id"])}
    raw = {name: 1_000_000_007 + 997 * columns[name] for name in ("user_id", "item_id")}

    def parts(ids: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        table = pa.table(ids | {"rating": columns["rating"]})
        size = -(-table.num_rows // FILES)
        return (table.slice(begin, size) for begin in range(0, table.num_rows, size))

    record_batches.write(folder / "dense", parts(dense), DENSE)
    record_batches.write(folder / "raw", parts(raw), RAW)
    for name, compression in (("csv", None), ("csv.gz", "gzip")):
        os.makedirs(folder / name)
        for number, part in enumerate(parts(dense)):
            with pa.output_stream(f"{folder}/{name}/{number:02d}.{name}", compression) as stream:
                pyarrow.csv.write_csv(part, stream, pyarrow.csv.WriteOptions(include_header=False))


def by_frequency(ids: np.ndarray) -> np.ndarray:
    """Rows of a table, the most frequent id first, as vocabularies.sql numbers them."""
    _, inverse, count = np.unique(ids, return_inverse=True, return_counts=True)
    rank = np.empty(len(count), np.int32)
    rank[np.argsort(-count, kind="stable")] = np.arange(1, len(count) + 1)
    return rank[inverse]


def consume(dataset: tf.data.Dataset, rows: int) -> float:
    """M rows/s into a step that adds up every column, many steps an execution as Keras does it."""

    @tf.function(reduce_retracing=True)
    def steps(iterator: tf.data.Iterator, count: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0.0)
        for _ in tf.range(count):
            for column in tf.nest.flatten(next(iterator)):
                total += tf.cast(tf.reduce_sum(column), tf.float32)
        return total

    iterator = iter(dataset.repeat())
    count = tf.constant(max(rows // BATCH, 2))
    steps(iterator, tf.constant(2))
    start = time.perf_counter()
    steps(iterator, count)
    return int(count) * BATCH / (time.perf_counter() - start) / 1e6


def csv_paths(folder: Path, name: str) -> list[str]:
    """The text files, in order."""
    return sorted(str(path) for path in (folder / name).iterdir())


def hashed(function: Callable) -> Callable:
    """Both ids to rows of tables, by a hash of `features.py`."""

    def of_batch(batch: dict, key: tf.Tensor) -> dict:
        ids = {name: function(batch[f"{name}_id"], BUCKETS, name) for name in ("user", "item")}
        return ids | {"rating": batch["rating"]}

    return of_batch


def row_shuffle(manifest: record_batches.Manifest) -> tf.data.Dataset:
    """What every tutorial shows."""
    return record_batches.read(manifest).unbatch().shuffle(65_536, seed=1).batch(BATCH, drop_remainder=True).prefetch(2)


def speed_rows(folder: Path) -> list[dict]:
    """The cases that the promise is about, and their ratios to the book's pipeline and the row shuffle."""
    dense, raw = (record_batches.Manifest.load(folder / name) for name in ("dense", "raw"))
    batches = input_pipeline.batches
    cases = {
        "book pipeline": (routes.read_csv(csv_paths(folder, "csv.gz"), DENSE, BATCH).prefetch(8), 2_000_000),
        "row shuffle": (row_shuffle(dense), 200_000),
        "record batches": (batches(dense, BATCH), 4 * ROWS),
        "shuffled record batches": (batches(dense, BATCH, seed=1), 4 * ROWS),
        "shuffled, raw ids": (batches(raw, BATCH, seed=1), 4 * ROWS),
        "shuffled, integer hash": (
            batches(raw, BATCH, seed=1, features=hashed(features.hash_bucket)),
            2 * ROWS,
        ),
        "shuffled, fingerprint hash": (
            batches(raw, BATCH, seed=1, features=hashed(features.fingerprint_bucket)),
            ROWS,
        ),
        "shuffled by gather": (by_gather(dense), 4 * ROWS),
    }
    found: dict[str, list[float]] = {case: [] for case in cases}
    dice = random.Random(1)
    for number in tqdm(range(ROUNDS + 1), desc="speed", unit="round"):
        for case in dice.sample(list(cases), len(cases)):
            value = consume(*cases[case])
            if number:  # the first round fills the page cache and traces graphs
                found[case].append(value)
    rows = [scale.spread(case, values, "M rows/s") for case, values in found.items()]
    shuffled = [case for case in cases if case.startswith("shuffled")]
    for case, base in [(case, "book pipeline") for case in shuffled] + [("shuffled record batches", "row shuffle")]:
        ratios = [fast / slow for fast, slow in zip(found[case], found[base], strict=True)]
        rows.append(scale.spread(f"{case} / {base}", ratios, "ratio"))
    one = [value for _ in range(3) for value in run("one_core", str(folder)).value]
    return [*rows, scale.spread("shuffled record batches, one core", one, "M rows/s"), *permute_rows(dense)]


def one_core(folder: str) -> list[float]:
    """The rung of the column shuffle, with one of the two cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    return rung("column shuffle", folder, 1.0)


def permute_rows(manifest: record_batches.Manifest) -> list[dict]:
    """One window in memory, in turns: each column written to its places, or read from them."""
    size = input_pipeline.WINDOW * manifest.rows_per_record
    window = next(iter(record_batches.read(manifest).rebatch(size)))
    order = tf.random.experimental.stateless_shuffle(tf.range(size), [1, 0])
    ways = {
        "dynamic_stitch": lambda column: tf.dynamic_stitch([order], [column]),
        "gather": lambda column: tf.gather(column, order),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(40):
        for way, move in ways.items():
            start = time.perf_counter()
            for column in window.values():
                move(column)
            if number:
                found[way].append((time.perf_counter() - start) / size * 1e9)
    return [scale.spread(f"permute three columns: {way}", values, "ns/row") for way, values in found.items()]


def by_gather(manifest: record_batches.Manifest) -> tf.data.Dataset:
    """The same windows, each column read in the new order instead of written to it."""
    window = input_pipeline.WINDOW * manifest.rows_per_record

    def permute(number: tf.Tensor, columns: dict) -> dict:
        rows = tf.shape(columns["rating"])[0]
        order = tf.random.experimental.stateless_shuffle(tf.range(rows), tf.stack([1, number]))
        return {name: tf.gather(column, order) for name, column in columns.items()}

    windows = record_batches.read(manifest).rebatch(window).enumerate()
    shuffled = windows.map(permute, num_parallel_calls=tf.data.AUTOTUNE)
    return shuffled.rebatch(BATCH, drop_remainder=True).prefetch(input_pipeline.BATCHES_AHEAD)


# The ladder --------------------------------------------------------------------------------------------
# One change a rung. Each rung is a function of the folder; its first line of the docstring is the change.


def parse(lines: tf.Tensor) -> dict[str, tf.Tensor]:
    """A line of text, or many, to columns."""
    defaults = [tf.constant([], dtype) for dtype in DENSE.values()]
    return dict(zip(DENSE, tf.io.decode_csv(lines, defaults), strict=True))


def lines_of(path: tf.Tensor, compression: str = "") -> tf.data.Dataset:
    """Lines of a file of text."""
    return tf.data.TextLineDataset(path, compression)


def in_memory(folder: Path) -> dict[str, np.ndarray]:
    """The whole table as NumPy arrays."""
    manifest = record_batches.Manifest.load(folder / "dense")
    held = [{name: column.numpy() for name, column in batch.items()} for batch in record_batches.read(manifest)]
    return {name: np.concatenate([batch[name] for batch in held]) for name in DENSE}


def slices(folder: Path) -> tf.data.Dataset:
    """from_tensor_slices(table).batch(8192)"""
    return tf.data.Dataset.from_tensor_slices(in_memory(folder)).batch(BATCH, drop_remainder=True)


def generator(folder: Path) -> tf.data.Dataset:
    """from_generator(rows).batch(8192)"""
    columns = list(in_memory(folder).values())

    def rows() -> Iterator[dict]:
        for row in zip(*columns, strict=True):
            yield dict(zip(DENSE, row, strict=True))

    spec = {name: tf.TensorSpec([], dtype) for name, dtype in DENSE.items()}
    return tf.data.Dataset.from_generator(rows, output_signature=spec).batch(BATCH, drop_remainder=True)


def csv_by_line(folder: Path) -> tf.data.Dataset:
    """TextLineDataset(files).map(parse).batch(8192)"""
    files = tf.data.Dataset.from_tensor_slices(csv_paths(folder, "csv"))
    return files.flat_map(lines_of).map(parse).batch(BATCH, drop_remainder=True)


def batch_then_parse(folder: Path) -> tf.data.Dataset:
    """.batch(8192).map(parse)"""
    files = tf.data.Dataset.from_tensor_slices(csv_paths(folder, "csv"))
    return files.flat_map(lines_of).batch(BATCH, drop_remainder=True).map(parse)


def gzip(folder: Path) -> tf.data.Dataset:
    """TextLineDataset(files, "GZIP")"""
    files = tf.data.Dataset.from_tensor_slices(csv_paths(folder, "csv.gz"))
    return files.flat_map(lambda path: lines_of(path, "GZIP")).batch(BATCH, drop_remainder=True).map(parse)


def interleave(folder: Path, calls: int | None = None) -> tf.data.Dataset:
    """.interleave(files, num_parallel_calls=AUTOTUNE)"""
    files = tf.data.Dataset.from_tensor_slices(csv_paths(folder, "csv.gz"))
    lines = files.interleave(lambda path: lines_of(path, "GZIP"), cycle_length=8, num_parallel_calls=tf.data.AUTOTUNE)
    return lines.batch(BATCH, drop_remainder=True).map(parse, num_parallel_calls=calls)


def prefetch(folder: Path) -> tf.data.Dataset:
    """.prefetch(AUTOTUNE)"""
    return interleave(folder).prefetch(tf.data.AUTOTUNE)


def parallel_map(folder: Path) -> tf.data.Dataset:
    """.map(parse, num_parallel_calls=AUTOTUNE)"""
    return interleave(folder, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def parse_in_interleave(folder: Path) -> tf.data.Dataset:
    """.interleave(lambda file: lines(file).batch(8192).map(parse))"""
    return routes.read_csv(csv_paths(folder, "csv.gz"), DENSE, BATCH).prefetch(tf.data.AUTOTUNE)


def columns(folder: Path, size: int = BATCH, **options) -> tf.data.Dataset:
    """batches(manifest, 8192)"""
    return input_pipeline.batches(record_batches.Manifest.load(folder / "dense"), size, **options)


def shuffle_by_row(folder: Path) -> tf.data.Dataset:
    """.unbatch().shuffle(65536).batch(8192)"""
    return row_shuffle(record_batches.Manifest.load(folder / "dense"))


def column_shuffle(folder: Path) -> tf.data.Dataset:
    """batches(manifest, 8192, seed=1)"""
    return columns(folder, seed=1)


def larger_batches(folder: Path) -> tf.data.Dataset:
    """batches(manifest, 65536, seed=1)"""
    return columns(folder, 8 * BATCH, seed=1)


def private_threads(folder: Path) -> tf.data.Dataset:
    """options.threading.private_threadpool_size = 2"""
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    return columns(folder, seed=1).with_options(options)


def read_by_python(folder: Path) -> tf.data.Dataset:
    """for batch in dataset, instead of many steps an execution"""
    return columns(folder, seed=1)


def device_feed(folder: Path) -> tf.data.Dataset:
    """.apply(prefetch_to_device(device))"""
    device = (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))[0].name
    return columns(folder, seed=1).apply(tf.data.experimental.prefetch_to_device(device))


LADDER = {
    "tutorial slices": slices,
    "row-by-row generator": generator,
    "CSV": csv_by_line,
    "batch, then parse": batch_then_parse,
    "gzip": gzip,
    "interleave": interleave,
    "prefetch": prefetch,
    "parallel map": parallel_map,
    "parse in the interleave": parse_in_interleave,
    "columns: record batches": columns,
    "shuffle by row": shuffle_by_row,
    "column shuffle": column_shuffle,
    "larger batches": larger_batches,
    "private thread pools": private_threads,
    "read by Python": read_by_python,
    "direct device feed": device_feed,
}


def rung(name: str, folder: str, seconds: float) -> list[float]:
    """M rows/s of a rung: three measurements of about so many seconds each, after one to get going."""
    dataset = LADDER[name](Path(folder))
    iterator = iter(dataset.repeat())
    size = next(iterator)["rating"].shape[0]
    found: list[float] = []

    @tf.function
    def step(count: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0.0)
        for _ in tf.range(count):
            for column in tf.nest.flatten(next(iterator)):
                total += tf.cast(tf.reduce_sum(column), tf.float32)
        return total

    if name in ("read by Python", "direct device feed"):  # what lives on a device is read by Python, batch by batch
        step = lambda count: [tf.nest.map_structure(tf.reduce_sum, next(iterator)) for _ in range(int(count))]  # noqa: E731
    step(tf.constant(1))  # traced, and the first rows are there
    count = 2
    while len(found) < 3:
        start = time.perf_counter()
        step(tf.constant(count))
        took = time.perf_counter() - start
        if took < seconds / 2 and not found:
            count = int(count * min(max(2, seconds / took), 30))
        else:
            found.append(count * size / took / 1e6)
    return found


def in_a_process(benchmark: str, function: str, *arguments):
    """A function of this file, for `limited_memory.run`, which carries over no more than a function's own source."""
    spec = importlib.util.spec_from_file_location("benchmark", benchmark)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)(*arguments)


def run(function: str, *arguments, megabytes: float | None = None, timeout: float = 900) -> limited_memory.Outcome:
    """A function of this file in a process of its own."""
    return limited_memory.run(in_a_process, __file__, function, *arguments, megabytes=megabytes, timeout=timeout)


def ladder_rows(folder: Path) -> list[dict]:
    """Each rung in processes of its own, round after round: speed, and the most memory that one took."""
    speed: dict[str, list[float]] = {name: [] for name in LADDER}
    memory: dict[str, list[float]] = {name: [] for name in LADDER}
    for name in tqdm(list(LADDER) * 3, desc="ladder", unit="rung"):
        outcome = run("rung", name, str(folder), 1.0)
        assert not outcome.failure, f"{name}: {outcome.failure}"
        speed[name].append(statistics.median(outcome.value))
        memory[name].append(outcome.peak)
    rows = []
    for name, function in LADDER.items():
        change = function.__doc__.splitlines()[0]
        rows.append(scale.spread(name, speed[name], "M rows/s") | {"change": change})
        rows.append({"case": f"{name}: peak memory", "value": statistics.median(memory[name]), "unit": "MB"})
    return rows


# Memory ------------------------------------------------------------------------------------------------


def large_files(folder: Path) -> record_batches.Manifest:
    """Rows of random numbers: what they are does not matter here, how many bytes they have does."""
    dice = np.random.default_rng(1)

    def tables() -> Iterator[pa.Table]:
        for begin in tqdm(range(0, LARGE, PER_FILE), desc="writing 6 GB", unit="file"):
            yield pa.table(
                {
                    "user_id": dice.integers(0, 100_000_000, PER_FILE),
                    "item_id": dice.integers(0, 10_000_000, PER_FILE),
                    "rating": dice.integers(1, 6, PER_FILE).astype(np.float32),
                    "timestamp": np.arange(begin, begin + PER_FILE),
                }
            )

    return record_batches.write(folder / "large", tables(), WIDE)


def passes(folder: str, limit: int, seed: int | None, epochs: int = 1) -> int:
    """Read the first rows of the large files; returns how many came, which must be all of the full batches."""
    manifest = record_batches.Manifest.load(Path(folder) / "large")
    dataset = input_pipeline.batches(manifest, BATCH, seed=seed, limit=limit, epochs=epochs)
    return dataset.reduce(np.int64(0), lambda count, batch: count + tf.size(batch["rating"], tf.int64)).numpy()


def whole_table(folder: str) -> int:
    """The whole table into memory, then slices of it."""
    manifest = record_batches.Manifest.load(Path(folder) / "large")
    held = [{name: column.numpy() for name, column in batch.items()} for batch in record_batches.read(manifest)]
    table = {name: np.concatenate([batch[name] for batch in held]) for name in WIDE}
    return sum(1 for _ in tf.data.Dataset.from_tensor_slices(table).batch(BATCH))


def cached(folder: str) -> int:
    """A pipeline with cache()."""
    manifest = record_batches.Manifest.load(Path(folder) / "large")
    return sum(1 for _ in input_pipeline.batches(manifest, BATCH).cache())


def buffered(folder: str) -> int:
    """A row shuffle whose buffer has the size of the data."""
    manifest = record_batches.Manifest.load(Path(folder) / "large")
    return sum(1 for _ in record_batches.read(manifest).unbatch().shuffle(manifest.rows).batch(BATCH))


def memory_rows(folder: Path) -> list[dict]:
    """Flat memory for 1, 10 and 100 million rows; four times the memory that is allowed; the naive ways."""
    rows = []
    for name, limit in tqdm({"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}.items(), desc="memory"):
        # 100 million rows are read in each: what an allocator holds back grows for a while, whatever the data.
        again = 100_000_000 // limit
        for case, seed, epochs in (
            (f"memory {name}", 1, again),
            (f"memory {name}, one pass", 1, 1),
            (f"memory {name}, not shuffled", None, again),
        ):
            outcomes = [run("passes", str(folder), limit, seed, epochs) for _ in range(3)]
            assert {outcome.value for outcome in outcomes} == {limit // BATCH * BATCH * epochs}, outcomes
            rows.append(scale.spread(case, [outcome.peak for outcome in outcomes], "MB"))
    data = record_batches.Manifest.load(folder / "large").bytes / 1e6
    rows.append({"case": "limited: data", "value": data, "unit": "MB"})
    limited = {
        "record batches": ("passes", str(folder), LARGE, None),
        "shuffled record batches": ("passes", str(folder), LARGE, 1),
        "whole table": ("whole_table", str(folder)),
        "cache()": ("cached", str(folder)),
        "row buffer of all rows": ("buffered", str(folder)),
    }
    for case, call in tqdm(limited.items(), desc="limited memory", unit="case"):
        base = limited_memory.run(nothing, megabytes=1).limit - 1  # private memory of TensorFlow alone
        outcome = run(*call, megabytes=LIMIT_MB - base)
        assert (outcome.failure == "") == ("record batches" in case), f"{case}: {outcome.failure!r}"
        step = max(1, len(outcome.memory) // 60)
        rows.append(
            {
                "case": f"limited: {case}",
                "value": outcome.peak,
                "unit": "MB",
                "failure": outcome.failure,
                "seconds": outcome.seconds,
                "limit": outcome.limit,
                "series": [[round(second, 2), round(used)] for second, used in outcome.memory[::step]],
            }
        )
    return rows


def nothing() -> None:
    """To see how much TensorFlow takes alone."""


# Resume ------------------------------------------------------------------------------------------------


def resume_rows(folder: Path) -> list[dict]:
    """From the call to the next batch in the middle of 100 million rows, beside tf.data's iterator checkpoints."""
    manifest = record_batches.Manifest.load(folder / "large")
    settings = {"batch_size": BATCH, "seed": 1, "epochs": 2, "limit": 100_000_000}
    steps = input_pipeline.steps_per_epoch(manifest, BATCH, limit=100_000_000)
    dice, seconds, states, saves = random.Random(1), [], [], []
    asked = [*sorted(dice.sample(range(steps), 5)), steps + 1]
    expected = {}
    for number, batch in enumerate(tqdm(input_pipeline.batches(manifest, **settings), desc="uninterrupted")):
        if number in asked:
            expected[number] = batch["timestamp"].numpy()
    for step in asked:
        start = time.perf_counter()
        states.append(json.dumps(input_pipeline.position(manifest, step=step, **settings)))
        saves.append(time.perf_counter() - start)
        start = time.perf_counter()
        dataset = input_pipeline.batches(manifest, **settings, start=json.loads(states[-1]))
        batch = next(iter(dataset))
        seconds.append(time.perf_counter() - start)
        assert np.array_equal(batch["timestamp"], expected[step]), step
    rows = [
        scale.spread("resume", seconds, "s"),
        scale.spread("resume: save", saves, "s"),
        {"case": "resume state", "value": max(map(len, states)), "unit": "bytes"},
        {"case": "resume: goes on exactly", "value": 1, "unit": f"at {len(asked)} of {2 * steps:,} steps"},
    ]
    for name, dataset in {
        "iterator checkpoint, row buffer of 100,000": record_batches.read(manifest)
        .unbatch()
        .shuffle(100_000)
        .batch(BATCH),
        "iterator checkpoint, shuffled record batches": input_pipeline.batches(manifest, **settings),
    }.items():
        rows += checkpoint_rows(name, dataset, folder / "checkpoints" / name.replace(" ", "-"))
    return rows


def checkpoint_rows(name: str, dataset: tf.data.Dataset, folder: Path) -> list[dict]:
    """Save tf.data's iterator after 20 batches, and restore it."""
    iterator = iter(dataset)
    for _ in range(20):
        next(iterator)
    start = time.perf_counter()
    path = tf.train.Checkpoint(iterator=iterator).write(str(folder / "iterator"))
    save = time.perf_counter() - start
    after = next(iterator)["timestamp"].numpy()
    start = time.perf_counter()
    again = iter(dataset)
    tf.train.Checkpoint(iterator=again).read(path).assert_consumed()
    same = np.array_equal(next(again)["timestamp"], after)
    restore = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    return [
        {"case": f"{name}: save", "value": save, "unit": "s"},
        {"case": f"{name}: restore", "value": restore, "unit": "s"},
        {"case": f"{name}: size", "value": size, "unit": "bytes"},
        {"case": f"{name}: goes on exactly", "value": int(same), "unit": ""},
    ]


# The order ---------------------------------------------------------------------------------------------


def orders(table: pa.Table, folder: Path, seed: int) -> dict[str, list[np.ndarray]]:
    """Positions in the table in the order of each epoch, from the pipelines themselves."""
    rows = table.num_rows
    numbered = table.append_column("position", pa.array(np.arange(rows)))
    size = rows // 64
    by_time = [numbered.slice(begin, size) for begin in range(0, rows, size)]
    low = [signed_fingerprint(kind, table[f"{kind}_id"].to_numpy()) & 0x7FFFFFFF for kind in ("user", "item")]
    shards = {
        "windowed, sharded files": (low[0] * low[1] >> 24) % 64,  # as export_rows.sql does
        "windowed, shards by a sum": (low[0] + low[1]) % 64,
    }
    files = {"windowed": by_time}
    for name, shard in shards.items():
        files[name] = [numbered.filter(pa.array(shard == number)) for number in range(64)]
    found = {"none": [np.arange(rows)] * EPOCHS}
    buffer = tf.data.Dataset.range(rows).shuffle(10_000, seed=seed, reshuffle_each_iteration=True).batch(rows)
    found["row buffer of 10,000"] = [next(iter(buffer)).numpy() for _ in range(EPOCHS)]
    for name, tables in files.items():
        manifest = record_batches.write(folder / name, tables, {"position": "int64"}, rows_per_record=size // 8)
        dataset = input_pipeline.batches(manifest, 1024, epochs=EPOCHS, seed=seed, remainder="pad")
        whole = np.concatenate([batch["position"][batch["weight"] > 0].numpy() for batch in dataset])
        found[name] = np.split(whole, EPOCHS)
    return found


def signed_fingerprint(kind: str, ids: np.ndarray) -> np.ndarray:
    """The lower 62 bits of FARM_FINGERPRINT(CONCAT('user', CAST(user_id AS STRING)))."""
    return features.fingerprint_bucket(ids, 2**62, kind).numpy()


def order_rows(folder: Path) -> list[dict]:
    """How well each order mixes a table sorted by time, and what a model makes of it."""
    table = simulated.load(SORTED).ratings.sort_by("timestamp")
    users, items = (by_frequency(table[name].to_numpy()) for name in ("user_id", "item_id"))
    past = int(0.9 * len(users))  # what the model may see; then it is asked for the rest
    known = np.isin(users, users[:past]) & np.isin(items, items[:past]) & (np.arange(len(users)) >= past)
    frequency = np.bincount(items[:past], minlength=items.max() + 1)
    rating, rows = table["rating"].to_numpy(), []
    measured: dict[str, list[float]] = {}
    every = [orders(table.slice(0, past), folder, seed) for seed in range(SEEDS)]
    for name, epochs in every[0].items():
        where = epochs[0]
        for case, value in shuffle_quality.measure(where, users[where], rating[where], 1024).items():
            rows.append({"case": f"order {name}: {case}", "value": value, "unit": ""})
        rows.append(
            {"case": f"order {name}: places", "value": 0, "unit": "", "series": where[:: past // 1500].tolist()}
        )
    for seed, name in tqdm([(seed, name) for seed in range(SEEDS) for name in every[0]], desc="models"):
        model = MatrixFactorization(users.max() + 1, len(frequency), 32, frequency, seed=seed)
        model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
        steps = past // 1024
        cut = np.concatenate([where[: steps * 1024] for where in every[seed][name]]).reshape(-1, 1024)
        dataset = tf.data.Dataset.from_tensor_slices({"user_index": users[cut], "item_index": items[cut]})
        training.fit(model, dataset, EPOCHS, steps, 1024)
        seen = users[:past], items[:past]
        scores = evaluation.evaluate(model.scores, users[known], items[known], *seen, len(frequency))
        measured.setdefault(name, []).append(scores["NDCG@10"])
    return rows + [scale.spread(f"order {name}: NDCG@10", values, "") for name, values in measured.items()]


# The result file ---------------------------------------------------------------------------------------


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row["value"] for row in content["rows"]}
    lines = [
        "Shuffled batches of 8,192 rows into a step, chapter 3 "
        f"([benchmarks/input_pipeline.json](benchmarks/input_pipeline.json), {content['machine']['cores']} cores).",
        "",
        "| input | M rows/s | hours for 50 billion rows |",
        "|---|---|---|",
    ]
    names = {
        "row shuffle": "`unbatch().shuffle().batch()`",
        "book pipeline": "gzipped CSV, not shuffled",
        "shuffled, fingerprint hash": "record batches, ids hashed as strings",
        "shuffled, integer hash": "record batches, ids hashed as integers",
        "shuffled record batches": "**record batches, ids dense from SQL**",
    }
    lines += [f"| {name} | {of[case]:.2f} | {50e3 / of[case] / 3600:,.1f} |" for case, name in names.items()]
    lines += [
        "",
        f"Reading 100 million rows takes {of['memory 100M']:,.0f} MB in one epoch, {of['memory 1M']:,.0f} MB as 100 "
        f"epochs of a million. An interrupted run goes on with the next row after {of['resume']:.1f} s. The files lay "
        "in the page cache.",
    ]
    return quoted(text, "input_pipeline", lines, 3, of["chapter 3"])


PARTS = ("speed", "ladder", "memory", "resume", "order")


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the input pipeline; writes benchmarks/input_pipeline.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="measure these parts, and keep the others as they are")
    arguments = parser.parse_args()
    started_from = scale.commit()
    os.environ["RECSYS_PROGRESS"] = "0"  # bars of its own
    wanted, rows = arguments.only or PARTS, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"speed", "ladder"} & set(wanted):
            ratings_files(folder)
        if {"memory", "resume"} & set(wanted):
            large_files(folder)
        for part in wanted:
            rows += [row | {"part": part} for row in globals()[f"{part}_rows"](folder)]
            print(part, "done", flush=True)
    path = ROOT / "benchmarks" / "input_pipeline.json"
    kept = json.loads(path.read_text())["rows"] if arguments.only else []
    rows = [row for row in kept if row.get("part") not in wanted] + rows
    content = scale.result("input_pipeline", rows, scale="benchmark", dataset="simulated")
    finish(3, content | {"commit": started_from}, readme)


if __name__ == "__main__":
    main()
