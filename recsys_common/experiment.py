"""How good is this model on this split? Fit, rank, and look for settings, the same way for every model.

    parts = splits.leave_one_out(*interactions.read("ml-1m.txt"))
    result = run("ease", parts["test"], {"l2": 500.0}, k=(10, 20))          # {"ndcg@10": ..., "seconds": ..., ...}
    tuned = tune("ease", parts["validation"], trials=20)                    # tuned.settings, tuned.trials

A model is a module of recsys_common.models by its name ("item-knn" is item_knn.py): one with `fit(train, parameters)`,
or an architecture of config.py with `build`, which fitted.py trains. A setting of the first is a field of its
`Parameters`; of the second, a path of the config such as "training.epochs". Tuning sees the validation part alone.

Needs: evaluation.py metrics.py interactions.py splits.py declared_features.py models/ (and what the model needs)
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from recsys_common import evaluation, metrics
from recsys_common.splits import RatingSplit, Split

LOOKS = 15  # at validation in a trial, about
EPOCHS = 20  # of an architecture of the config, whose own default is that of a first try
PATIENCE = 3  # looks without a better validation, after which a trial ends


def names() -> list[str]:
    """The models that there are, as the command line calls them."""
    found = pkgutil.iter_modules([str(Path(__file__).parent / "models")])
    return sorted(each.name.replace("_", "-") for each in found)


def module(name: str):
    """The module of a model.

    Raises:
      ValueError: there is none of that name; names those that there are.
    """
    if name not in names():
        raise ValueError(f"--model: found {name!r}, expected one of {', '.join(names())}")
    return importlib.import_module(f"recsys_common.models.{name.replace('-', '_')}")


def is_rating(name: str) -> bool:
    """Whether a model predicts ratings, and does not rank."""
    return getattr(module(name), "TASK", "ranking") == "rating"


def parameters(name: str, settings: dict[str, Any]):
    """The settings of a model, checked, with its defaults: its `Parameters`, or a `config.Config`.

    Raises:
      ValueError: an unknown setting or a value out of range: the path, what was found, what is expected.
    """
    its = module(name)
    if hasattr(its, "build"):
        from recsys_common.config import Config

        changed = [f"{path}={'null' if value is None else value}" for path, value in settings.items()]
        training = {"epochs": EPOCHS, "steps_per_execution": 20}  # nothing is logged between passes
        return Config(model={"architecture": name.replace("-", "_")}, training=training).override(*changed)
    try:
        return its.Parameters(**settings)
    except ValidationError as error:
        fields, lines = its.Parameters.model_fields, []
        for fault in error.errors(include_url=False):
            path = str(fault["loc"][0])
            if path not in fields:
                lines.append(f"model.{path}: no such setting of {name}; there are {', '.join(fields) or 'none'}")
            else:
                expected = fault["msg"].replace("Input should be ", "")
                about = fields[path].description
                lines.append(f"model.{path}: found {fault['input']!r}, expected {expected} ({about})")
        raise ValueError("\n".join(lines)) from None


def fit(name: str, split: Split | RatingSplit, settings: dict[str, Any] | None = None, seed: int = 1, after_epoch=None):
    """A model, fitted to `split.train`.

    Args:
      name: of the model.
      split: of `splits`.
      settings: as `parameters` takes them.
      seed: of what is random in it.
      after_epoch: `after_epoch(model, epoch)` after each pass, from 1; True ends the training.

    Returns:
      What scores: `scores(seen, rows)` -> float32 [B, num_items], or `ratings(users, items)` -> float32 [N].

    Raises:
      ValueError: as `parameters`; or a model with a table of users is asked about users who are not in it.
    """
    its, checked = module(name), parameters(name, settings or {})
    if hasattr(its, "build"):
        from recsys_common import fitted

        model = fitted.fit(checked, split.train, seed, after_epoch)
    else:
        model = its.fit(split.train, checked, seed, after_epoch)
    if isinstance(split, Split) and not model.folds_in:
        asked = np.unique(split.test.users)
        strangers = asked[(split.train.lengths[asked] == 0) & (split.seen.lengths[asked] > 0)]
        if len(strangers) > len(asked) / 2:
            raise ValueError(
                f"{name} has a table of users, and {len(strangers):,} of {len(asked):,} users that are asked about are "
                "not in training. Take a model that scores histories, such as ease, item-knn or ials."
            )
    return model


def rank(model, split: Split, k: int = 10, progress: bool = False) -> evaluation.Ranking:
    """The exact ranking of a fitted model on the users of `split.test`."""
    from tqdm import tqdm

    users = len(np.unique(split.test.users))
    with tqdm(total=users, unit=" users", desc="ranking", delay=2, disable=not progress) as bar:

        def scores(rows: np.ndarray) -> np.ndarray:
            bar.update(len(rows))
            return model.scores(split.seen, rows)

        seen, test = split.seen, split.test
        return evaluation.rank(scores, test.users, test.items, seen.users, seen.items, test.num_items, k)


def run(
    name: str, split: Split | RatingSplit, settings: dict[str, Any] | None = None, seed: int = 1,
    k: tuple[int, ...] = (10,), progress: bool = False, after_epoch=None,
) -> dict[str, Any]:  # fmt: skip
    """Fit and evaluate.

    Args:
      name, split, settings, seed: as of `fit`.
      k: lengths of lists, for a split of rankings.
      progress: whether passes and ranked users are shown on stderr.

    Returns:
      "model", "parameters" (all of them), "seed"; the metrics, in small letters, such as "ndcg@10", or "rmse" and
      "mae"; "users", who were asked, or "ratings"; "seconds" of fitting, "evaluation_seconds", and "memory_gb", the
      most that this process has taken so far.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    passes = _passes(name, settings or {})
    with tqdm(total=passes, unit=" passes", desc=name, delay=2, disable=not (progress and passes)) as bar:

        def each_epoch(model, epoch: int) -> bool:
            bar.update(epoch - bar.n)
            return bool(after_epoch and after_epoch(model, epoch))

        # A model that nobody looks at between passes is not put together there.
        model = fit(name, split, settings, seed, each_epoch if progress or after_epoch else None)
    seconds = time.perf_counter() - started
    if isinstance(split, RatingSplit):
        found = metrics.rating_errors(model.ratings(split.users, split.items), split.ratings)
        found |= {"ratings": len(split.ratings)}
    else:
        ranking = rank(model, split, max(k), progress)
        found = {each: float(values.mean()) for each, values in metrics.per_user(ranking, tuple(k)).items()}
        found |= {f"coverage@{each}": metrics.coverage(ranking, each) for each in k}
        found |= {"users": len(np.unique(ranking.users))}
    checked = parameters(name, settings or {})
    return {
        "model": name,
        "parameters": checked.model_dump(mode="json"),
        "seed": seed,
        **{each.lower(): value for each, value in found.items()},
        "seconds": round(seconds, 3),
        "evaluation_seconds": round(time.perf_counter() - started - seconds, 3),
        "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if _MAC else 2**20), 2),
    }


_MAC = sys.platform == "darwin"  # where ru_maxrss is in bytes


# Looking for settings -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was tried, and the best of it.

    Attributes:
      settings: those of the best trial, for `run`; with the number of passes that was best.
      value: the metric of the best trial, on the validation part.
      metric: its name; RMSE is better when lower, the others when higher.
      trials: a row for each, in order: its settings, its value, its seconds; or, if it diverged, its "fault".
      seed: of the sampler, and of the models.
    """

    settings: dict[str, Any]
    value: float
    metric: str
    trials: list[dict[str, Any]]
    seed: int


def tune(
    name: str, split: Split | RatingSplit, trials: int = 20, fixed: dict[str, Any] | None = None,
    metric: str = "NDCG@10", seed: int = 1, progress: bool = False,
) -> Tuned:  # fmt: skip
    """Search the settings that the module's `SEARCH` names, with Optuna's tree-structured Parzen estimator.

    Every model has the same budget: so many trials, of which the first has the defaults. A model with passes is looked
    at up to 15 times in a trial, which ends after 3 looks without a better one; the best number of passes becomes a
    setting.

    Args:
      name: of the model.
      split: the *validation* part; the test part has no business here.
      trials: the budget. A model without settings has one trial.
      fixed: settings that are not searched.
      metric: that is made as high as can be, of `metrics.per_user`. Rating models take RMSE, as low as can be.
      seed: of the sampler, and of the models.

    Raises:
      ValueError: no such model; settings that it does not have; all trials diverged.
    """
    import optuna

    fixed, rating = dict(fixed or {}), isinstance(split, RatingSplit)
    metric = "RMSE" if rating else metric
    its = module(name)
    space = {path: bounds for path, bounds in getattr(its, "SEARCH", {}).items() if path not in fixed}
    passes = "training.epochs" if hasattr(its, "build") else "epochs"
    has_passes = passes not in fixed and _passes(name, fixed) is not None
    rows: list[dict[str, Any]] = []

    def value_of(model) -> float:
        if rating:
            return metrics.rating_errors(model.ratings(split.users, split.items), split.ratings)["RMSE"]
        kind, _, k = metric.partition("@")
        ranking = rank(model, split, int(k or 10))
        return float(metrics.per_user(ranking, (int(k or 10),), (kind,))[metric].mean())

    def objective(trial) -> float:
        settings = {path: _suggested(trial, path, bounds) for path, bounds in space.items()} if trial.number else {}
        settings = fixed | settings
        planned, epochs, values = _passes(name, settings) if has_passes else 0, [], []

        def look(model, epoch: int) -> bool:
            if epoch % -(-planned // LOOKS) and epoch != planned:
                return False
            epochs.append(epoch)
            values.append(value_of(model))
            best = int(np.argmin(values) if rating else np.argmax(values))
            return len(values) - 1 - best >= PATIENCE

        started = time.perf_counter()
        try:
            model = fit(name, split, settings, seed, look if has_passes else None)
        except FloatingPointError as error:  # it diverged: a trial like others, which cannot be the best
            rows.append({"settings": settings, "value": None, "fault": str(error)})
            raise optuna.TrialPruned from None
        if has_passes and values:
            best = int(np.argmin(values) if rating else np.argmax(values))
            settings, value = settings | {passes: epochs[best]}, values[best]
        else:
            value = value_of(model)
        rows.append({"settings": settings, "value": value, "seconds": round(time.perf_counter() - started, 2)})
        return value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="minimize" if rating else "maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials if space else 1, show_progress_bar=progress)
    ended = [row for row in rows if row["value"] is not None]
    if not ended:
        raise ValueError(f"{name}: all {len(rows)} trials diverged; the last one: {rows[-1]['fault']}")
    best = (min if rating else max)(ended, key=lambda row: row["value"])
    return Tuned(best["settings"], best["value"], metric, rows, seed)


def _passes(name: str, settings: dict[str, Any]) -> int | None:
    """How many passes a model would make; None if it makes none."""
    checked = parameters(name, settings)
    return getattr(getattr(checked, "training", checked), "epochs", None)


def _suggested(trial, path: str, bounds):
    if isinstance(bounds, list):
        return trial.suggest_categorical(path, bounds)
    low, high, how = bounds
    suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
    return suggest(path, low, high, log=how == "log")
