"""The conversion as a Beam pipeline: the same files as in one process, whatever is killed, repeated or done twice."""

import ast
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_common import beam_conversion, bigquery, conversion, record_batches
from recsys_common.conversion import ParquetFiles, TableShards
from recsys_common.record_batches import Manifest
from recsys_common.scale import REHEARSAL

pytestmark = pytest.mark.skipif(find_spec("apache_beam") is None, reason="apache-beam is not installed (extra `beam`)")

COLUMNS = {"item_index": "int64", "rating": "float32"}
FLAGS = ["--columns", "item_index:int64,rating:float32"]


def write_parquet(folder: Path, files: int, rows: int) -> str:
    """`item_index` numbers the rows of all files; returns the pattern of the files."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        items = np.arange(number * rows, (number + 1) * rows)
        pq.write_table(pa.table({"item_index": items, "rating": items % 5 / 2}), folder / f"{number:05d}.parquet")
    return f"{folder}/*.parquet"


def rows_of(manifest: Manifest) -> list[tuple[int, float]]:
    batches = record_batches.read(manifest).as_numpy_iterator()
    return sorted(row for batch in batches for row in zip(batch["item_index"], batch["rating"], strict=True))


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def names_of(manifest: Manifest) -> list[str]:
    return sorted([file.name for file in manifest.files] + ["manifest.json"])


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        connected.query(
            "CREATE TABLE examples AS SELECT n AS item_index, CAST(MOD(n, 5) / 2 AS FLOAT64) AS rating, "
            "MOD(n, 3) AS shard, IF(n < 2000, 'train', 'test') AS split FROM UNNEST(GENERATE_ARRAY(0, 2999)) AS n"
        )
        yield connected


def test_parquet_files_become_the_same_files_as_in_process(tmp_path):
    source = ParquetFiles(write_parquet(tmp_path / "export", files=3, rows=1000))
    options = {"seed": 3, "rows_per_file": 400, "compression": "ZLIB"}
    expected = conversion.convert(tmp_path / "threads", source, COLUMNS, **options)
    work = conversion.begin(tmp_path / "beam", source, COLUMNS, **options)
    counters = beam_conversion.run(work).metrics().query()["counters"]
    assert {counter.key.metric.name: counter.committed for counter in counters} == {"units": 3, "rows": 3000}
    manifest = work.finish()
    assert [file.rows for file in manifest.files] == [500, 500] * 3
    assert manifest.files == expected.files and names_in(tmp_path / "beam") == names_of(manifest)
    assert rows_of(Manifest.load(tmp_path / "beam")) == [(row, row % 5 / 2) for row in range(3000)]


def test_a_tables_shards_become_the_same_files_as_in_process(tmp_path, warehouse, monkeypatch, capsys):
    """By the command line, which is told to find the embedded warehouse where it looks for a real one."""
    asked = []
    monkeypatch.setattr(bigquery, "connect", lambda *where: asked.append(where) or nullcontext(warehouse))
    place = ["--project", "p", "--bucket", "b", "--dataset", "d"]
    words = ["--table", "examples", "--where", "split=train", "--to", str(tmp_path / "beam"), "--seed", "7"]
    assert beam_conversion.main([*words, *place, *FLAGS, "--runner", "DirectRunner"]) == 0
    assert asked == [("p", "b", "d")]
    manifest = Manifest.load(tmp_path / "beam")
    said = f"{tmp_path}/beam: 3 files, 2,000 rows, {manifest.bytes:,} bytes\n"
    assert capsys.readouterr().out == said
    assert [file.rows for file in manifest.files] == [667, 667, 666]
    assert rows_of(manifest) == [(row, row % 5 / 2) for row in range(2000)]
    assert manifest.source["where"] == "split = 'train'" and manifest.seed == 7
    source = TableShards(warehouse, "examples", {"split": "train"})
    assert manifest.files == conversion.convert(tmp_path / "threads", source, COLUMNS, seed=7).files


def test_a_killed_pipeline_continues_and_does_nothing_again(tmp_path):
    pattern, folder = write_parquet(tmp_path / "export", files=200, rows=50), tmp_path / "beam"
    words = ["--parquet", pattern, "--to", str(folder), *FLAGS]
    process = subprocess.Popen([sys.executable, "-m", beam_conversion.__name__, *words], stderr=subprocess.PIPE)
    while len(list(folder.glob("unit-*.json"))) < 5:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    receipts = list(folder.glob("unit-*.json"))
    assert 5 <= len(receipts) < 200 and not (folder / "manifest.json").exists()
    numbers = [path.name.split("-")[1] for path in receipts]
    done = [path for number in numbers for path in folder.glob(f"part-{number}-*.tfrecord")]
    before = {path: path.stat().st_mtime_ns for path in (*receipts, *done)}
    (folder / f"part-{numbers[0]}-000.{'0' * 32}.writing").write_text("what a worker was writing when it was killed")

    work = conversion.begin(folder, ParquetFiles(pattern), COLUMNS)
    assert len(work.pending) == 200 - len(receipts)
    beam_conversion.run(work)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert beam_conversion.main(words) == 0  # nothing is left to do but to finish
    assert {path: path.stat().st_mtime_ns for path in done} == {path: before[path] for path in done}
    manifest = Manifest.load(folder)
    assert manifest.files == conversion.convert(tmp_path / "threads", ParquetFiles(pattern), COLUMNS).files
    assert rows_of(manifest) == [(row, row % 5 / 2) for row in range(10_000)]
    assert names_in(folder) == names_of(manifest)


@pytest.mark.parametrize(("files", "rows", "rows_per_file"), [(8, 10_000, 4000), (12, 10, 4)])
def test_a_unit_done_by_several_workers_at_once_counts_once(tmp_path, files, rows, rows_per_file):
    """Large units meet while a file is written, small ones while their receipt is."""
    source = ParquetFiles(write_parquet(tmp_path / "export", files, rows))
    work = conversion.begin(tmp_path / "beam", source, COLUMNS, rows_per_file=rows_per_file, compression="ZLIB")
    together = Barrier(4)

    def unit(number: int) -> int:
        together.wait()
        return work.unit(number)

    with ThreadPoolExecutor(4) as pool:
        # Not `map`, which cancels the others when one fails: the barrier would wait for them.
        found = [pool.submit(unit, number) for number in work.pending for _ in range(4)]
    assert [each.result() for each in found] == [rows] * 4 * files
    manifest = work.finish()
    record_batches.verify(Manifest.load(tmp_path / "beam"))
    assert [10 * file.rows // rows for file in manifest.files] == [5, 5] * files
    assert rows_of(manifest) == [(row, row % 5 / 2) for row in range(files * rows)]
    assert names_in(tmp_path / "beam") == names_of(manifest)


def test_a_unit_with_a_receipt_is_not_read_again(tmp_path):
    """Dataflow repeats a bundle of units from its first when the last of them fails."""
    source = ParquetFiles(write_parquet(tmp_path / "export", files=1, rows=10))
    work = conversion.begin(tmp_path / "beam", source, COLUMNS)
    assert work.unit(0) == 10
    (tmp_path / "export" / "00000.parquet").unlink()
    assert work.unit(0) == 10


def test_a_worker_of_an_earlier_conversion_that_nobody_stopped_does_not_mix_in(tmp_path):
    source = ParquetFiles(write_parquet(tmp_path / "export", files=2, rows=100))
    earlier = conversion.begin(tmp_path / "to", source, COLUMNS, seed=1)
    earlier.unit(0)
    work = conversion.begin(tmp_path / "to", source, {"item_index": "int64"}, seed=2)
    assert work.pending == [0, 1]
    for number in work.pending:
        work.unit(number)
    earlier.unit(0)  # they come last
    earlier.unit(1)
    manifest = work.finish()
    assert manifest.seed == 2
    record_batches.verify(Manifest.load(tmp_path / "to"))  # reads the columns of `work` in every file
    assert names_in(tmp_path / "to") == names_of(manifest)


def test_a_receipt_whose_files_another_export_removed_does_not_count(tmp_path):
    source = ParquetFiles(write_parquet(tmp_path / "export", files=2, rows=100))
    conversion.begin(tmp_path / "to", source, COLUMNS).unit(1)
    record_batches.write(tmp_path / "to", [pa.table({"other": [1]})], {"other": "int64"})
    assert conversion.begin(tmp_path / "to", source, COLUMNS).pending == [0, 1]
    assert beam_conversion.convert(tmp_path / "to", source, COLUMNS).rows == 200
    record_batches.verify(Manifest.load(tmp_path / "to"))


def test_a_bad_value_fails_by_name_and_leaves_the_earlier_export(tmp_path, capsys):
    pattern, folder = write_parquet(tmp_path / "export", files=2, rows=10), tmp_path / "beam"
    before = conversion.convert(folder, ParquetFiles(pattern), COLUMNS)
    bad = tmp_path / "export" / "00001.parquet"
    pq.write_table(pa.table({"item_index": [7, 8], "rating": [1.0, float("inf")]}), bad)
    assert beam_conversion.main(["--parquet", pattern, "--to", str(folder), *FLAGS]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: {bad}: column 'rating', row 1 holds inf, expected a finite number" in said.err
    assert Manifest.load(folder) == before and rows_of(before) == [(row, row % 5 / 2) for row in range(20)]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "one of the arguments --parquet --table is required"),
        (["--parquet", "x", "--table", "t"], 2, "--table: not allowed with argument --parquet"),
        (["--parquet", "x", "--columns", "rating"], 2, "'rating' is not name:dtype,name:dtype,...: column 'rating'"),
        (["--parquet", "x", "--columns", "rating:float"], 2, "column 'rating': float of shape (), expected int8, "),
        (["--parquet", "x", "--compresion", "ZLIB"], 2, "--compresion: a flag neither of this command nor of Beam"),
        (["--parquet", "x", "--rows-per-file", "0"], 2, "--rows-per-file 0: expected 1 or more"),
        (["--parquet", "x", "--where", "split=train"], 2, "--where split=train: expected name=value, and --table"),
        (["--table", "t", "--project", "p", "--bucket", "b", "--where", "train"], 2, "--where train: expected name="),
        (["--table", "t"], 2, "--table needs --project and --bucket"),
        (["--parquet", "nothing/*.parquet"], 1, "nothing/*.parquet']: no such files\n"),
        (["--help"], 0, "--rows-per-file"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(tmp_path, capsys, words, status, says):
    words = [*([] if "--columns" in words else FLAGS), "--to", str(tmp_path / "to"), *words]
    try:
        found = beam_conversion.main(words)
    except SystemExit as end:  # how argparse ends
        found = end.code
    said = capsys.readouterr()
    assert found == status and says in (said.err if status else said.out)
    assert not (tmp_path / "to").exists()


def test_dataflow_gets_its_flags(tmp_path, capsys):
    """As far as that can be seen from here: it refuses what it lacks, and no more."""
    pattern = write_parquet(tmp_path / "export", files=1, rows=10)
    words = ["--parquet", pattern, "--to", str(tmp_path / "to"), *FLAGS, "--runner", "DataflowRunner"]
    assert beam_conversion.main([*words, "--project", REHEARSAL["PROJECT"]]) == 1
    said = capsys.readouterr().err
    assert "Missing required option: region" in said and "Missing GCS path option: temp_location" in said
    assert "project" not in said
    assert not (tmp_path / "to" / "manifest.json").exists()


def test_without_beam_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)  # as if it were not there
    assert beam_conversion.main([]) == 1
    assert "Install the extra: pip install 'recsys-common[beam]'" in capsys.readouterr().err


def test_only_running_a_pipeline_imports_beam():
    """It takes seconds, and most who convert do not have it."""
    package = Path(beam_conversion.__file__).parent
    users = [path for path in package.rglob("*.py") if "import apache_beam" in path.read_text()]
    assert [path.name for path in users] == ["beam_conversion.py"]
    top = [ast.unparse(node) for node in ast.parse(users[0].read_text()).body if "Import" in type(node).__name__]
    assert "import argparse" in top and not [line for line in top if "apache_beam" in line]
