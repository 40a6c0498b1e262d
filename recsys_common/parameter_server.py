"""What if the tables do not fit into one machine? Then shards of them live on several: parameter servers.

    def build():                                           # called where variables become shards
        return MatrixFactorization(users, items, 32), LazyAdam(1e-3)

    with LocalCluster(workers=2, servers=2) as cluster:    # four processes of this machine; this one coordinates
        run = train(build, lambda i, n: batches(manifest, 1024, seed=1, epochs=99, worker=Worker(i, n)), 1000, cluster)
    print(run.losses[-100:].mean(), run.examples_per_second, run.bytes_per_step)

ParameterServerStrategy is the only strategy of `tf.distribute` that cuts tables. Its limits, and the others':

- MirroredStrategy, MultiWorkerMirroredStrategy and, for ordinary variables, TPUStrategy keep the whole table and its
  slots on every replica. More devices are more copies: the largest table is what one of them holds.
- Parameter servers hold shards in the memory of CPU hosts, never on GPUs. Each step of each worker asks them for its
  rows and sends gradients back, so the network is paid at every step: at least 4 bytes a column for every id of the
  batch, and again for every distinct id. `measure` tells the bytes, and examples/s beside one process.
- Workers do not wait for each other. A gradient may be of rows that others have changed since; two runs never give the
  same losses. Which worker takes which step is chance, so no epoch is exact and none can be resumed row by row: give
  each worker a dataset that does not end.
- Optimizers see each shard as a variable of its own, and update it on its server. Row-sparse there are those that are
  so in one process: tf-keras Adagrad, and LazyAdam, RowWiseAdagrad and Adagrad of optimizers.py, whose `clip_norm` is
  then the norm of a shard's part.
- A lost worker is done without while another is left; the rest of its share is not trained. A lost server takes its
  shards with it: `train` raises within seconds. In a new process, a new cluster restores the last checkpoint.
- `tf.train.Checkpoint` joins the shards of tables, and of tf-keras's slots; those of our optimizers are kept shard by
  shard, for as many servers as there were.
- One cluster a process: TensorFlow stays bound to it.

Tables belong on the accelerators where steps must be fast: a TPU shards them over its SparseCores (v5p, v6e) by
`tfrs.layers.embedding.TPUEmbedding`, from the same description (`embeddings.tpu_features`) and with the same updates
(`LazyAdam.tpu`). For GPUs TensorFlow has nothing like it.

Needs: nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

START_SECONDS = 60.0
WAIT = 0.02  # s between two looks at the cluster


class LocalCluster(contextlib.AbstractContextManager):
    """Workers and parameter servers on this machine, each a process, and the strategy of this one, the coordinator.

    They are copies of one process that has imported TensorFlow, and end when this one does, however that ends.

    Args:
      workers: processes that compute.
      servers: processes that hold the variables.
      shard_bytes: a table is cut into shards of no fewer bytes than this, at most one for each server.

    Attributes:
      strategy: a `tf.distribute.experimental.ParameterServerStrategy`; variables are created in its `scope()`.
      coordinator: its `ClusterCoordinator`.
      processes: {"worker": [process id, ...], "ps": [...]}.

    Raises:
      RuntimeError: they did not start; the message ends with their last words.
    """

    def __init__(self, workers: int = 2, servers: int = 2, shard_bytes: int = 256 << 10):
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this)
        command = [sys.executable, "-m", __name__, *["worker"] * workers, *["ps"] * servers]
        # In a session of its own, since Ctrl-C in a notebook is for the cell.
        self._servers = subprocess.Popen(
            command, stdin=-1, stdout=-1, stderr=self._words, text=True, start_new_session=True
        )
        self.processes, addresses = {"worker": [], "ps": []}, {"worker": [], "ps": []}
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            alarm = threading.Timer(START_SECONDS, self._kill)
            undo.callback(alarm.cancel)
            alarm.start()
            import tensorflow as tf  # at the same time as they do

            for _ in range(workers + servers):
                if not (line := self._servers.stdout.readline()):
                    self._words.seek(0)
                    words = self._words.read()[-1500:]
                    raise RuntimeError(f"{' '.join(command)} did not start. Its last words:\n{words}")
                job, process, address = line.split()
                self.processes[job].append(int(process))
                addresses[job].append(address)
            cluster = tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec(addresses), rpc_layer="grpc"
            )
            cut = tf.distribute.experimental.partitioners.MinSizePartitioner(shard_bytes, max_shards=servers)
            self.strategy = tf.distribute.experimental.ParameterServerStrategy(cluster, variable_partitioner=cut)
            self.coordinator = tf.distribute.experimental.coordinator.ClusterCoordinator(self.strategy)
            undo.pop_all()  # all serve
            alarm.cancel()

    def lost(self, job: str) -> list[int]:
        """Numbers of the processes of a job, "worker" or "ps", that have ended."""
        return [number for number, process in enumerate(self.processes[job]) if not _alive(process)]

    def _kill(self) -> None:
        if self._servers.returncode is None:  # or else the number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._servers.pid, signal.SIGKILL)  # they hold nothing that is worth saving

    def stop(self, *_) -> None:
        """End all processes; calling it twice does nothing more."""
        with self._servers:  # which waits for the end of the first, and closes its pipes
            self._kill()

    __exit__ = stop


@dataclass(frozen=True)
class Run:
    """What `train` returns.

    Attributes:
      model: trained; its tables are shards, whose rows `rows` joins.
      optimizer: with its moments.
      losses: float32 [steps], in the order in which the steps were handed out.
      examples_per_second: of all workers, without the first tenth of the steps (of 1 step: with it).
      bytes_per_step: that went through the loopback device of this machine meanwhile; nan where Linux does not tell.
    """

    model: Any
    optimizer: Any
    losses: np.ndarray
    examples_per_second: float
    bytes_per_step: float


def train(build: Callable, dataset: Callable, steps: int, cluster: LocalCluster | None = None) -> Run:
    """Train a model, on a cluster or, with the same step, in this process alone.

    Args:
      build: `build()` returns (model, optimizer); `model.compute_loss(batch, training=True)` gives a loss.
      dataset: `dataset(index, count)` returns the batches of worker `index` of `count`, a `tf.data.Dataset` that
        does not end: each worker takes as many as it has time for. It is called in every worker for all of them.
      steps: of all workers together.

    Raises:
      ValueError: no step.
      RuntimeError: a server, or the last worker, has ended.
    """
    import tensorflow as tf

    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    with _explained(cluster), cluster.strategy.scope() if cluster else contextlib.nullcontext():
        model, optimizer = build()
        batch = next(iter(dataset(0, 1)))
        model.compute_loss(batch, training=True)  # which makes its variables
        optimizer.build(model.trainable_variables)

    def update(batch) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(batch, training=True)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    @tf.function
    def step(batches) -> tf.Tensor:
        return cluster.strategy.run(update, (next(batches),)) if cluster else update(next(batches))

    def share() -> tf.data.Dataset:
        index = tf.distribute.coordinator.experimental_get_current_worker_index()  # a tensor, hence no argument
        choice, count = tf.data.Dataset.from_tensors(index).repeat(), len(cluster.processes["worker"])
        return tf.data.Dataset.choose_from_datasets([dataset(i, count) for i in range(count)], choice)

    losses, first = [], min(-(-steps // 10), steps - 1)
    with _explained(cluster):
        batches = iter(cluster.coordinator.create_per_worker_dataset(share) if cluster else dataset(0, 1))
        for number in range(steps):
            if number == first:
                if cluster:
                    _wait(cluster)
                start, sent = time.perf_counter(), _loopback()
            losses.append(cluster.coordinator.schedule(step, (batches,)) if cluster else step(batches).numpy())
        if cluster:
            _wait(cluster)
        seconds, sent = time.perf_counter() - start, _loopback() - sent
        losses = [loss.fetch() if cluster else loss for loss in losses]
    size = len(next(iter(tf.nest.flatten(batch))))
    return Run(model, optimizer, np.array(losses, np.float32), (steps - first) * size / seconds, sent / (steps - first))


def measure(cluster: LocalCluster, build: Callable, dataset: Callable, steps: int = 300, rounds: int = 3) -> dict:
    """What the cluster costs beside this process alone, with the same model, optimizer and batches.

    Returns:
      Medians of `rounds` runs of each, in turns: {"one process": examples/s, "cluster": examples/s, "bytes": a step,
      of the cluster}. Both share the cores of this machine, so the difference is what messages and copies cost.
    """
    runs = [[train(build, dataset, steps, where) for where in (None, cluster)] for _ in range(rounds)]
    speeds = np.median([[run.examples_per_second for run in both] for both in runs], axis=0).tolist()
    sent = float(np.median([both[1].bytes_per_step for both in runs]))
    return {"one process": speeds[0], "cluster": speeds[1], "bytes": sent}


def rows(table) -> np.ndarray:
    """The rows of a table, be it one variable or shards of one: a copy in this process's memory."""
    return np.concatenate([shard.numpy() for shard in getattr(table, "variables", [table])])


def _wait(cluster: LocalCluster) -> None:
    """Wait until all scheduled steps are done, or cannot be."""
    while not cluster.coordinator.done():
        _check(cluster)
        time.sleep(WAIT)


def _check(cluster: LocalCluster, cause: Exception | None = None) -> None:
    if servers := cluster.lost("ps"):
        raise RuntimeError(
            f"parameter servers {servers} of {len(cluster.processes['ps'])} ended, and with them their shards of the "
            "tables. Start again in a new process, from the last checkpoint."
        ) from cause
    if len(workers := cluster.lost("worker")) == len(cluster.processes["worker"]):
        raise RuntimeError(f"all workers, {workers}, ended. Start again in a new process.") from cause


@contextlib.contextmanager
def _explained(cluster: LocalCluster | None) -> Iterator[None]:
    """An error of TensorFlow's that has its cause in the end of a process is raised as one that says so."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if cluster:
            time.sleep(WAIT)  # the process may be about to end
            _check(cluster, error)
        raise


def _alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def _loopback() -> float:
    """Bytes that this machine has sent to itself."""
    with contextlib.suppress(FileNotFoundError), open("/proc/net/dev") as devices:
        return sum(float(line.split()[9]) for line in devices if line.split()[0] == "lo:")
    return float("nan")


def main(jobs: list[str]) -> None:
    """Serve as these jobs, each in a process of its own, until stdin ends."""
    import tensorflow as tf

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # one that ends is gone at once, and no zombie
    for job in jobs:
        # Before anything has made TensorFlow start its threads, which a copy would lack.
        if os.fork() == 0:
            server = tf.distribute.Server({job: ["localhost:0"]}, job_name=job, task_index=0)  # any free port
            print(job, os.getpid(), server.target.removeprefix("grpc://"), flush=True)
            break
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
