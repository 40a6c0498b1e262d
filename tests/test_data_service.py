"""tf.data service with processes of this machine: each row once, and what is left when one of them is killed."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import record_batches
from recsys_common.data_service import LocalService, Server

Mode = tf.data.experimental.service.ShardingPolicy
ROWS, FILES, BATCH = 6_000, 12, 50


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return str(tmp_path_factory.mktemp("journal"))


@pytest.fixture(scope="module")
def service(journal):
    with LocalService(2, work_dir=journal, fixed=True) as service:
        yield service
    assert all(server.returncode is not None for server in (service.dispatcher, *service.workers))


@pytest.fixture(scope="module")
def by_file(tmp_path_factory):
    """The pipeline: its one source is the list of files, and every row has a number of its own."""
    tables = (pa.table({"row": rows}) for rows in np.split(np.arange(ROWS), FILES))
    manifest = record_batches.write(tmp_path_factory.mktemp("rows"), tables, {"row": "int64"}, rows_per_record=BATCH)
    decode = record_batches.decoder(manifest)
    files = tf.data.Dataset.from_tensor_slices(manifest.paths)
    return files.interleave(lambda path: tf.data.TFRecordDataset(path).map(decode), cycle_length=2)


def remote(dataset, mode, service):
    distribute = tf.data.experimental.service.distribute
    return dataset.apply(distribute(mode, service.address, target_workers="ANY"))


def arrivals(batches) -> np.ndarray:
    """How often each row came."""
    return np.bincount([row for batch in batches for row in batch["row"].numpy()], minlength=ROWS)


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends in time; a zombie has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("mode", "times"), [("DYNAMIC", 1), ("FILE", 1), ("OFF", 2)])
def test_how_often_each_row_comes_from_two_workers(service, by_file, mode, times):
    assert (arrivals(remote(by_file, Mode[mode], service)) == times).all()


def test_the_work_is_done_in_other_processes(service):
    def seconds():
        return sum(psutil.Process(worker.pid).cpu_times().user for worker in service.workers)

    assert len({os.getpid(), service.dispatcher.pid, *(worker.pid for worker in service.workers)}) == 4
    work = tf.data.Dataset.range(10).map(lambda _: tf.reduce_sum(tf.sort(tf.random.uniform([1_000_000]))))
    theirs, mine = seconds(), time.process_time()
    assert len(list(remote(work, Mode.DYNAMIC, service))) == 10
    assert seconds() - theirs > 2 * (time.process_time() - mine)


def test_a_dispatcher_that_is_started_again_goes_on_with_its_journal(service, journal, by_file):
    batches = iter(remote(by_file, Mode.DYNAMIC, service))
    first, lost = [next(batches) for _ in range(40)], service.dispatcher
    lost.kill()
    service.dispatcher = Server("dispatcher", lost.port, "--work-dir", journal).answer()
    assert service.dispatcher.port == lost.port and service.dispatcher.pid != lost.pid
    assert (arrivals([*first, *batches]) == 1).all()


def test_no_row_of_a_killed_worker_comes_twice_and_its_successor_lets_the_epoch_end(service, by_file):
    """At most once: what it had been given and had not delivered never comes. One at its port takes its place."""
    batches = iter(remote(by_file, Mode.DYNAMIC, service))
    first = [next(batches) for _ in range(8)]
    lost = max(service.workers, key=lambda worker: psutil.Process(worker.pid).io_counters().read_chars)
    lost.kill()
    service.workers.remove(lost)
    service.add_worker(lost.port)
    assert service.workers[-1].port == lost.port
    count = arrivals([*first, *batches])
    assert count.max() == 1
    # How many never come depends on what was under way: on a busy machine none. benchmarks/data_service.json has more.
    assert (count == 0).sum() < ROWS / 2


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)worker --child .* did not start.*unrecognized arguments: --rank 3"):
        Server("worker", 0, "--rank", "3").answer()


def test_a_server_ends_with_a_parent_that_is_killed():
    """Even one that waits, in TensorFlow, for a dispatcher that is not there."""
    code = """
        import subprocess, sys
        command = [sys.executable, "-m", "recsys_common.data_service", "worker", "--child"]
        worker = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)
        print("localhost:1", file=worker.stdin, flush=True)
        print(worker.pid, flush=True)
        worker.wait()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        while len(worker.threads()) <= 5:  # TensorFlow is loaded, and connects
            assert worker.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.1)
        assert not gone(worker.pid, 1)
        parent.kill()
    assert gone(worker.pid, 5)
