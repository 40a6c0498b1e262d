"""What was trained here, with what, and how good is it? From a config to a folder that says so.

    run = train(Config.load("run.yaml"))             # made again it goes on, or returns what is there
    run.folder, run.metrics["test"]["NDCG@10"]
    table("runs/train")                              # a dict for each run: name, state, what differs, metrics
    compared(one, other)                             # rows of what differs, field by field, and of the metrics
    curves([one, other])                             # a matplotlib figure
    export(run.folder)                               # the model that leaves (saving.py)

or `python -m recsys_common train run.yaml`, and then `runs` and `export`. The folder, runs/train/<name of the config>:

    config.yaml       as resolved, with the rows of the tables
    run.json          state (running, finished, stopped, failed), starts with git revision, data with hashes, versions,
                      machine, seed, seconds; at the end the metrics on validation and test, and popularity's beside
    changes.patch     what differed from the git revision, if anything did
    log.txt           what happened and when: starts, resumes, warnings, evaluations, the end or the error
    metrics.jsonl, checkpoints/, best/, tensorboard/         as training.py writes them

Credentials are masked in what is text (masking.py). Choices are made on validation, and the test is asked once, at the
end: exact ranking of all items (evaluation.py), for at most `evaluation.users` users.

The same config and the same data give the same metrics, bit for bit on a CPU with the same versions, also where the
run was killed in between: `train` makes TensorFlow's operations deterministic, in the whole process. On another kind
of processor or another version of TensorFlow sums are made in another order, and what differs in the last digit grows
with the steps: how far was not measured, so there compare a run with its own popularity.

Needs: training.py prepare.py and what they need; evaluation.py saving.py (for `export`)
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recsys_common import scale
from recsys_common.config import Config, leaves, tree_differences
from recsys_common.masking import Masked, masked
from recsys_common.plain_yaml import read

log = logging.getLogger("recsys_common")


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
      folder: of the run.
      about: run.json.
    """

    folder: Path
    about: dict

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Of "validation" and "test", and of "validation, popularity" and "test, popularity": what `evaluate` gives.

        Empty unless the run has finished.
        """
        return self.about.get("metrics", {})


def train(
    config: Config,
    *,
    runs_dir: str | os.PathLike = "runs",
    data_dir: str = "data",
    project: str = "",
    bucket: str = "",
    location: str = "US",
    data: str | os.PathLike | None = None,
    before: str | os.PathLike | None = None,
) -> Run:
    """Prepare the data, train, and ask the test. The same call resumes; of a finished run it returns what is there.

    Args:
      config: the run; the rows of its tables may be open.
      runs_dir: data goes to its folder `data`, the run to its folder `train`.
      data_dir, project, bucket, location: as for `prepare.prepare`.
      data: folder of data that `prepare` has made, perhaps elsewhere; None: it is prepared now, or found.
      before: folder of an earlier run with its exported model. The first step begins with the rows that it has for ids
        that are still there, and with its layers; new ids begin as always.

    Raises:
      BlockingIOError: another process is at work on this run.
      ValueError: the folder has a run of the same config on other data; others as `prepare` and `training.train`.
    """
    from recsys_common.prepare import found, prepare

    start = time.perf_counter()
    places = {"data_dir": data_dir, "project": project, "bucket": bucket, "location": location}
    prepared = found(data, config) if data else prepare(config, runs_dir=runs_dir, **places)
    folder, prepared_in = Path(runs_dir) / "train" / prepared.config.name, time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    with _log(folder):
        about = _started(folder, prepared, before)
        if about["state"] == "finished":
            log.info("finished already: %s", folder)
            return load(folder)
        about["seconds"]["prepare"] += prepared_in
        try:
            about |= _trained(folder, prepared, about, before)
        except BaseException as error:
            log.exception("ended by an error")
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            _written(folder, about | {"state": state, "error": f"{type(error).__name__}: {error}"})
            raise
        _written(folder, about)
        log.info("%s: %s", about["state"], folder)
    return load(folder)


def _started(folder: Path, prepared, before) -> dict:
    """run.json as it is at the start, written; or that of a run that has finished."""
    from recsys_common import checkpoints

    known, made = _about(folder), prepared.about
    if known and known["data"]["content"] != made["content"]:
        raise ValueError(
            f"{folder} has a run of this config on other data: content {known['data']['content'][:12]}, now "
            f"{made['content'][:12]} in {prepared.folder}. Take another runs_dir."
        )
    if known.get("state") == "finished":
        return known
    latest = checkpoints.latest(folder / "checkpoints")
    step = checkpoints.content(latest)["state"]["step"] if latest else 0
    commit, changes = scale.commit(), _git("diff", "HEAD", "--", ".", ":!*.ipynb")
    number = len(known.get("starts", [])) + 1
    if changes:
        patch = folder / ("changes.patch" if number == 1 else f"changes-{number}.patch")
        patch.write_text(masked(changes), encoding="utf-8")
    begun = {"date": _now(), "step": step, "commit": commit, "changed": _git("status", "--porcelain").splitlines()}
    begun["changes"] = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else ""
    local = "://" not in prepared.folder
    data = {"folder": os.path.relpath(prepared.folder, folder) if local else prepared.folder}
    data |= {name: made[name] for name in ("content", "manifest", "dataset", "split", "counts", "stride")}
    about = {
        "name": prepared.config.name,
        "state": "running",
        "config": prepared.config.hash,
        "metric": prepared.config.evaluation.metric,
        "before": known.get("before") or (load(before).about["name"] if before else None),
        "starts": [*known.get("starts", []), begun],
        "data": data,
        "seed": prepared.config.seed,
        "machine": scale.machine(),
        "versions": {"python": platform.python_version()} | scale.versions(),
        "seconds": known.get("seconds", {"prepare": 0.0, "train": 0.0, "test": 0.0}),
    }
    (folder / "config.yaml").write_text(prepared.config.dump(), encoding="utf-8")
    _written(folder, about)
    log.info("%s at step %d, commit %s", "resumed" if step else "started", step, commit or "unknown")
    return about


def _trained(folder: Path, prepared, about: dict, before) -> dict:
    """Train and ask the test; what run.json says of it."""
    import tensorflow as tf

    from recsys_common import training

    config, frequency = prepared.config, prepared.frequency()
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()

    def evaluated(model) -> dict[str, float]:
        found = evaluate(model, prepared, "validation")
        log.info("validation: %s", _listed(found))
        return found

    make = functools.partial(config.build, _longer(frequency, config))
    begin = functools.partial(_begin, Path(before), prepared) if before else None
    files = {"train": prepared.train}
    run = training.train(config, make, files, folder=folder, evaluate=evaluated, initialise=begin)
    seconds = about["seconds"] | {"train": run.seconds}
    ended = {"steps": run.steps, "stopped": run.stopped, "evaluations": run.evaluations, "seconds": seconds}
    if run.stopped == "SIGTERM":
        return ended | {"state": "stopped"}
    line = run.evaluations[-1]
    if config.training.early_stopping:  # then the model is that of its best epoch, the first of equals
        line = max(run.evaluations, key=lambda line: line[config.evaluation.metric])
    start = time.perf_counter()
    metrics = {"validation": {name: value for name, value in line.items() if name not in ("step", "epoch")}}
    metrics["validation"]["users"] = int(line["users"])  # training.py makes floats of all
    metrics["validation, popularity"] = evaluate(None, prepared, "validation")
    metrics["test"] = evaluate(run.model, prepared, "test")
    metrics["test, popularity"] = evaluate(None, prepared, "test")
    seconds["test"] += time.perf_counter() - start
    log.info("test: %s", _listed(metrics["test"]))
    return ended | {"state": "finished", "metrics": metrics}


def evaluate(model, prepared, part: str) -> dict[str, float]:
    """Exact ranking for the users of one part of the data.

    Args:
      model: with `scores(users)`: int [U], or what its features are where one is a history -> float [U, items]. None:
        popularity, the number of training rows.
      prepared: a `prepare.Prepared`.
      part: "validation" or "test".
    """
    import numpy as np
    from tqdm import tqdm

    from recsys_common import evaluation

    config, pairs = prepared.config, prepared.pairs(part)
    popularity, histories = prepared.frequency(), prepared.histories(part) if model is not None else {}
    # evaluation.py knows one row for ids out of the vocabulary, row 0: the last of them stands for all.
    first, last = config.data.oov_buckets - 1, prepared.about["rows"]["item"]
    users, items, seen_users, seen_items = pairs
    items, seen_items = (np.maximum(rows - first, 0) for rows in (items, seen_items))
    number = len(np.unique(users))
    with tqdm(total=number, unit=" users", desc=part, delay=2, disable=not scale.progress()) as bar:

        def scores(block: np.ndarray) -> np.ndarray:
            bar.update(len(block))
            if model is None:
                return np.tile(popularity[first:], (len(block), 1))
            return model.scores(prepared.inputs(block, histories))[:, first:last]

        return evaluation.evaluate(scores, users, items, seen_users, seen_items, last - first, config.evaluation.k)


def _longer(frequency, config: Config):
    """The frequency of each row of the item table, where the config gives it more rows than the data needs."""
    import numpy as np

    rows = [each.rows for each in config.features.values() if each.column == "item_index" and getattr(each, "rows", 0)]
    return np.pad(frequency, (0, max(rows, default=len(frequency)) - len(frequency)))


# What is there ------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike) -> Run:
    """A run from its folder.

    Raises:
      FileNotFoundError: there is none.
    """
    if not (about := _about(Path(folder))):
        raise FileNotFoundError(f"{folder}: no run.json; `python -m recsys_common runs` lists the runs that are there")
    return Run(Path(folder), about)


def settings(run: Run) -> dict:
    """config.yaml as plain values, so that no architecture is imported."""
    path = run.folder / "config.yaml"
    return read(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(folder: str | os.PathLike = "runs/train") -> list[dict]:
    """The runs of a folder, the oldest first: name, state, fields that differ between them, metrics, seconds.

    A metric's column is "validation NDCG@10" and the like, by each run's evaluation.metric. A run that was killed is in
    the state "killed".
    """
    found = [load(path.parent) for path in Path(folder).glob("*/run.json")]
    found.sort(key=lambda run: run.about["starts"][0]["date"] if "starts" in run.about else "")
    trees = {run.folder: leaves(settings(run)) for run in found}
    paths = dict.fromkeys(path for tree in trees.values() for path in tree)
    differ = [path for path in paths if len({str(tree.get(path)) for tree in trees.values()}) > 1]
    rows = []
    for run in found:
        tree, row = trees[run.folder], {"name": run.folder.name, "state": _state(run)}
        row |= {path: tree.get(path) for path in differ}
        metric = tree.get("evaluation.metric", "")
        row |= {f"{part} {metric}": values.get(metric) for part, values in run.metrics.items()}
        rows.append(row | {"seconds": round(sum(run.about.get("seconds", {}).values()), 1)})
    return rows


def compared(a: str | os.PathLike, b: str | os.PathLike) -> list[dict]:
    """What differs between two runs: rows of "of" (config, data, code or metrics), "name", "a" and "b".

    Metrics are all listed, equal or not.
    """
    one, other = load(a), load(b)
    rows = [("config", *row) for row in tree_differences(settings(one), settings(other))]
    pairs = [
        ("data", "content", *(run.about.get("data", {}).get("content") for run in (one, other))),
        *(
            ("code", name, *(run.about.get("starts", [{}])[-1].get(name) for run in (one, other)))
            for name in ("commit", "changes")
        ),
        ("code", "versions", *(run.about.get("versions") for run in (one, other))),
    ]
    rows += [pair for pair in pairs if pair[2] != pair[3]]
    left, right = leaves(one.metrics, ""), leaves(other.metrics, "")
    rows += [("metrics", name.replace(".", " "), left.get(name), right.get(name)) for name in left | right]
    return [dict(zip(("of", "name", "a", "b"), row, strict=True)) for row in rows]


def curves(folders: list[str | os.PathLike]):
    """A matplotlib figure: the loss of a row by steps, and the metric on validation by epochs, of each run."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run in map(load, folders):
        tree, path = leaves(settings(run)), run.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        size, metric = tree["training.batch_size"], tree["evaluation.metric"]
        losses = [(line["step"], line["loss"] / size) for line in lines if "loss" in line]
        judged = [(line["epoch"], line[metric]) for line in lines if metric in line]
        left.plot(*zip(*losses, strict=True) if losses else [[], []], label=run.folder.name)
        right.plot(*zip(*judged, strict=True) if judged else [[], []], marker="o", label=run.folder.name)
        right.set(ylabel=f"{metric}, validation")
    left.set(xlabel="step", ylabel="loss of a row")
    right.set(xlabel="epoch")
    right.legend(fontsize=8, loc="lower right")
    plt.close(figure)  # a notebook shows what the cell returns, once
    return figure


def export(folder: str | os.PathLike, data: str | os.PathLike | None = None) -> Path:
    """Write the model of a run to its folder `config.export.folder`: its best checkpoint, or else its latest.

    Args:
      data: folder of the data that it was trained on; None: where that was then.

    Raises:
      FileNotFoundError: no run, no checkpoint yet, or its data is gone.
      Others as `saving.export`.
    """
    from recsys_common import checkpoints, saving
    from recsys_common.prepare import found

    run, folder = load(folder), Path(folder)
    config = Config.load(folder / "config.yaml")
    place = run.about["data"]["folder"]
    prepared = found(data or (place if "://" in place else os.path.normpath(folder / place)), config)
    if prepared.about["content"] != run.about["data"]["content"]:
        raise ValueError(f"{prepared.folder} has other data than {folder} was trained on, so its ids stand elsewhere")
    latest = checkpoints.latest(folder / "best") or checkpoints.latest(folder / "checkpoints")
    if latest is None:
        raise FileNotFoundError(f"{folder}: no checkpoint yet; make the run again, it goes on")
    model = restored(config, prepared.frequency(), latest)
    about = {"name": run.about["name"], "commit": run.about["starts"][-1]["commit"]}
    about |= {"data": run.about["data"], "metrics": run.metrics}
    about["run"] = {name: run.about[name] for name in ("name", "state", "starts", "seed", "machine", "versions")}
    about["run"]["checkpoint"] = f"{latest.parent.name}/{latest.name}"
    return saving.export(folder / config.export.folder, model, prepared.vocabularies(), config, about=masked(about))


def _begin(before: Path, prepared, objects: dict) -> None:
    """Take over what an exported run knows, row by row where a table has ids.

    Raises:
      ValueError: it was trained on rows of another data set, or parted in another way, which this run may ask for.
    """
    from recsys_common import artifact, checkpoints

    model, now, ids = objects["model"], prepared.vocabularies(), {}
    was, about = Config.load(before / "config.yaml"), load(before).about["data"]
    for name in ("dataset", "split"):
        if about[name] != prepared.about[name]:
            found = f"its {name} is {about[name]}, here {prepared.about[name]}"
            raise ValueError(f"{before}: {found}, so it may have trained on what is asked here")
    exported = before / was.export.folder
    known = {each.feature: each.vocabulary for each in artifact.verify(exported).inputs if each.vocabulary}
    for name, table in model.rows.features.items():
        feature = getattr(model, "ids_of", {}).get(table.name, name)
        if feature in known and feature in now:
            ids[table.name] = artifact.read_ids(exported / known[feature].file), now[feature]
    latest = checkpoints.latest(before / "best") or checkpoints.latest(before / "checkpoints")
    report = checkpoints.warm_start(latest, objects, ids, prepared.config.data.oov_buckets)
    listed = [f"{table}: " + ", ".join(f"{n:,} {what}" for what, n in rows.items()) for table, rows in report.items()]
    log.info("begun with %s; %s", load(before).about["name"], "; ".join(listed))


def restored(config: Config, frequency, checkpoint: Path):
    """The model of a config as a checkpoint has it."""
    import tensorflow as tf

    from recsys_common import checkpoints, training_step

    model = training_step.made(config, functools.partial(config.build, _longer(frequency, config)))
    loss = tf.function(functools.partial(model.compute_loss, training=False))
    loss.get_concrete_function(config.features.batch_spec(2))  # makes all variables
    checkpoints.restore(checkpoint, {"model": model})
    return model


def _about(folder: Path) -> dict:
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _written(folder: Path, about: dict) -> None:
    about = about if about["state"] == "running" else about | {"ended": _now()}
    scale.write_json(folder / "run.json", masked(about))


def _state(run: Run) -> str:
    """The state; of one that is running, whether its process is still there."""
    state, path = run.about.get("state", "unknown"), run.folder / "log.txt"
    if state != "running" or not path.exists():
        return state
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return state
    return "killed"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _listed(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "users")


def _git(*words: str) -> str:
    """What git says of the checkout that this file is in; "" outside of one."""
    with contextlib.suppress(FileNotFoundError):  # no git
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, capture_output=True)
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
    return ""


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """log.txt gets what is logged and warned of; no other process does this run meanwhile."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    try:
        fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handler.close()
        raise BlockingIOError(
            error.errno, f"{folder}: another process is at work on this run. Wait until it has ended"
        ) from None
    handler.setFormatter(Masked("%(asctime)s %(levelname)s %(message)s"))
    level, show = log.level, warnings.showwarning

    def logged(message, category, *where, **more) -> None:
        log.warning("%s: %s", category.__name__, message)
        show(message, category, *where, **more)

    log.addHandler(handler)
    log.setLevel(logging.INFO)
    warnings.showwarning = logged
    try:
        yield
    finally:
        warnings.showwarning = show
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
