"""Are chapters run, refused, skipped and compared as tools/book.py says? Toy chapters, real kernels."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import book
import execution
import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The header's filter is the one that takes tags away when jupytext alone decides (jupytext issue 714).
TOY = """\
# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
# ---

# %% [markdown]
# # A toy

# %% tags=["parameters"]
SCALE = "small"
DATASET = "simulated"
DATA_DIR = ""
SEED = 42
BATCH_SIZE = 10  # rows
RATE = 0.5
LOUD = False

# %%
import json, os, pathlib, time
total = BATCH_SIZE * RATE
{body}
total

# %% tags=["nbval-ignore-output"]
time.time_ns()

# %%
scale = "rehearsal" if os.environ.get("RECSYS_REHEARSE") else SCALE
folder = pathlib.Path("..") / "runs" / scale / "chapter-{number}"
_ = (folder / "metrics.json").write_text(json.dumps({{"rows": [{{"case": "total", "value": total}}]}}))
"""
WAIT = """if "TOY_WAITS" in os.environ:
    pathlib.Path("../waiting").write_text(str(os.getpid()))
    time.sleep(60)"""
CHAPTERS = {
    "1_toy": WAIT,
    "2_fails": "1 / 0",
    "3_dies": "os.kill(os.getpid(), 9)  # as the kernel of a machine short of memory would",
    "4_noisy": 'import sys; print("careful", file=sys.stderr); print(os.getcwd())',
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small book of its own: the real tools and module, toy chapters, ratings of two files."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recsys_common", folder / "recsys_common", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("papermill==2.7.0\n")
    (folder / "chapters").mkdir()
    for name, body in CHAPTERS.items():
        (folder / "chapters" / f"{name}.py").write_text(TOY.format(number=name[0], body=body))
    (folder / "ratings").mkdir()
    (folder / "ratings" / "ratings.csv").write_text("1,2,5.0\n")
    return folder


@pytest.fixture(autouse=True)
def at_toy(toy, monkeypatch):
    """tools/book.py, called in this process, takes the toy for the repository."""
    monkeypatch.setattr(book, "ROOT", toy)
    monkeypatch.setattr(execution, "ROOT", toy)
    monkeypatch.chdir(toy)


def total(toy, number, scale="small"):
    """What a toy chapter recorded as its metric."""
    metrics = json.loads((toy / "runs" / scale / f"chapter-{number}" / "metrics.json").read_text())
    return metrics["rows"][0]["value"]


def job(toy, **parameters):
    return execution.Job(toy / "chapters" / "1_toy.py", "run", "small", {"SCALE": "small"} | parameters)


def test_a_run_passes_parameters_reports_failures_and_prints_the_table(toy, capsys):
    stale = toy / "runs" / "small" / "chapter-2" / "metrics.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"rows": [{"case": "total", "value": 5.0}]}')

    status = book.main(["run", "1", "2", "3", "--extra", "batch_size=8192 Rate=3 loud=true"])
    printed = capsys.readouterr().out

    assert status == 1
    assert total(toy, 1) == 8192 * 3.0
    executed = nbformat.read(toy / "runs" / "small" / "chapter-1.ipynb", as_version=4)
    injected = next(c.source for c in executed.cells if "injected-parameters" in c.metadata.get("tags", []))
    assert {"BATCH_SIZE = 8192", "RATE = 3.0", "LOUD = True"} < set(injected.splitlines())

    rows = {line[:7]: line.split() for line in printed.splitlines() if line[:2] in ("1 ", "2 ", "3 ")}
    name, seconds, memory, unit, result = rows["1 toy  "][1:]
    memory = memory.replace(",", "")  # of a child that begins with the memory of this process
    assert (name, unit, result) == ("toy", "MB", "ran") and float(seconds) > 0 and int(memory) > 30
    assert rows["2 fails"][2:] == ["FAILED", "in", "cell", "[3]"]  # [2] is the injected one
    assert rows["3 dies "][2:] == ["FAILED", "the", "kernel", "died:", "killed,", "perhaps", "for", "memory"]
    assert "ZeroDivisionError: division by zero" in printed and "runs/small/chapter-2.ipynb" in printed

    record = json.loads((toy / "runs" / "small" / "chapter-1" / "run.json").read_text())
    assert record["parameters"] == {"SCALE": "small", "BATCH_SIZE": 8192, "RATE": 3.0, "LOUD": True}
    assert record["seconds"] == float(seconds) and record["peak_memory_mb"] == int(memory)
    assert not (toy / "runs" / "small" / "chapter-2" / "run.json").exists()
    assert not (toy / "runs" / "small" / "chapter-3" / "run.json").exists()
    assert not stale.exists(), "a failed chapter left another run's metrics to be read as its own"


def test_an_unchanged_chapter_is_not_run_again_unless_forced(toy, capsys):
    assert book.main(["run", "1"]) == 0
    metrics = toy / "runs" / "small" / "chapter-1" / "metrics.json"
    before = metrics.stat().st_mtime_ns
    capsys.readouterr()

    start = time.monotonic()
    assert book.main(["run", "1"]) == 0
    assert time.monotonic() - start < 0.5
    assert "unchanged since" in capsys.readouterr().out
    assert metrics.stat().st_mtime_ns == before

    assert book.main(["run", "1", "--force"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" ran")
    assert metrics.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "changed", ["chapters/1_toy.py", "recsys_common/scale.py", "requirements.txt", "ratings/ratings.csv"]
)
def test_a_change_of_any_input_is_noticed(toy, changed):
    ratings = str(toy / "ratings")
    before = job(toy, DATA_DIR=ratings).inputs
    text = (toy / changed).read_bytes()
    try:
        (toy / changed).write_bytes(text + b"\n")
        assert job(toy, DATA_DIR=ratings).inputs != before
    finally:
        (toy / changed).write_bytes(text)


def test_other_parameters_are_another_run_and_another_file_time_is_not(toy):
    before = job(toy).inputs
    (toy / "chapters" / "1_toy.py").touch()
    assert job(toy).inputs == before
    assert job(toy, SEED=43).inputs != before


def test_a_killed_run_is_not_taken_for_done(toy, capsys):
    assert book.main(["run", "1"]) == 0
    assert execution.unchanged(job(toy)), "the test needs a finished run to begin with"
    command = [sys.executable, "tools/book.py", "run", "1", "--force"]
    running = subprocess.Popen(command, cwd=toy, env=os.environ | {"TOY_WAITS": "1"})
    while not (toy / "waiting").exists() or not (toy / "waiting").read_text():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()

    assert execution.unchanged(job(toy)) is None
    kernel = int((toy / "waiting").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(kernel), "the killed run left its kernel behind"

    capsys.readouterr()
    assert book.main(["run", "1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" ran")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["run", "7"], ["no chapter 7", "1 toy, 2 fails"]),
        (["run", "1", "--scale", "huge"], ["huge", "small", "medium", "full"]),
        (["run", "1", "--dataset", "ml-2m"], ["ml-2m", "SCALE=small", "simulated"]),
        (["run", "1", "--scale", "medium", "--dataset", "ml-2m"], ["ml-2m", "ml-latest-small", "ml-1m"]),
        (["run", "1", "--data-dir", "nowhere"], ["DATA_DIR=nowhere", "there is no folder"]),
        (["run", "1", "--extra", "batchsize=1"], ["'batchsize'", "did you mean batch_size?", "rate=0.5"]),
        (["run", "1", "--extra", "batch_size=1e6"], ["batch_size=1e6", "must be a whole number"]),
        (["run", "1", "--extra", "loud=1"], ["LOUD must be true or false"]),
        (["run", "1", "--extra", "rate"], ["RATE must be a number"]),
        (["run", "1", "--extra", "dataset=ml-1m"], ["'dataset'", "stand outside of EXTRA"]),
        (["run", "1", "--extra", "rate='1"], ["EXTRA=rate='1", "No closing quotation"]),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_runs(toy, capsys, arguments, told):
    shutil.rmtree(toy / "runs", ignore_errors=True)
    assert book.main(arguments) == 2
    message = capsys.readouterr().err
    assert [part for part in told if part not in message] == []
    assert not (toy / "runs").exists()


def test_full_scale_with_nothing_stops_within_two_seconds_and_lists_everything_missing(toy):
    shutil.rmtree(toy / "runs", ignore_errors=True)
    bare = {name: value for name, value in os.environ.items() if "GOOGLE" not in name and "CLOUD" not in name}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "tools/book.py", "run", "1", "--scale", "full"],
        cwd=toy,
        env=bare | {"HOME": str(toy)},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - start < 2
    assert done.returncode == 2
    for missing in ("project", "bucket", "credentials", "table", "make plan", "make rehearse CHAPTER=1"):
        assert missing.lower() in done.stderr.lower(), done.stderr
    assert not (toy / "runs").exists()


def test_a_rehearsal_is_a_full_run_beside_the_real_ones(toy):
    assert book.main(["rehearse", "1", "--extra", "batch_size=4"]) == 0
    assert total(toy, 1, "rehearsal") == 2.0
    record = json.loads((toy / "runs" / "rehearsal" / "chapter-1" / "rehearse.json").read_text())
    assert record["parameters"] == {"SCALE": "full", "DATASET": "rehearsal.shop.ratings", "BATCH_SIZE": 4}
    assert "RECSYS_REHEARSE" not in os.environ


def test_a_relative_folder_of_ratings_reaches_the_notebook_as_an_absolute_one(toy):
    arguments = argparse.Namespace(command="run", scale="small", dataset="", data_dir="ratings", extra="")
    job = book.job_for(toy / "chapters" / "1_toy.py", arguments)
    assert job.parameters["DATA_DIR"] == str(toy / "ratings")


def test_sync_writes_a_clean_notebook_and_check_compares_it(toy, capsys):
    written = toy / "chapters" / "1_toy.ipynb"
    assert book.main(["check", "1"]) == 1
    assert "no chapters/1_toy.ipynb: run make sync" in capsys.readouterr().out

    assert book.main(["sync", "1"]) == 0
    notebook = nbformat.read(written, as_version=4)
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, None, 1, 2, 3, 4]
    assert notebook.cells[3].outputs[0].data["text/plain"] == "5.0"
    assert book.main(["sync", "1"]) == 0
    assert "unchanged since" in capsys.readouterr().out

    # The output tagged as this machine's differs, the others are the same; the metrics are the check's own.
    metrics = toy / "runs" / "small" / "chapter-1" / "metrics.json"
    metrics.write_text('{"rows": [{"case": "total", "value": -1}]}')
    assert book.main(["check", "1"]) == 0
    assert "as committed" in capsys.readouterr().out
    assert total(toy, 1) == 5.0
    assert book.main(["check", "1"]) == 0
    assert "unchanged since" in capsys.readouterr().out

    # Metrics of the same parameters are as good as the check's own; those of another experiment are not.
    check = execution.Job(toy / "chapters" / "1_toy.py", "check", "small", {})
    assert book.main(["run", "1", "--force"]) == 0
    assert execution.unchanged(check)
    assert book.main(["run", "1", "--extra", "rate=0.0"]) == 0
    assert total(toy, 1) == 0
    assert execution.unchanged(check) is None, "the gate would read the metrics of another experiment"

    written.write_text(written.read_text().replace('"5.0"', '"6.0"'))
    assert book.main(["check", "1"]) == 1
    printed = capsys.readouterr().out
    assert "'6.0' == '5.0'" in printed and "FAILED not the committed outputs" in printed


def test_sync_refuses_stderr_and_machine_paths_and_keeps_the_old_notebook(toy, capsys):
    old = toy / "chapters" / "4_noisy.ipynb"
    old.write_text("the old one")
    assert book.main(["sync", "4"]) == 1
    printed = capsys.readouterr().out
    assert "4_noisy.ipynb, cell 4 wrote to stderr" in printed and "careful" in printed
    assert "4_noisy.ipynb, cell 4 prints a path of this machine" in printed
    assert old.read_text() == "the old one"
