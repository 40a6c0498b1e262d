"""What does a training step cost as the table grows, what does a table of 100 million rows take, and what is lost?

    python benchmarks/embeddings.py          (make bench)

Writes benchmarks/embeddings.json. Steps are of matrix factorization: a user table of so many rows and an item table of
10,000, dimension 16, binary cross-entropy, batches of 8,192, user ids by a Zipf law of exponent 1.1 folded into the
table, the same ids for every library. Each case has a process of its own (embedding_programs/) with two
threads; they stand ready side by side and take turns, so that a slow minute of the machine meets all. PyTorch is not
among this project's requirements: it is installed into build/torch, 1 GB, from the extra `compare` of pyproject.toml.
The large tables take 17 GB of memory and the checkpoint 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorflow as tf
from _finish import finish, quoted
from tqdm import tqdm

from recsys_common import checkpoints, evaluation, optimizers, record_batches, scale
from recsys_common.datasets import simulated
from recsys_common.embeddings import Embeddings, Table

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "benchmarks" / "embedding_programs"
BATCH, BATCHES, ITEMS, DIM = 8192, 1024, 10_000, 16
SIZES = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
ROUNDS, SECONDS = 7, 0.5
PROGRAM = {  # case -> the program that runs it
    "lazy adam": "with_tf_keras",
    "lazy adam, row second moment": "with_tf_keras",
    "row-wise adagrad": "with_tf_keras",
    "tf-keras adagrad": "with_tf_keras",
    "tf-keras adam": "with_tf_keras",
    "keras 3 adam": "with_keras_3",
    "torch sparse adam": "with_torch",
    "torch adam": "with_torch",
}
# Full Adam of 100 million rows fits into 24 GB of memory at dimension 8 only.
LARGE = [
    ("lazy adam, row second moment", DIM),
    ("row-wise adagrad", DIM),
    ("lazy adam", 8),
    ("torch sparse adam", 8),
]


# Steps -------------------------------------------------------------------------------------------------


def write_ids(folder: Path, sizes: list[int], uniform: list[int]) -> dict[int, float]:
    """Batches of ids for tables of these sizes; returns how many distinct users a batch has, by size."""
    dice, distinct = np.random.default_rng(1), {}
    shape = BATCHES, BATCH
    for rows in sizes:
        ids = ((dice.zipf(1.1, shape) - 1) % rows).astype(np.int32)
        distinct[rows] = statistics.mean(len(np.unique(batch)) for batch in ids[:32])
        np.save(folder / f"zipf {rows}.npy", ids)
    for rows in uniform:
        np.save(folder / f"uniform {rows}.npy", dice.integers(0, rows, shape, np.int32))
    np.save(folder / "items.npy", ((dice.zipf(1.1, shape) - 1) % ITEMS).astype(np.int32))
    np.save(folder / "labels.npy", dice.integers(0, 2, shape).astype(np.float32))
    return distinct


def torch_python() -> Path:
    """The Python that has PyTorch; makes the environment if there is none."""
    folder = ROOT / "build" / "torch"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        print(f"installing {extras['compare']} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", *extras["compare"]], check=True)
        (folder / "installed").touch()
    return python


class Child:
    """A program of embedding_programs/, ready for commands. `made` is its first answer, when the model is there."""

    def __init__(self, folder: Path, case: str, rows: int, dim: int = DIM):
        program = PROGRAM[case]
        python = torch_python() if program == "with_torch" else sys.executable
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if program == "with_keras_3":
            environment |= {"TF_USE_LEGACY_KERAS": "0", "KERAS_BACKEND": "tensorflow"}
        command = [python, PROGRAMS / f"{program}.py", folder, rows, case, dim]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, bufsize=1, env=environment,
        )  # fmt: skip
        self.name = f"{case} {rows:,} x {dim}"
        self.made = self._answer()

    def ask(self, do: str, **values) -> dict:
        """Send a command and wait for its answer."""
        self.process.stdin.write(json.dumps({"do": do} | values) + "\n")
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code, _ = self.process.wait(), self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {code}: {self.errors.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(children: dict[str, Child], ids: str, seconds: float) -> dict[str, list[float]]:
    """ms a step of each child in every round, in an order that changes; the first round does not count."""
    found: dict[str, list[float]] = {case: [] for case in children}
    dice, first = random.Random(1), 0
    for number in tqdm(range(ROUNDS + 1), desc=f"{ids} ids", unit="round"):
        for case in dice.sample(list(children), len(children)):
            ms = children[case].ask("steps", ids=ids, first=first, seconds=seconds)["ms"]
            if number:
                found[case].append(ms)
        first += BATCHES // (ROUNDS + 1)
    return found


def speed_rows(folder: Path) -> list[dict]:
    """Each optimizer at each size that leaves room for all of them side by side."""
    sizes = [size for size in SIZES if size != "100M"][: 1 if QUICK else None]
    distinct, rows = write_ids(folder, [SIZES[size] for size in sizes], []), []
    for size in sizes:
        with ExitStack() as stack:
            children = {}
            for case in tqdm(PROGRAM, desc=f"starting {size}", unit="process"):
                children[case] = stack.enter_context(Child(folder, case, SIZES[size]))
            found = take_turns(children, "zipf", SECONDS)
        about = {"distinct": round(distinct[SIZES[size]])}
        rows += [scale.spread(f"{case} {size}", values, "ms/step") | about for case, values in found.items()]
        for case in PROGRAM:
            if case != "lazy adam":
                rows.append(ratio(f"{case} / lazy adam, {size}", found[case], found["lazy adam"]))
    return rows


def large_rows(folder: Path) -> list[dict]:
    """100 million rows beside 100,000 of the same variant: time and memory to make, every row touched, speed."""
    small, large = ("10k", "100k") if QUICK else ("100k", "100M")
    write_ids(folder, [SIZES[small], SIZES[large]], [SIZES[small], SIZES[large]])
    rows = []
    for case, dim in LARGE:
        name = case if dim == DIM else f"{case}, dimension {dim}"
        print(f"{name}, {large} rows: making them takes up to a minute, touching them two", file=sys.stderr)
        with Child(folder, case, SIZES[large], dim) as big, Child(folder, case, SIZES[small], dim) as little:
            made, touched = big.made, big.ask("touch")
            little.ask("touch")
            rows += [
                {"case": f"create {large}, {name}", "value": made["seconds"], "unit": "s"},
                {"case": f"create {large}, {name}: peak", "value": made["peak"] / made["resident"], "unit": "of final"},
                {
                    "case": f"memory {large}, {name}",
                    "value": touched["resident"],
                    "unit": "GB",
                    "peak": touched["peak"],
                },
                {"case": f"touch {large}, {name}", "value": touched["seconds"], "unit": "s"},
            ]
            if (case, dim) == LARGE[0]:  # the one that the checkpoints are of, too
                rows.append({"case": f"create {large}", "value": made["seconds"], "unit": "s"})
                rows.append({"case": f"memory {large}", "value": touched["resident"], "unit": "GB"})
            for ids in ("zipf", "uniform"):
                found = take_turns({small: little, large: big}, ids, SECONDS)
                end = "" if ids == "zipf" else ", uniform ids"
                rows += [scale.spread(f"{name} {size}{end}", values, "ms/step") for size, values in found.items()]
                rows.append(ratio(f"{name} {large} / {small}{end}", found[large], found[small]))
    # Those of 100,000 rows at dimension 16 stand among the others of their size already.
    return [row for row in rows if row["case"] not in {f"{case} {small}" for case in PROGRAM}]


# Checkpoints -------------------------------------------------------------------------------------------


def checkpoint_rows(folder: Path) -> list[dict]:
    """100 million rows, every one touched, to the disk and back; and as many plain bytes, in turns."""
    size, where = "100k" if QUICK else "100M", ROOT / "build" / "checkpoint"
    case, rows = "lazy adam, row second moment", []
    found: dict[str, list[float]] = {}
    shutil.rmtree(where, ignore_errors=True)
    with Child(folder, case, SIZES[size]) as child:
        resident = child.ask("touch")["resident"]
        for _ in tqdm(range(2 if QUICK else 3), desc="checkpoint", unit="round"):
            saved = child.ask("save", folder=str(where))
            files = list(where.glob("*/*"))
            total = sum(file.stat().st_size for file in files)
            for file in files:
                forget(file)
            restored = child.ask("restore", folder=str(where))
            shutil.rmtree(where)
            write, read = plain(where, total)
            for name, value in {
                f"checkpoint {size}: save": saved["seconds"],
                f"checkpoint {size}: restore": restored["seconds"],
                f"checkpoint {size}: plain write": write,
                f"checkpoint {size}: plain read": read,
                f"checkpoint {size}: save, share of the disk's speed": write / saved["seconds"],
                f"checkpoint {size}: restore, share of the disk's speed": read / restored["seconds"],
                f"checkpoint {size}: save, peak": saved["peak"] / resident,
                f"checkpoint {size}: restore, peak": restored["peak"] / resident,
            }.items():
                found.setdefault(name, []).append(value)
    for name, values in found.items():
        unit = "of the disk's" if "share" in name else "of final" if "peak" in name else "s"
        rows.append(scale.spread(name, values, unit))
    both = [save + restore for save, restore in zip(*list(found.values())[:2], strict=True)]
    rows.append(scale.spread(f"checkpoint {size}", both, "s"))
    return [*rows, {"case": f"checkpoint {size}: size", "value": total / 1e9, "unit": "GB"}]


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that reading it again asks the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(path: Path, count: int) -> tuple[float, float]:
    """Seconds to write so many bytes, through the page cache or past it, which is faster; and to read them."""
    block, seconds = mmap.mmap(-1, 1 << 23), []
    block.write(np.random.default_rng(1).bytes(len(block)))
    for direct in (0, os.O_DIRECT):
        start = time.perf_counter()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct)
        with ThreadPoolExecutor(2 if direct else 1) as pool:
            list(pool.map(lambda begin, file=file: os.pwrite(file, block, begin), range(0, count, len(block))))
        os.fsync(file)
        os.close(file)
        seconds.append(time.perf_counter() - start)
    write = min(seconds)
    forget(path)
    buffer, start = bytearray(len(block)), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return write, read


# Quality -----------------------------------------------------------------------------------------------

# So many rows would have a catalogue of a million items; 8 of the 80,000 chunks of users are drawn.
WORLD, CHUNKS, HELD_OUT, K = 34_602_076_125, 8, 10, 10
GROUP, EPOCHS, TEST_USERS, RATES, SEEDS = 256, 4, 2000, (0.003, 0.01, 0.03), 5
T_95 = 2.776  # Student's t, two-sided 95%, of 5 seeds


class LongTail:
    """Users' items in order of time: the last 10 are the test, the 10 before those the validation."""

    def __init__(self, chunks: int = CHUNKS):
        rows = WORLD // 10_000 if QUICK else WORLD  # 10,000 items instead of a million
        tables = tqdm(simulated.stream(rows, 1, range(chunks)), desc="simulating", unit="chunk", total=chunks)
        columns = [[table[name].to_numpy() for name in ("user_id", "item_id")] for table in tables]
        self.users, self.items = (np.concatenate(column).astype(np.int32) for column in zip(*columns, strict=True))
        self.num_users, self.num_items = int(self.users.max()) + 1, simulated._sizes(rows)[1] + 1
        end = np.searchsorted(self.users, self.users, side="right")
        from_end = end - 1 - np.arange(len(self.users))
        self.part = np.minimum(from_end // HELD_OUT, 2)  # 0 test, 1 validation, 2 training
        chosen = np.random.default_rng(1).choice(np.arange(1, self.num_users), TEST_USERS, replace=False)
        self.asked = np.sort(chosen).astype(np.int32)
        self.frequency = np.bincount(self.items[self.part == 2], minlength=self.num_items)

    def of(self, users: np.ndarray, *parts: int) -> tuple[np.ndarray, np.ndarray]:
        """(place in `users`, item) of these users' rows in these parts; `users` ascends."""
        bounds = np.searchsorted(self.users, [users, users + 1]).T
        rows = np.concatenate([np.arange(begin, end) for begin, end in bounds])
        rows = rows[np.isin(self.part[rows], parts)]
        return np.searchsorted(users, self.users[rows]), self.items[rows]

    def ndcg(self, users: tf.Tensor, items: tf.Tensor) -> tuple[float, float]:
        """NDCG@10 of the validation and of the test, every item ranked, earlier ones left out.

        As `evaluation.evaluate`, but only the best items are sorted: there are a million scores a user.

        Args:
          users, items: float32 [num_users, d], [num_items, d]; their dot product is the score.
        """
        gain, totals = 1 / np.log2(np.arange(2, K + 2)), np.zeros(2)
        for begin in range(0, len(self.asked), 100):
            some = self.asked[begin : begin + 100]
            seen = np.stack(self.of(some, 2), 1)  # and item 0, which is none
            seen = np.concatenate([seen, np.stack([np.arange(len(some)), np.zeros(len(some), int)], 1)])
            for user, listed in zip(some, best_items(tf.gather(users, some), items, seen).numpy(), strict=True):
                (_, before), (_, after) = self.of(np.array([user]), 1), self.of(np.array([user]), 0)
                later = listed[~np.isin(listed, before)]
                totals += [gain @ np.isin(listed[:K], before), gain @ np.isin(later[:K], after)]
        return tuple((totals / len(self.asked) / gain[:HELD_OUT].sum()).tolist())


@tf.function(reduce_retracing=True)
def best_items(users: tf.Tensor, items: tf.Tensor, seen: tf.Tensor) -> tf.Tensor:
    """int [U, 20], the items not seen that score best: enough for a list of 10 once 10 more are taken out.

    They lie in the 20 blocks of 1,000 items whose best items are best, which is quicker to find out than `top_k` is.
    """
    count, wanted = tf.shape(users)[0], K + HELD_OUT
    score = tf.matmul(users, items, transpose_b=True)
    score = tf.tensor_scatter_nd_update(score, seen, tf.fill([tf.shape(seen)[0]], -np.inf))
    score = tf.pad(score, [[0, 0], [0, -tf.shape(items)[0] % 1000]], constant_values=-np.inf)
    blocks = tf.reshape(score, [count, -1, 1000])
    chosen = tf.math.top_k(tf.reduce_max(blocks, 2), tf.minimum(wanted, tf.shape(blocks)[1])).indices
    places = tf.math.top_k(tf.reshape(tf.gather(blocks, chosen, batch_dims=1), [count, -1]), wanted).indices
    return tf.gather(chosen, places // 1000, batch_dims=1) * 1000 + places % 1000


def train(data: LongTail, optimizer, seed: int) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """Matrix factorization with an item bias by softmax; after the last two epochs, what `LongTail.ndcg` takes.

    The negatives of a row are the other items of its group of 256 in the batch, corrected by log Q: as
    `models/matrix_factorization.py`, where the group is the batch, which would cost 67 million scores a step.
    """
    layer = Embeddings(
        {
            "user": Table("user", data.num_users, DIM),
            "item": Table("item", data.num_items, DIM),
            "bias": Table("bias", data.num_items, 1, initial=0.0),
        },
        seed,
    )
    optimizer.build(layer.trainable_variables)
    log_q = tf.constant(np.log(np.maximum(data.frequency, 1) / data.frequency.sum()).astype(np.float32))
    groups = BATCH // GROUP

    @tf.function
    def step(users, items):
        with tf.GradientTape() as tape:
            rows = layer({"user": users, "item": items, "bias": items})
            bias = rows["bias"][:, 0] - tf.gather(log_q, items)
            p, q = (tf.reshape(rows[name], [groups, GROUP, DIM]) for name in ("user", "item"))
            score = tf.matmul(p, q, transpose_b=True) + tf.reshape(bias, [groups, 1, GROUP])
            item = tf.reshape(items, [groups, GROUP])
            same = (item[:, :, None] == item[:, None, :]) & ~tf.eye(GROUP, dtype=tf.bool)
            score = tf.where(same, -1e9, score)  # the same item is no negative
            loss = tf.reduce_sum(tf.reduce_logsumexp(score, -1) - tf.linalg.diag_part(score))
        variables = layer.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    rows, dice = np.flatnonzero(data.part == 2), np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        order = dice.permutation(rows)[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)
        for batch in order[: 20 if QUICK else None]:
            loss = float(step(data.users[batch], data.items[batch]))
        assert np.isfinite(loss), f"{optimizer.name}: the loss is {loss}"
        if epoch >= EPOCHS - 2:
            tables = {name: table.read_value() for name, table in layer.tables.items()}
            users = tf.concat([tables["user"], tf.ones([data.num_users, 1])], 1)
            yield users, tf.concat([tables["item"], tables["bias"]], 1)


WAYS = {
    "tf-keras adam": tf.keras.optimizers.Adam,
    "lazy adam": optimizers.LazyAdam,
    "lazy adam, corrected for skipped steps": lambda rate: optimizers.LazyAdam(rate, correct_skipped=True),
}


def best_epoch(data: LongTail, way: str, rate: float, seed: int) -> dict:
    """Of a run's last two epochs the one that is better on the validation, with its test."""
    found = []
    for epoch, (users, items) in enumerate(train(data, WAYS[way](rate), seed), EPOCHS - 1):
        validation, test = data.ndcg(users, items)
        found.append({"validation": validation, "test": test, "epoch": epoch})
    print(f" {way}, rate {rate}, seed {seed}: {found}", file=sys.stderr)
    if seed == 1 and way == "lazy adam":  # the quick ranking is the exact one, on 50 users
        asked, data.asked = data.asked, data.asked[:50]
        (row, item), (seen_row, seen_item) = data.of(data.asked, 0), data.of(data.asked, 1, 2)
        pairs = data.asked[row], item, data.asked[seen_row], seen_item
        exact = evaluation.evaluate(
            lambda some: (tf.gather(users, some) @ tf.transpose(items)).numpy(), *pairs, data.num_items, K
        )
        quick = data.ndcg(users, items)[1]
        assert abs(quick - exact["NDCG@10"]) < 1e-6, f"{quick} here, {exact['NDCG@10']} by evaluation.evaluate"
        data.asked = asked
    return max(found, key=lambda result: result["validation"])


def rates_rows(folder: Path) -> list[dict]:
    """Dense Adam's learning rate: the best of three on the validation."""
    data, rows = LongTail(), []
    for rate in tqdm(RATES, desc="rates", unit="run"):
        value = best_epoch(data, "tf-keras adam", rate, 0)["validation"]
        rows.append({"case": f"quality: rate {rate}, validation", "value": value, "unit": "NDCG@10", "rate": rate})
    return rows


def quality_rows(folder: Path) -> list[dict]:
    """NDCG@10 on a catalogue of a million items, most of them never touched: dense Adam against the lazy ones.

    At the learning rate that the part `rates` found best for dense Adam.
    """
    path = ROOT / "benchmarks" / "embeddings.json"
    tried = [row for row in json.loads(path.read_text())["rows"] if "rate" in row] if path.exists() else []
    if not tried:
        raise SystemExit(f"{path} has no learning rates: measure the part `rates` first")
    rate = max(tried, key=lambda row: row["value"])["rate"]
    data = LongTail()
    popular = tf.constant(data.frequency[:, None], tf.float32)
    popularity = data.ndcg(tf.ones([data.num_users, 1]), popular)[1]
    rows = [
        {"case": "quality: items", "value": data.num_items - 1, "unit": ""},
        {"case": "quality: training rows", "value": int(data.frequency.sum()), "unit": ""},
        {"case": "quality: items never touched", "value": float((data.frequency[1:] == 0).mean()), "unit": "share"},
        {"case": "quality: learning rate", "value": rate, "unit": ""},
        {"case": "quality: popularity", "value": popularity, "unit": "NDCG@10"},
    ]
    found = {way: [] for way in WAYS}
    seeds = range(1, (2 if QUICK else SEEDS) + 1)
    for seed, way in tqdm([(seed, way) for seed in seeds for way in WAYS], desc="quality", unit="run"):
        found[way].append(best_epoch(data, way, rate, seed))
    for way, results in found.items():
        values = [result["test"] for result in results]
        rows.append(
            {"case": f"quality: {way}", "value": statistics.mean(values), "unit": "NDCG@10", "seeds": values}
            | {"epochs": [result["epoch"] for result in results]}
        )
    dense = np.array([result["test"] for result in found["tf-keras adam"]])
    for way in list(WAYS)[1:]:
        change = np.array([result["test"] for result in found[way]]) / dense - 1
        half = T_95 * change.std(ddof=1) / len(change) ** 0.5
        rows.append(
            {"case": f"quality: {way} / tf-keras adam - 1", "value": float(change.mean()), "unit": "ratio"}
            | {"repeats": len(change), "min": float(change.mean() - half), "max": float(change.mean() + half)}
            | {"interval": "95%, of the mean over seeds"}
        )
    return rows


# Configs and kills -------------------------------------------------------------------------------------


def configs_rows(folder: Path) -> list[dict]:
    """Random configs of tests/test_config.py: each comes back from YAML the same, or is refused with its paths."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_config

    number = 100 if QUICK else 10_000
    found = test_config.random_configs(number, seed=1)  # AssertionError at the first that does neither
    assert sum(found.values()) == number and set(found) == {"round trip", "refused"}, found
    rows = [{"case": f"random configs: {what}", "value": count, "unit": "configs"} for what, count in found.items()]
    return [{"case": "random configs", "value": number, "unit": "configs"}, *rows]


def kills_rows(folder: Path) -> list[dict]:
    """Ten kills at random moments of a training run; each time it is started again; then compared with one left alone.

    The losses of every step and the hash of every variable, moments too, are equal bit for bit: so no row was trained
    twice or left out, since that would move the rows of its user and item.
    """
    dice, kills = np.random.default_rng(1), 2 if QUICK else 10
    rows = 20_000 if QUICK else 400_000
    table = pa.table({"user_index": dice.integers(1, 20_001, rows), "item_index": dice.zipf(1.2, rows) % 2000 + 1})
    files = [table.slice(begin, rows // 10) for begin in range(0, rows, rows // 10)]
    record_batches.write(folder / "rows", files, {"user_index": "int32", "item_index": "int32"})

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, PROGRAMS / "train_run.py", folder / "rows", folder / name]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert child.stdout.readline() == "ready\n", f"{name}: ended before it began"
        return child

    def steps(name: str) -> list[tuple[int, float]]:
        path = folder / name / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [(line["step"], line["loss"]) for line in map(json.loads, whole)]

    def saved(name: str) -> int:
        last = checkpoints.latest(folder / name / "checkpoints")
        return int(last.name.removeprefix("step-")) if last else 0

    def hashes(name: str) -> dict[str, int]:
        last = checkpoints.content(checkpoints.latest(folder / name / "checkpoints"))
        return {variable: entry["crc32c"] for variable, entry in last["variables"].items()}

    alone = start("alone")
    while not steps("alone"):
        time.sleep(0.01)
    began = time.perf_counter()
    assert alone.wait() == 0
    seconds = time.perf_counter() - began
    killed, ended, lost = 0, 0, []
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        while killed < kills:  # a run that ends before its next kill is compared, and another one begins
            name = f"killed {ended}"
            path, before, moment = folder / name / "metrics.jsonl", saved(name), dice.uniform(0, seconds / 4)
            written, child = path.stat().st_mtime_ns if path.exists() else 0, start(name)
            while child.poll() is None and (  # until it trains: the log is cut back to the checkpoint, and grows again
                not path.exists() or path.stat().st_mtime_ns == written or (steps(name) or [(0, 0)])[-1][0] <= before
            ):
                time.sleep(0.01)
            try:
                assert child.wait(moment) == 0
                ended += 1
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                killed += 1
                bar.update()
                lost.append(steps(name)[-1][0] - saved(name))
    assert start(f"killed {ended}").wait() == 0
    for number in range(ended + 1):
        name = f"killed {number}"
        assert steps(name) == steps("alone") and hashes(name) == hashes("alone"), f"{name} is not the undisturbed run"
    return [
        {"case": "kills", "value": killed, "unit": "kills", "runs": ended + 1},
        {"case": "kills: steps of a run", "value": len(steps("alone")), "unit": "steps"},
        {"case": "kills: difference of the final loss", "value": 0.0, "unit": "", "loss": steps("alone")[-1][1]},
        {"case": "kills: steps trained again", "value": max(lost), "unit": "steps, at most", "each": lost},
        {"case": "kills: undisturbed training", "value": seconds, "unit": "s"},
    ]


# Parameter servers -------------------------------------------------------------------------------------


def servers_rows(folder: Path) -> list[dict]:
    """The same step in one process, and with its tables on two servers and its batches on two workers, in turns."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    rows = []
    for size in ("100k",) if QUICK else ("1M", "10M"):
        print(f"parameter servers, {size} rows: a minute", file=sys.stderr)
        command = [sys.executable, PROGRAMS / "with_servers.py", str(SIZES[size]), "30" if QUICK else "200"]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        for where in ("one process", "cluster"):
            rows.append({"case": f"servers: {where}, {size} rows", "value": found[where] / 1e6, "unit": "M examples/s"})
        ratio = found["one process"] / found["cluster"]
        rows.append({"case": f"servers: one process / cluster, {size} rows", "value": ratio, "unit": "ratio"})
        rows.append({"case": f"servers: sent, {size} rows", "value": found["bytes"] / 1e6, "unit": "MB a step"})
    return [row | ({"repeats": 3} if row["unit"] != "ratio" else {}) for row in rows]


# The result file ---------------------------------------------------------------------------------------


def ratio(case: str, above: list[float], below: list[float]) -> dict:
    """A row with the ratio of two cases, round by round."""
    return scale.spread(case, [a / b for a, b in zip(above, below, strict=True)], "ratio")


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row["value"] for row in content["rows"]}
    lines = [
        "Milliseconds a step as the table grows, chapter 4: batch 8,192, dimension 16 "
        f"([benchmarks/embeddings.json](benchmarks/embeddings.json), {content['machine']['cores']} cores).",
        "",
        f"| optimizer | {' rows | '.join(SIZES)} rows |",
        "|---|" + "---|" * len(SIZES),
    ]
    names = {
        "tf-keras adam": "tf-keras Adam",
        "keras 3 adam": "Keras 3 Adam",
        "torch adam": "PyTorch Adam",
        "torch sparse adam": "PyTorch SparseAdam",
        "lazy adam": "**LazyAdam**",
        "lazy adam, row second moment": "**LazyAdam, one second moment a row**",
        "row-wise adagrad": "**row-wise Adagrad**",
    }
    for case, name in names.items():
        found = (of.get(f"{case} {size}") for size in SIZES)
        lines.append(f"| {name} | {' | '.join('' if ms is None else f'{ms:,.1f}' for ms in found)} |")
    row, change = "lazy adam, row second moment", of["quality: lazy adam / tf-keras adam - 1"]
    lines += [
        "",
        f"100 million rows with one second moment a row take {of[f'memory 100M, {row}']:.1f} GB once every row was "
        f"trained, {of[f'create 100M, {row}']:.0f} s to make, and {of['checkpoint 100M: save']:.0f} s to save. On a "
        f"catalogue of a million items LazyAdam's NDCG@10 is {change:+.1%} from dense Adam's.",
    ]
    return quoted(text, "embeddings", lines, 4, of.get("chapter 4"))


PARTS = ("speed", "large", "checkpoint", "rates", "quality", "configs", "kills", "servers")
QUICK = False


def main() -> None:
    """Measure everything and write the result file."""
    global QUICK, ROUNDS, SECONDS
    parser = argparse.ArgumentParser(description="Measure embedding tables; writes benchmarks/embeddings.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="measure these parts, and keep the others as they are")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try the script: prints, and writes nothing"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        QUICK, ROUNDS, SECONDS = True, 2, 0.05
    started_from, path = scale.commit(), ROOT / "benchmarks" / "embeddings.json"
    os.environ["RECSYS_PROGRESS"] = "0"  # bars of its own
    wanted = arguments.only or PARTS
    rows = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for part in wanted:
            start = time.perf_counter()
            found = [row | {"part": part} for row in globals()[f"{part}_rows"](Path(folder))]
            print(f"{part} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            rows = [row for row in rows if row.get("part") != part] + found
            content = scale.result("embeddings", rows, scale="benchmark", dataset="simulated")
            content |= {"commit": started_from}
            if QUICK:
                print(*map(json.dumps, found), sep="\n")
            else:
                scale.write_json(path, content)  # what was measured stays if a later part fails
    if not QUICK:
        finish(4, content, readme)


if __name__ == "__main__":
    main()
