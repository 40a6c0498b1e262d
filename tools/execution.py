"""How is one chapter executed, and when need it not be?

    record = execution.unchanged(job) or execution.execute(job)

`execute` leaves a record beside the metrics, `runs/<scale>/chapter-N/<command>.json`, written last and
renamed into place. `unchanged` finds it as long as its inputs stand; a killed or failed run leaves none.
A parameter may be a credential, and an output may show one: what is written is masked (recsys_common/masking.py).

Needs: notebooks.py; recsys_common installed
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import notebooks

from recsys_common import scale
from recsys_common.masking import masked

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("run", "rehearse", "sync", "check")
CELL_TIMEOUT_SECONDS = 300  # in a check, which is at the small scale
# What TensorFlow's C++ side and the debugger write to stderr would land in the outputs; the order of a set of
# strings would change them.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONHASHSEED": "0"}


class Failed(Exception):
    """A chapter was executed and did not pass; the first line of the message goes into the table."""


@dataclass
class Job:
    """One chapter to execute, and the folder that its metrics and its record go to."""

    path: Path
    command: str
    scale: str
    parameters: dict[str, bool | int | float | str]

    @property
    def number(self) -> int:
        return int(self.path.stem.split("_")[0])

    @property
    def folder(self) -> Path:
        place = "rehearsal" if self.command == "rehearse" else self.scale
        return ROOT / "runs" / place / f"chapter-{self.number}"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.command}.json"

    @property
    def executed(self) -> Path:
        """The notebook that a run leaves behind."""
        if self.command in ("sync", "check"):
            return ROOT / "build" / self.command / f"chapter-{self.number}.ipynb"
        return self.folder.with_suffix(".ipynb")

    @property
    def log(self) -> Path:
        return self.executed.with_suffix(".log")

    @functools.cached_property
    def inputs(self) -> str:
        """A hash, equal where two executions would do the same: text, module, lock, parameters, data."""
        files = [self.path, ROOT / "requirements.txt", ROOT / "tools" / "notebooks.py"]
        files += [file for kind in ("*.py", "*.sql") for file in (ROOT / "recsys_common").rglob(kind)]
        files += [*(ROOT / "data" / "sample").rglob("*"), *(ROOT / "benchmarks").glob("*.json")]
        lines = [json.dumps({"SCALE": self.scale} | self.parameters, sort_keys=True)]
        lines += [f"{file.relative_to(ROOT)} {_hash(file)}" for file in sorted(files) if file.is_file()]
        # Ratings may be gigabytes: their names, sizes and times stand for them.
        ratings = sorted(Path(self.parameters.get("DATA_DIR") or os.devnull).rglob("*"))
        lines += [f"{file} {file.lstat().st_size} {file.lstat().st_mtime_ns}" for file in ratings]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(record: Path) -> dict:
    return json.loads(record.read_text(encoding="utf-8"))


def _hash(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def unchanged(job: Job) -> dict | None:
    """The record of an execution that did the same as this job would, if it passed and its results stand."""
    results = [job.record, job.folder / "metrics.json"]
    if job.command in ("run", "rehearse"):
        results.append(job.executed)
    if not all(file.is_file() for file in results):
        return None
    record = _read(job.record)
    same = record["inputs"] == job.inputs
    if job.command in ("sync", "check"):
        same = same and record["notebook"] == _hash(job.path.with_suffix(".ipynb"))
    return record if same else None


def execute(job: Job) -> dict:
    """Executes one chapter and returns its record; raises Failed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    # The metrics that come belong to these inputs: no record of other inputs may claim them, nor one of this
    # command before it has passed.
    inputs = job.inputs
    (job.folder / "metrics.json").unlink(missing_ok=True)
    for record in (job.folder / f"{command}.json" for command in COMMANDS):
        if record.is_file() and (record == job.record or _read(record)["inputs"] != inputs):
            record.unlink()

    with environment(job), measured() as meter:
        {"sync": sync, "check": compare}.get(job.command, run)(job)
    if not (job.folder / "metrics.json").is_file():
        raise Failed(f"its last cell left no {relative(job.folder / 'metrics.json')}")

    record = {
        "chapter": notebooks.title(job.path),
        "command": job.command,
        "scale": job.scale,
        "parameters": masked(job.parameters),
        **meter,
        "inputs": inputs,
        "notebook": _hash(job.path.with_suffix(".ipynb")),
        "commit": scale.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": scale.machine(),
    }
    scale.write_json(job.record, record)
    return record


def run(job: Job) -> None:
    """Through papermill, with the job's parameters in a cell of their own after the `parameters` cell."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    _mask(job.executed)
    progress = {
        "desc": f"chapter {job.number}",
        "bar_format": "{desc}: cell {n_fmt}/{total_fmt}, {elapsed}",
        "leave": False,
        # A log that is not a terminal gets a line now and then, and none at the small scale.
        "mininterval": 0.2 if sys.stderr.isatty() else 30,
        "disable": not sys.stderr.isatty() and job.scale == "small",
    }
    job.log.write_text("")
    with job.log.open("a", encoding="utf-8") as log:  # the kernel adds to it too
        try:
            papermill.execute_notebook(
                notebooks.generate(job.path),
                job.executed,
                job.parameters,
                cwd=job.path.parent,
                progress_bar=progress,
                stdout_file=log,
                stderr_file=log,
                coalesce_streams=True,
                extra_arguments=["--log-level=ERROR"],  # no warning that this machine talks to itself over TCP
            )
        except papermill.PapermillExecutionError as error:
            log.write("\n".join(error.traceback))
            message = masked(f"in cell [{error.exec_count}]\n{error.ename}: {error.evalue}")
            raise Failed(f"{message}\nexecuted so far: {relative(job.executed)}") from error
        except DeadKernelError as error:
            message = "the kernel died: killed, perhaps for memory\n"
            raise Failed(f"{message}executed so far: {relative(job.executed)}") from error
        finally:
            log.flush()
            job.log.write_text(masked(job.log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


def _mask(path: Path) -> None:
    """Papermill writes the notebook before, while and after its cells run: without credentials, at any time."""
    import nbformat
    import papermill.iorw

    class Masked(papermill.iorw.LocalHandler):
        def write(self, buf, path):
            notebook = masked(nbformat.reads(buf, as_version=4))
            return super().write(nbformat.writes(nbformat.from_dict(notebook)), path)

    papermill.iorw.papermill_io.register(str(path), Masked())  # for paths that begin so


def sync(job: Job) -> None:
    """Executes the chapter as it stands and puts the notebook, free of the run's noise, beside its text."""
    import nbformat

    run(job)
    notebook = notebooks.clean(nbformat.read(job.executed, as_version=4), job.path)
    faults = notebooks.faults(notebook, job.path.with_suffix(".ipynb").name, ROOT)
    if faults:
        raise Failed("the notebook may not be committed, the old one stands\n" + "\n".join(faults))
    notebooks.write(notebook, job.path.with_suffix(".ipynb"))


def compare(job: Job) -> None:
    """nbval executes the committed notebook and compares each output that is not tagged away."""
    notebook = job.path.with_suffix(".ipynb")
    if not notebook.is_file():
        raise Failed(f"there is no {relative(notebook)}: run make sync")
    options = f"-p nbval.plugin --nbval --nbval-current-env --nbval-cell-timeout={CELL_TIMEOUT_SECONDS}"
    options += " -p no:cacheprovider -q --no-header --tb=short --color=no -o addopts="
    command = [sys.executable, "-m", "pytest", *options.split(), str(notebook)]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with job.log.open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=alone, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        text = job.log.read_text(encoding="utf-8")
        hint = "nbval counts code cells from 0; where the new outputs are right, run make sync"
        raise Failed(f"not the committed outputs\n{text}\n{hint}")


@contextlib.contextmanager
def environment(job: Job):
    """What kernels inherit: no noise on stderr, progress where it takes long, no IPython start-up files."""
    before = dict(os.environ)
    ipython = ROOT / "build" / "ipython"
    profile = ipython / "profile_default"
    (profile / "startup").mkdir(parents=True, exist_ok=True)
    # TensorFlow's C++ side writes a few lines while it is imported, whatever TF_CPP_MIN_LOG_LEVEL says: they go to
    # the log, not into the notebook. What Python writes to stderr still arrives there.
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.capture_fd_output = False\n")
    log = f"os.open({str(job.log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)"
    (profile / "startup" / "stderr.py").write_text(f"import os\n\nos.dup2({log}, 2)\n")
    os.environ.update(QUIET, IPYTHONDIR=str(ipython))
    if job.scale == "small":  # what is compared must not depend on the processor's best instructions
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    os.environ["RECSYS_PROGRESS"] = "0" if job.scale == "small" else "1"
    if job.command == "rehearse":
        os.environ["RECSYS_REHEARSE"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def measured():
    """Seconds, and the peak of the memory that this process's children and theirs hold together."""
    import psutil

    meter, done = {"seconds": 0.0, "peak_memory_mb": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            resident = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it ended between the listing and the question
                    resident += child.memory_info().rss
            meter["peak_memory_mb"] = max(meter["peak_memory_mb"], round(resident / 1e6))

    watcher, start = threading.Thread(target=watch, daemon=True), time.monotonic()
    watcher.start()
    try:
        yield meter
    finally:
        meter["seconds"] = round(time.monotonic() - start, 1)
        done.set()
        watcher.join()


def relative(path: Path) -> str:
    """A path as it reads best in a message: from the top of the repository."""
    return str(path.relative_to(ROOT))
