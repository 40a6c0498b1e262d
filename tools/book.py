"""How are the chapters run, checked and turned into notebooks?

    python tools/book.py run 3 --scale medium --extra "batch_size=8192"     into runs/medium/chapter-3.ipynb
    python tools/book.py rehearse 3     the full path on the embedded services, into runs/rehearsal/
    python tools/book.py sync           chapters/N_name.py -> N_name.ipynb, executed at the small scale
    python tools/book.py check          executes each committed notebook once, compares its outputs (nbval)

`make book`, `make test` and their neighbours call these. What can be refused (an unknown chapter, scale,
dataset or parameter, a missing project) is refused before a notebook starts and in under two seconds: the
imports that take longer stand inside the functions that need them.

Needs: notebooks.py execution.py; recsys_common installed
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from pathlib import Path

import notebooks
from execution import ROOT, Failed, Job, execute, relative, unchanged

from recsys_common import scale

BUDGET_SECONDS, BUDGET_GB = 75, 4  # of one chapter at the small scale
WORDS = {
    "run": ("running", "ran"),
    "rehearse": ("rehearsing", "rehearsed"),
    "sync": ("executing", "written"),
    "check": ("comparing its outputs", "as committed"),
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


class Refused(Exception):
    """What was asked for cannot start; the message says why, and what would."""


# What is asked for -------------------------------------------------------------------------------------


def chosen(numbers: list[str]) -> list[Path]:
    """The chapters with these numbers, all of them for no number."""
    known = notebooks.chapters(ROOT / "chapters")
    unknown = [number for number in numbers if not number.isdigit() or int(number) not in known]
    if unknown or not known:
        there = ", ".join(notebooks.title(path) for path in known.values()) or f"none in {ROOT / 'chapters'}"
        raise Refused(f"no chapter {' '.join(unknown)}; the chapters are: {there}")
    return [known[int(number)] for number in numbers] or list(known.values())


def parse_extra(path: Path, defaults: dict, extra: str) -> dict[str, bool | int | float | str]:
    """`batch_size=8192 ...` as parameters of this chapter: known names, values of their default's type."""
    names = {name.lower(): name for name in defaults if name not in ("SCALE", "DATASET", "DATA_DIR")}
    given = {}
    try:
        words = shlex.split(extra)
    except ValueError as error:
        raise Refused(f"EXTRA={extra}: {error}") from None
    for word in words:
        name, _, value = word.partition("=")
        if name.lower() not in names:
            near = difflib.get_close_matches(name.lower(), names, n=1)
            raise Refused(
                f"EXTRA: chapter {notebooks.title(path)} has no parameter {name!r}"
                + (f", did you mean {near[0]}?" if near else "")
                + f"\n  EXTRA takes: {' '.join(f'{low}={defaults[name]}' for low, name in names.items())}"
                + "\n  SCALE=, DATASET= and DATA_DIR= stand outside of EXTRA"
            )
        name = names[name.lower()]
        kind = type(defaults[name])
        try:
            given[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise Refused(f"EXTRA: {word!r}: {name} must be {KINDS[kind]}") from None
    return given


def check_scale(command: str, effective: dict, number: str) -> None:
    """Refuses an unknown scale or dataset, and a full run that has nothing to run on."""
    project, bucket, dataset = (str(effective.get(name, "")) for name in ("PROJECT", "BUCKET", "DATASET"))
    try:
        scale.check(effective["SCALE"], dataset)
    except ValueError as error:
        raise Refused(str(error)) from None
    if (effective["SCALE"], command) != ("full", "run"):
        return
    missing = scale.missing_for_full(project, bucket, dataset)
    if missing:
        raise Refused(
            "SCALE=full cannot start, missing:\n"
            + "".join(f"  - {line}\n" for line in missing)
            + f"What it will do and cost:                make plan SCALE=full CHAPTER={number}\n"
            + f"The same path here, without an account:  make rehearse CHAPTER={number}"
        )


def job_for(path: Path, arguments: argparse.Namespace) -> Job:
    """What one chapter gets to run with; raises Refused for anything that cannot be right."""
    given: dict[str, bool | int | float | str] = {}
    defaults = notebooks.parameters(path)
    if arguments.command in ("run", "rehearse"):
        given = {"SCALE": arguments.scale}
        if arguments.dataset or arguments.scale != "small":  # the chapter's own data set is that of small
            default = scale.DEFAULT_DATASET.get(arguments.scale, "")
            if arguments.scale == "medium":
                default = scale.MEDIUM_DATASET.get(int(path.stem.split("_")[0]), default)
            given["DATASET"] = arguments.dataset or default
        if arguments.data_dir:
            given["DATA_DIR"] = absolute(arguments.data_dir)
        if arguments.command == "rehearse":
            given |= {name: value for name, value in scale.REHEARSAL.items() if name in defaults}
        given |= parse_extra(path, defaults, arguments.extra)
    check_scale(arguments.command, defaults | given, path.stem.split("_")[0])
    return Job(path, arguments.command, arguments.scale, given)


def absolute(data_dir: str) -> str:
    """A folder as the notebook, which runs in chapters/, can open it; an address such as gs:// stays."""
    if "://" in data_dir:
        return data_dir
    folder = Path(data_dir).expanduser().absolute()
    if not folder.is_dir():
        raise Refused(f"DATA_DIR={data_dir}: there is no folder {folder}")
    return str(folder)


# What is told ------------------------------------------------------------------------------------------


def tell(rows: list[tuple[Path, dict | None, str]]) -> None:
    """The table of chapters: what each took, at most held, and came to."""
    width = max(len(notebooks.title(path)) for path, _, _ in rows)
    print(f"\n{'chapter':{width}}  seconds  peak memory  result")
    for path, record, result in rows:
        seconds = f"{record['seconds']:.1f}" if record else ""
        memory = f"{record['peak_memory_mb']:,} MB" if record else ""
        print(f"{notebooks.title(path):{width}}  {seconds:>7}  {memory:>11}  {result}")


def process(job: Job, force: bool) -> tuple[Path, dict | None, str]:
    """One chapter's row of the table, executed if it must be."""
    record = None if force else unchanged(job)
    if record:
        return job.path, record, f"unchanged since {record['date'][:16].replace('T', ' ')} UTC"
    doing, done = WORDS[job.command]
    print(f"chapter {notebooks.title(job.path)}: {doing}, log in {relative(job.log)}", flush=True)
    try:
        record = execute(job)
    except Failed as failure:
        summary, _, details = str(failure).partition("\n")
        print(details)
        return job.path, None, f"FAILED {summary}"
    over = []
    if job.scale == "small" and record["seconds"] > BUDGET_SECONDS:
        over.append(f"over {BUDGET_SECONDS} s")
    if job.scale == "small" and record["peak_memory_mb"] > BUDGET_GB * 1000:
        over.append(f"over {BUDGET_GB} GB")
    return job.path, record, ", ".join([done, *over])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the chapters, checks them, turns them into notebooks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in {
        "run": "through papermill into runs/<scale>/",
        "rehearse": "the full path against the embedded services, into runs/rehearsal/",
        "sync": "write chapters/N_name.ipynb from N_name.py, executed at the small scale",
        "check": "execute each committed notebook and compare its outputs",
    }.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("chapters", nargs="*", metavar="N", help="chapter numbers; none means all")
        command.add_argument("--force", action="store_true", help="execute unchanged chapters too")
        always = "full" if name == "rehearse" else "small"
        command.set_defaults(scale=always, dataset="", data_dir="", extra="")
        if name in ("run", "rehearse"):
            command.add_argument("--dataset", help="such as simulated or ml-1m; the chapter's own by default")
            command.add_argument("--data-dir", help="the folder that holds the ratings")
            command.add_argument("--extra", metavar="'NAME=VALUE ...'", help="any parameter of the chapter")
        if name == "run":
            command.add_argument("--scale", help="small, medium or full")
    wanted = parser.parse_args(arguments)
    try:
        jobs = [job_for(path, wanted) for path in chosen(wanted.chapters)]
    except (Refused, ValueError) as refusal:
        print(refusal, file=sys.stderr)
        return 2
    rows = []
    try:
        for job in jobs:
            rows.append(process(job, wanted.force))
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    tell(rows)
    return 1 if any(result.startswith("FAILED") for _, _, result in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
