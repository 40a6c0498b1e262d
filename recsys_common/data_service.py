"""How does input scale past one machine? With tf.data service: other processes run the pipeline and send its batches.

    service = LocalService(workers=2)                       # a dispatcher and two workers, processes of this machine
    remote = tf.data.experimental.service.distribute("distributed_epoch", service.address)
    for batch in dataset.apply(remote): ...
    service.stop()                                          # or: with LocalService(workers=2) as service:

On many machines each of these processes is a container, and the trainer names the dispatcher:

    python -m recsys_common.data_service dispatcher --port 5050 --work-dir gs://bucket/dispatcher
    python -m recsys_common.data_service worker --port 5051 --dispatcher 10.0.0.2:5050 --address 10.0.0.3:5051

Who runs them must start a lost one again at the same address: until it is back there, an epoch does not end. The
dispatcher needs `--work-dir`, a folder that the workers can read too; without it, a restart fails all trainers. They
listen on all interfaces and do what anybody asks who can connect: keep them in a private network.

Needs: nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import subprocess
import sys
import tempfile

START_SECONDS = 60.0  # four of them, which import TensorFlow at the same time, were seen to take 13 on two cores


class Server(subprocess.Popen):
    """A dispatcher or worker: a process of this machine that ends when its parent does, however that ends.

    Made in two steps, so that several can import TensorFlow at the same time: this one starts it.

    Args:
      role: "dispatcher" or "worker".
      port: where it is to listen; 0 for any free port.
      options: more of the command line's.

    Attributes:
      port: where it listens, known after `answer`.
    """

    def __init__(self, role: str, port: int = 0, *options: str):
        self.port, self._words, pipe = port, tempfile.TemporaryFile("w+"), subprocess.PIPE  # noqa: SIM115 (its own)
        command = [sys.executable, "-m", __name__, role, "--child", "--port", str(port), *options]
        # In a session of its own, since Ctrl-C in a notebook is for the cell.
        super().__init__(command, stdin=pipe, stdout=pipe, stderr=self._words, text=True, start_new_session=True)

    def answer(self, dispatcher: str = "") -> Server:
        """Tell it where the dispatcher is, and block until it serves.

        Raises:
          RuntimeError: it did not start; the message ends with its own last words.
        """
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            print(dispatcher, file=self.stdin, flush=True)
        line = self.stdout.readline() if select.select([self.stdout], [], [], START_SECONDS)[0] else ""
        if not line:
            self.kill()
            self._words.seek(0)
            raise RuntimeError(f"{' '.join(self.args)} did not start. Its last words:\n{self._words.read()[-1500:]}")
        self.port = int(line)
        return self


class LocalService(contextlib.AbstractContextManager):
    """A dispatcher and its workers on this machine, to try the service and to see what it does when one is lost.

    Args:
      workers: how many to start with.
      work_dir: folder for the dispatcher's journal. With it one that was killed can go on:
        `service.dispatcher = Server("dispatcher", service.dispatcher.port, "--work-dir", work_dir).answer()`.
      fixed: whether no worker may join later, which the sharding modes FILE, DATA, FILE_OR_DATA and HINT need.

    Attributes:
      address: of the dispatcher, host:port, as `distribute` takes it.
      dispatcher, workers: the processes; `kill()` one to lose it.

    Raises:
      RuntimeError: one did not start.
    """

    def __init__(self, workers: int = 2, work_dir: str | None = None, fixed: bool = False):
        options = ["--work-dir", work_dir] * bool(work_dir) + ["--workers", *["localhost:%port%"] * workers] * fixed
        self.dispatcher = Server("dispatcher", 0, *options)
        self.workers = [Server("worker") for _ in range(workers)]
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self.address = f"localhost:{self.dispatcher.answer().port}"
            for worker in self.workers:
                worker.answer(self.address)
            undo.pop_all()  # all serve

    def add_worker(self, port: int = 0) -> None:
        """Start one more worker; at the port of one that was killed, it takes that one's place."""
        self.workers.append(Server("worker", port).answer(self.address))

    def stop(self, *_) -> None:
        """End all processes; calling it twice does nothing more."""
        for server in [*self.workers, self.dispatcher]:
            with server:  # which waits for its end, and closes its pipes
                server.kill()  # it holds nothing that is worth saving

    __exit__ = stop


def main() -> None:
    """The command line: one server, until it is stopped."""
    parser = argparse.ArgumentParser(description="One server of tf.data service.")
    parser.add_argument("role", choices=["dispatcher", "worker"])
    parser.add_argument("--port", type=int, default=0, help="where to listen (default: any free port)")
    parser.add_argument("--work-dir", help="dispatcher: folder of its journal, which workers can read too")
    parser.add_argument("--workers", nargs="*", help="dispatcher: host:port of all workers, for static sharding")
    parser.add_argument("--dispatcher", help="worker: host:port of the dispatcher")
    parser.add_argument("--address", default="localhost:%port%", help="worker: host:port at which trainers reach it")
    parser.add_argument("--child", action="store_true", help="read --dispatcher from stdin, and end when stdin does")
    given = parser.parse_args()
    import tensorflow as tf  # not above: who starts servers need not load it; nor below: it takes seconds

    if given.child:
        if not (line := sys.stdin.readline()):
            return  # the parent is gone already
        given.dispatcher = line.strip()
        # From here on the pipe's end sends SIGIO, which ends this process even where TensorFlow blocks all of Python.
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)
    service = tf.data.experimental.service
    if given.role == "dispatcher":
        config = service.DispatcherConfig(given.port, None, given.work_dir, bool(given.work_dir), given.workers)
        server = service.DispatchServer(config)
    else:
        server = service.WorkerServer(service.WorkerConfig(given.dispatcher, given.address, given.port))
    print(server._address.rpartition(":")[2], flush=True)  # the port, of which a worker tells nothing in public
    select.select([], [], [])  # unlike the server's `join`, this ends with Ctrl-C


if __name__ == "__main__":
    main()
