"""What of a run is on disk, and how is it there whole or not at all?

    save("run/checkpoints", {"model": model, "optimizer": optimizer}, {"step": 1000})
    state = restore(latest("run/checkpoints"), {"model": model, "optimizer": optimizer})

A checkpoint is a folder `step-000001000` with one NumPy file (.npy) for each variable, which every language reads, and
`checkpoint.json`:

    {"version": 1, "state": {"step": 1000, ...},
     "variables": {"model/user_table": {"file": "model.user_table.npy", "dtype": "float32", "shape": [10, 4],
                                        "bytes": 288, "crc32c": 907060870}}}

`bytes` and `crc32c` are those of the whole file. A dtype that NumPy does not have, bfloat16 above all, lies in its file
as unsigned integers of its width. The folder is `step-000001000.writing` until all of it is on the disk; then it is
renamed. So a killed process or a full disk leaves the checkpoints that were there before.

Tables are written and read slice by slice: no second copy of one is ever in memory, and the disk sets the pace.

Needs: embeddings.py
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import io
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import google_crc32c  # ten times as fast as zlib's crc32, which would be slower than a disk
import numpy as np
import tensorflow as tf

from recsys_common.embeddings import read_rows

VERSION = 1
CONTENT = "checkpoint.json"
FOLDER = re.compile(r"step-(\d{9,})")
SLICE_BYTES = 2**23  # of a table, read at once
BLOCK_BYTES, WRITES = 2**22, 3  # whole pages, written so many at a time


def variables(objects: dict[str, tf.Module | tf.keras.layers.Layer]) -> dict[str, tf.Variable]:
    """`{"model/user_table/embeddings": variable}`: each variable once, by its shortest path of attributes.

    Raises:
      ValueError: a variable that numbers and NumPy files cannot hold, such as one of strings.
    """
    found, seen = {}, {}
    queue = collections.deque(objects.items())
    while queue:
        path, part = queue.popleft()
        if id(part) in seen:
            continue
        seen[id(part)] = part  # held, so that no other object gets its id
        if isinstance(part, tf.Variable):
            if part.dtype.base_dtype in (tf.string, tf.variant, tf.resource) or not part.shape.is_fully_defined():
                raise ValueError(f"{path}: {part.dtype.name} of shape {part.shape}, expected numbers of a known shape")
            found[path] = part
        elif type(part).__name__ == "ShardedVariable":  # of a parameter server: it has no children to be found
            queue.extend((f"{path}/part_{number}", piece) for number, piece in enumerate(part.variables))
        else:
            children = tf.train.TrackableView.children(part)
            if hasattr(part, "_random_generator"):  # tf-keras leaves it out, and dropout would begin anew
                children = {**children, "_random_generator": part._random_generator}
            queue.extend((f"{path}/{quote(name, safe=' ')}", child) for name, child in children.items())
    return found


def save(folder: str | os.PathLike, objects: dict, state: dict, *, keep: int = 3) -> Path:
    """Write the checkpoint `folder/step-<state["step"]>`, then delete all but the last `keep`.

    Args:
      objects: what has the variables: models, optimizers, anything that TensorFlow tracks, each under a name.
      state: anything else that JSON can hold, with "step", int: the steps that are done.

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: there is a checkpoint of this step.
      OSError: the disk is full, or cannot be written; says how many bytes are needed. The earlier checkpoints are
        untouched, and nothing is left of this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("step-*"):  # by a process that was killed as it wrote, or deleted, a checkpoint
        if left.suffix == ".writing" or (FOLDER.fullmatch(left.name) and not (left / CONTENT).exists()):
            shutil.rmtree(left)
    final, wanted = folder / f"step-{state['step']:09d}", variables(objects)
    if final.exists():
        raise FileExistsError(f"{final}: there already. Delete it first if this run is to take its place.")
    needed = sum(_bytes(_about(variable)) + 4096 for variable in wanted.values())
    free = shutil.disk_usage(folder).free
    full = (
        f"{folder}: the checkpoint of step {state['step']} needs {needed:,} bytes, and {free:,} are free. The earlier "
        f"checkpoints are whole. With keep={keep} there has to be room for {keep + 1}."
    )
    if needed > free:
        raise OSError(errno.ENOSPC, full)
    beside = final.with_name(final.name + ".writing")
    beside.mkdir()
    try:
        entries = {}
        for name, variable in wanted.items():
            file = name.replace("/", ".")[-200:] + ".npy"
            if any(entry["file"] == file for entry in entries.values()):
                file = f"{len(entries)}.{file}"
            entries[name] = _write(beside / file, variable)
        with open(beside / CONTENT, "w") as stream:
            json.dump({"version": VERSION, "state": state, "variables": entries}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        _sync(beside)
        beside.rename(final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{full} ({error.strerror})") from error
        raise
    for old in _checkpoints(folder)[:-keep]:
        (old / CONTENT).unlink()  # no checkpoint from now on, even if this process is killed here
        shutil.rmtree(old)
    return final


@contextlib.contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """Within it no other process of this machine gets the folder: each would delete what the other is writing.

    The system gives the folder free when the process ends, however it ends.

    Raises:
      BlockingIOError: another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"{folder}: another process trains in it. Wait until it has ended, or take another folder."
            raise BlockingIOError(error.errno, what) from None
        yield
    finally:
        os.close(handle)


def latest(folder: str | os.PathLike) -> Path | None:
    """The checkpoint in a folder that has the most steps; None if there is none."""
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def content(path: str | os.PathLike) -> dict:
    """`checkpoint.json` of a checkpoint, whose files are all there at full size.

    Raises:
      FileNotFoundError: no checkpoint is there, or a file of it is gone.
      ValueError: of another version, or a file has another size than was written.
    """
    path = Path(path)
    if not (path / CONTENT).is_file():
        raise FileNotFoundError(f"{path}: no {CONTENT}, so no checkpoint; `latest(folder)` finds one")
    try:
        found = json.loads((path / CONTENT).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONTENT}: no JSON ({error}). {_OTHER}") from error
    if found.get("version") != VERSION:
        raise ValueError(f"{path / CONTENT}: version {found.get('version')!r}, expected {VERSION}")
    for name, entry in found["variables"].items():
        file = path / entry["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{file}: gone; it held {name}. {_OTHER}")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file}: {file.stat().st_size:,} bytes, expected {entry['bytes']:,} of {name}. {_OTHER}")
    return found


def restore(path: str | os.PathLike, objects: dict) -> dict:
    """Read a checkpoint into the variables of `objects`, which must be like those saved. Returns the state.

    An optimizer has its slots only after a first step, or once its `build` was called.

    Args:
      objects: as for `save`; may leave out some of the names, which are then not read.

    Raises:
      FileNotFoundError: as `content`.
      ValueError: as `content`; names, shapes or dtypes that do not fit, all of them listed, and nothing was read. Or a
        file's bytes are not those written: then the variables hold part of it.
    """
    path, found, wanted = Path(path), content(path), variables(objects)
    for name, entry in _fitting(path, found, objects, wanted, {}).items():
        _read(path / entry["file"], entry, wanted[name])
    return found["state"]


def warm_start(
    path: str | os.PathLike, objects: dict, ids: dict[str, tuple[np.ndarray, np.ndarray]], oov_rows: int = 1
) -> dict:
    """Begin with what a checkpoint knows although its tables have other rows: for daily training on new ids.

    Rows go where their id is now, and the rows of the optimizer's slots with them. A row whose id is new keeps the
    values that it has, a row whose id is gone is left out. The rows before them, for ids that training never saw, stay
    where they are. All else must fit as in `restore`; the optimizer's iterations come along, so that its bias
    corrections stay right, and its learning rates do not: they are those that it has here.

    Args:
      objects: as for `restore`.
      ids: of each table with other rows, by its name: the ids of its rows in the checkpoint, and of those here,
        numbers or strings, from row `oov_rows` on.
      oov_rows: rows at the head of these tables, for ids out of the vocabulary: the config's data.oov_buckets.

    Returns:
      {table: {"kept": rows, "new": rows, "gone": rows}}

    Raises:
      FileNotFoundError: as `restore`.
      ValueError: as `restore`; a table that is not there with that many rows; an id that is there twice.
    """
    path, found = Path(path), content(path)
    wanted, found["variables"] = _without_rates(variables(objects)), _without_rates(found["variables"])
    moved, rows_of, report = {}, {}, {}
    for table, (old, new) in ids.items():
        target = _targets(table, np.asarray(old), np.asarray(new), oov_rows)
        for name, variable in wanted.items():
            words = f"{name}/{variable.name.partition(':')[0]}".split("/")
            if table in words and variable.shape[:1] == [oov_rows + len(new)]:
                moved[name], rows_of[name] = target, oov_rows + len(old)
        if not any(moved.get(name) is target for name in wanted):
            there = ", ".join(f"{name} {variable.shape.as_list()}" for name, variable in wanted.items())
            expected = f"{oov_rows + len(new):,} rows ({oov_rows:,} for unknown ids, and the ids)"
            raise ValueError(f"table {table!r}: none of {expected}; there are {there}")
        kept = int((target >= oov_rows).sum())
        report[table] = {"kept": kept, "new": len(new) - kept, "gone": len(old) - kept}
    for name, entry in _fitting(path, found, objects, wanted, rows_of).items():
        _read(path / entry["file"], entry, wanted[name], moved.get(name))
    return report


_OTHER = "The checkpoint was copied half-way or changed: delete its folder, and the one before it is the latest."


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if FOLDER.fullmatch(path.name) and (path / CONTENT).is_file()]
    return sorted(found, key=lambda path: int(FOLDER.fullmatch(path.name)[1]))


def _without_rates(named: dict) -> dict:
    """Without the variables in which a tf-keras optimizer keeps its learning rate, fixed or scheduled."""
    return {name: of for name, of in named.items() if not name.endswith(("_learning_rate", "/learning_rate"))}


def _fitting(path: Path, found: dict, objects: dict, wanted: dict, rows_of: dict[str, int]) -> dict[str, dict]:
    """The entries of the variables wanted; `rows_of` has how many rows some have in the checkpoint."""
    saved = {name: entry for name, entry in found["variables"].items() if name.split("/")[0] in objects}
    faults = [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
    faults += [f"{name}: in the checkpoint only" for name in saved.keys() - wanted.keys()]
    for name in saved.keys() & wanted.keys():
        then, here = saved[name], _about(wanted[name])
        if name in rows_of:
            here["shape"][0] = rows_of[name]
        if any(then[part] != here[part] for part in here):
            faults.append(f"{name}: {then['dtype']} {then['shape']}, expected {here['dtype']} {here['shape']}")
    if faults:
        faults = "\n  ".join(sorted(faults))
        raise ValueError(f"{path} is not of this model and optimizer, or of other tables:\n  {faults}")
    return saved


def _targets(table: str, old: np.ndarray, new: np.ndarray, oov_rows: int) -> np.ndarray:
    """Where each row of the checkpoint goes: [oov_rows + old ids], -1 for nowhere."""
    order = np.argsort(new, kind="stable")
    ordered = new[order]
    target = np.full(oov_rows + len(old), -1, np.int32 if oov_rows + len(new) < 2**31 else np.int64)
    target[:oov_rows] = range(oov_rows)
    for begin in range(0, len(old) if len(new) else 0, 2**20):
        part = old[begin : begin + 2**20]
        place = np.minimum(np.searchsorted(ordered, part), len(new) - 1)
        first = oov_rows + begin
        target[first : first + len(part)] = np.where(ordered[place] == part, order[place] + oov_rows, -1)
    there = np.sort(target[target >= oov_rows])
    twice = [*ordered[1:][ordered[1:] == ordered[:-1]], *new[there[1:][there[1:] == there[:-1]] - oov_rows]]
    if twice:
        raise ValueError(f"table {table!r}: id {twice[0]} is there twice; each row needs an id of its own")
    return target


def _about(variable: tf.Variable) -> dict:
    return {"dtype": variable.dtype.base_dtype.name, "shape": variable.shape.as_list()}


def _dtypes(about: dict) -> tuple[np.dtype, np.dtype]:
    """The NumPy dtype of the values, and that of the file."""
    dtype = np.dtype(tf.as_dtype(about["dtype"]).as_numpy_dtype)
    return dtype, dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


def _bytes(about: dict) -> int:
    return math.prod(about["shape"]) * _dtypes(about)[0].itemsize


def _slices(about: dict) -> list[tuple[int, int]]:
    """(first row, end) of each slice."""
    rows = about["shape"][0] if about["shape"] else 1
    at_once = max(1, SLICE_BYTES * rows // max(_bytes(about), 1))
    return [(begin, min(begin + at_once, rows)) for begin in range(0, rows, at_once)]


def _write(path: Path, variable: tf.Variable) -> dict:
    """Write one file; while threads copy, hash and write slices, the next one is read. Returns its entry."""
    about, header = _about(variable), io.BytesIO()
    descr = np.lib.format.dtype_to_descr(_dtypes(about)[1])
    shape = {"descr": descr, "fortran_order": False, "shape": tuple(about["shape"])}
    np.lib.format.write_array_header_1_0(header, shape)
    slices = _slices(about)
    with _Stream(path) as stream, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(stream.write, np.frombuffer(header.getvalue(), np.uint8))
        for begin, end in slices:
            values = read_rows(variable, begin, end) if len(slices) > 1 else variable
            block = np.ascontiguousarray(values.numpy()).reshape(-1).view(np.uint8)
            writing.result()
            writing = pool.submit(stream.write, block)
        writing.result()
    return {"file": path.name, **about, "bytes": stream.size, "crc32c": stream.crc}


class _Stream:
    """A new file, written past the page cache where the system can; `size` and `crc` are those of its bytes.

    Through the page cache the kernel copies each byte and writes it back in threads of its own: with two cores, half
    of the disk's speed. Direct writes need memory and lengths of whole pages, hence the blocks.
    """

    def __init__(self, path: Path):
        self.size, self.crc, self._filled, self._number = 0, 0, 0, 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by __exit__
        self._direct(True)
        self._blocks = [np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8) for _ in range(WRITES + 1)]
        self._pool, self._pending = ThreadPoolExecutor(WRITES), collections.deque()

    def __enter__(self):
        return self

    def write(self, values: np.ndarray) -> None:
        """Append bytes."""
        while len(values):
            part, values = np.split(values, [BLOCK_BYTES - self._filled])
            self._blocks[self._number][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._put()

    def _put(self) -> None:
        block = self._blocks[self._number][: self._filled]
        block.flags.writeable = False  # or google_crc32c would not take it
        self.crc = google_crc32c.extend(self.crc, block)
        self._pending.append(self._pool.submit(self._at, block, self.size))
        self.size, self._filled, self._number = self.size + len(block), 0, (self._number + 1) % len(self._blocks)
        if len(self._pending) == len(self._blocks):
            self._pending.popleft().result()  # its block is the next to be filled

    def _at(self, block: np.ndarray, begin: int) -> None:
        done = 0
        with contextlib.suppress(OSError):  # of a file system that wants other lengths, or has room for a part of it
            done = os.pwrite(self._file.fileno(), block, begin)
        while done < len(block):
            self._direct(False)  # and now an error is the disk's
            done += os.pwrite(self._file.fileno(), block[done:], begin + done)

    def __exit__(self, kind, *_):
        try:
            while self._pending:
                self._pending.popleft().result()
            if kind is None:
                self._direct(False)  # the rest is no whole page
                self._put()
                self._pending.popleft().result()
                os.fsync(self._file.fileno())
        finally:
            self._pool.shutdown()
            self._file.close()

    def _direct(self, on: bool) -> None:
        """Past the page cache or not, where there is such a choice: Linux, and not every file system."""
        if hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _read(path: Path, entry: dict, variable: tf.Variable, target: np.ndarray | None = None) -> None:
    """A file into a variable, row r to row target[r], if that is not -1."""
    for begin, rows in _blocks(path, entry):
        if target is None and len(rows) == math.prod(entry["shape"][:1]):
            variable.assign(rows.reshape(entry["shape"]))
            continue
        to = np.arange(begin, begin + len(rows))
        if target is not None:
            to = target[to]
            rows, to = rows[to >= 0], to[to >= 0]
        # Four times as fast as a strided assignment, and in place as well.
        for copy in getattr(variable, "values", [variable]):  # those of a mirrored variable
            copy.scatter_update(tf.IndexedSlices(rows, to))


def _blocks(path: Path, entry: dict) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a file, slice by slice; a thread is one ahead. Raises at the end if the file was changed."""
    crc, slices = 0, _slices(entry)
    width = _bytes(entry) // slices[-1][1] if slices else 0

    def take(count: int) -> np.ndarray:
        nonlocal crc
        block = np.empty(count, np.uint8)
        if stream.readinto(block) != count:
            raise ValueError(f"{path}: ended early. {_OTHER}")
        block.flags.writeable = False
        crc = google_crc32c.extend(crc, block)
        return block

    with open(path, "rb") as stream, ThreadPoolExecutor(1) as pool:
        take(entry["bytes"] - _bytes(entry))  # the header, which says what the entry says
        ahead = [pool.submit(take, (end - begin) * width) for begin, end in slices[:1]]
        for number, (begin, _) in enumerate(slices):
            block = ahead.pop(0).result()
            ahead += [pool.submit(take, (end - first) * width) for first, end in slices[number + 1 : number + 2]]
            yield begin, block.view(_dtypes(entry)[0]).reshape(-1, *entry["shape"][1:])
    if crc != entry["crc32c"]:
        raise ValueError(f"{path}: its bytes are not those written: crc32c {crc}, expected {entry['crc32c']}. {_OTHER}")


def _sync(folder: Path) -> None:
    """What `fsync` is for a file: the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
