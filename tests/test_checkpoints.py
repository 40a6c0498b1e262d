"""Checkpoints: all of it comes back bit for bit, and what is on the disk is whole or not taken for a checkpoint."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf

from recsys_common import checkpoints
from recsys_common.embeddings import Embeddings, Table
from recsys_common.optimizers import LazyAdam


class Model(tf.keras.Model):
    """Two tables, one of them bfloat16, and a dense layer."""

    def __init__(self, users: int = 501, items: int = 301):
        super().__init__()
        self.rows = Embeddings({"user": Table("user", users, 8), "item": Table("item", items, 4, dtype="bfloat16")})
        self.dense = tf.keras.layers.Dense(3)
        self.counts = tf.Variable([1, 2, 3], dtype=tf.int64, trainable=False)
        self.flag = tf.Variable(True, trainable=False)

    def call(self, batch):
        rows = self.rows(batch)
        return self.dense(tf.concat([rows["user"], rows["item"]], 1))


def trained(users: int = 501, items: int = 301, steps: int = 3, seed: int = 0) -> dict:
    """A model and its optimizer after a few steps on random ids."""
    objects = {"model": Model(users, items), "optimizer": LazyAdam(0.01)}
    for step in range(steps):
        train(objects, seed + step)
    return objects


def train(objects: dict, seed: int) -> None:
    model, random = objects["model"], np.random.default_rng(seed)
    tables = model.rows.tables
    batch = {name: tf.constant(random.integers(0, table.shape[0], 64)) for name, table in tables.items()}
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(batch) ** 2)
    variables = model.trainable_variables
    objects["optimizer"].apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))


def values(objects: dict) -> dict[str, np.ndarray]:
    return {name: variable.numpy().copy() for name, variable in checkpoints.variables(objects).items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Slices of 1,000 bytes: 31 rows of the one table, 125 of the other, and a rest."""
    monkeypatch.setattr(checkpoints, "SLICE_BYTES", 1000)
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 8192)


def test_everything_comes_back(tmp_path):
    objects = trained()
    before = values(objects)
    assert before["optimizer/_iterations"] == 3
    assert {"model/rows/tables/user", "model/dense/kernel", "model/counts", "model/flag"} < set(before)
    shapes = sorted(value.shape for name, value in before.items() if name.startswith("optimizer"))
    assert (501, 16) in shapes and (301, 8) in shapes  # both moments of each table
    state = {"step": 3, "position": {"files": "ab", "seed": None}, "losses": [0.1, 1 / 3]}
    path = checkpoints.save(tmp_path, objects, state)
    assert path == tmp_path / "step-000000003" == checkpoints.latest(tmp_path)

    other = trained(seed=9)
    assert not same(values(other), before)
    assert checkpoints.restore(path, other) == state
    assert same(values(other), before)
    for each in (objects, other):
        train(each, seed=4)
    assert same(values(other), values(objects)) and not same(values(other), before)


@pytest.mark.parametrize("direct", [True, False])
def test_any_language_can_read_it(tmp_path, monkeypatch, direct):
    if not direct:  # a Mac, and some file systems
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    objects = trained()
    path = checkpoints.save(tmp_path, objects, {"step": 1})
    content, there = json.loads((path / "checkpoint.json").read_text()), values(objects)
    assert content["variables"].keys() == there.keys()
    for name, entry in content["variables"].items():
        raw, array = (path / entry["file"]).read_bytes(), np.load(path / entry["file"])
        assert (len(raw), google_crc32c.value(raw)) == (entry["bytes"], entry["crc32c"])
        assert array.shape == tuple(entry["shape"]) == there[name].shape
        if entry["dtype"] == "bfloat16":  # the upper half of a float32
            assert array.dtype == np.uint16
            array = (array.astype(np.uint32) << 16).view(np.float32)
        assert (array == there[name].astype(array.dtype)).all(), name
    assert {entry["dtype"] for entry in content["variables"].values()} == {"float32", "bfloat16", "int64", "bool"}
    assert sorted(file.name for file in path.iterdir()) == sorted(
        ["checkpoint.json", *(entry["file"] for entry in content["variables"].values())]
    )


def test_the_last_ones_are_kept(tmp_path):
    objects = {"model": tf.Module()}
    objects["model"].x = tf.Variable(0)
    for step in (9, 10, 100, 20_000_000_000):
        objects["model"].x.assign_add(1)
        checkpoints.save(tmp_path, objects, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000100", "step-20000000000"]
    assert checkpoints.restore(checkpoints.latest(tmp_path), objects) == {"step": 20_000_000_000}
    with pytest.raises(FileExistsError, match="step-000000100: there already"):
        checkpoints.save(tmp_path, objects, {"step": 100})
    assert checkpoints.latest(tmp_path / "none") is None


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path):
    objects = {"model": tf.Module()}
    objects["model"].x = tf.Variable(0)
    first = checkpoints.save(tmp_path, objects, {"step": 1})
    (tmp_path / "step-000000002.writing").mkdir()
    (tmp_path / "step-000000002.writing" / "model.x.npy").write_bytes(b"half")
    (tmp_path / "step-000000003").mkdir()  # one that was being deleted
    (tmp_path / "mine").mkdir()
    assert checkpoints.latest(tmp_path) == first
    checkpoints.save(tmp_path, objects, {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step-000000001", "step-000000003"]


def test_a_truncated_a_changed_and_a_lost_file_are_named(tmp_path):
    objects = trained()
    path = checkpoints.save(tmp_path, objects, {"step": 1})
    file = path / "model.rows.tables.user.npy"
    whole = file.read_bytes()
    assert len(whole) == 128 + 501 * 8 * 4

    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"user.npy: {len(whole) - 1:,} bytes, expected {len(whole):,} of model/rows"):
        checkpoints.restore(path, objects)
    for place in (20, 128, len(whole) - 1):  # in the header, in the first slice, in the last
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"user.npy: its bytes are not those written: crc32c \d+, expected \d+"):
            checkpoints.restore(path, objects)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"user.npy: gone; it held model/rows/tables/user"):
        checkpoints.restore(path, objects)
    (path / "checkpoint.json").write_text('{"version": 1, "sta')
    with pytest.raises(ValueError, match=r"checkpoint.json: no JSON"):
        checkpoints.restore(path, objects)
    (path / "checkpoint.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="version 2, expected 1"):
        checkpoints.restore(path, objects)
    (path / "checkpoint.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint\.json"):
        checkpoints.restore(path, objects)


def test_all_that_does_not_fit_is_listed_and_nothing_is_read(tmp_path):
    saved, here = tf.Module(), tf.Module()
    saved.same, here.same = tf.Variable([1.0, 2.0]), tf.Variable([0.0, 0.0])
    saved.shape, here.shape = tf.Variable(tf.zeros([4, 2])), tf.Variable(tf.zeros([4, 3]))
    saved.dtype, here.dtype = tf.Variable([1.0]), tf.Variable([1])
    saved.old, here.new = tf.Variable(1.0), tf.Variable(1.0)
    path = checkpoints.save(tmp_path, {"model": saved, "other": tf.Module()}, {"step": 1})
    with pytest.raises(ValueError) as caught:
        checkpoints.restore(path, {"model": here})
    assert str(caught.value).splitlines()[1:] == [
        "  model/dtype: float32 [1], expected int32 [1]",
        "  model/new: not in the checkpoint",
        "  model/old: in the checkpoint only",
        "  model/shape: float32 [4, 2], expected float32 [4, 3]",
    ]
    assert here.same.numpy().tolist() == [0, 0]


def test_one_of_the_objects_can_be_read_alone(tmp_path):
    objects = trained()
    path = checkpoints.save(tmp_path, objects, {"step": 1})
    model = trained(seed=5)["model"]
    checkpoints.restore(path, {"model": model})
    assert same(values({"model": model}), values({"model": objects["model"]}))


def test_strings_are_refused():
    module = tf.Module()
    module.names = tf.Variable(["a"])
    with pytest.raises(ValueError, match=r"model/names: string of shape \(1,\), expected numbers"):
        checkpoints.variables({"model": module})


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    objects = trained()
    before = values(objects)
    first = checkpoints.save(tmp_path, objects, {"step": 1}, keep=1)
    objects["model"].rows.tables["user"].assign_add(tf.ones([501, 8]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the table has 16,032 bytes: the system refuses it
    try:
        with pytest.raises(OSError, match=r"step 2 needs \d+,\d+ bytes, and .* are free.*File too large") as caught:
            checkpoints.save(tmp_path, objects, {"step": 2}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]

    usage = type("usage", (), {"free": 77_777})  # what a full disk of that much room says beforehand
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: usage)
    needed = sum(value.nbytes + 4096 for value in before.values())
    assert needed > 77_777
    with pytest.raises(OSError, match=rf"needs {needed:,} bytes, and 77,777 are free") as caught:
        checkpoints.save(tmp_path, objects, {"step": 2}, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    checkpoints.restore(first, objects)
    assert same(values(objects), before)


def test_rows_move_with_their_ids(tmp_path):
    old = trained(users=6, items=4)
    path = checkpoints.save(tmp_path, old, {"step": 3})
    here = trained(users=8, items=4, steps=1, seed=7)
    fresh, then = values(here), values(old)
    # rows 1 to 5 were ids 50, 10, 40, 20, 30; 10 is gone, 60, 5 and 70 are new
    ids = {"user": (np.array([50, 10, 40, 20, 30]), np.array([60, 20, 50, 5, 30, 40, 70]))}
    assert checkpoints.warm_start(path, here, ids) == {"user": {"kept": 4, "new": 3, "gone": 1}}
    now = values(here)
    moved = [name for name in now if now[name].shape[:1] == (8,)]
    assert len(moved) == 2  # the table and its moments
    for name in moved:
        rows = {0: 0, 2: 4, 3: 1, 5: 5, 6: 3}  # row here -> row then
        expected = [then[name][rows[row]] if row in rows else fresh[name][row] for row in range(8)]
        assert now[name].tolist() == [row.tolist() for row in expected], name
    others = now.keys() - moved
    assert same({name: now[name] for name in others}, {name: then[name] for name in others})
    assert now["optimizer/_iterations"] == 3


def test_rows_of_unknown_ids_stay_where_they_are(tmp_path):
    old = trained(users=6, items=4)
    path = checkpoints.save(tmp_path, old, {"step": 3})
    here = trained(users=7, items=4, steps=1, seed=7)
    fresh, then = values(here), values(old)
    ids = {"user": (np.array([50, 10, 40]), np.array([40, 60, 50, 70]))}
    assert checkpoints.warm_start(path, here, ids, oov_rows=3) == {"user": {"kept": 2, "new": 2, "gone": 1}}
    now = values(here)["model/rows/tables/user"]
    was, new = then["model/rows/tables/user"], fresh["model/rows/tables/user"]
    assert (now == np.stack([was[0], was[1], was[2], was[5], new[4], was[3], new[6]])).all()
    with pytest.raises(ValueError, match=r"none of 5 rows [(]1 for unknown ids"):
        checkpoints.warm_start(path, here, ids)


def test_both_tables_grow_and_ids_may_be_strings(tmp_path):
    old = trained(users=40, items=30)
    path = checkpoints.save(tmp_path, old, {"step": 3})
    here = trained(users=1001, items=30, steps=1, seed=7)
    then, random = values(old), np.random.default_rng(0)
    users = np.array([f"user {number}" for number in random.permutation(1000)])
    known = random.choice(users, 39, replace=False)
    items = np.arange(29)
    report = checkpoints.warm_start(path, here, {"user": (known, users), "item": (items, items[::-1])})
    assert report == {"user": {"kept": 39, "new": 961, "gone": 0}, "item": {"kept": 29, "new": 0, "gone": 0}}
    now = values(here)
    for row, user in enumerate(known, 1):
        place = 1 + users.tolist().index(user)
        assert (now["model/rows/tables/user"][place] == then["model/rows/tables/user"][row]).all()
    assert (now["model/rows/tables/item"][1:] == then["model/rows/tables/item"][:0:-1]).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"user": ([1, 2, 3, 4, 4], [1, 2, 3, 4, 5])}, "'user': id 4 is there twice"),
        ({"user": ([1, 2, 3, 4, 5], [1, 2, 2, 4, 5])}, "'user': id 2 is there twice"),
        ({"user": ([1, 2, 3, 4, 5], [1, 2, 3])}, r"'user': none of 4 rows .*model/rows/tables/user \[6, 8\]"),
        ({"users": ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])}, "'users': none of 6 rows"),
        ({"user": ([1, 2, 3, 4], [1, 2, 3, 4, 5])}, r"user: float32 \[6, 8\], expected float32 \[5, 8\]"),
    ],
)
def test_ids_that_do_not_fit(tmp_path, ids, message):
    objects = trained(users=6, items=4)
    path = checkpoints.save(tmp_path, objects, {"step": 1})
    with pytest.raises(ValueError, match=message):
        checkpoints.warm_start(path, objects, ids)


CHILD = """
import sys, tensorflow as tf
from recsys_common import checkpoints
from recsys_common.embeddings import Table, create

def memory(field):
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith(field))

def peak(call):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before

mine = checkpoints.alone(sys.argv[1])
mine.__enter__()
module = tf.Module()
module.table = create(Table("table", 3_200_000, 16))  # 204.8 MB
objects = {"model": module}
checkpoints.save(sys.argv[1] + "/warm", {"model": tf.Module()}, {"step": 0})
print(peak(lambda: checkpoints.save(sys.argv[1], objects, {"step": 1})))
print(peak(lambda: checkpoints.restore(checkpoints.latest(sys.argv[1]), objects)), flush=True)
for step in range(2, 1000):
    module.table.scatter_update(tf.IndexedSlices(tf.fill([1, 16], float(step)), [0]))
    checkpoints.save(sys.argv[1], objects, {"step": step}, keep=2)
    print(step, flush=True)
"""


def test_memory_stays_flat_and_a_kill_leaves_what_was_there(tmp_path, tell):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        saving, restoring = float(child.stdout.readline()), float(child.stdout.readline())
        assert child.stdout.readline() == "2\n"
        deadline = time.monotonic() + 30
        while not (writing := list(tmp_path.glob("*.writing/*.npy"))) or writing[0].stat().st_size < 50_000_000:
            assert time.monotonic() < deadline
        with pytest.raises(BlockingIOError, match=f"{tmp_path}: another process"), checkpoints.alone(tmp_path):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    tell(f"checkpoint of a table of 205 MB: {saving:.0f} MB more memory to write, {restoring:.0f} MB to read")
    assert saving < 0.2 * 205 and restoring < 0.2 * 205
    left = list(tmp_path.glob("*.writing"))
    assert len(left) == 1 and not (left[0] / "checkpoint.json").exists()
    with checkpoints.alone(tmp_path):  # free again
        latest, module = checkpoints.latest(tmp_path), tf.Module()
    step = int(latest.name[5:])
    assert left[0].name == f"step-{step + 1:09d}.writing"
    module.table = tf.Variable(tf.zeros([3_200_000, 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SLICE_BYTES", 2**23)
        assert checkpoints.restore(latest, {"model": module}) == {"step": step}
    assert module.table[0].numpy().tolist() == [step] * 16
