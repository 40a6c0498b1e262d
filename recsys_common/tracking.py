"""How does a finished run get onto a tracking server that a team has already? MLflow; nothing here needs one.

    tracking.send("runs/train/matrix_factorization-0123456789ab", "http://tracking.example.com:5000")

or `python -m recsys_common runs --mlflow http://tracking.example.com:5000`. It reads the folder of the run and nothing
else: the config becomes parameters, metrics.jsonl metrics over steps, the final metrics go under names such as
`test/NDCG_at_10`, and config.yaml, run.json, metrics.jsonl and log.txt are kept as files. A run that is there already
is not sent twice. The client is the package mlflow-skinny; the server is the reader's own.

Needs: runs.py config.py declared_features.py plain_yaml.py masking.py scale.py
"""

from __future__ import annotations

import json
import os
from datetime import datetime

from recsys_common import runs
from recsys_common.config import leaves

EXPERIMENT = "recsys"
FILES = ("config.yaml", "run.json", "metrics.jsonl", "log.txt")
AT_ONCE = 100  # parameters in a call; a server takes no more, and of metrics 1,000


def send(folder: str | os.PathLike, uri: str, experiment: str = EXPERIMENT) -> str:
    """Send a finished run. Returns its id on the server.

    Args:
      folder: of the run.
      uri: of the server, http(s)://host:port. Credentials: as MLflow takes them, from the environment.

    Raises:
      ImportError: mlflow-skinny is not installed.
      ValueError: the run has not finished.
      ConnectionError: what the server or the way to it says.
    """
    try:
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ImportError("the tracking client is not installed: pip install 'recsys-common[tracking]'") from error
    run = runs.load(folder)
    if run.about.get("state") != "finished":
        raise ValueError(f"{folder}: {run.about.get('state')}, expected a finished run: `train` goes on with it")
    try:
        return _sent(run, uri, experiment)
    except MlflowException as error:
        raise ConnectionError(f"{uri}: {error}") from error


def _sent(run: runs.Run, uri: str, experiment: str) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client, name, key = MlflowClient(uri), run.about["name"], run.about["data"]["content"]
    known = client.get_experiment_by_name(experiment)
    place = known.experiment_id if known else client.create_experiment(experiment)
    there = f"tags.`recsys.run` = '{name}' and tags.`recsys.data` = '{key}' and attributes.status = 'FINISHED'"
    if found := client.search_runs([place], there, max_results=1):
        return found[0].info.run_id
    begun, ended = (_milliseconds(run.about[part]) for part in ("starts", "ended"))
    made = client.create_run(place, begun, {"recsys.run": name, "recsys.data": key}, name).info.run_id
    tree = runs.settings(run)
    parameters = [Param(path, str(value)) for path, value in leaves(tree).items()]
    for first in range(0, len(parameters), AT_ONCE):
        client.log_batch(made, params=parameters[first : first + AT_ONCE])
    metrics = list(_metrics(run, Metric, begun, ended))
    for first in range(0, len(metrics), AT_ONCE):
        client.log_batch(made, metrics=metrics[first : first + AT_ONCE])
    about = {"git revision": run.about["starts"][-1]["commit"], "dataset": run.about["data"]["dataset"]}
    client.log_batch(made, tags=[RunTag(name, str(value)) for name, value in about.items()])
    for file in FILES:
        if (run.folder / file).is_file():
            client.log_artifact(made, str(run.folder / file))
    client.set_terminated(made, "FINISHED", ended)
    return made


def _metrics(run: runs.Run, make, begun: int, ended: int):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        at = begun + round(1000 * line.get("seconds", 0))
        names = [name for name in line if name not in ("step", "epoch", "seconds", "users")]
        yield from (make(_plain(name), line[name], at, line["step"]) for name in names)
    for part, values in run.metrics.items():
        yield from (make(_plain(f"{part}/{name}"), value, ended, 0) for name, value in values.items())


def _plain(name: str) -> str:
    """MLflow takes letters, digits, _ - . / : and blanks."""
    return name.replace("@", "_at_").replace(", ", " ")


def _milliseconds(when: str | list[dict]) -> int:
    when = when if isinstance(when, str) else when[0]["date"]
    return round(1000 * datetime.fromisoformat(when).timestamp())
