"""What is in the files? TFRecords that hold record batches: thousands of rows a record, column after column.

    manifest = write("data/train", tables, {"user_id": "int64", "rating": "float32"})
    dataset = read(Manifest.load("data/train"))              # tf.data: one element a record batch

The format, version 2. An export is a folder with files of records and one `manifest.json`.

1. A file is a TFRecord file. For each record: its length (uint64), a checksum of the length (4 bytes), the record, a
   checksum of the record (4 bytes). Checksums are masked CRC-32C.
2. A record is one serialized `tf.train.Example` with a batch of n rows. Each feature is a bytes feature with one value.
   All numbers are little-endian, without padding.
3. A column of numbers is the feature `name`: its n values one after another. `dtype` is int8, int16, int32, int64,
   uint8, uint16, float16, float32 or float64. With `shape` [k] each row has k values, so there are n * k.
4. A ragged column, `shape` [null], has in `name` the values of all rows and in `name/lengths` how many each row has:
   n int32.
5. A column of strings has `dtype` "string": in `name` the UTF-8 bytes of all strings, in `name/offsets` where each
   begins, and where the last ends: n + 1 int32. With a `shape`, which it has as in 3 or 4, the offsets are of strings
   instead of rows, so there is one more of them than strings.
6. With `compression` "ZLIB" each feature is a zlib stream (RFC 1950). In it, numbers of w bytes lie in w planes: the
   first bytes of all numbers, then all second bytes, and so on, since these are more alike than a number's own bytes.
7. There are no nulls. A column's `null` in the manifest is the value that replaced them, also within lists; if that is
   null, nulls were refused. Floats are finite.
8. `manifest.json` has `version`, `columns` (name, dtype, shape, null), `files` (name, rows, bytes, sha256), `rows`,
   `rows_per_record` (only the last record of a file has fewer), `compression` ("" or "ZLIB"), `seed` (of the order
   of rows) and `source`: table, snapshot time, SQL with its parameters, shards.
9. The manifest is written last and renamed into place. Only files that it names are data. Others that are named like
   an export's (`part-<numbers>-<8 hex digits>.tfrecord`, `part-<numbers>.<...>.writing`) are left from one that was
   killed, and the next export removes them.

Decoding takes native TensorFlow ops alone (`parse_single_example`, `decode_raw`), on a TPU host and from `gs://` alike.

Needs: nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

VERSION = 2
MANIFEST = "manifest.json"
NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "float16", "float32", "float64")  # of `decode_raw`
COMPRESSIONS = ("", "ZLIB")
# Handing a record to tf.data costs the same whatever its size; at 2 MB that is little beside copying it.
RECORD_BYTES = 2**21
FILES_AT_ONCE = 8  # files that `read` interleaves
OURS = re.compile(r"part-[\d-]+(-[0-9a-f]{8}\.tfrecord|\.(\w+\.)?writing)")  # what an export may remove


@dataclass(frozen=True)
class Column:
    """A column: name, dtype (a number's NumPy name, or "string"), shape of a row's value, and what replaces a null.

    `shape` is () for one value, (k,) for k values, (None,) for a list of any length. `null` None refuses nulls.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] = ()
    null: int | float | str | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        sized = len(self.shape) == 1 and isinstance(self.shape[0], int) and self.shape[0] > 0
        if self.dtype not in (*NUMBERS, "string") or not (sized or self.shape in ((), (None,))):
            raise ValueError(
                f"column {self.name!r}: {self.dtype} of shape {self.shape}, expected {', '.join(NUMBERS)} or string, "
                "and a shape of (), (k,) or (None,)"
            )
        number = isinstance(self.null, int | float) and self.dtype != "string"
        if self.null is not None and not (
            _fits(np.array([self.null]), self.dtype).all()
            if number
            else self.dtype == "string" and isinstance(self.null, str)
        ):
            raise ValueError(f"column {self.name!r}: null={self.null!r}, expected a value that fits {self.dtype}")

    @property
    def features(self) -> list[str]:
        """The names of the features that hold this column."""
        lengths, offsets = self.shape == (None,), self.dtype == "string"
        return [self.name] + [f"{self.name}/lengths"] * lengths + [f"{self.name}/offsets"] * offsets


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
    rows_per_record: int
    compression: str = ""
    seed: int = 0
    source: dict = field(default_factory=dict)
    made_by: str = "recsys_common"
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
        try:
            with tf.io.gfile.GFile(path) as stream:
                content = json.loads(stream.read())
            version = content["version"]
            if version == VERSION:
                rows = content.pop("rows")
                columns = [Column(**column) for column in content.pop("columns")]
                files = [File(**file) for file in content.pop("files")]
                manifest = cls(folder, columns, files, **content)
                found = manifest.rows
                if manifest.compression not in COMPRESSIONS:
                    raise ValueError(f"compression {manifest.compression!r}, expected '' or 'ZLIB'")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a manifest of this format ({type(error).__name__}: {error}); it was edited or cut short. "
                "Copy it again, or run the export again."
            ) from error
        if version != VERSION:
            raise ValueError(f"{path}: format version {version!r}, expected {VERSION}. Export again with this code.")
        if found != rows:
            raise ValueError(f"{path}: its files have {found:,} rows, it says {rows}. Run the export again.")
        with ThreadPoolExecutor(32) as pool:  # a question to Cloud Storage takes 50 ms, and there may be 10,000
            sizes = pool.map(_size, manifest.paths)
        for file, path, size in zip(files, manifest.paths, sizes, strict=True):
            if size is None:
                raise FileNotFoundError(f"{path}: the manifest names it, but it is gone. Run the export again.")
            if size != file.bytes:
                raise ValueError(
                    f"{path}: {size:,} bytes, the manifest says {file.bytes:,}: copied half-way or changed. "
                    "Run the export again."
                )
        return manifest

    def save(self) -> Manifest:
        """Write `manifest.json` in one step, then remove the files of earlier exports. Returns this manifest.

        Raises:
          ValueError: no rows at all.
        """
        if self.rows == 0:
            raise ValueError(f"{self.folder}: 0 rows to write; the table or its filter is empty")
        content = {name: value for name, value in asdict(self).items() if name != "folder"} | {"rows": self.rows}
        path = os.path.join(self.folder, MANIFEST)
        with tf.io.gfile.GFile(path + ".writing", "w") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
        tf.io.gfile.rename(path + ".writing", path, overwrite=True)
        for name in filter(OURS.fullmatch, foreign(self)):
            tf.io.gfile.remove(os.path.join(self.folder, name))
        return self


def foreign(manifest: Manifest) -> list[str]:
    """Names of the TFRecords, and the unfinished ones, in the folder that the manifest does not name."""
    found, named = tf.io.gfile.listdir(manifest.folder), {file.name for file in manifest.files}
    named.add(f"{MANIFEST}.writing")  # of a manifest that was being replaced: no rows are in it
    return sorted(name for name in found if name.endswith((".tfrecord", ".writing")) and name not in named)


def schema(columns: dict[str, str] | Iterable[Column], like: pa.Schema | None = None) -> list[Column]:
    """`{"user_id": "int64"}` as columns; one that is a list in the Arrow schema `like` becomes ragged.

    Raises:
      ValueError: no columns, or two that would be stored under one name.
    """
    if isinstance(columns, dict):
        ragged = [name for name in columns if like and name in like.names and _is_list(like.field(name).type)]
        columns = [Column(name, dtype, (None,) if name in ragged else ()) for name, dtype in columns.items()]
    columns = list(columns)
    features = [feature for column in columns for feature in column.features]
    if not columns or len(set(features)) < len(features):
        raise ValueError(f"columns stored as {features}: expected at least one, and each name once")
    return columns


def batch_rows(columns: list[Column]) -> int:
    """The power of two that makes records of about 2 MB, if a list has 64 values and a string 32 bytes."""
    width = sum(
        (32 if column.dtype == "string" else np.dtype(column.dtype).itemsize)
        * (column.shape[0] or 64 if column.shape else 1)
        for column in columns
    )
    return 2 ** int(np.clip(np.log2(RECORD_BYTES / width), 8, 16))


def write(
    folder: str | os.PathLike,
    tables: Iterable[pa.Table],
    columns: dict[str, str] | list[Column],
    *,
    seed: int = 0,
    compression: str = "",
    rows_per_record: int | None = None,
    source: dict | None = None,
) -> Manifest:
    """Write one file for each table; replaces an earlier export only once all of the new one is there.

    Args:
      folder: local or `gs://` folder.
      tables: Arrow tables, one a file, each small enough for memory; taken one at a time.
      columns: what to store: `Column`s, or name -> dtype, where a list column of the first table is ragged.
      seed: of the order of rows within files, see `write_file`.
      compression: "" or "ZLIB".
      rows_per_record: rows in a record; None for records of about 2 MB.
      source: what to remember of where the rows came from; goes into the manifest.

    Raises:
      ValueError: no rows at all, a wrong option, a column that is missing, null, not finite or too wide for its dtype.
      OSError: the disk is full or the folder cannot be written; the earlier export is untouched.
    """
    folder, files = os.fspath(folder), []
    for number, table in enumerate(tables):
        columns = schema(columns, table.schema)
        rows_per_record = rows_per_record or batch_rows(columns)
        where = f"{folder}, file {number}"
        files.append(
            write_file(folder, f"part-{number:05d}", table, columns, rows_per_record, seed, compression, where)
        )
    return Manifest(folder, schema(columns), files, rows_per_record or 1, compression, seed, source or {}).save()


def write_file(
    folder: str,
    name: str,
    table: pa.Table,
    columns: list[Column],
    rows_per_record: int,
    seed: int,
    compression: str,
    where: str,
) -> File:
    """Write one table as one file, under a passing name first; the final name is `name` and part of the file's hash.

    The order of the rows depends on the rows and the seed alone and is random otherwise, because the order in which a
    warehouse hands rows out is neither. So whoever writes the same rows again writes the same file.

    Args:
      where: what to call the table in an error.

    Raises:
      ValueError: a wrong option, a column that is missing, null, not finite or too wide for its dtype; names the row.
      OSError: the disk is full or the folder cannot be written; no part of the file is left.
    """
    if rows_per_record < 1 or compression not in COMPRESSIONS:
        raise ValueError(
            f"{where}: rows_per_record {rows_per_record}, compression {compression!r}; expected 1 or more, '' or 'ZLIB'"
        )
    arrays = []
    for column in columns:
        try:
            arrays.append(_stored(table, column, where))
        except pa.ArrowException as error:
            raise ValueError(
                f"{where}: column {column.name!r}: {error}. A file holds up to 2 GB of strings, and 2**31 values of "
                "lists, of a column: write fewer rows to a file."
            ) from error
    order = _order([_bits(array) for array in arrays], seed)
    arrays = [array.take(pa.array(order)) for array in arrays]
    size = sum(array.nbytes for array in arrays)
    path = os.path.join(folder, f"{name}.{uuid.uuid4().hex}.writing")  # two workers may be writing the same
    tf.io.gfile.makedirs(folder)
    if "://" not in folder and not compression and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, _full(size, folder), path)
    try:
        with tf.io.TFRecordWriter(path) as writer:
            for begin in range(0, len(order), rows_per_record):
                example = tf.train.Example()
                for column, array in zip(columns, arrays, strict=True):
                    parts = _parts(array.slice(begin, rows_per_record))
                    for feature, numbers in zip(column.features, parts, strict=True):
                        example.features.feature[feature].bytes_list.value.append(_packed(numbers, compression))
                # Deterministic: the order of a protobuf map is otherwise another in each process.
                writer.write(example.SerializeToString(deterministic=True))
        written, digest = _size(path), _sha256(path)  # read back: what counts is what was stored
        final = f"{name}-{digest[:8]}.tfrecord"
        tf.io.gfile.rename(path, os.path.join(folder, final), overwrite=True)
    except (OSError, tf.errors.OpError) as error:
        if tf.io.gfile.exists(path):
            tf.io.gfile.remove(path)
        code = getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"{_full(size, folder)} ({error})", path) from error
    return File(final, len(order), written, digest)


def verify(manifest: Manifest) -> None:
    """Read every byte again: hashes, rows in every column, files that do not belong.

    Raises:
      ValueError: naming the file and what differs.
    """
    if found := foreign(manifest):
        raise ValueError(
            f"{manifest.folder}: {', '.join(found)}: not in the manifest. Readers leave such files out; if their rows "
            "are wanted, export again, otherwise remove them."
        )
    for file, path in zip(manifest.files, manifest.paths, strict=True):
        found = _sha256(path)
        if found != file.sha256:
            raise ValueError(
                f"{path}: sha256 {found[:12]}..., the manifest says {file.sha256[:12]}...: the file changed. "
                "Run the export again."
            )
        batches = tf.data.TFRecordDataset(path).map(decoder(manifest))
        rows = np.zeros(len(manifest.columns), int)
        for batch in batches:
            rows += [batch[column.name].shape[0] for column in manifest.columns]
        for column, count in zip(manifest.columns, rows, strict=True):
            if count != file.rows:
                raise ValueError(f"{path}: {count:,} rows of {column.name!r}, the manifest says {file.rows:,}")


def decoder(manifest: Manifest, columns: Iterable[str] | None = None):
    """A function from one serialized record (string scalar) to `{column: tensor [rows, ...]}`, for `Dataset.map`.

    Args:
      columns: names to decode; None for all. What is left out is not even copied.

    Raises:
      ValueError: a name that the export does not have.
    """
    wanted = None if columns is None else set(columns)
    chosen = [column for column in manifest.columns if wanted is None or column.name in wanted]
    if missing := sorted((wanted or set()) - {column.name for column in chosen}):
        there = ", ".join(f"{column.name} ({column.dtype})" for column in manifest.columns)
        raise ValueError(f"{manifest.folder}: no column {', '.join(missing)}; the export has {there}")
    spec = {feature: tf.io.FixedLenFeature([], tf.string) for column in chosen for feature in column.features}

    def numbers(feature: tf.Tensor, dtype: str) -> tf.Tensor:
        dtype = tf.as_dtype(dtype)
        if not manifest.compression:
            return tf.io.decode_raw(feature, dtype)
        planes = tf.io.decode_raw(tf.io.decode_compressed(feature, manifest.compression), tf.uint8)
        return tf.reshape(tf.bitcast(tf.transpose(tf.reshape(planes, [dtype.size, -1])), dtype), [-1])

    def decode(record: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
        example = tf.io.parse_single_example(record, spec)
        batch = {}
        for column in chosen:
            if column.dtype == "string":
                offsets, data = numbers(example[f"{column.name}/offsets"], "int32"), example[column.name]
                data = tf.io.decode_compressed(data, manifest.compression) if manifest.compression else data
                values = _strings(data, offsets, manifest.rows_per_record)
            else:
                values = numbers(example[column.name], column.dtype)
            if column.shape == (None,):
                lengths = numbers(example[f"{column.name}/lengths"], "int32")
                values = tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)
            elif column.shape:
                values = tf.reshape(values, [-1, *column.shape])
            batch[column.name] = values
        return batch

    return decode


def read(manifest: Manifest, columns: Iterable[str] | None = None) -> tf.data.Dataset:
    """All record batches, several files at a time: elements `{column: tensor [rows, ...]}`; see `decoder`."""
    decode = decoder(manifest, columns)
    return tf.data.Dataset.from_tensor_slices(manifest.paths).interleave(
        lambda path: tf.data.TFRecordDataset(path).map(decode),
        cycle_length=FILES_AT_ONCE,
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def _strings(data: tf.Tensor, offsets: tf.Tensor, rows: int) -> tf.Tensor:
    """The strings in `data` [] between `offsets` [n + 1], n of them.

    `substr` copies its input once for every piece that it cuts from it. Cutting into sixteenths, and those again,
    copies each byte sixteen times a level; cutting string after string would copy all of it for each string.
    """
    count = tf.shape(offsets)[0] - 1
    size = 16
    while size < rows:
        size *= 16
    groups = tf.maximum(-(-count // size), 1)
    offsets = tf.concat([offsets, tf.fill([groups * size - count], offsets[-1])], 0)
    pieces, begin = tf.reshape(data, [1, 1]), tf.zeros([1, 1], tf.int32)
    while size:
        cut = offsets[::size]
        starts, ends = (tf.reshape(at, [tf.shape(pieces)[0], -1]) for at in (cut[:-1], cut[1:]))
        pieces = tf.reshape(tf.strings.substr(pieces, starts - begin, ends - starts), [-1, 1])
        begin, size = tf.reshape(starts, [-1, 1]), size // 16
    return pieces[:count, 0]


def _stored(table: pa.Table, column: Column, where: str) -> pa.Array:
    """A column as an Arrow array of what is stored, without nulls."""
    if (count := table.column_names.count(column.name)) != 1:
        found = f"{'more than one' if count else 'no'} column {column.name!r}"
        raise ValueError(f"{where}: {found}; the table has {', '.join(table.column_names)}")
    array = pa.concat_arrays(table[column.name].chunks) if table.num_rows else pa.array([], table[column.name].type)
    listed = _is_list(array.type)
    if listed != bool(column.shape):
        raise ValueError(f"{where}: column {column.name!r} is {array.type}, expected shape {column.shape} of a value")
    if not listed:
        return _values(array, column, where)
    if array.null_count:  # BigQuery has no null lists, other sources have
        row = pc.index(array.is_null(), True).as_py()
        raise ValueError(
            f"{where}: column {column.name!r} has {array.null_count:,} nulls for lists, first in row {row}; expected "
            "lists. Drop these rows, or put a list there, such as an empty one, before the export."
        )
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    values = _values(array.flatten(), column, where, ends)
    if column.shape == (None,):
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), values)
    if (wrong := lengths != column.shape[0]).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{where}: column {column.name!r}, row {row} has {lengths[row]} values, expected {column.shape[0]}"
        )
    return pa.FixedSizeListArray.from_arrays(values, column.shape[0])


def _values(array: pa.Array, column: Column, where: str, ends: np.ndarray | None = None) -> pa.Array:
    """Single values as their stored type; the first that does not fit is named.

    `ends` [rows]: if these are the values of lists, where each row's end.
    """

    def row(value: int) -> int:
        return value if ends is None else int(np.searchsorted(ends, value, side="right"))

    if array.null_count and column.null is None:
        first = row(pc.index(array.is_null(), True).as_py())
        raise ValueError(
            f"{where}: column {column.name!r} has {array.null_count:,} nulls, first in row {first}; expected values. "
            "Replace or drop them in the SQL that makes the table, or say what stands for them: Column(..., null=0)."
        )
    kind, text = array.type, column.dtype == "string"
    if pa.types.is_null(kind):  # of nulls alone, or of no values at all
        array = array.cast(pa.string() if text else pa.int8())
    elif text and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{where}: column {column.name!r} holds {kind}, expected strings; CAST it in SQL")
    elif not text and not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(
            f"{where}: column {column.name!r} holds {kind}, expected numbers; CAST it, or give it an id, in SQL"
        )
    if text:
        return (array.fill_null(column.null) if array.null_count else array).cast(pa.string())
    nulls = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    if nulls is not None:  # what stands for them may not fit the type that they have here
        array = array.fill_null(pa.scalar(False).cast(array.type))
    values = array.to_numpy(zero_copy_only=False)
    fits = _fits(values, column.dtype)
    if not fits.all():
        first, target = int(np.argmin(fits)), np.dtype(column.dtype)
        limits = np.iinfo(target) if target.kind in "iu" else None
        expected = f"a whole number of {limits.min} to {limits.max}" if limits else "a finite number that fits"
        raise ValueError(
            f"{where}: column {column.name!r}, row {row(first)} holds {values[first]}, expected {expected} "
            f"({column.dtype}); {int((~fits).sum()):,} such values"
        )
    stored = values.astype(column.dtype, copy=False)
    return pa.array(stored if nulls is None else np.where(nulls, stored.dtype.type(column.null), stored))


def _fits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Which values `dtype` can hold: an integer's whole ones within its limits; of floats the finite ones, which lose
    digits in a narrower float, and of integers in a float those that lose nothing: an id must not become another."""
    target = np.dtype(dtype)
    if target.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            stored = values.astype(target, copy=False)
            return np.isfinite(stored) if values.dtype.kind == "f" else stored.astype(values.dtype) == values
    limits = np.iinfo(target)
    if values.dtype.kind != "f":
        return (values >= limits.min) & (values <= limits.max)
    # In float64 both limits of every type are exact, but the upper one of int64, which is one above.
    values = values.astype(np.float64, copy=False)
    return (values >= limits.min) & (values < limits.max + 1.0) & (values == np.round(values))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _parts(array: pa.Array) -> list[np.ndarray]:
    """What a batch of a column is stored as, in the order of `Column.features`."""
    if _is_list(array.type):
        values = _parts(array.flatten())
        if pa.types.is_fixed_size_list(array.type):
            return values
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        return [values[0], lengths.astype("<i4", copy=False), *values[1:]]
    if not pa.types.is_string(array.type):
        values = array.to_numpy()
        return [values.astype(values.dtype.newbyteorder("<"), copy=False)]
    _, offsets, data = array.buffers()
    offsets = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
    return [data, (offsets - offsets[0]).astype("<i4", copy=False)]


def _packed(numbers: np.ndarray, compression: str) -> bytes:
    """What a feature holds. zlib's fastest level: on planes it is three times as fast as the next and loses 3%."""
    if not compression:
        return numbers.tobytes()
    planes = numbers.view(np.uint8).reshape(len(numbers), -1).T if len(numbers) else numbers
    return zlib.compress(planes.tobytes(), 1)


def _bits(array: pa.Array) -> np.ndarray:
    """One unsigned number for each row that its value decides; of lists and strings a hash."""
    if not (_is_list(array.type) or pa.types.is_string(array.type)):
        values = array.to_numpy()
        return values.view(f"u{values.itemsize}")
    # By blocks: numbers of 8 bytes for every character of a large file would not fit into memory.
    blocks = [_hashes(array.slice(begin, 2**12)) for begin in range(0, len(array), 2**12)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint64)


def _hashes(array: pa.Array) -> np.ndarray:
    """A hash of each list or string: the sum over its values or bytes of a hash of value and place."""
    lengths = pc.list_value_length(array) if _is_list(array.type) else pc.binary_length(array)
    lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    places = _mix(np.arange(1, lengths.max(initial=0) + 1))
    inner = _bits(array.flatten()) if _is_list(array.type) else _parts(array)[0]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(inner ^ places[place]))])
    return sums[ends[1:]] - sums[ends[:-1]]


def _mix(key: np.ndarray) -> np.ndarray:
    """64 bits of each number, of which every bit depends on all of its own (the finalizer of SplitMix64)."""
    key = key.astype(np.uint64)
    key ^= key >> np.uint64(30)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(27)
    key *= np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return key


def _order(columns: list[np.ndarray], seed: int) -> np.ndarray:
    """Row numbers by a hash of the rows: by its first byte, then within each of these 256 parts.

    Sorting 4 M hashes at once takes more than twice as long, since they do not fit into the processor's cache.
    """
    key = np.repeat(_mix(np.array([seed % 2**64], np.uint64)), len(columns[0]))
    for begin in range(0, len(key), 2**15):
        block = key[begin : begin + 2**15]
        for bits in columns:
            block[:] = _mix(block ^ bits[begin : begin + 2**15])
    first = (key >> np.uint64(56)).astype(np.uint8)
    order, begin = np.argsort(first, kind="stable"), 0
    key = key[order]
    for end in np.cumsum(np.bincount(first, minlength=256)):
        order[begin:end] = order[begin:end][np.argsort(key[begin:end])]
        begin = end
    return order


def _full(size: int, folder: str) -> str:
    free = "" if "://" in folder else f", {shutil.disk_usage(folder).free:,} bytes are free there"
    return (
        f"could not write a file of about {size:,} bytes{free}. Free some space, or choose another folder that may be "
        "written, and run the export again: an earlier export in this folder is untouched"
    )


def _size(path: str) -> int | None:
    """Bytes of a file, None where there is none."""
    try:
        return tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
        return None


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
