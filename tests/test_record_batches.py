"""Record batches and the input pipeline over them: no row lost, none doubled, nothing half-written taken for whole."""

import datetime
import inspect
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from recsys_common import input_pipeline, record_batches
from recsys_common.datasets import simulated
from recsys_common.record_batches import NUMBERS, Column, Manifest

COLUMNS = {"user_index": "int32", "item_index": "int64", "rating": "float32"}


def tables(*sizes: int, start: int = 0) -> list[pa.Table]:
    """One table for each size; `item_index` numbers the rows of all of them."""
    made = []
    for size in sizes:
        rows = np.arange(start, start + size)
        made.append(pa.table({"user_index": rows % 97, "item_index": rows, "rating": (rows % 5).astype("f4")}))
        start += size
    return made


def rows_of(dataset) -> list[tuple]:
    return [row for batch in dataset for row in zip(*(batch[name].numpy().tolist() for name in COLUMNS), strict=True)]


def expected(rows: int) -> list[tuple]:
    return [(row % 97, row, float(row % 5)) for row in range(rows)]


def multiset(rows) -> Counter:
    """Rows as often as they come; floats by all their digits."""
    return Counter(map(repr, rows))


def python_rows(manifest: Manifest) -> list[list]:
    """All rows through `read`, as Python values, in the order of the columns."""
    rows = []
    for batch in record_batches.read(manifest):
        columns = [batch[column.name] for column in manifest.columns]
        lists = [c.to_list() if isinstance(c, tf.RaggedTensor) else c.numpy().tolist() for c in columns]
        rows += map(list, zip(*map(text, lists), strict=True))
    return rows


def text(values):
    """Bytes within lists as strings."""
    return [text(v) if isinstance(v, list) else v.decode() if isinstance(v, bytes) else v for v in values]


# The format ----------------------------------------------------------------------------------------------


def plain_reader(folder):
    """Rows of an export, by the page alone: nothing of recsys_common in here."""
    manifest = json.loads(Path(folder, "manifest.json").read_text())
    paths = [os.path.join(folder, file["name"]) for file in manifest["files"]]
    for record in tf.data.TFRecordDataset(paths, manifest["compression"]):
        features, batch = tf.train.Example.FromString(record.numpy()).features.feature, []
        for column in manifest["columns"]:
            name, dtype, shape = column["name"], column["dtype"], column["shape"]
            stored = features[name].bytes_list.value[0]
            if dtype == "string":
                at = tf.io.decode_raw(features[f"{name}/offsets"].bytes_list.value[0], tf.int32).numpy()
                values = [stored[begin:end].decode() for begin, end in zip(at[:-1], at[1:], strict=True)]
            else:
                values = tf.io.decode_raw(stored, dtype).numpy().tolist()
            if shape == [None]:
                lengths = tf.io.decode_raw(features[f"{name}/lengths"].bytes_list.value[0], tf.int32)
                values = [values[end - length : end] for end, length in zip(tf.cumsum(lengths), lengths, strict=True)]
            elif shape:
                values = [values[row : row + shape[0]] for row in range(0, len(values), shape[0])]
            batch.append(values)
        yield from zip(*batch, strict=True)


TEXTS = ["", "a", "nul\0inside", 'quo"te, and\nline', "🎬 émoji", "x" * 300, "\0", "\0\0"]


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_a_reader_without_the_project_needs_the_page_alone(tmp_path, compression):
    lines = inspect.getsource(plain_reader).splitlines()
    assert len(lines) - 2 <= 20  # without its name and its docstring
    rng, rows = np.random.default_rng(1), 230
    numbers = {dtype: rng.integers(0, 120, rows).astype(dtype) for dtype in NUMBERS}
    numbers |= {"int64": rng.integers(-(2**63), 2**63, rows), "float64": rng.normal(size=rows)}
    lengths = rng.integers(0, 5, rows)
    lists = [rng.integers(-(2**31), 2**31, length).tolist() for length in lengths]
    words = [rng.choice(TEXTS, length).tolist() for length in lengths]
    table = pa.table(
        numbers
        | {
            "pair": pa.array(rng.normal(size=(rows, 2)).tolist(), pa.list_(pa.float64(), 2)),
            "history": lists,
            "title": rng.choice(TEXTS, rows).tolist(),
            "words": words,
            "names": [[word, word + "!"] for word in rng.choice(TEXTS, rows)],
            "age": pa.array([None if row % 3 == 0 else row for row in range(rows)]),
        }
    )
    columns = [Column(dtype, dtype) for dtype in NUMBERS] + [
        Column("pair", "float64", (2,)),
        Column("history", "int32", (None,)),
        Column("title", "string"),
        Column("words", "string", (None,)),
        Column("names", "string", (2,)),
        Column("age", "int16", null=-1),
    ]
    # By hand: what comes back is what went in, with -1 for a null.
    want = [tuple(row.values())[:-1] + (-1 if row["age"] is None else row["age"],) for row in table.to_pylist()]
    parts = [table[:100], table[100:101], table[101:101], table[101:]]
    manifest = record_batches.write(tmp_path, parts, columns, rows_per_record=64, compression=compression)
    assert multiset(plain_reader(tmp_path)) == multiset(want)
    assert multiset(map(tuple, python_rows(manifest))) == multiset(want)
    record_batches.verify(Manifest.load(tmp_path))
    saved = json.loads((tmp_path / "manifest.json").read_text())
    assert saved["rows"] == rows and saved["version"] == 2 and saved["rows_per_record"] == 64
    assert saved["columns"][-1] == {"name": "age", "dtype": "int16", "shape": [], "null": -1}
    assert saved["columns"][-5] == {"name": "history", "dtype": "int32", "shape": [None], "null": None}


def values(dtype: str):
    """Values of a dtype, its limits among them."""
    if dtype == "string":
        return st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))
    if dtype.startswith("float"):
        return st.floats(width=int(dtype[5:]), allow_nan=False, allow_infinity=False)
    limits = np.iinfo(dtype)
    return st.one_of(st.sampled_from([limits.min, limits.max, 0]), st.integers(int(limits.min), int(limits.max)))


@st.composite
def exports(draw):
    """Arrow tables with their columns, for one export: of a few drawn values, in any number of rows."""
    kinds = st.tuples(st.sampled_from([*NUMBERS, "string"]), st.sampled_from([(), (None,), (1,), (3,)]))
    columns = [Column(f"c{n}", *kind) for n, kind in enumerate(draw(st.lists(kinds, min_size=1, max_size=4)))]
    pools = [draw(st.lists(values(column.dtype), min_size=1, max_size=6)) for column in columns]
    rng, made = np.random.default_rng(draw(st.integers(0, 2**32))), []
    for rows in draw(st.lists(st.integers(0, 500), min_size=1, max_size=3)):
        skip, arrays = draw(st.integers(0, 3)), []
        for column, pool in zip(columns, pools, strict=True):
            kind = pa.string() if column.dtype == "string" else pa.from_numpy_dtype(column.dtype)

            def some(number, pool=pool):
                return [pool[index] for index in rng.integers(0, len(pool), number)]

            if column.shape == (None,):
                array = pa.array([some(n) for n in rng.integers(0, 4, rows + skip)], pa.list_(kind))
            elif column.shape:
                array = pa.array([some(column.shape[0]) for _ in range(rows + skip)], pa.list_(kind, *column.shape))
            else:
                array = pa.array(some(rows + skip), kind)
            at = sorted(rng.integers(0, rows + 1, draw(st.integers(0, 2))) + skip)
            ends = zip([skip, *at], [*at, rows + skip], strict=True)  # slices with offsets into one buffer
            arrays.append(pa.chunked_array([array[begin:end] for begin, end in ends], array.type))
        made.append(pa.table(arrays, [column.name for column in columns]))
    return made, columns


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    export=exports(),
    rows_per_record=st.integers(1, 600),
    seed=st.integers(-(2**63), 2**64),
    compression=st.sampled_from(["", "GZIP"]),
)
def test_any_table_comes_back(tmp_path_factory, export, rows_per_record, seed, compression):
    made, columns = export
    folder, options = tmp_path_factory.mktemp("any"), {"rows_per_record": rows_per_record, "compression": compression}
    want = [row.values() for table in made for row in table.to_pylist()]
    if not want:
        with pytest.raises(ValueError, match="0 rows to write"):
            record_batches.write(folder, made, columns, seed=seed, **options)
        return
    record_batches.write(folder, made, columns, seed=seed, **options)
    manifest = Manifest.load(folder)
    record_batches.verify(manifest)
    assert multiset(python_rows(manifest)) == multiset(map(list, want))
    sizes = [batch[columns[0].name].shape[0] for batch in record_batches.read(manifest)]
    assert len(sizes) == sum(-(-table.num_rows // rows_per_record) for table in made)


@pytest.mark.parametrize("rows", [1, 16, 17, 4096])
def test_strings_are_cut_apart_whatever_their_number(rows):
    """`_strings` cuts by sixteens; counts around their powers, and far more strings than a record has rows."""
    rng = np.random.default_rng(rows)
    for count in (0, 1, 2, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 65537):
        pieces = [b"%x" % number * length for number, length in enumerate(rng.integers(0, 4, count))]
        offsets = np.concatenate([[0], np.cumsum(list(map(len, pieces)))]).astype("i4")
        found = record_batches._strings(tf.constant(b"".join(pieces)), tf.constant(offsets), rows)
        assert found.numpy().tolist() == pieces, count


def test_lists_of_far_more_strings_than_rows(tmp_path):
    lists = [[f"{row}-{place}" for place in range(7000)] for row in range(5)]
    table = pa.table({"words": lists})
    manifest = record_batches.write(tmp_path, [table], [Column("words", "string", (None,))], rows_per_record=2)
    assert sorted(words for (words,) in python_rows(manifest)) == lists


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_every_row_comes_back_once(tmp_path, compression):
    sizes = (1000, 1, 257)
    written = record_batches.write(tmp_path, tables(*sizes), COLUMNS, rows_per_record=100, compression=compression)
    manifest = Manifest.load(tmp_path)
    assert manifest == written
    assert manifest.rows == 1258 and [file.rows for file in manifest.files] == list(sizes)
    assert sorted(rows_of(record_batches.read(manifest)), key=lambda row: row[1]) == expected(1258)
    record_batches.verify(manifest)


def test_bytes_a_row_are_the_columns_widths(tmp_path):
    manifest = record_batches.write(tmp_path, tables(100_000), COLUMNS)
    assert 16 <= manifest.bytes / manifest.rows < 16 * 1.01  # 4 + 8 + 4


def test_the_order_is_random_and_does_not_depend_on_arrival(tmp_path):
    (table,) = tables(5000)
    backwards = table.take(np.arange(5000)[::-1])
    orders = [
        [row[1] for row in rows_of(record_batches.read(record_batches.write(tmp_path / name, [t], COLUMNS, seed=seed)))]
        for name, t, seed in (("a", table, 1), ("b", backwards, 1), ("c", table, 2))
    ]
    assert orders[0] == orders[1] != orders[2]
    # Random: the rank correlation of a random permutation of 5,000 has a standard deviation of 1 / sqrt(4,999).
    assert abs(np.corrcoef(orders[0], np.arange(5000))[0, 1]) < 5 / np.sqrt(4999)


def test_ragged_columns(tmp_path):
    table = pa.table({"n": [3, 1, 2], "history": pa.array([[7, 8, 9], [], [5]], pa.list_(pa.int64()))})
    manifest = record_batches.write(tmp_path, [table], {"n": "int32", "history": "int32"}, rows_per_record=2)
    found = {}
    for batch in record_batches.read(Manifest.load(tmp_path)):
        assert batch["history"].dtype == tf.int32
        found |= dict(zip(batch["n"].numpy().tolist(), batch["history"].to_list(), strict=True))
    assert found == {3: [7, 8, 9], 1: [], 2: [5]}
    assert [column.shape for column in manifest.columns] == [(), (None,)]
    record_batches.verify(manifest)


def test_a_file_can_be_read_from_the_description_alone(tmp_path):
    """The module's docstring says enough to decode a record with nothing but the wire format of TFRecord."""
    manifest = record_batches.write(tmp_path, tables(10), COLUMNS)
    raw = Path(manifest.paths[0]).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    example = tf.train.Example.FromString(raw[12 : 12 + length])
    items = np.frombuffer(example.features.feature["item_index"].bytes_list.value[0], "<i8")
    users = np.frombuffer(example.features.feature["user_index"].bytes_list.value[0], "<i4")
    assert sorted(items) == list(range(10)) and (users == items % 97).all()


def test_a_second_export_replaces_the_first_and_leaves_nothing_behind(tmp_path):
    record_batches.write(tmp_path, tables(10, 10, 10), COLUMNS)
    manifest = record_batches.write(tmp_path, tables(20), COLUMNS)
    assert sorted(os.listdir(tmp_path)) == sorted([manifest.files[0].name, "manifest.json"])
    assert Manifest.load(tmp_path).rows == 20


@pytest.mark.parametrize(
    ("column", "values", "dtype", "says"),
    [
        (
            "item_index",
            [1, 2**31],
            "int32",
            "'item_index', value 1 is 2147483648, expected a whole number of -2147483648 to 2147483647 (int32)",
        ),
        ("item_index", [1, None], "int64", "'item_index' is null in 1 rows, first in row 1"),
        ("rating", [1.0, float("nan")], "float32", "'rating', value 1 is nan, expected a finite number"),
        ("rating", [float("inf"), 1.0], "float32", "'rating', value 0 is inf, expected a finite number"),
        ("rating", [1.0, 2.5], "int32", "'rating', value 1 is 2.5, expected a whole number of"),
        ("rating", ["a", "b"], "float32", "'rating' holds string, expected numbers"),
        ("missing", [1, 2], "int32", "no column 'user_index'; the table has missing"),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path, column, values, dtype, says):
    name = "user_index" if column == "missing" else column
    with pytest.raises(ValueError, match="file 0") as error:
        record_batches.write(tmp_path, [pa.table({column: values})], {name: dtype})
    assert says in str(error.value)
    assert not (tmp_path / "manifest.json").exists()


def test_a_failure_half_way_keeps_the_earlier_export(tmp_path):
    before = record_batches.write(tmp_path, tables(50), COLUMNS)
    bad = pa.table({"user_index": [1], "item_index": [1], "rating": [float("nan")]})
    with pytest.raises(ValueError, match="nan"):
        record_batches.write(tmp_path, [*tables(10, start=50), bad], COLUMNS)
    assert Manifest.load(tmp_path) == before
    assert sorted(rows_of(record_batches.read(before)), key=lambda row: row[1]) == expected(50)


@pytest.mark.parametrize("empty", [[], [tables(0)[0]]])
def test_nothing_to_write_is_an_error(tmp_path, empty):
    with pytest.raises(ValueError, match="0 rows to write; the table or its filter is empty"):
        record_batches.write(tmp_path, empty, COLUMNS)


def test_an_export_without_a_manifest_is_not_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: no manifest; the folder does not exist"):
        Manifest.load(tmp_path / "never")
    record_batches.write(tmp_path, tables(10), COLUMNS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest; the folder holds 1 other files.*run the export again"):
        Manifest.load(tmp_path)


def test_files_that_changed_are_found(tmp_path):
    manifest = record_batches.write(tmp_path, tables(1000, 1000), COLUMNS)
    path = tmp_path / manifest.files[1].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{path.name}: {len(whole) - 100:,} bytes, the manifest says {len(whole):,}"):
        Manifest.load(tmp_path)
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(ValueError, match=f"{path.name}: sha256"):
        record_batches.verify(Manifest.load(tmp_path))
    with pytest.raises(tf.errors.DataLossError):  # TFRecord's own checksum: a pass over the data cannot miss it
        rows_of(record_batches.read(manifest))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name}: the manifest names it, but it is gone"):
        Manifest.load(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    record_batches.write(tmp_path, tables(10), COLUMNS)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99, expected 2"):
        Manifest.load(tmp_path)


def test_a_disk_that_fills_says_so_and_keeps_the_earlier_export(tmp_path):
    before = record_batches.write(tmp_path, tables(1000), COLUMNS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write a file of about 1,600,000 bytes.*earlier.*untouched"):
            record_batches.write(tmp_path, tables(100_000), COLUMNS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert Manifest.load(tmp_path) == before
    assert not list(tmp_path.glob("*.writing"))


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = record_batches.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(record_batches.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="1,000 bytes are free there"):
        record_batches.write(tmp_path, tables(1000), COLUMNS)


def test_a_killed_export_leaves_the_old_one_and_running_it_again_finishes(tmp_path):
    old = record_batches.write(tmp_path, tables(500), COLUMNS)
    code = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_record_batches import COLUMNS, record_batches, tables
        def slowly():
            for table in tables(*[2000] * 1000):
                print("table", flush=True)
                yield table
        record_batches.write({str(tmp_path)!r}, slowly(), COLUMNS)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob("part-*"))) > 1  # it had begun
    assert Manifest.load(tmp_path) == old
    assert sorted(rows_of(record_batches.read(old)), key=lambda row: row[1]) == expected(500)
    again = record_batches.write(tmp_path, tables(700, 50), COLUMNS)
    assert sorted(rows_of(record_batches.read(Manifest.load(tmp_path))), key=lambda row: row[1]) == expected(750)
    assert sorted(os.listdir(tmp_path)) == sorted([*(file.name for file in again.files), "manifest.json"])


# The input pipeline ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return record_batches.write(folder, tables(3000, 10, 2000, 990), COLUMNS, rows_per_record=64)


@pytest.mark.parametrize("seed", [None, 1])
def test_each_pass_reads_each_row_once(manifest, seed):
    dataset = input_pipeline.batches(manifest, 256, epochs=2, seed=seed, drop_remainder=False)
    rows = rows_of(dataset)
    assert sorted(rows[:6000], key=lambda row: row[1]) == expected(6000)
    assert sorted(rows[6000:], key=lambda row: row[1]) == expected(6000)
    assert int(dataset.cardinality()) == 2 * input_pipeline.steps_per_epoch(manifest, 256, False) == 48


def test_the_order_is_a_function_of_seed_and_epoch(manifest):
    def order(seed, epochs=1):
        batches = input_pipeline.batches(manifest, 500, epochs=epochs, seed=seed)
        return [row[1] for row in rows_of(batches)]

    assert order(3) == order(3) == order(3, epochs=2)[:6000]
    assert order(3) != order(4)
    first, second = np.split(np.array(order(3, epochs=2)), 2)
    assert (first != second).mean() > 0.99
    # Well mixed: neighbours in the stream are far apart in the files (a third of the range for a perfect shuffle).
    assert np.abs(np.diff(first)).mean() > 6000 / 3 * 0.5


def test_shapes_are_static_and_the_remainder_is_dropped(manifest):
    dataset = input_pipeline.batches(manifest, 700, seed=1)
    assert {name: spec.shape.as_list() for name, spec in dataset.element_spec.items()} == {
        name: [700] for name in COLUMNS
    }
    assert [len(batch["rating"]) for batch in dataset] == [700] * 8  # 6,000 = 8 x 700 + 400
    assert input_pipeline.steps_per_epoch(manifest, 700) == 8


def test_a_batch_larger_than_the_data_is_refused(manifest):
    with pytest.raises(ValueError, match=r"batch_size 6,001 is more than the 6,000 rows of .*: not one full batch"):
        input_pipeline.batches(manifest, 6001)


def test_the_pipeline_is_native_and_serializes(manifest):
    """A TPU host gets the graph alone: nothing in it may call back into this Python process."""
    dataset = input_pipeline.batches(manifest, 500, seed=1)
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=dataset._variant_tensor, strip_device_assignment=True)
    definition = tf.compat.v1.GraphDef.FromString(graph.numpy())
    ops = {node.op for node in definition.node} | {n.op for f in definition.library.function for n in f.node_def}
    assert "DecodeRaw" in ops
    assert not {op for op in ops if "PyFunc" in op}


def test_training_ends_without_running_out_of_data(manifest):
    """`steps_per_epoch` from the manifest and the dataset's own length agree (pain 3)."""
    dataset = input_pipeline.batches(manifest, 700, epochs=3, seed=1)
    iterator = iter(dataset)
    for _ in range(3 * input_pipeline.steps_per_epoch(manifest, 700)):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_file_that_vanishes_in_mid_pass_is_named(tmp_path):
    manifest = record_batches.write(tmp_path, tables(1000, 1000), COLUMNS, rows_per_record=10)
    os.remove(manifest.paths[1])
    with pytest.raises(tf.errors.NotFoundError, match=manifest.files[1].name):
        rows_of(input_pipeline.batches(manifest, 100))


def test_reading_record_batches_is_far_faster_than_rows(manifest, tmp_path):
    """The claim of chapter 1, with a wide margin; the benchmarks have the figures."""
    big = record_batches.write(tmp_path, tables(400_000), COLUMNS)

    def rows_per_second(dataset, rows):
        start = time.perf_counter()
        for _ in dataset:
            pass
        return rows / (time.perf_counter() - start)

    fast = max(rows_per_second(input_pipeline.batches(big, 8192, seed=1, epochs=5), 2_000_000) for _ in range(2))
    by_row = record_batches.read(big).unbatch().shuffle(8192).batch(8192).take(6)
    assert fast > 5 * rows_per_second(by_row, 6 * 8192)
