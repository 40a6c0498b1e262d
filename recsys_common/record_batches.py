"""What is in the files? TFRecords that hold record batches: thousands of rows a record, column after column.

    manifest = write("data/train", tables, {"user_index": "int32", "item_index": "int32"})
    manifest = Manifest.load("data/train")
    dataset = read(manifest)                       # tf.data: one element a record batch

Each record is one `tf.train.Example`. A column of n values is one bytes feature: the n values in little-endian
binary, one after another. A ragged column (a list in each row) has its values in the feature `name` and its n
lengths, int32, in `name/lengths`. Native TensorFlow ops decode it (`parse_single_example`, `decode_raw`), on a TPU
host and from `gs://` alike; nothing runs in Python for each row.

`manifest.json` beside the files names them with rows, bytes and sha256, and is written last, in one step. Only what
it names is data: files of an export that was killed are not in it, and the next export removes them.

Needs: nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

VERSION = 1
MANIFEST = "manifest.json"
# 8,192 rows of four narrow columns are 200 kB: the cost of a record no longer matters, and 16 are a good shuffle.
ROWS_PER_RECORD = 8192


@dataclass(frozen=True)
class Column:
    """A column: its name, its NumPy dtype's name, and whether each row holds a list of values."""

    name: str
    dtype: str
    ragged: bool = False


@dataclass(frozen=True)
class File:
    """A file of an export: name within the folder, rows, bytes, sha256 of the bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an export consists of; all but `folder`, where it lies, is in `manifest.json`."""

    folder: str
    columns: list[Column]
    files: list[File]
    compression: str = ""
    rows_per_record: int = ROWS_PER_RECORD
    source: dict = field(default_factory=dict)
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        """Bytes in all files."""
        return sum(file.bytes for file in self.files)

    @property
    def paths(self) -> list[str]:
        """The files' paths, in order."""
        return [os.path.join(self.folder, file.name) for file in self.files]

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Manifest:
        """Read `folder/manifest.json` and check that its files are there at full size.

        Raises:
          FileNotFoundError: no manifest, or a file that it names is gone.
          ValueError: the manifest is of another version or not ours, or a file has another size.
        """
        folder = os.fspath(folder)
        path = os.path.join(folder, MANIFEST)
        if not tf.io.gfile.exists(path):
            found = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else None
            state = "the folder does not exist" if found is None else f"the folder holds {len(found)} other files"
            raise FileNotFoundError(
                f"{path}: no manifest; {state}. An export writes its manifest last, so this one was never finished: "
                "run the export again."
            )
        with tf.io.gfile.GFile(path) as stream:
            content = json.loads(stream.read())
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path}: format version {content.get('version')!r}, expected {VERSION}. Export again with this code."
            )
        content.pop("rows")
        columns = [Column(**column) for column in content.pop("columns")]
        files = [File(**file) for file in content.pop("files")]
        manifest = cls(folder, columns, files, **content)
        for file, path in zip(files, manifest.paths, strict=True):
            if not tf.io.gfile.exists(path):
                raise FileNotFoundError(f"{path}: the manifest names it, but it is gone. Run the export again.")
            size = tf.io.gfile.stat(path).length
            if size != file.bytes:
                raise ValueError(
                    f"{path}: {size:,} bytes, the manifest says {file.bytes:,}: copied half-way or changed. "
                    "Run the export again."
                )
        return manifest

    def _save(self) -> None:
        content = {name: value for name, value in asdict(self).items() if name != "folder"} | {"rows": self.rows}
        path = os.path.join(self.folder, MANIFEST)
        with tf.io.gfile.GFile(path + ".writing", "w") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
        tf.io.gfile.rename(path + ".writing", path, overwrite=True)


def write(
    folder: str | os.PathLike,
    tables: Iterable[pa.Table],
    columns: dict[str, str],
    *,
    seed: int = 0,
    rows_per_record: int = ROWS_PER_RECORD,
    compression: str = "",
    source: dict | None = None,
) -> Manifest:
    """Write one file for each table; replaces an earlier export only once all of the new one is there.

    The rows of a file are put into an order that depends on the rows (their columns that are not lists) and the seed
    alone, and is random otherwise: the order in which a warehouse hands rows out is neither.

    Args:
      folder: local or `gs://` folder.
      tables: Arrow tables, one a file, each small enough for memory; taken one at a time.
      columns: name -> NumPy dtype name to store, such as "int32"; a list column stores its values so.
      seed: of the order within files.
      rows_per_record: rows in a record (the last of a file has fewer).
      compression: "" or "GZIP".
      source: what to remember of where the rows came from (table, SQL, parameters); goes into the manifest.

    Raises:
      ValueError: no rows at all, a column that is missing, null, not finite or too wide for its dtype.
      OSError: the disk is full or the folder cannot be written; the earlier export is untouched.
    """
    folder = os.fspath(folder)
    tf.io.gfile.makedirs(folder)
    described, files = [], []
    for number, table in enumerate(tables):
        arrays = _arrays(table, columns, f"{folder}, file {number}")
        described = described or [Column(name, dtype, f"{name}/lengths" in arrays) for name, dtype in columns.items()]
        order = _order(table.select(list(columns)), seed + number)
        files.append(_write_file(folder, number, arrays, order, rows_per_record, compression))
    manifest = Manifest(folder, described, files, compression, rows_per_record, source or {})
    if manifest.rows == 0:
        raise ValueError(f"{folder}: 0 rows to write; the table or its filter is empty")
    manifest._save()
    named = {file.name for file in files}
    for name in tf.io.gfile.listdir(folder):
        if name.startswith("part-") and name not in named:
            tf.io.gfile.remove(os.path.join(folder, name))
    return manifest


def verify(manifest: Manifest) -> None:
    """Read every byte again: hashes, and rows in every column.

    Raises:
      ValueError: naming the file and what differs.
    """
    for file, path in zip(manifest.files, manifest.paths, strict=True):
        found = _sha256(path)
        if found != file.sha256:
            raise ValueError(
                f"{path}: sha256 {found[:12]}..., the manifest says {file.sha256[:12]}...: the file changed"
            )
        batches = tf.data.TFRecordDataset(path, manifest.compression).map(decoder(manifest))
        rows = sum(batch[manifest.columns[0].name].shape[0] for batch in batches)
        if rows != file.rows:
            raise ValueError(f"{path}: {rows:,} rows, the manifest says {file.rows:,}")


def decoder(manifest: Manifest):
    """A function from one serialized record (string scalar) to `{column: tensor [rows]}`, for `Dataset.map`."""
    spec = {}
    for column in manifest.columns:
        spec[column.name] = tf.io.FixedLenFeature([], tf.string)
        if column.ragged:
            spec[f"{column.name}/lengths"] = tf.io.FixedLenFeature([], tf.string)

    def decode(record: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
        example = tf.io.parse_single_example(record, spec)
        batch = {}
        for column in manifest.columns:
            values = tf.io.decode_raw(example[column.name], tf.as_dtype(column.dtype))
            if column.ragged:
                lengths = tf.io.decode_raw(example[f"{column.name}/lengths"], tf.int32)
                values = tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)
            batch[column.name] = values
        return batch

    return decode


def read(manifest: Manifest) -> tf.data.Dataset:
    """The record batches in the order of the files: elements `{column: tensor [rows]}`."""
    return tf.data.TFRecordDataset(manifest.paths, manifest.compression).map(
        decoder(manifest), num_parallel_calls=tf.data.AUTOTUNE
    )


def _arrays(table: pa.Table, columns: dict[str, str], where: str) -> dict[str, np.ndarray]:
    """The columns as NumPy arrays of their stored dtype, a list column as values and lengths."""
    arrays = {}
    for name, dtype in columns.items():
        if name not in table.column_names:
            raise ValueError(f"{where}: no column {name!r}; the table has {', '.join(table.column_names)}")
        column = table[name].combine_chunks()
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise ValueError(
                f"{where}: column {name!r} is null in {column.null_count:,} rows, first in row {row}; expected "
                "values. Replace or drop them in the SQL that makes the table."
            )
        if pa.types.is_list(column.type):
            arrays[f"{name}/lengths"] = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i4")
            arrays[name] = _cast(column.flatten().to_numpy(zero_copy_only=False), dtype, name, where)
        else:
            arrays[name] = _cast(column.to_numpy(zero_copy_only=False), dtype, name, where)
    return arrays


def _cast(values: np.ndarray, dtype: str, name: str, where: str) -> np.ndarray:
    target = np.dtype(dtype).newbyteorder("<")
    if values.dtype.kind not in "iufb":
        raise ValueError(f"{where}: column {name!r} holds {values.dtype}, expected numbers; give it an id in SQL")
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
        expected = "a finite number"
        if target.kind in "iu":
            bad |= values != np.round(values)
            expected = f"a whole number for {dtype}"
    else:
        bad, expected = np.zeros(values.shape, bool), ""
    if target.kind in "iu" and not bad.any():
        limits = np.iinfo(target)
        bad = (values < limits.min) | (values > limits.max)
        expected = f"{limits.min} to {limits.max} ({dtype})"
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{where}: column {name!r}, value {row} is {values[row]}, expected {expected}; "
            f"{int(bad.sum()):,} such values"
        )
    return values.astype(target, copy=False)


def _order(table: pa.Table, seed: int) -> np.ndarray:
    """Row numbers in a random order that does not depend on the order of arrival."""
    flat = [name for name in table.column_names if not pa.types.is_list(table[name].type)]
    order = np.arange(table.num_rows)
    if flat:
        order = pc.sort_indices(table.select(flat), [(name, "ascending") for name in flat]).to_numpy()
    return order[np.random.default_rng(seed).permutation(table.num_rows)]


def _write_file(folder, number, arrays, order, rows_per_record, compression) -> File:
    """Write a file under a passing name, then give it the name that its content decides."""
    path = os.path.join(folder, f"part-{number:05d}.writing")
    size = sum(array.nbytes for array in arrays.values())
    if "://" not in folder and not compression and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, _full(size, folder), path)
    starts = {
        name.removesuffix("/lengths"): np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for name, lengths in arrays.items()
        if name.endswith("/lengths")
    }
    try:
        with tf.io.TFRecordWriter(path, compression) as writer:
            for begin in range(0, len(order), rows_per_record):
                rows = order[begin : begin + rows_per_record]
                example = tf.train.Example()
                for name, array in arrays.items():
                    if name in starts:
                        pieces = [array[starts[name][r] : starts[name][r + 1]] for r in rows]
                        raw = np.concatenate(pieces).tobytes()
                    else:
                        raw = array[rows].tobytes()
                    example.features.feature[name].bytes_list.value.append(raw)
                # Deterministic: the order of a protobuf map is otherwise another in each process.
                writer.write(example.SerializeToString(deterministic=True))
        written = tf.io.gfile.stat(path).length
        digest = _sha256(path)
        final = f"part-{number:05d}-{digest[:8]}.tfrecord"
        tf.io.gfile.rename(path, os.path.join(folder, final), overwrite=True)
    except (OSError, tf.errors.OpError) as error:
        if tf.io.gfile.exists(path):
            tf.io.gfile.remove(path)
        code = getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"{_full(size, folder)} ({error})", path) from error
    return File(final, len(order), written, digest)


def _full(size: int, folder: str) -> str:
    free = "" if "://" in folder else f", {shutil.disk_usage(folder).free:,} bytes are free there"
    return (
        f"could not write a file of about {size:,} bytes{free}. Free some space, or choose another folder that may be "
        "written, and run the export again: an earlier export in this folder is untouched"
    )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
