"""What can be done from a shell? Prepare data, train, list and compare runs, export a model, evaluate any model.

    python -m recsys_common train                                     # the defaults
    python -m recsys_common train run.yaml --set training.epochs=8    # a file says what differs from the defaults
    python -m recsys_common runs --compare matrix_factorization-1 matrix_factorization-2 --plot curves.png
    python -m recsys_common export runs/train/<name>
    python -m recsys_common evaluate --model ease --train train.txt --test test.txt --k 10 20 --set model.l2=500

Each command says more with --help. A faulty config, or file that is to be evaluated, ends with what is wrong with it
and exit code 2, other faults with 1, a run that was asked to stop, by SIGTERM or Ctrl-C, with 143 or 130; the same
command then goes on. Nothing is imported from the current folder, and no architecture but those of this package, unless
`--allow-own-code` is given: a config names the module of its architecture, and a config may come from anybody.

Needs: config_commands.py runs.py prepare.py evaluate_command.py and what they need; tracking.py (for `runs --mlflow`)
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

OWN_CODE = "--allow-own-code"


class FaultyConfig(ValueError):
    """What is wrong with the config, or with what else was given."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m recsys_common", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (purpose, options, _) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        for add in options:
            add(command)
    given = parser.parse_args(arguments)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "2":  # of the package; what C++ still says there is for its developers
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from recsys_common import runs
    from recsys_common.masking import Masked, masked

    if arguments is None:  # from a shell
        own = getattr(given, "own_code", False)
        os.environ["RECSYS_OWN_CODE"] = "1" if own else os.environ.get("RECSYS_OWN_CODE", "0")
    shown = logging.StreamHandler()
    shown.setFormatter(Masked("%(message)s"))
    runs.log.addHandler(shown)
    runs.log.setLevel(logging.INFO)
    try:
        return COMMANDS[given.command][2](given)
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        print(masked(str(error)), file=sys.stderr)
        return 2 if isinstance(error, FaultyConfig) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:  # of Google's client or of TensorFlow
        print(masked(traceback.format_exc()), file=sys.stderr)
        return 1
    finally:
        runs.log.removeHandler(shown)


def _config(given):
    from recsys_common.config_commands import config

    try:
        made = config(given.config, *given.settings)
        from recsys_common import prepare  # takes seconds, TensorFlow and all; a fault of the config is told at once

        prepare.check(made)
    except (ValueError, OSError) as error:
        raise FaultyConfig(str(error)) from None
    return made


def _places(given) -> dict:
    names = ("runs_dir", "data_dir", "project", "bucket", "location")
    return {name: getattr(given, name) for name in names}


def _prepare(given) -> int:
    from recsys_common.prepare import prepare

    made = prepare(_config(given), **_places(given))
    counts = ", ".join(f"{part} {rows:,}" for part, rows in made.about["counts"].items())
    print(f"{made.folder}\n  {made.about['dataset']}: {counts}; content {made.about['content'][:12]}")
    return 0


def _interrupted(*_) -> None:
    """The first Ctrl-C asks training to save a checkpoint and end, as SIGTERM does; the next one ends it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # nothing to save yet
        raise KeyboardInterrupt
    print("saving a checkpoint; Ctrl-C again ends at once", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


def _train(given) -> int:
    from recsys_common import runs

    signal.signal(signal.SIGINT, _interrupted)
    run = runs.train(_config(given), **_places(given))
    if run.about["state"] != "finished":
        print(f"{run.folder}: {run.about['state']} at step {run.about['steps']}; the same command goes on")
        return 143
    print(_aligned([{"": part} | _rounded(values) for part, values in run.metrics.items()]))
    print(f"\n{run.folder}, {sum(run.about['seconds'].values()):.0f} s")
    options = "" if given.runs_dir == "runs" else f" {Path(given.runs_dir) / 'train'}"
    if given.export:
        print(f"exported: {runs.export(run.folder)}")
    else:
        print(f"next: python -m recsys_common export {run.folder}")
    print(f"      python -m recsys_common runs{options}")
    return 0


def _runs(given) -> int:
    from recsys_common import runs

    if given.compare:
        rows = runs.compared(*(_named(given.folder, name) for name in given.compare))
        print(_aligned([_rounded(row) for row in rows]))
    elif rows := runs.table(given.folder):
        print(_aligned([_rounded(row) for row in rows]))
    else:
        print(f"{given.folder}: no runs yet; python -m recsys_common train")
    chosen = [_named(given.folder, name) for name in given.compare or [row["name"] for row in runs.table(given.folder)]]
    if given.plot:
        runs.curves(chosen).savefig(given.plot)
        print(given.plot)
    if given.mlflow:
        from recsys_common import tracking

        for folder in chosen:
            if runs.load(folder).about.get("state") == "finished":
                print(f"{folder.name}: {tracking.send(folder, given.mlflow)}")
    return 0


def _export(given) -> int:
    from recsys_common import runs

    print(runs.export(given.run))
    return 0


def _evaluate(given) -> int:
    from recsys_common import evaluate_command

    try:
        return evaluate_command.command(given)
    except (ValueError, OSError) as error:
        raise FaultyConfig(str(error)) from None


def _named(folder: str, name: str) -> Path:
    """The folder of a run that is called by its name, by the beginning of it or of its hash, or by its path."""
    if (Path(name) / "run.json").is_file():
        return Path(name)
    there = [path.parent for path in Path(folder).glob("*/run.json")]
    found = [path for path in there if path.name.startswith(name) or path.name.rpartition("-")[2].startswith(name)]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found or there)) or "none"
        raise ValueError(f"{name!r}: {len(found)} runs in {folder} are called so, expected one; there are {names}")
    return found[0]


def _rounded(row: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def _aligned(rows: list[dict]) -> str:
    """Rows as columns of text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([("" if row.get(name) is None else str(row[name])) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


# Options ------------------------------------------------------------------------------------------------


def _of_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", default="small", help="YAML file, or small, medium or full (small)")
    command.add_argument("--set", dest="settings", action="extend", nargs="+", default=[], metavar="path=value")
    command.add_argument(OWN_CODE, dest="own_code", action="store_true", help="the config may name a module of yours")


def _of_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runs-dir", default="runs", help="data goes to its folder data, runs to train (runs)")
    command.add_argument("--data-dir", default="data", help="where data sets that are files lie (data)")
    command.add_argument("--project", default="", help="Google Cloud project; none: the embedded BigQuery")
    command.add_argument("--bucket", default="", help="Cloud Storage bucket, without gs://")
    command.add_argument("--location", default="US", help="where table and bucket are (US)")


def _of_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--export", action="store_true", help="write the model that leaves, too")


def _of_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", nargs="?", default="runs/train", help="folder of the runs (runs/train)")
    command.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs, by the beginning of name or hash")
    command.add_argument("--plot", metavar="FILE", help="draw learning curves, such as curves.png")
    command.add_argument("--mlflow", metavar="URI", help="send the finished ones to an MLflow server (tracking.py)")


def _of_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="folder of the run")
    command.add_argument(OWN_CODE, dest="own_code", action="store_true", help="the config may name a module of yours")


def _of_evaluate(command: argparse.ArgumentParser) -> None:
    from recsys_common import evaluate_command

    evaluate_command.options(command)


COMMANDS = {  # name -> purpose, options, function
    "prepare": ("make the data of a config: load, split, number, convert", [_of_config, _of_places], _prepare),
    "train": ("train as a config says, or go on with it", [_of_config, _of_places, _of_train], _train),
    "runs": ("list runs, compare two, plot their curves", [_of_runs], _runs),
    "export": ("write the model of a run, for other programs", [_of_export], _export),
    "evaluate": ("fit a model to plain files or a data set, and rank", [_of_evaluate], _evaluate),
}

if __name__ == "__main__":
    sys.exit(main())
