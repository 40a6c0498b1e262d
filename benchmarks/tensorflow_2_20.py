"""Does this repository run on the TensorFlow that a TPU machine has, 2.20, and do its models cross to 2.21 and back?

    python benchmarks/tensorflow_2_20.py          (make bench)

Writes benchmarks/tensorflow_2_20.json. The packages of requirements-tpu.txt, and those of requirements.txt that it has
not, which run notebooks, are installed into build/tensorflow-2.20: 5 GB. TensorFlow there is tensorflow-tpu, the build
of TPU machines, on this machine's processor; it waits 5 s for a TPU in every process that computes. It cannot compile
for a processor by XLA, which chapter 5's compile check begins with: that chapter has the same version's build for
processors, `tensorflow`. The chapters run in a copy of this repository, at the small scale.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recsys_common import scale

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "tensorflow-2.20"
CHAPTERS = {1: "tensorflow-tpu", 4: "tensorflow-tpu", 5: "tensorflow"}  # chapter -> build of TensorFlow
# Of a chapter, shown beside its seconds.
METRICS = {1: "matrix factorization NDCG@10", 4: "lazy adam NDCG@10", 5: "lazy adam NDCG@10"}
USERS, ITEMS, DIM, BATCH, STEPS, K = 5000, 800, 16, 256, 20, 10


# The environment ---------------------------------------------------------------------------------------


def entries(lock: Path) -> dict[str, str]:
    """Package -> its lines of a lock, hashes and all."""
    blocks = re.findall(r"^[\w.-]+==.*\n(?: .*\n)*", lock.read_text(), re.M)
    return {block.partition("==")[0]: block for block in blocks}


def python_2_20() -> Path:
    """The Python that has TensorFlow 2.20; makes the environment if there is none, or one of an older lock.

    `tensorflow` has the same files as tensorflow-tpu: it is beside them, in FOLDER/processor.
    """
    of_tpu, of_book = (entries(ROOT / name) for name in ("requirements-tpu.txt", "requirements.txt"))
    # The compile check takes the other lock's libtpu, and TensorFlow none (`environment`).
    both = of_book | of_tpu | {"libtpu": of_book["libtpu"]}
    lock = "".join(block for name, block in sorted(both.items()) if name != "tensorflow")
    python, installed = FOLDER / "bin" / "python", FOLDER / "installed.txt"
    if not installed.exists() or installed.read_text() != lock:
        print(f"installing {len(both) - 1} packages into {FOLDER}: minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        (FOLDER / "lock.txt").write_text(lock)
        options = ["--no-deps", "--require-hashes", "--requirement", FOLDER / "lock.txt"]
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        subprocess.run([*pip, *options], check=True)
        same = of_tpu["tensorflow-tpu"].split()[0].replace("-tpu", "")
        subprocess.run([*pip, "--no-deps", "--target", FOLDER / "processor", same], check=True)
        (FOLDER / "lock.txt").rename(installed)
    return python


def environment(root: Path, build: str) -> dict[str, str]:
    """For a process of either Python that imports the code under `root` and uses the processor."""
    own = {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "RECSYS_PROGRESS": "0"}
    if build == "tensorflow":
        own["PYTHONPATH"] += f"{os.pathsep}{FOLDER / 'processor'}"
    else:  # it aborts at import where it finds a libtpu as new as the compile check's
        own["TPU_LIBRARY_PATH"] = "/dev/null"
    return os.environ | own


# Chapters ----------------------------------------------------------------------------------------------


def chapter_rows(python: Path) -> list[dict]:
    """Seconds and memory of each chapter under TensorFlow 2.20, and what its model reached."""
    copy = FOLDER / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    rows = []
    for chapter, build in CHAPTERS.items():
        if not list((copy / "chapters").glob(f"{chapter}_*.py")):
            print(f"chapter {chapter} is not there yet", file=sys.stderr)
            continue
        command = [python, copy / "tools" / "book.py", "run", str(chapter), "--force"]
        done = subprocess.run(command, env=environment(copy, build), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"chapter {chapter} under TensorFlow 2.20:\n{done.stdout}")
        folder = copy / "runs" / "small" / f"chapter-{chapter}"
        run, metrics = (json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))
        found, about = metrics["versions"], {"build": build}
        assert found[build].startswith("2.20") and found["tf-keras"].startswith("2.20"), f"{build}: {found}"
        name = f"chapter {chapter}"
        rows += [
            {"case": name, "value": run["seconds"], "unit": "s"} | about,
            {"case": f"{name}: peak memory", "value": run["peak_memory_mb"], "unit": "MB"} | about,
        ]
        values = {row["case"]: row["value"] for row in metrics["rows"]}
        if chapter in METRICS:
            case = METRICS[chapter]
            rows.append({"case": f"{name}: {case}", "value": values[case], "unit": "NDCG@10"} | about)
        print(f"{name}: {run['seconds']} s", file=sys.stderr)
    return rows


# Crossing ----------------------------------------------------------------------------------------------


def crossing_rows(python: Path) -> list[dict]:
    """What one version saved, read by the other: predictions, and the losses of the training that goes on."""
    pythons, rows = {"2.20": python, "2.21": sys.executable}, []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=4, desc="crossing", unit="process") as bar:

        def child(does: str, version: str, saved_by: str) -> dict[str, np.ndarray]:
            place = Path(folder) / saved_by
            command = [pythons[version], __file__, "--child", does, place]
            done = subprocess.run(
                command, env=environment(ROOT, "tensorflow-tpu"), stderr=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{does} by {version}, saved by {saved_by}:\n{done.stderr[-3000:]}")
            bar.update()
            with np.load(place / f"{does}.npz") as found:
                assert str(found["version"]).startswith(version), f"{found['version']}, expected {version}"
                return {name: found[name] for name in found.files if name != "version"}

        saved = {version: child("save", version, version) for version in pythons}
        for there, here in (("2.20", "2.21"), ("2.21", "2.20")):
            before, after, way = saved[there], child("load", here, there), f"{there} -> {here}"
            error = str(after.pop("error"))
            difference = {name: float(np.abs(after[name] - before[name]).max()) for name in after}
            lists, losses = difference.pop("item_id"), difference.pop("losses")
            largest = {name: float(np.abs(before[name]).max()) for name in difference}
            rows += [
                {"case": f"SavedModel {way}: largest difference", "value": max(difference.values()), "unit": ""}
                | {"each": difference, "largest value": largest},
                {"case": f"SavedModel {way}: lists equal", "value": int(lists == 0), "unit": ""},
                {"case": f"checkpoint {way}: largest difference of a loss", "value": losses, "unit": ""}
                | {"largest value": float(before["losses"].max()), "steps": STEPS},
                {"case": f"tf-keras load_model {way}: works", "value": int(not error), "unit": "", "error": error},
            ]
    return rows


def child(does: str, folder: Path) -> None:
    """Train, save and go on ("save"), or read what the other version saved and do the same with it ("load").

    Leaves `<does>.npz` in the folder: "score" float32 [n] of the SavedModel of `saving.export`, "best", "item_id"
    [n, K] of its lists, "tower" [n, 1] of a tf-keras model, "losses" [STEPS] of the steps after the checkpoint, and
    "error", what `load_model` said of the tf-keras model, "" if it read it.
    """
    import recsys_common  # noqa: F401 - before TensorFlow: tf.keras becomes tf-keras

    import tensorflow as tf  # isort: skip

    from recsys_common import checkpoints, optimizers, saving
    from recsys_common.models.matrix_factorization import MatrixFactorization

    dice = np.random.default_rng(1)
    user_ids, item_ids = (dice.choice(10**12, count - 1, replace=False) for count in (USERS, ITEMS))
    users, items = dice.integers(0, USERS, (2 * STEPS, BATCH)), dice.integers(0, ITEMS, (2 * STEPS, BATCH))
    tf.keras.utils.set_random_seed(1)
    model, optimizer = MatrixFactorization(USERS, ITEMS, DIM, seed=1), optimizers.LazyAdam(0.01)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(users, items):
        with tf.GradientTape() as tape:
            loss = model.compute_loss({"user_index": users, "item_index": items}, training=True)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    def train(begin: int) -> np.ndarray:
        return np.array([float(step(*batch)) for batch in zip(users[begin:][:STEPS], items[begin:][:STEPS])])  # noqa: B905

    objects = {"model": model, "optimizer": optimizer}
    if does == "save":
        train(0)
        vectors = model.users(tf.range(USERS)).numpy(), model.items(tf.range(ITEMS)).numpy()
        saving.export(folder / "model", user_ids, vectors[0], item_ids, vectors[1], {"model": "matrix factorization"})
        tower = tf.keras.Sequential([tf.keras.layers.Dense(32, "relu"), tf.keras.layers.Dense(1)])
        tower.build([None, DIM + 1])
        tower.save(folder / "tower", save_format="tf")
        checkpoints.save(folder / "checkpoints", objects, {"step": STEPS})
    else:
        checkpoints.restore(checkpoints.latest(folder / "checkpoints"), objects)
    loaded, tower, error = tf.saved_model.load(folder / "model"), tf.saved_model.load(folder / "tower"), ""
    asked = tf.constant(user_ids[:BATCH])
    score = loaded.signatures["score"](user_id=asked, item_id=tf.constant(item_ids[:BATCH]))["score"]
    best = loaded.signatures["recommend"](user_id=asked, k=tf.constant(K))
    try:
        tf.keras.models.load_model(folder / "tower")
    except TypeError as refused:  # a layer's config has what this version does not know
        error = str(refused)
    np.savez(
        folder / f"{does}.npz", version=tf.__version__, score=score, best=best["score"], item_id=best["item_id"],
        tower=tower(loaded.user_vectors[:BATCH]), losses=train(STEPS), error=error,
    )  # fmt: skip


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description="Run on TensorFlow 2.20; writes benchmarks/tensorflow_2_20.json.")
    parser.add_argument("--data-dir", help="not needed here; `make bench` passes it to every benchmark")
    parser.add_argument("--child", nargs=2, metavar=("save|load", "FOLDER"), help="for the processes of this program")
    arguments = parser.parse_args()
    if arguments.child:
        Path(arguments.child[1]).mkdir(exist_ok=True)
        return child(arguments.child[0], Path(arguments.child[1]))
    started_from, python = scale.commit(), python_2_20()
    rows = crossing_rows(python) + chapter_rows(python)
    of_tpu = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements-tpu.txt").read_text(), re.M))
    content = scale.result("tensorflow_2_20", rows, scale="small", dataset="simulated")
    names = ("tensorflow-tpu", "tf-keras", "tensorflow-recommenders", "numpy")
    content |= {"commit": started_from, "other versions": {name: of_tpu[name] for name in names}}
    print(scale.write_json(Path(__file__).with_suffix(".json"), content))


if __name__ == "__main__":
    main()
