"""Conversion of tables and Parquet files: whatever breaks, every row arrives once, and nothing is done again."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_common import bigquery, conversion, record_batches
from recsys_common.conversion import Incomplete, ParquetFiles, TableShards, begin, convert
from recsys_common.embedded_bigquery import Address
from recsys_common.record_batches import Column, Manifest

COLUMNS = {"user": "int32", "item": "int64", "rating": "float32"}
PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = os.environ.get("RECSYS_PROGRESS")
    os.environ["RECSYS_PROGRESS"] = "0"
    yield
    os.environ.pop("RECSYS_PROGRESS") if before is None else os.environ.update(RECSYS_PROGRESS=before)


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        yield connected


def table(rows: int, start: int = 0) -> pa.Table:
    """Rows that `item` numbers."""
    item = np.arange(start, start + rows)
    return pa.table({"user": item % 97, "item": item, "rating": (item % 5) / 2})


def parquet(folder: Path, *sizes: int) -> str:
    """A Parquet file of each size, of rows that are numbered through. Returns a glob of them."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        pq.write_table(table(size, sum(sizes[:number])), folder / f"{number:03}.parquet", **PLAIN)
    return f"{folder}/*.parquet"


def rows_of(manifest: Manifest) -> list[tuple]:
    batches = record_batches.read(Manifest.load(manifest.folder))
    columns = [column.name for column in manifest.columns]
    return sorted(row for b in batches for row in zip(*(b[name].numpy().tolist() for name in columns), strict=True))


def numbered(rows: int) -> list[tuple]:
    return sorted((row % 97, row, row % 5 / 2) for row in range(rows))


def content(manifest: Manifest) -> Manifest:
    """A manifest without where it lies."""
    return dataclasses.replace(manifest, folder="")


def nothing_else(manifest: Manifest) -> bool:
    """Whether the folder holds the export and no leftovers."""
    return sorted(os.listdir(manifest.folder)) == sorted([*(file.name for file in manifest.files), "manifest.json"])


class Counted(ParquetFiles):
    """Parquet files that remember which units were read."""

    def __init__(self, pattern):
        super().__init__(pattern)
        self.read = []

    def blocks(self, number, columns):
        self.read.append(number)
        yield from super().blocks(number, columns)


# Rows and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", "ZLIB"])
def test_every_row_of_every_file_comes_once(tmp_path, compression):
    pattern = parquet(tmp_path / "parquet", 1000, 1, 0, 70_000)
    manifest = convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS, compression=compression)
    assert rows_of(manifest) == numbered(71_001)
    assert [file.rows for file in manifest.files] == [1000, 1, 70_000]
    assert [file.name[:14] for file in manifest.files] == ["part-00000-000", "part-00001-000", "part-00003-000"]
    assert manifest.source["files"] == sorted(map(str, (tmp_path / "parquet").iterdir()))
    assert nothing_else(manifest)
    record_batches.verify(manifest)


def test_a_file_named_twice_is_read_once_and_one_that_is_missing_is_told(tmp_path):
    pattern = parquet(tmp_path / "with [brackets]", 10, 10)
    paths = [str(path) for path in sorted((tmp_path / "with [brackets]").iterdir())]
    assert ParquetFiles([*paths, f"{tmp_path}/*/000.parquet", paths[1]]).units == paths
    with pytest.raises(FileNotFoundError, match=r"002\.parquet'\]: no such files"):
        ParquetFiles([*paths, paths[0].replace("000", "002")])
    for nothing in ([], pattern):  # as a glob, brackets are a set of letters
        with pytest.raises(FileNotFoundError, match="no such files"):
            ParquetFiles(nothing)


def test_a_large_unit_becomes_several_files(tmp_path):
    pattern = parquet(tmp_path / "parquet", 200_000, 1000, 5)
    manifest = convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS, rows_per_file=70_000)
    assert [file.rows for file in manifest.files] == [66_667, 66_667, 66_666, 1000, 5]
    assert [file.name[:14] for file in manifest.files[:3]] == [f"part-00000-00{part}" for part in range(3)]
    assert rows_of(manifest) == numbered(201_005)
    whole = convert(tmp_path / "whole", ParquetFiles(pattern), COLUMNS, rows_per_file=199_000)
    assert [file.rows for file in whole.files] == [200_000, 1000, 5]  # no small file for what is left over
    even = convert(tmp_path / "even", ParquetFiles(pattern), COLUMNS, rows_per_file=1000)
    assert [file.rows for file in even.files] == [1000] * 201 + [5]
    assert rows_of(even) == numbered(201_005)


def test_files_and_shards_of_the_same_rows_become_the_same_files(warehouse, tmp_path):
    warehouse.query(
        "CREATE OR REPLACE TABLE same AS SELECT MOD(x, 97) AS user, x AS item, x / 8 AS rating, "
        "CONCAT('title, ', CAST(x AS STRING)) AS title, [x, 2 * x] AS history, [CAST(x AS STRING), ''] AS words, "
        "MOD(x, 3) AS shard, IF(x < 150000, 'train', 'test') AS split FROM UNNEST(GENERATE_ARRAY(0, 160000)) AS x"
    )
    columns = COLUMNS | {"title": "string", "history": "int32", "words": "string"}
    source = TableShards(warehouse, "same", {"split": "train"})
    shards = convert(tmp_path / "shards", source, columns)
    assert shards.rows == 150_000 and [file.rows for file in shards.files] == [50_000] * 3
    assert shards.source["table"] == "same" and shards.source["where"] == "split = 'train'"
    assert shards.source["shards"] == 3 and shards.source["snapshot_time"]
    (tmp_path / "parquet").mkdir()
    for shard in range(3):
        rows = warehouse.read("same", where=f"shard = {shard} AND split = 'train'")
        mixed = rows.take(np.random.default_rng(shard).permutation(rows.num_rows))  # another order of arrival
        pq.write_table(mixed, tmp_path / f"parquet/{shard}.parquet")
    files = convert(tmp_path / "files", ParquetFiles(f"{tmp_path}/parquet/*.parquet"), columns)
    assert files.files == shards.files
    record_batches.verify(files)
    batches = record_batches.read(shards)
    items = np.concatenate([batch["item"].numpy() for batch in batches])
    assert sorted(items) == list(range(150_000))
    first = next(iter(batches))
    assert first["history"].to_list() == [[item, 2 * item] for item in first["item"].numpy().tolist()]
    assert first["words"][0].numpy().tolist() == [b"%d" % first["item"][0].numpy(), b""]


def test_two_conversions_differ_by_seed_and_units_by_number(tmp_path):
    (tmp_path / "parquet").mkdir()
    for number in range(2):
        pq.write_table(table(1000), tmp_path / f"parquet/{number}.parquet")
    found = [convert(tmp_path / str(s), ParquetFiles(f"{tmp_path}/parquet/*"), COLUMNS, seed=s) for s in (7, 7, 8)]
    assert found[0].files == found[1].files and found[0].seed == 7
    assert len({file.sha256 for manifest in found[1:] for file in manifest.files}) == 3  # 7, 8 and 8, 9


# Killed, and continued -----------------------------------------------------------------------------------

UNITS = 24


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    parquet(folder, *[5000 + number for number in range(UNITS)])
    return folder


@pytest.fixture(scope="module")
def undisturbed(source_folder, tmp_path_factory):
    manifest = convert(tmp_path_factory.mktemp("undisturbed"), ParquetFiles(f"{source_folder}/*"), COLUMNS)
    assert rows_of(manifest) == numbered(sum(5000 + number for number in range(UNITS)))
    return content(manifest)


def receipts(folder: Path) -> set[int]:
    """Numbers of the units that have a receipt."""
    return {int(name.split("-")[1]) for name in os.listdir(folder) if name.startswith("unit-") and "." in name[-6:]}


def test_a_killed_conversion_continues(source_folder, undisturbed, tmp_path):
    """Killed at a random point in the middle; an earlier export stays readable until the new one is whole."""
    earlier = record_batches.write(tmp_path, [table(77)], COLUMNS)
    code = f"""
        import sys, time
        from recsys_common.conversion import ParquetFiles, convert
        class Slow(ParquetFiles):
            def blocks(self, number, columns):
                for block in super().blocks(number, columns):
                    time.sleep(0.05)
                    yield block
        convert({str(tmp_path)!r}, Slow({str(source_folder / "*")!r}), {COLUMNS!r}, workers=2)
        print("finished")
    """
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=quiet
    )
    enough, deadline = random.randint(1, UNITS // 2), time.time() + 60
    while len(receipts(tmp_path)) < enough and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    process.kill()
    assert process.communicate()[0] == ""
    done = receipts(tmp_path)
    assert enough <= len(done) < UNITS
    assert Manifest.load(tmp_path) == earlier and rows_of(earlier) == numbered(77)

    source = Counted(f"{source_folder}/*")
    manifest = convert(tmp_path, source, COLUMNS)
    assert sorted(source.read) == sorted(set(range(UNITS)) - done)  # each once, and none that was done
    assert content(manifest) == undisturbed
    assert nothing_else(manifest)
    record_batches.verify(manifest)


def everything(folder: Path, source: ParquetFiles) -> conversion.Conversion:
    """A conversion of which all units are done, and that is not finished."""
    work = begin(folder, source, COLUMNS)
    for number in work.pending:
        work.unit(number)
    return work


def test_killed_before_the_manifest(source_folder, undisturbed, tmp_path):
    everything(tmp_path, ParquetFiles(f"{source_folder}/*"))
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Manifest.load(tmp_path)
    source = Counted(f"{source_folder}/*")
    manifest = convert(tmp_path, source, COLUMNS)
    assert source.read == [] and content(manifest) == undisturbed and nothing_else(manifest)


@pytest.mark.parametrize("left", ["plan and receipts", "receipts", "plan", "half of the receipts"])
def test_killed_between_the_manifest_and_the_removal_of_receipts(source_folder, undisturbed, tmp_path, left):
    work = everything(tmp_path, ParquetFiles(f"{source_folder}/*"))
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    work.finish()
    for number, (path, text) in enumerate(sorted(kept.items())):
        if (left.startswith("plan") and path.name == "conversion.json") or (
            left.endswith("receipts") and (path.name != "conversion.json" and (number % 2 or "half" not in left))
        ):
            path.write_bytes(text)
    assert content(Manifest.load(tmp_path)) == undisturbed  # finished, for who reads
    manifest = convert(tmp_path, ParquetFiles(f"{source_folder}/*"), COLUMNS)
    assert content(manifest) == undisturbed and nothing_else(manifest)
    assert rows_of(manifest) == numbered(manifest.rows)


def test_receipts_of_files_that_are_gone_do_not_count(source_folder, undisturbed, tmp_path):
    """Another export into the same folder removes what an unfinished conversion has there."""
    work = everything(tmp_path, ParquetFiles(f"{source_folder}/*"))
    other = record_batches.write(tmp_path, [table(10)], COLUMNS)
    with pytest.raises(FileNotFoundError, match=r"part-00000-000-\w+\.tfrecord, which was converted, is gone: another"):
        work.finish()
    assert Manifest.load(tmp_path) == other
    source = Counted(f"{source_folder}/*")
    manifest = convert(tmp_path, source, COLUMNS)
    assert sorted(source.read) == list(range(UNITS)) and content(manifest) == undisturbed


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"rows_per_file": 5000},
        {"rows_per_record": 1000},
        {"compression": "ZLIB"},
        {"columns": COLUMNS | {"user": "int64"}},
        {"columns": [Column("user", "int32", null=0), Column("item", "int64"), Column("rating", "float32")]},
        {"columns": {"item": "int64"}},
    ],
)
def test_another_conversion_does_not_take_up_what_this_one_did(source_folder, tmp_path, other):
    source = ParquetFiles(f"{source_folder}/*")
    work = begin(tmp_path, source, COLUMNS)
    for number in (0, 3):
        work.unit(number)
    assert begin(tmp_path, source, COLUMNS).pending == [n for n in range(UNITS) if n not in (0, 3)]
    options = {"columns": COLUMNS} | other
    assert begin(tmp_path, source, **options).pending == list(range(UNITS))
    assert receipts(tmp_path) == set()
    assert begin(tmp_path, source, COLUMNS).pending == list(range(UNITS))  # nor the first one what the other did


def test_another_source_does_not_take_up_what_this_one_did(tmp_path):
    pattern = parquet(tmp_path / "parquet", 100, 100)
    begin(tmp_path / "to", ParquetFiles(pattern), COLUMNS).unit(0)
    shutil.copytree(tmp_path / "parquet", tmp_path / "copy")
    assert begin(tmp_path / "to", ParquetFiles(f"{tmp_path}/copy/*"), COLUMNS).pending == [0, 1]
    begin(tmp_path / "to", ParquetFiles(pattern), COLUMNS).unit(1)
    path = tmp_path / "parquet/001.parquet"
    size = path.stat().st_size
    pq.write_table(table(100, start=101), path, **PLAIN)  # other rows, of which there are as many, in as many bytes
    assert path.stat().st_size == size
    manifest = convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS)
    assert [row[1] for row in sorted(rows_of(manifest), key=lambda row: row[1])] == [*range(100), *range(101, 201)]


def test_a_folder_with_brackets_is_a_folder(source_folder, undisturbed, tmp_path):
    """As a glob its name matches nothing, and another conversion's receipts would be taken for this one's."""
    folder = tmp_path / "run [1]"
    begin(folder, ParquetFiles(f"{source_folder}/*"), COLUMNS, seed=5).unit(2)
    manifest = convert(folder, ParquetFiles(f"{source_folder}/*"), COLUMNS)
    assert content(manifest) == undisturbed and nothing_else(manifest)


def test_a_table_that_changed_is_not_mixed_with_what_it_was(warehouse, tmp_path):
    def fill(first: int) -> None:
        warehouse.query(
            f"CREATE OR REPLACE TABLE moving AS SELECT x AS item, MOD(x, 4) AS shard "
            f"FROM UNNEST(GENERATE_ARRAY({first}, {first + 3999})) AS x"
        )

    fill(0)
    work = begin(tmp_path, TableShards(warehouse, "moving"), {"item": "int64"})
    for number in (0, 1):
        work.unit(number)
    assert begin(tmp_path, TableShards(warehouse, "moving"), {"item": "int64"}).pending == [2, 3]
    fill(4000)  # as many rows in each shard
    assert begin(tmp_path, TableShards(warehouse, "moving"), {"item": "int64"}).pending == [0, 1, 2, 3]
    manifest = convert(tmp_path, TableShards(warehouse, "moving"), {"item": "int64"})
    assert rows_of(manifest) == [(item,) for item in range(4000, 8000)]


# A source that breaks ------------------------------------------------------------------------------------


class Proxy:
    """Stands between the client and the service, and breaks connections.

    Attributes:
      address: host:port for the client.
      after: bytes from the service, counted while connections are to be cut, after which one is cut.
      left: how many connections are still to be cut.
      cuts: how many were.
    """

    def __init__(self, target: str):
        self.target, self.after, self.left, self.cuts = target.split(":"), 0, 0, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            service = socket.create_connection(self.target)
            for pair in ((client, service, False), (service, client, True)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket, counted: bool) -> None:
        passed = 0
        try:
            while data := source.recv(2**16):
                passed = passed + len(data) if counted and self.left else 0
                if passed > self.after:
                    self.left, self.cuts = self.left - 1, self.cuts + 1
                    time.sleep(0.2)  # what has passed is read and counted by then
                    break
                to.sendall(data)
        except OSError:
            pass  # the other side was cut
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def proxied(warehouse):
    """A warehouse of the same tables whose Storage Read connection goes through a proxy, and the proxy."""
    # 100,000 rows are two blocks of 524 and 276 kB. (The emulator keeps a thread for every stream that is not read to
    # the last block but one, and has four more than there are cores: a larger table would leave none.)
    warehouse.query(
        "CREATE OR REPLACE TABLE streamed AS SELECT x AS item, 0 AS shard FROM UNNEST(GENERATE_ARRAY(0, 99999)) AS x"
    )
    proxy = Proxy(warehouse.server.grpc)
    proxy.after = 600_000
    address = Address(warehouse.server.rest, proxy.address, warehouse.server.root)
    beside = bigquery.Warehouse(address, warehouse.project, "embedded-bucket", warehouse.dataset, warehouse.location)
    yield beside, proxy
    proxy.close()


def test_what_the_client_makes_of_a_broken_stream(proxied):
    """Why rows are counted: the client resumes at an offset by itself, and this service starts over."""
    warehouse, proxy = proxied
    session = warehouse.open("streamed", ["item"], streams=1)
    proxy.left = 1
    blocks = [block.num_rows for block in warehouse.blocks(session, session.streams[0])]
    assert proxy.cuts == 1
    assert sum(blocks) == 65_536 + 100_000  # no error, and more rows than there are


def test_a_stream_that_breaks_once_loses_and_doubles_nothing(proxied, tmp_path):
    warehouse, proxy = proxied
    source = TableShards(warehouse, "streamed")
    smooth = convert(tmp_path / "smooth", source, {"item": "int64"})
    assert rows_of(smooth) == [(item,) for item in range(100_000)]
    proxy.left = 1
    broken = convert(tmp_path / "broken", source, {"item": "int64"}, rows_per_file=40_000)
    assert proxy.cuts == 1
    assert rows_of(broken) == [(item,) for item in range(100_000)]
    assert [file.rows for file in broken.files] == [50_000, 50_000] and nothing_else(broken)


def test_a_stream_that_breaks_each_time_ends_with_an_error(proxied, tmp_path):
    warehouse, proxy = proxied
    earlier = record_batches.write(tmp_path, [pa.table({"item": [5]})], {"item": "int64"})
    proxy.left = 1000
    with pytest.raises(Incomplete, match=r"streamed, shard 0: 131,072 rows arrived so far, it has 100,000\. A stream"):
        convert(tmp_path, TableShards(warehouse, "streamed"), {"item": "int64"})
    assert proxy.cuts >= conversion.ATTEMPTS
    assert Manifest.load(tmp_path) == earlier and rows_of(earlier) == [(5,)]
    proxy.left = 0
    manifest = convert(tmp_path, TableShards(warehouse, "streamed"), {"item": "int64"})
    assert rows_of(manifest) == [(item,) for item in range(100_000)] and nothing_else(manifest)


def test_rows_that_are_missing_are_missed(tmp_path):
    """A source that ends early without an error."""

    class Short(ParquetFiles):
        def blocks(self, number, columns):
            yield from list(super().blocks(number, columns))[:-1]

    source = Short(parquet(tmp_path / "parquet", 70_000))
    with pytest.raises(Incomplete, match=r"000\.parquet: 65,536 rows arrived, it has 70,000\."):
        convert(tmp_path / "to", source, COLUMNS)
    assert not (tmp_path / "to/manifest.json").exists()


# What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"user": pa.array(["7"])}, r"column 'user' is string, but int64 in .*000\.parquet"),
        ({"item": None}, r"column 'item' is missing, but int64 in .*000\.parquet"),
        ({"extra": pa.array([1.5])}, r"column 'extra' is double, but missing in .*000\.parquet"),
    ],
)
def test_two_exports_in_one_folder_are_refused(tmp_path, other, says):
    pattern = parquet(tmp_path / "parquet", 10, 10)
    changed = {"user": pa.array([7]), "item": pa.array([8]), "rating": pa.array([0.5])} | other
    changed = {name: values for name, values in changed.items() if values is not None}
    pq.write_table(pa.table(changed), tmp_path / "parquet/002.parquet")
    with pytest.raises(ValueError, match=rf"002\.parquet: {says}\. The files are of two exports"):
        ParquetFiles(pattern)


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_a_truncated_parquet_file_is_named(tmp_path, length):
    pattern = parquet(tmp_path / "parquet", 1000, 1000)
    path = tmp_path / "parquet/001.parquet"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"001\.parquet: not a whole Parquet file"):
        ParquetFiles(pattern)


def test_a_damaged_parquet_file_is_named(tmp_path):
    pattern = parquet(tmp_path / "parquet", 10)
    path = tmp_path / "parquet/001.parquet"
    pq.write_table(table(10, start=10), path, write_page_checksum=True, **PLAIN)
    whole = path.read_bytes()
    at = whole.index(np.int64(15).tobytes())  # 15 becomes 14, which nothing but the checksum tells
    path.write_bytes(whole[:at] + b"\x0e" + whole[at + 1 :])
    with pytest.raises(OSError, match=r"001\.parquet: could not be read .*CRC"):
        convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS)


def test_a_value_that_does_not_fit_is_named_and_the_rest_is_kept(tmp_path):
    pattern = parquet(tmp_path / "parquet", 1000, 1000, 1000)
    earlier = record_batches.write(tmp_path / "to", [table(5)], COLUMNS)
    path = tmp_path / "parquet/001.parquet"
    good = path.read_bytes()
    rows = table(1000).to_pydict()
    rows["user"][777] = 2**31
    pq.write_table(pa.table(rows), path)
    says = r"001\.parquet, rows after the first 668: column 'user', row 109 holds 2147483648, expected a whole number"
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS, rows_per_file=300)
    assert Manifest.load(tmp_path / "to") == earlier and rows_of(earlier) == numbered(5)
    path.write_bytes(good)
    manifest = convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS, rows_per_file=300)
    assert rows_of(manifest) == numbered(3000) and nothing_else(manifest)


def test_what_the_source_does_not_have_is_told_before_anything_is_read(warehouse, tmp_path):
    source = Counted(parquet(tmp_path / "parquet", 10))
    with pytest.raises(ValueError, match=r"000\.parquet: no column year, title; it has user, item, rating"):
        convert(tmp_path / "to", source, COLUMNS | {"year": "int16", "title": "string"})
    with pytest.raises(ValueError, match="rows_per_file 0, expected 1 or more"):
        convert(tmp_path / "to", source, COLUMNS, rows_per_file=0)
    assert source.read == [] and not (tmp_path / "to").exists()
    warehouse.query("CREATE OR REPLACE TABLE bare AS SELECT 1 AS item, 0 AS shard")
    with pytest.raises(ValueError, match="bare, shard 0: no column user; it has item, shard"):
        convert(tmp_path / "to", TableShards(warehouse, "bare"), {"user": "int64"})


def test_rows_without_a_shard_are_not_left_out(warehouse):
    warehouse.query(
        "CREATE OR REPLACE TABLE partly AS SELECT x AS item, IF(x = 2, NULL, 0) AS shard FROM UNNEST([1, 2, 3]) AS x"
    )
    with pytest.raises(ValueError, match="table 'partly': column 'shard' is NULL in 1 rows"):
        TableShards(warehouse, "partly")
    warehouse.query("CREATE OR REPLACE TABLE partly AS SELECT 1 AS item, 0 AS shard, 'test' AS split")
    with pytest.raises(ValueError, match="no rows where split = 'train'"):
        TableShards(warehouse, "partly", {"split": "train"})


def test_no_rows_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="0 rows to write"):
        convert(tmp_path / "to", ParquetFiles(parquet(tmp_path / "parquet", 0, 0)), COLUMNS)


def test_a_disk_that_fills_says_so_and_what_was_done_counts(tmp_path):
    pattern = parquet(tmp_path / "parquet", 1000, 100_000)
    earlier = record_batches.write(tmp_path / "to", [table(5)], COLUMNS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write a file of about 1,600,000 bytes.*earlier.*untouched"):
            convert(tmp_path / "to", ParquetFiles(pattern), COLUMNS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert Manifest.load(tmp_path / "to") == earlier
    source = Counted(pattern)
    manifest = convert(tmp_path / "to", source, COLUMNS)
    assert source.read == [1] and rows_of(manifest) == numbered(101_000) and nothing_else(manifest)


# Memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_number_of_units(tmp_path, tell):
    """Four times the rows, in units of one size, in a process of their own."""
    rows, few, many = 400_000, 4, 16
    pq.write_table(pa.table({name: np.arange(rows) * (k + 1) for k, name in enumerate("abcd")}), tmp_path / "one")
    for units in (few, many):
        (tmp_path / f"{units}").mkdir()
        for number in range(units):
            os.link(tmp_path / "one", tmp_path / f"{units}" / f"{number}.parquet")
    code = f"""
        import json, re
        from pathlib import Path
        from recsys_common.conversion import ParquetFiles, convert
        peaks = []
        for units in ({few}, {many}):
            folder = {str(tmp_path)!r} + f"/{{units}}"
            source, columns = ParquetFiles(folder + "/*.parquet"), dict.fromkeys("abcd", "int64")
            assert convert(folder + "/to", source, columns, workers=2).rows == units * {rows}
            # Not ru_maxrss, in which Linux hands a child its parent's peak.
            peaks.append(int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000)
        print(json.dumps(peaks))
    """
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=quiet, check=True
    )
    first, second = json.loads(done.stdout)
    tell(f"conversion: peak memory {first:,.0f} MB for {few * rows:,} rows, {second:,.0f} MB for {many * rows:,}")
    unit = rows * 4 * 8 / 1e6  # MB of a unit in memory; the 12 more are 154 MB
    assert second - first < 4 * unit
