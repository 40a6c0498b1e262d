"""Programs that are short of memory: told as what they are, and gone when they should be."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import input_pipeline, limited_memory, record_batches

if not Path("/proc/self/status").exists():
    pytest.skip("limited_memory reads /proc, which is Linux's", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 100  # MB
ROWS = 2**21
READS = 8  # of each file


def in_passing(manifest):
    batches = input_pipeline.batches(manifest, 8192)
    return int(batches.reduce(np.int64(0), lambda rows, batch: rows + tf.size(batch["user_id"], tf.int64)))


def row_buffer(manifest):
    rows = input_pipeline.batches(manifest, 8192).unbatch().shuffle(1_000_000)
    return sum(1 for _ in rows.batch(8192))


def too_much(fits, does_not):
    """MB."""
    print("what a program prints is in nobody's way", len(np.ones(fits * 10**6, np.uint8)))
    return len(np.ones(does_not * 10**6, np.uint8))


def slow(seconds):
    time.sleep(seconds)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """28 bytes a row: 59 MB on disk, 470 MB to read, since the manifest names the files eight times."""
    random = np.random.default_rng(0)
    columns = {"user_id": "int64", "item_id": "int64", "timestamp": "int64", "rating": "float32"}
    tables = (pa.table({name: random.integers(0, 2**20, ROWS // 4) for name in columns}) for _ in range(4))
    written = record_batches.write(tmp_path_factory.mktemp("files"), tables, columns)
    return dataclasses.replace(written, files=written.files * READS)


@pytest.fixture(scope="module")
def outcomes(manifest):
    """Two programs at a time: each takes seconds to import TensorFlow."""
    with ThreadPoolExecutor(2) as pool:
        return dict(
            pool.map(
                lambda call: (
                    call[0],
                    limited_memory.run(*call, megabytes=ALLOWED, timeout=1 if call[0] is slow else 60),
                ),
                [(in_passing, manifest), (row_buffer, manifest), (too_much, ALLOWED - 10, ALLOWED + 10), (slow, 60)],
            )
        )


def test_a_pass_over_more_than_four_times_the_memory_stays_flat(outcomes, manifest):
    outcome = outcomes[in_passing]
    assert outcome.failure == "" and manifest.bytes > 4 * ALLOWED * 1e6
    assert outcome.value == ROWS * READS  # 8192 divides it
    seconds, resident = zip(*outcome.memory, strict=True)
    assert list(seconds) == sorted(seconds) and seconds[-1] <= outcome.seconds < 60
    assert max(resident) - resident[0] < ALLOWED and max(resident) <= outcome.peak + 1
    assert outcome.limit > ALLOWED + 100  # TensorFlow's own memory comes on top


def test_a_buffer_of_rows_is_told_as_failing(outcomes):
    outcome = outcomes[row_buffer]
    assert re.match("SIGSEGV|SIGABRT|MemoryError|ResourceExhausted", outcome.failure) and outcome.value is None
    assert outcome.peak - outcome.memory[0][1] > ALLOWED / 2  # it had most of what it was allowed


def test_the_limit_lies_where_it_should(outcomes):
    """90 MB are had, 110 are not, and Python's own error is told."""
    assert outcomes[too_much].failure.startswith("MemoryError: Unable to allocate 105. MiB for an array")


def test_a_timeout_ends_the_program(outcomes):
    outcome = outcomes[slow]
    assert outcome.failure == "SIGALRM" and outcome.value is None
    assert 1 <= outcome.seconds < 5 and len(outcome.memory) > 5


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("echo 'F0000 00:00:1.5   12 env.cc:84] Check failed: ret == 0' >&2; kill -ABRT $$", "Check failed: ret == 0"),
        ("echo \"terminate called after throwing 'x'\" >&2; kill -ABRT $$", "terminate called after throwing 'x'"),
        ("echo 'I0000 00:00:1.5   12 port.cc:153] oneDNN' >&2; kill -KILL $$", None),
        ("exit 3", None),
    ],
)
def test_a_death_is_told_by_its_signal_and_its_last_words(code, told):
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(["sh", "-c", code], stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        died = "exit code 3" if "exit" in code else "SIGABRT" if told else "SIGKILL"
        assert limited_memory._answer(child, errors) == (f"{died}: {told}" if told else died, None)


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_begin_is_no_outcome():
    with pytest.raises(RuntimeError, match=r"slow could not begin .* ValueError: invalid literal .* 'no number'"):
        limited_memory.run(slow, Unreadable(), megabytes=ALLOWED)


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(NotImplementedError, match="run this on Linux"):
        limited_memory.run(slow, 0, megabytes=None)


def test_the_program_ends_with_who_started_it(tmp_path):
    script, told = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        "import os, pathlib, sys, time\nfrom recsys_common import limited_memory\n\n"
        "def asleep(path):\n    pathlib.Path(path).write_text(f'{os.getpid()}.')\n    time.sleep(120)\n\n"
        "limited_memory.run(asleep, sys.argv[1], megabytes=None)\n"
    )

    def wait(until):
        end = time.perf_counter() + 60
        while not until() and time.perf_counter() < end:
            time.sleep(0.05)
        assert until()

    with subprocess.Popen([sys.executable, script, told], env=os.environ | {"PYTHONPATH": str(ROOT)}) as parent:
        wait(lambda: told.exists() and told.read_text().endswith("."))
        pid = int(told.read_text()[:-1])
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)

    def ended():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()  # dead, and nobody has asked how
        return True

    wait(ended)
