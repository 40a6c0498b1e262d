"""What does a program do when memory is short? Run it in a process of its own, with as much as it may take.

    def kept_in_memory(manifest):
        return sum(1 for _ in input_pipeline.batches(manifest, 8192).cache())

    outcome = run(kept_in_memory, manifest, megabytes=300)
    outcome.failure, outcome.seconds, outcome.peak         # ("SIGSEGV", 1.8, 814.0)

The limit is `RLIMIT_DATA`, which on Linux counts a process's private writable memory: heap, large arrays, stacks.
(`RLIMIT_AS` counts addresses, of which TensorFlow reserves gigabytes that it never touches.) A program to which memory
is refused ends in one of several ways, and not always in the same: `MemoryError` from NumPy, `ResourceExhaustedError`
from TensorFlow's tensors after 10 seconds in which they hope for some to be freed, `SIGABRT` or `SIGSEGV` where C++
did not expect it, as in TensorFlow's strings. A container would end them all alike, by `SIGKILL`.

Needs: nothing else.
"""

import ctypes
import inspect
import os
import pickle
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Stacks of threads count at full size, 8 MB each, though hardly touched: here 1 MB. A GPU's driver would take memory of
# the host. Arrow's own pool counts a gigabyte whatever it holds.
SHELL = 'ulimit -c 0; ulimit -S -s 1024; export CUDA_VISIBLE_DEVICES=-1 ARROW_DEFAULT_MEMORY_POOL=system; exec "$@"'


@dataclass(frozen=True)
class Outcome:
    """What became of a program. Memory is in MB of 10**6 bytes."""

    failure: str  # "" if it finished; else an error's type and first line, or a signal; SIGALRM is the timeout
    value: object  # what the function returned; None if it failed
    seconds: float  # without the imports
    limit: float | None  # private writable memory that it might have in all, TensorFlow's own with it
    memory: list[tuple[float, float]]  # seconds since the start, resident memory; every 50 ms
    peak: float  # most resident memory, up to 50 ms before the end


def run(function: Callable, *arguments, megabytes: float | None, timeout: float = 600) -> Outcome:
    """Call `function(*arguments)` in a new process that may take so many MB on top of what TensorFlow takes itself.

    The process has two cores. What the function prints is dropped. It ends with the thread that called `run`.

    Args:
      function: made with `def` at the top of a notebook's cell or a module. Its source runs in the new process, where
        of its globals there are only the modules that it names (`tf`, `np`, `record_batches`): hand it the rest.
      arguments: what pickle can carry, such as a manifest.
      megabytes: on top of what a process has that imported TensorFlow and ran a tf.data pipeline; None for no limit.
      timeout: seconds after which the process is ended.

    Raises:
      NotImplementedError: this is not Linux.
      RuntimeError: the process ended before the function began, by an import or an argument.
    """
    if not Path("/proc/self/status").exists():
        raise NotImplementedError(f"{sys.platform} has no /proc/<pid>/status to read memory from: run this on Linux")
    source, names = inspect.getsource(function), function.__globals__
    modules = {name: names[name].__name__ for name in names if inspect.ismodule(names[name]) and name in source}
    source = "".join(f"import {module} as {name}\n" for name, module in modules.items()) + source
    # -P: the files beside this one are not modules of their own.
    command, pipe = ["sh", "-c", SHELL, "sh", sys.executable, "-P", __file__], subprocess.PIPE
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors) as child:
        try:
            child.stdin.write(pickle.dumps(sys.path))
            pickle.dump((source, function.__name__, arguments, megabytes, timeout), child.stdin)
            child.stdin.flush()
            failure, status = _answer(child, errors)
            if failure:
                raise RuntimeError(f"{function.__name__} could not begin in a process of its own: {failure}")
            start, memory = time.perf_counter(), [(0.0, status["VmRSS"])]
            limit = None if megabytes is None else status["VmData"] + megabytes
            while not select.select([child.stdout], [], [], 0.05)[0]:
                status = _status(child.pid) or status
                memory.append((time.perf_counter() - start, status["VmRSS"]))
            seconds = time.perf_counter() - start
            return Outcome(*_answer(child, errors), seconds, limit, memory, status["VmHWM"])
        finally:
            child.kill()


def _answer(child: subprocess.Popen, errors) -> tuple[str, object]:
    """What the process says next: "" and a value, or how it failed; if it died, by what signal, and its last words."""
    try:
        return pickle.load(child.stdout)
    except EOFError:
        code, _ = child.wait(), errors.seek(0)
        words = re.findall(r"^(?:F\d{4}.*?\] |(?=terminate called))(.*)", errors.read().decode(errors="replace"), re.M)
        return ": ".join([signal.Signals(-code).name if code < 0 else f"exit code {code}", *words[:1]]), None


def _status(pid: int | str) -> dict[str, float]:
    """The sizes in /proc/<pid>/status in MB; {} of a process that has ended."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(size) * 1024 / 1e6 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}


def _child() -> None:
    """The new process: get ready, say how much memory that took, call the function, say what came of it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    resource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[1],) * 2)  # its first thread's
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # with a thread a core, machines would differ
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the function prints
    try:
        sys.path[:] = pickle.load(sys.stdin.buffer)
        source, function, arguments, megabytes, timeout = pickle.load(sys.stdin.buffer)
        exec(source, names := {})
        import tensorflow as tf

        list(tf.data.Dataset.range(1).map(lambda number: number, tf.data.AUTOTUNE).prefetch(1))  # starts its threads
        status = _status("self")
        if megabytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int((status["VmData"] + megabytes) * 1e6),) * 2)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        answers.write(pickle.dumps(("", status)))
        answer = "", names[function](*arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", None
    answers.write(pickle.dumps(answer))
    os._exit(0)  # a pipeline that failed may have threads that never end


if __name__ == "__main__":
    _child()
