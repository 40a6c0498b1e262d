"""How does the road become a job that runs every night, by itself? As a Flyte workflow, here and on a cluster alike.

    pyflyte run workflows/road.py road --settings "$(cat run.yaml)" --home runs/nightly --day 2026-11-23
    pyflyte --pkgs workflows package --image IMAGE --output build/road.tgz --force        # what a cluster takes

Data, training, approval, publication. Why Flyte: of the engines that run in one plain process and on a cluster, it has
all three of retries, schedules and a cache by content as keywords of a task. So a night whose rows are those of the
night before trains nothing, and what it trains begins with the tables of the model that is published. A model that is
no better than popularity, or much worse than yesterday's, is not published: yesterday's stays.

A cluster runs each task in the image's container, retries it, starts `nightly` by the clock, and keeps folders in its
own storage; all that a task needs comes through its inputs. A local run does not retry: give the same command again.
The local cache is in ~/.flyte; `pyflyte local-cache clear` empties it.
"""

import datetime
import json
from typing import Annotated

import fsspec
from flytekit import CronSchedule, LaunchPlan, Resources, current_context, task, workflow
from flytekit.core.hash import HashMethod
from flytekit.types.directory import FlyteDirectory

VERSION = "1"  # of these tasks: another one forgets what is cached
STEP = {"cache": True, "cache_version": VERSION, "retries": 3}
LEAST_OF_BEFORE = 0.9  # of the published model's metric that a new one must reach


def _content(data: FlyteDirectory) -> str:
    with fsspec.open(f"{data.path}/data.json") as stream:
        return json.load(stream)["content"]


def _outcome(run: FlyteDirectory) -> str:
    about = _about(run.path)
    return json.dumps([about["config"], about["data"]["content"], about["metrics"]])


def _about(run: str) -> dict:
    with fsspec.open(f"{run}/run.json") as stream:
        return json.load(stream)


Data = Annotated[FlyteDirectory, HashMethod(_content)]
TrainedRun = Annotated[FlyteDirectory, HashMethod(_outcome)]


@task(**STEP, requests=Resources(cpu="2", mem="8Gi"))
def prepared(settings: str, project: str, location: str, day: datetime.datetime) -> Data:
    """The rows of this day, as prepare.py makes them; without a project by the embedded BigQuery."""
    from recsys_common.config import Config
    from recsys_common.prepare import prepare

    folder = current_context().working_directory
    made = prepare(Config.parse(settings), runs_dir=folder, project=project, location=location)
    return FlyteDirectory(made.folder)


@task(retries=3)
def published_before(home: str) -> str:
    """The folder of the run whose model is published; "" if there is none."""
    files, path = fsspec.core.url_to_fs(f"{home}/current.json")
    return f"{home}/{json.loads(files.cat(path))['run']}" if files.exists(path) else ""


@task(**STEP, cache_ignore_input_vars=("before",), requests=Resources(cpu="2", mem="16Gi"))
def trained(settings: str, data: Data, before: str) -> TrainedRun:
    """A run; its tables begin with the rows that `before` has for ids that are still there."""
    from recsys_common import runs
    from recsys_common.config import Config

    known = FlyteDirectory(before).download() if before else None
    folder = current_context().working_directory
    run = runs.train(Config.parse(settings), data=data.download(), before=known, runs_dir=folder)
    return FlyteDirectory(str(run.folder))


@task
def approved(run: TrainedRun, before: str) -> bool:
    """Whether the run is good enough on validation, which is True.

    Raises:
      ValueError: it is not above popularity, or below LEAST_OF_BEFORE of what the published model reached.
    """
    about = _about(run.path)
    metric, metrics = about["metric"], about["metrics"]
    value, least = metrics["validation"][metric], metrics["validation, popularity"][metric]
    if before:
        was = _about(before)["metrics"]["validation"]
        if metric not in was:
            raise ValueError(f"{before} was judged by {', '.join(was)}, not by {metric}: publish the first one by hand")
        least = max(least, LEAST_OF_BEFORE * was[metric])
    if value <= least:
        raise ValueError(f"{run.path}: validation {metric} is {value:.4f}, expected above {least:.4f}: not published")
    return True


@task(retries=3)
def published(run: TrainedRun, data: Data, home: str, day: datetime.datetime, good: bool) -> str:
    """Export the model to a folder of `home`, and name that in current.json last. Returns the folder."""
    from recsys_common import runs

    folder = run.download()
    model = runs.export(folder, data=data.download())
    files, path = fsspec.core.url_to_fs(home)
    about = _about(folder)
    place = f"{day:%Y-%m-%d}-{about['name']}-{about['data']['content'][:12]}"  # another model never stands there
    current = {name: f"{place}/{name}" for name in ("run", "data", "model")}
    for name, source in (("run", folder), ("data", data.path), ("model", str(model))):
        files.put(f"{source}/", f"{path}/{current[name]}/", recursive=True)
    files.pipe(f"{path}/current.json.writing", json.dumps(current, indent=1).encode())
    files.mv(f"{path}/current.json.writing", f"{path}/current.json")
    return f"{home}/{current['model']}"


@workflow
def road(settings: str, home: str, day: datetime.datetime, project: str = "", location: str = "US") -> str:
    """Data, training, approval, publication; returns where the model is."""
    before = published_before(home=home)
    data = prepared(settings=settings, project=project, location=location, day=day)
    run = trained(settings=settings, data=data, before=before)
    return published(run=run, data=data, home=home, day=day, good=approved(run=run, before=before))


# For a cluster: `home` has to be a bucket, gs://..., since what a container writes to its own disk goes with it, and
# `settings` and `project` are yours to write here before it is registered.
nightly = LaunchPlan.get_or_create(
    road,
    "nightly",
    default_inputs={
        "settings": "data: {dataset: project.dataset.ratings}",
        "home": "gs://bucket/nightly",
        "project": "project",
    },
    schedule=CronSchedule(schedule="0 4 * * *", kickoff_time_input_arg="day"),
)
