"""What does `python -m recsys_common evaluate` do? One model, on plain files or a data set: fit, rank, JSON.

    evaluate --model ease --train train.txt --test test.txt --k 10 20 --set model.l2=500
    evaluate --model ials --sequences ml-1m.txt --protocol leave-one-out --tune 20
    evaluate --model biased-mf --train u1.base u2.base --test u1.test u2.test
    evaluate --model item-knn --dataset ml-20m --protocol strong-generalisation --minimum-rating 4

Files of interactions have lines `user item` or `user item item ...`, ids are integers, in order of time if there is
one. Files of ratings, for models that predict them, have `user item rating` or `user item rating time`.

Needs: experiment.py interactions.py splits.py metrics.py evaluation.py plain_yaml.py datasets/ models/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PROTOCOLS = ("leave-one-out", "temporal", "strong-generalisation", "90/10", "5-fold")
OF_RATINGS = ("90/10", "5-fold")


def options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from recsys_common import experiment

    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = "\n".join(__doc__.split("\n")[:-3])
    command.epilog = f"models: {', '.join(experiment.names())}"
    add = command.add_argument
    add("--model", required=True, metavar="NAME", help="which model; see below")
    add("--train", nargs="+", metavar="FILE", help="what to fit to; several with as many --test: the mean of the folds")
    add("--test", nargs="+", metavar="FILE", help="what is asked for")
    add("--validation", metavar="FILE", help="between both: for --tune; seen when the test is asked for")
    add("--sequences", metavar="FILE", help="all interactions in one file, parted by --protocol")
    add("--ratings", metavar="FILE", help="all ratings in one file, parted by --protocol")
    add("--dataset", metavar="NAME", help="in place of files: ml-1m, ml-20m, simulated, ...")
    add("--data-dir", default="data", help="where data sets lie, or are downloaded to (data)")
    add("--rows", type=int, default=100_000, help="ratings of the data set `simulated` (100000)")
    add("--minimum-rating", type=float, metavar="R", help="an interaction is a rating of R or more (any rating)")
    add("--protocol", choices=PROTOCOLS, help="temporal where there is a clock, leave-one-out else; 90/10 of ratings")
    add("--held-out", type=int, metavar="N", help="users of strong generalisation's test (a tenth; ml-20m: 10000)")
    add("--on", choices=("test", "validation"), default="test", help="which part is asked for (test)")
    add("--k", type=int, nargs="+", default=[10], help="lengths of lists (10)")
    add("--set", dest="settings", action="extend", nargs="+", default=[], metavar="path=value", help="model.l2=500")
    add("--tune", type=int, default=0, metavar="TRIALS", help="search settings on validation first; --set are fixed")
    add("--seed", type=int, default=1, help="of the model, of the search and of random splits (1)")
    add("--output", metavar="FILE", help="write the JSON there, too")


def command(given: argparse.Namespace) -> int:
    """Run; prints one JSON object.

    Raises:
      ValueError: a faulty option, setting or file.
      OSError: a file cannot be read.
    """
    from recsys_common import experiment, scale

    settings, rating = _settings(given), experiment.is_rating(given.model)
    experiment.parameters(given.model, settings)  # a fault is told before files are read
    if min(given.k) < 1:
        raise ValueError(f"--k: found {min(given.k)}, expected 1 or more")
    protocol, folds = _rating_folds(given) if rating else _ranking_parts(given)
    tuned, progress = {}, scale.progress() and sys.stderr.isatty()
    if given.tune:
        found = experiment.tune(
            given.model, _for_tuning(folds[0], rating), given.tune, settings, seed=given.seed, progress=progress
        )
        settings = found.settings
        tuned = {"tuned": {"trials": len(found.trials), "metric": found.metric.lower(), "validation": found.value}}
    parts = folds if rating else [_part(folds[0], given.on)]
    results = [experiment.run(given.model, part, settings, given.seed, tuple(given.k), progress) for part in parts]
    result = results[0] | {"dataset": _name(given), "protocol": protocol} | tuned
    if len(results) > 1:
        for name in ("rmse", "mae", "seconds", "evaluation_seconds"):
            result[name] = sum(each[name] for each in results) / len(results)
        result["ratings"] = sum(each["ratings"] for each in results)
        result["folds"] = [each["rmse"] for each in results]
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        Path(given.output).write_text(text + "\n")
    return 0


def _settings(given) -> dict[str, Any]:
    from recsys_common import experiment
    from recsys_common.plain_yaml import read

    of_config, settings = hasattr(experiment.module(given.model), "build"), {}
    for setting in given.settings:
        path, equals, value = setting.partition("=")
        if not equals or not (of_config or path.startswith("model.")):
            raise ValueError(f"--set: found {setting!r}, expected model.NAME=VALUE")
        settings[path if of_config else path.removeprefix("model.")] = read(value)
    return settings


def _name(given) -> str:
    return given.dataset or Path(given.sequences or given.ratings or given.train[0]).name


def _check_source(given, *names: str) -> None:
    """Raise ValueError unless exactly one of the sources is given, and is one of `names`."""
    sources = [name for name in ("train", "sequences", "ratings", "dataset") if getattr(given, name)]
    expected = " or ".join("--train with --test" if name == "train" else f"--{name}" for name in names)
    if len(sources) != 1 or sources[0] not in names:
        found = ", ".join(f"--{name}" for name in sources) or "none"
        raise ValueError(f"{given.model} takes its data from {expected}, one of them; found {found}")
    if bool(given.train) != bool(given.test) or (given.train and len(given.train) != len(given.test)):
        raise ValueError("--train and --test: expected as many files of one as of the other")


def _ranking_parts(given) -> tuple[str, list[dict]]:
    """The protocol's name, and {"validation": Split, "test": Split}."""
    from recsys_common import interactions, splits

    _check_source(given, "train", "sequences", "ratings", "dataset")
    if given.protocol in OF_RATINGS:
        raise ValueError(f"--protocol {given.protocol} is for models that predict ratings; {given.model} ranks")
    if given.train:
        if len(given.train) > 1 or given.protocol:
            raise ValueError("--train: a ranking has one file for training and one for the test, and no --protocol")
        files = [given.train[0], *([given.validation] if given.validation else []), given.test[0]]
        return "given", [splits.given(*map(interactions.read, files))]
    times = None
    if given.sequences:
        users, items = interactions.read(given.sequences)
    else:
        users, items, ratings, times = _ratings(given)
        if given.minimum_rating is not None:
            users, items = users[ratings >= given.minimum_rating], items[ratings >= given.minimum_rating]
            times = None if times is None else times[ratings >= given.minimum_rating]
        if times is not None:
            order = times.argsort(kind="stable")
            users, items, times = users[order], items[order], times[order]
    protocol = given.protocol or ("leave-one-out" if times is None else "temporal")
    if protocol == "temporal":
        if times is None:
            raise ValueError("--protocol temporal: these interactions have no clock; take leave-one-out")
        return protocol, [splits.temporal(users, items, times)]
    if protocol == "strong-generalisation":
        held_out = given.held_out or (10_000 if given.dataset == "ml-20m" else max(len(set(users.tolist())) // 10, 1))
        return protocol, [splits.strong_generalisation(users, items, held_out)]
    return protocol, [splits.leave_one_out(users, items)]


def _ratings(given):
    """Users, items, ratings, and times in seconds where there is a clock."""
    from recsys_common import datasets, interactions

    if given.ratings:
        return interactions.read_ratings(given.ratings)
    tables = datasets.load(given.dataset, given.data_dir, rows=given.rows)
    users, items, ratings, times = (tables.ratings[name].to_numpy() for name in tables.ratings.column_names)
    if tables.time == "order":
        order = times.argsort(kind="stable")
        users, items, ratings = users[order], items[order], ratings[order]
    return users, items, ratings, times if tables.time == "seconds" else None


def _rating_folds(given) -> tuple[str, list]:
    from recsys_common import interactions, splits

    _check_source(given, "train", "ratings", "dataset")
    if given.train:
        pairs = [tuple(map(interactions.read_ratings, each)) for each in zip(given.train, given.test, strict=True)]
        return "given" if len(pairs) == 1 else f"{len(pairs)}-fold", [splits.rated(*each) for each in pairs]
    protocol = given.protocol or "90/10"
    if protocol not in OF_RATINGS:
        raise ValueError(f"--protocol: found {protocol}, expected one of {', '.join(OF_RATINGS)} for {given.model}")
    columns = [column for column in _ratings(given) if column is not None]
    folds = splits.random_folds(len(columns[0]), 0.1 if protocol == "90/10" else 0.2, given.seed)
    chosen = folds[:1] if protocol == "90/10" else folds
    return protocol, [splits.rated([c[~test] for c in columns], [c[test] for c in columns]) for test in chosen]


def _part(parts: dict, name: str):
    if name not in parts:
        raise ValueError(f"there is no {name} part; give --validation, or --sequences with a --protocol")
    return parts[name]


def _for_tuning(parts, rating: bool):
    """The validation part; of ratings, a tenth of the training rows."""
    from recsys_common import splits

    if not rating:
        return _part(parts, "validation")
    train = parts.train
    columns = train.users, train.items, train.values
    test = splits.random_folds(len(train), 0.1)[0]
    return splits.rated([column[~test] for column in columns], [column[test] for column in columns])
