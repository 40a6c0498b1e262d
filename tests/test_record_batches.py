"""Record batches: no row lost, none doubled, nothing half-written taken for whole."""

import inspect
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from recsys_common import record_batches
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
    return [row for batch in python_batches(manifest) for row in batch]


def python_batches(manifest: Manifest) -> list[list]:
    """The rows of each record batch."""
    batches = []
    for batch in record_batches.read(manifest):
        columns = [batch[column.name] for column in manifest.columns]
        lists = [c.to_list() if isinstance(c, tf.RaggedTensor) else c.numpy().tolist() for c in columns]
        batches.append(list(map(list, zip(*map(text, lists), strict=True))))
    return batches


def text(values):
    """Bytes within lists as strings."""
    return [text(v) if isinstance(v, list) else v.decode() if isinstance(v, bytes) else v for v in values]


# The format ----------------------------------------------------------------------------------------------


def plain_reader(folder):
    """Rows of an export, by the page alone, in twenty lines: nothing of recsys_common in here."""
    manifest = json.loads(Path(folder, "manifest.json").read_text())

    def stored(feature):
        return tf.io.decode_compressed(features[feature].bytes_list.value[0], manifest["compression"]).numpy()

    def numbers(feature, dtype):
        planes = tf.as_dtype(dtype).size if manifest["compression"] else 1
        joined = np.frombuffer(stored(feature), np.uint8).reshape(planes, -1).T.tobytes()
        return tf.io.decode_raw(joined, dtype).numpy().tolist()

    for record in tf.data.TFRecordDataset([os.path.join(folder, file["name"]) for file in manifest["files"]]):
        features, batch = tf.train.Example.FromString(record.numpy()).features.feature, []
        for name, dtype, shape in ((c["name"], c["dtype"], c["shape"]) for c in manifest["columns"]):
            at = itertools.pairwise(numbers(f"{name}/offsets", "int32") if dtype == "string" else [])
            values = [stored(name)[i:j].decode() for i, j in at] if dtype == "string" else numbers(name, dtype)
            if shape:
                lengths = numbers(f"{name}/lengths", "int32") if shape == [None] else shape * (len(values) // shape[0])
                values = [values[e - n : e] for e, n in zip(itertools.accumulate(lengths), lengths, strict=True)]
            batch.append(values)
        yield from zip(*batch, strict=True)


TEXTS = ["", "a", "nul\0inside", 'quo"te, and\nline', "🎬 émoji", "x" * 300, "\0", "\0\0"]


@pytest.mark.parametrize("compression", ["", "ZLIB"])
def test_a_reader_without_the_project_needs_the_page_alone(tmp_path, compression):
    lines = [line for line in inspect.getsource(plain_reader).splitlines() if line.strip()]
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
    want = [tuple((row | {"age": -1 if row["age"] is None else row["age"]}).values()) for row in table.to_pylist()]
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


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    export=exports(),
    rows_per_record=st.integers(1, 600),
    seed=st.integers(-(2**63), 2**64),
    compression=st.sampled_from(["", "ZLIB"]),
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
    batches = python_batches(Manifest.load(folder))
    assert multiset(itertools.chain(*batches)) == multiset(map(list, want))
    assert len(batches) == sum(-(-table.num_rows // rows_per_record) for table in made)


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


@pytest.mark.parametrize("compression", ["", "ZLIB"])
def test_every_row_comes_back_once(tmp_path, compression):
    sizes = (1000, 1, 257)
    written = record_batches.write(tmp_path, tables(*sizes), COLUMNS, rows_per_record=100, compression=compression)
    manifest = Manifest.load(tmp_path)
    assert manifest == written
    assert manifest.rows == 1258 and [file.rows for file in manifest.files] == list(sizes)
    assert sorted(rows_of(record_batches.read(manifest)), key=lambda row: row[1]) == expected(1258)
    record_batches.verify(manifest)


def test_bytes_a_row(tmp_path):
    """Without compression the columns' widths; with it no more than Parquet, whose snappy is BigQuery's default."""
    table = simulated.load(100_000).ratings
    columns = {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
    plain = record_batches.write(tmp_path / "plain", [table], columns)
    assert 28 <= plain.bytes / plain.rows <= 28 * 1.01 and plain.bytes == os.path.getsize(plain.paths[0])
    small = record_batches.write(tmp_path / "small", [table], columns, compression="ZLIB")
    # Sorted by user and time, as it comes, and which helps Parquet most: a record batch's rows are in no order.
    pq.write_table(table, tmp_path / "table.parquet", compression="snappy")
    assert small.bytes <= os.path.getsize(tmp_path / "table.parquet")


ORDERS = {
    "number": [Column("row", "int64")],
    "float": [Column("row", "int64"), Column("float", "float32")],
    "constant first": [Column("constant", "int8"), Column("row", "int64")],
    "string": [Column("string", "string")],
    "ragged": [Column("ragged", "int32", (None,))],
    "words": [Column("words", "string", (None,))],
    "pair": [Column("pair", "float64", (2,))],
}


def order_table(rows: int = 10_000) -> pa.Table:
    """Rows whose columns all tell the row's number."""
    row = np.arange(rows)
    digits = [[int(digit) for digit in f"{r:06}"] for r in row]
    columns = {
        "row": row,
        "float": (row % 5).astype("f4"),
        "constant": np.zeros(rows, int),
        "string": [f"user_{r:06}" for r in row],
        # Many hold the same digits in another order, some are longer by zeros alone.
        "ragged": [list_[: 3 + r % 4] for list_, r in zip(digits, row, strict=True)],
        "words": [["".join(map(str, list_[:3])), "".join(map(str, list_[3:]))] for list_ in digits],
        "pair": pa.array(np.stack([row // 100, row % 100], 1).astype(float).tolist(), pa.list_(pa.float64(), 2)),
    }
    return pa.table(columns)


@pytest.mark.parametrize("columns", ORDERS.values(), ids=ORDERS)
def test_the_order_depends_on_rows_and_seed_alone(tmp_path, columns):
    """The same file for any order of arrival, another for another seed, and nothing of the first order is left."""
    table = order_table()
    mixed = table.take(np.random.default_rng(0).permutation(table.num_rows))
    arrived = [table, mixed, pa.concat_tables([mixed[7:], mixed[:7]]), mixed.slice(0).combine_chunks()]

    def file(name, arrival, seed):
        (file,) = record_batches.write(tmp_path / name, [arrival], columns, seed=seed, rows_per_record=999).files
        return file.sha256

    assert len({file(str(number), arrival, 1) for number, arrival in enumerate(arrived)}) == 1
    assert file("again", table, 1) != file("again", table, 2)


def order_of(rows: pa.Table, columns: list[Column], seed: int) -> np.ndarray:
    """Which row comes when."""
    arrays = [record_batches._stored(rows, column, "") for column in columns]
    return record_batches._order([record_batches._bits(array) for array in arrays], seed)


@pytest.mark.parametrize("columns", [ORDERS[name] for name in ORDERS if name != "ragged"])
def test_the_order_is_random(columns):
    table = order_table()
    rows = table.num_rows
    first, second = (order_of(table, columns, seed) for seed in (0, 1))
    assert sorted(first) == sorted(second) == list(range(rows))
    limit = 5 / np.sqrt(
        rows - 1
    )  # the rank correlation of two random orders has a standard deviation of 1 / sqrt(rows - 1)
    assert abs(np.corrcoef(first, np.arange(rows))[0, 1]) < limit
    assert abs(np.corrcoef(first, second)[0, 1]) < limit  # neighbouring seeds have nothing in common
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < limit
    # Of n random steps from one row to the next, about n (1 - 1/e) or more are different; of a pattern, few.
    assert len(np.unique(np.diff(first))) > 0.6 * rows


def test_different_rows_have_different_places():
    """Two lists or strings of one hash would lie in the order of their arrival."""
    rng = np.random.default_rng(0)
    texts = pa.array([f"{number:06}" for number in range(300_000)] + ["", "\0", "\0\0"])
    lists = rng.integers(0, 5, (300_000, 8)).astype("f4")[rng.random(300_000) < 0.5].tolist()
    lists = pa.array([*map(list, set(map(tuple, lists))), [], [0.0], [0.0, 0.0]], pa.list_(pa.float32()))
    for array in (texts, lists, pa.array([[], [""], ["", ""], ["a", "b"], ["b", "a"], ["ab"], ["ab", ""]])):
        assert len(np.unique(record_batches._bits(array))) == len(array)


def test_hashing_long_strings_takes_no_multiple_of_their_bytes():
    array = pa.array(["x" * 200] * 100_000)  # 20 MB
    tracemalloc.start()
    record_batches._bits(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes * 2


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


def test_a_second_export_replaces_the_first_and_leaves_nothing_behind(tmp_path):
    record_batches.write(tmp_path, tables(10, 10, 10), COLUMNS)
    manifest = record_batches.write(tmp_path, tables(20), COLUMNS)
    assert sorted(os.listdir(tmp_path)) == sorted([manifest.files[0].name, "manifest.json"])
    assert Manifest.load(tmp_path).rows == 20


def integer_limits():
    """For each integer type the first numbers that do not fit, as integers and as floats."""
    for dtype in (dtype for dtype in NUMBERS if "int" in dtype):
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        says = f"expected a whole number of {low} to {high} ({dtype}); 1 such values"
        if dtype != "int64":
            yield pa.array([0, high + 1]), dtype, f"row 1 holds {high + 1}, {says}"
            yield pa.array([0, high, low - 1]), dtype, f"row 2 holds {low - 1}, {says}"
        yield pa.array([float(high + 1)]), dtype, f"row 0 holds {float(high + 1)}, {says}"
        yield pa.array([0.0, np.nan]), dtype, f"row 1 holds nan, {says}"
        yield pa.array([0.0, np.inf]), dtype, f"row 1 holds inf, {says}"
        yield pa.array([0.0, -np.inf], pa.float16()), dtype, f"row 1 holds -inf, {says}"
        yield pa.array([0.0, 0.5], pa.float32()), dtype, f"row 1 holds 0.5, {says}"


REFUSED = [
    *((values, Column("x", dtype), says) for values, dtype, says in integer_limits()),
    (pa.array([2**63], pa.uint64()), Column("x", "int64"), "row 0 holds 9223372036854775808, expected a whole"),
    (pa.array([1, None]), Column("x", "int64"), "has 1 nulls, first in row 1; expected values"),
    (pa.array(["a", None, None]), Column("x", "string"), "has 2 nulls, first in row 1; expected values"),
    (pa.nulls(2), Column("x", "float32"), "has 2 nulls, first in row 0"),
    (pa.array([[1, 2], [], [3, None]]), Column("x", "int64", (None,)), "has 1 nulls, first in row 2; expected values"),
    (pa.array([["a", "c"], ["b"]]), Column("x", "string", (2,)), "row 1 has 1 values, expected 2"),
    (pa.array([["a", "c"], ["b", None]]), Column("x", "string", (2,)), "has 1 nulls, first in row 1"),
    (
        pa.array([[1], None]),
        Column("x", "int64", (None,), null=0),
        "has 1 nulls for lists, first in row 1; expected lists",
    ),
    (
        pa.array([[1], [], [2, 300]]),
        Column("x", "uint8", (None,)),
        "row 2 holds 300, expected a whole number of 0 to 255",
    ),
    (pa.array([[1], [], [300]]), Column("x", "uint8", (None,)), "row 2 holds 300"),
    (pa.array([[1.0, 2.0], [3.0, np.nan]]), Column("x", "float32", (2,)), "row 1 holds nan, expected a finite number"),
    (pa.array([1.0, np.nan]), Column("x", "float64"), "row 1 holds nan, expected a finite number that fits (float64)"),
    (pa.array([1.0, -np.inf]), Column("x", "float32"), "row 1 holds -inf, expected a finite number"),
    (pa.array([3.5e38]), Column("x", "float32"), "row 0 holds 3.5e+38, expected a finite number that fits (float32)"),
    (pa.array([1, 65520]), Column("x", "float16"), "row 1 holds 65520, expected a finite number that fits (float16)"),
    (pa.array(["1"]), Column("x", "float32"), "holds string, expected numbers"),
    (pa.array([1]), Column("x", "string"), "holds int64, expected strings"),
    (pa.array([b"1"]), Column("x", "string"), "holds binary, expected strings"),
    (pa.array([{"a": 1}]), Column("x", "int64"), "holds struct<a: int64>, expected numbers"),
    (pa.array([[{"a": 1}]]), Column("x", "int64", (None,)), "holds struct<a: int64>, expected numbers"),
    (pa.array([[[1]]]), Column("x", "int64", (None,)), "holds list<item: int64>, expected numbers"),
    (pa.array([0], pa.timestamp("us")), Column("x", "int64"), "holds timestamp[us], expected numbers; CAST it"),
    (pa.array([[1]]), Column("x", "int64"), "is list<item: int64>, expected shape () of a value"),
    (pa.array([1]), Column("x", "int64", (None,)), "is int64, expected shape (None,) of a value"),
    (pa.array([[1, 2], [3]]), Column("x", "int64", (2,)), "row 1 has 1 values, expected 2"),
    (pa.array([1]), Column("y", "int64"), "no column 'y'; the table has x"),
]


@pytest.mark.parametrize(("values", "column", "says"), REFUSED)
def test_values_that_do_not_fit_are_named(tmp_path, values, column, says):
    if len(values) > 1:
        values = pa.chunked_array([values[:1], values[1:]])  # rows are counted across chunks
    with pytest.raises(ValueError, match="file 1: ") as error:
        record_batches.write(tmp_path, [fitting(column), pa.table({"x": values})], [column])
    assert says in str(error.value) and repr(column.name) in str(error.value)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob("*.writing"))


def fitting(column: Column) -> pa.Table:
    """A table that the column takes."""
    value = "a" if column.dtype == "string" else 1
    return pa.table({column.name: [[value] * (column.shape[0] or 1) if column.shape else value]})


def test_values_at_the_limits_fit(tmp_path):
    """What the refusals must not refuse: each limit itself, as an integer and as a float of it."""
    columns, table, want = [], {}, []
    for dtype in (dtype for dtype in NUMBERS if "int" in dtype):
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        top = high if dtype != "int64" else 2**63 - 1024  # the largest float64 below
        columns += [Column(dtype, dtype), Column(f"{dtype} of floats", dtype)]
        table |= {dtype: [low, high], f"{dtype} of floats": [float(low), float(top)]}
        want += [[low, high], [low, top]]
    for dtype in ("float16", "float32", "float64"):
        high = float(np.finfo(dtype).max)
        columns.append(Column(dtype, dtype))
        table[dtype] = [-high, high]
        want.append([-high, high])
    columns.append(Column("bool", "uint8"))
    manifest = record_batches.write(tmp_path, [pa.table(table | {"bool": [False, True]})], columns)
    assert sorted(python_rows(manifest)) == list(map(list, zip(*want, [0, 1], strict=True)))


@pytest.mark.parametrize(
    ("values", "column", "want"),
    [
        (pa.array([1, None, 3]), Column("x", "int16", null=-1), [1, -1, 3]),
        (pa.array([1, None, 3]), Column("x", "float32", null=0.5), [1.0, 0.5, 3.0]),  # 0.5 is no int64, as the table's
        (pa.array([True, None]), Column("x", "int8", null=7), [1, 7]),
        (pa.array([2.5, None]), Column("x", "float64", null=0), [2.5, 0.0]),
        (pa.nulls(2), Column("x", "int32", null=4), [4, 4]),
        (pa.array(["a", None]), Column("x", "string", null="?"), ["a", "?"]),
        (pa.array([[1, None], [None], []]), Column("x", "int64", (None,), null=9), [[1, 9], [9], []]),
        (pa.array([["a", None]]), Column("x", "string", (2,), null=""), [["a", ""]]),
    ],
)
def test_nulls_are_replaced_by_what_the_manifest_says(tmp_path, values, column, want):
    manifest = record_batches.write(tmp_path, [pa.table({"x": values})], [column])
    assert multiset(row for (row,) in python_rows(manifest)) == multiset(want)
    assert Manifest.load(tmp_path).columns == [column]


@pytest.mark.parametrize(("value", "dtype"), [(2**53 + 1, "float64"), (2**24 + 1, "float32"), (2**63 - 1, "float64")])
def test_an_integer_that_a_float_would_round_is_refused(tmp_path, value, dtype):
    with pytest.raises(
        ValueError, match=f"column 'x', row 1 holds {value}, expected a finite number that fits \\({dtype}"
    ):
        record_batches.write(tmp_path, [pa.table({"x": [value - 1 if value < 2**60 else 2**62, value]})], {"x": dtype})


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ({"dtype": "uint32"}, "column 'x': uint32 of shape ()"),  # no `decode_raw` for it
        ({"dtype": "bool"}, "column 'x': bool of shape ()"),
        ({"dtype": "int64", "shape": (2, 3)}, r"of shape \(2, 3\)"),
        ({"dtype": "int64", "shape": (0,)}, r"of shape \(0,\)"),
        ({"dtype": "int64", "shape": (-1,)}, r"of shape \(-1,\)"),
        ({"dtype": "int8", "null": 128}, "column 'x': null=128, expected a value that fits int8"),
        ({"dtype": "int8", "null": 0.5}, "null=0.5, expected"),
        ({"dtype": "int8", "null": "0"}, "null='0', expected"),
        ({"dtype": "string", "null": 0}, "null=0, expected"),
        ({"dtype": "float32", "null": float("nan")}, "null=nan, expected"),
    ],
)
def test_a_column_that_cannot_be_is_refused(column, says):
    with pytest.raises(ValueError, match=says):
        Column("x", **column)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({}, {}, "expected at least one"),
        ([Column("x", "int64"), Column("x", "int32")], {}, r"\['x', 'x'\]: expected at least one, and each name once"),
        ([Column("x", "int64", (None,)), Column("x/lengths", "int32")], {}, "'x/lengths', 'x/lengths'.*each name once"),
        ({"x": "int64"}, {"rows_per_record": -1}, "rows_per_record -1"),  # would write no record at all
        ({"x": "int64"}, {"compression": "GZIP"}, "compression 'GZIP'"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, columns, options, says):
    with pytest.raises(ValueError, match=says):
        record_batches.write(tmp_path, [pa.table({"x": [1]})], columns, **options)


def test_two_gigabytes_of_strings_in_a_column_are_refused(tmp_path):
    megabyte = pa.array(["x" * 2**20])
    with pytest.raises(ValueError, match=r"file 0: column 'x': .*2 GB of strings.*write fewer rows to a file"):
        record_batches.write(tmp_path, [pa.table({"x": pa.chunked_array([megabyte] * 2048)})], {"x": "string"})


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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"version": 2, "columns": [', "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[]", "not a manifest of this format"),
        ({"version": 1}, "format version 1, expected 2. Export again with this code"),
        ({"version": 99}, "format version 99, expected 2. Export again with this code"),
        ({"rows": 11}, "its files have 10 rows, it says 11. Run the export again"),
        ({"columns": [{"name": "x", "dtype": "uint32"}]}, "column 'x': uint32"),
        ({"columns": [{"name": "x"}]}, "not a manifest of this format (TypeError"),
        ({"files": None}, "not a manifest of this format (TypeError"),
        ({"unknown": 1}, "'unknown'"),
        ({"compression": "GZIP"}, "compression 'GZIP'"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(tmp_path, content, says):
    record_batches.write(tmp_path, tables(10), COLUMNS)
    path = tmp_path / "manifest.json"
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=r"manifest\.json: ") as error:
        Manifest.load(tmp_path)
    assert says in str(error.value) and "xport again" in str(error.value)


@pytest.mark.parametrize("compression", ["", "ZLIB"])
def test_a_flipped_bit_does_not_pass(tmp_path, compression):
    """Wherever it is: `verify` names the file, and TFRecord's own checksums end a pass over the data."""
    manifest = record_batches.write(tmp_path, tables(1000), COLUMNS, rows_per_record=100, compression=compression)
    path = Path(manifest.paths[0])
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 8):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=f"{path.name}: sha256"):
            record_batches.verify(Manifest.load(tmp_path))
        with pytest.raises(tf.errors.DataLossError):
            rows_of(record_batches.read(manifest))


def test_files_that_do_not_belong_are_left_out_and_named(tmp_path):
    manifest = record_batches.write(tmp_path, tables(10), COLUMNS)
    other = record_batches.write(tmp_path / "other", tables(10, start=10), COLUMNS)
    for name in (other.files[0].name, "extra.tfrecord"):
        os.rename(other.paths[0], tmp_path / name)
        assert sorted(rows_of(record_batches.read(Manifest.load(tmp_path)))) == sorted(expected(10))
        with pytest.raises(ValueError, match=f"{name}: not in the manifest"):
            record_batches.verify(manifest)
        os.rename(tmp_path / name, other.paths[0])
    record_batches.verify(manifest)


def test_an_export_removes_no_files_but_its_own(tmp_path):
    """Parquet and TFRecords of others are often called part-*, too."""
    others = ["part-00000.parquet", "part-00000-of-00010.tfrecord", "part-00000.tfrecord", "notes.txt", "part-1-x.csv"]
    ours = ["part-00007-0123abcd.tfrecord", "part-00007-012-0123abcd.tfrecord", f"part-00001.{'0f' * 16}.writing"]
    for name in others + ours:
        (tmp_path / name).write_text("x")
    manifest = record_batches.write(tmp_path, tables(10), COLUMNS)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, manifest.files[0].name, "manifest.json"])


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
