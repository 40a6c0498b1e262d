"""Does the nightly road train only what is new, begin with yesterday, and publish nothing that is worse?"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Flyte keeps its cache in the home folder; what a test leaves must not be found by the next one.
PROGRAM = '''
import datetime, json, shutil, sys
from pathlib import Path

sys.path.insert(0, "workflows")
import road

folder = Path(sys.argv[1])
settings = """
data: {rows: 50_000, shards: 1}
model: {embedding_dim: 8}
optimizer: {learning_rate: 0.02}
training: {epochs: 4, batch_size: 256, tensorboard: false}
"""
said = []

def night(number, settings):
    try:
        made = road.road(settings=settings, home=str(folder / "home"), day=datetime.datetime(2026, 11, number))
    except Exception as error:
        made = str(error)
    current = json.loads((folder / "home" / "current.json").read_text())
    said.append([made, current, json.loads((folder / "home" / current["run"] / "run.json").read_text())])

night(1, settings)
night(2, settings)
night(3, settings.replace("shards: 1", "shards: 1, minimum_frequency: 3"))
night(4, settings.replace("0.02", "10"))
print(json.dumps(said))
'''


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nights")
    environment = os.environ | {"HOME": str(folder), "RECSYS_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_the_first_night_publishes_a_model(nights):
    from recsys_common import artifact

    (made, current, about), folder = nights[0][0], nights[1]
    assert made == f"{folder}/home/{current['model']}"
    assert current["model"] == f"2026-11-01-{about['name']}-{about['data']['content'][:12]}/model"
    assert about["state"] == "finished" and about["before"] is None
    metadata = artifact.verify(made)
    assert metadata.name == about["name"] and metadata.metrics == about["metrics"]


def test_a_night_without_new_rows_trains_nothing(nights):
    first, second = nights[0][:2]
    assert second[2]["starts"] == first[2]["starts"]  # the very run
    assert second[1]["model"] != first[1]["model"]  # published under its own day


def test_other_rows_begin_with_what_is_published(nights):
    second, third = nights[0][1:3]
    assert third[2]["before"] == second[2]["name"]
    assert third[2]["data"]["content"] != second[2]["data"]["content"]
    log = (nights[1] / "home" / third[1]["run"] / "log.txt").read_text()
    [line] = [line for line in log.splitlines() if "begun with" in line]
    assert re.search(r"user_table: [\d,]{3,} kept, 0 new, \d gone", line), line
    assert re.search(r"item_bias: [\d,]{3,} kept, 0 new, [1-9][\d,]* gone", line), line


def test_a_worse_model_is_not_published(nights):
    third, fourth = nights[0][2:]
    assert "not published" in fourth[0] and "NDCG@10" in fourth[0]
    assert fourth[1] == third[1]


def test_a_cluster_can_have_it(tmp_path):
    command = [Path(sys.executable).parent / "pyflyte", "--pkgs", "workflows", "package", "--image", "registry/road:1"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "road.tgz", "--force"],
        cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    from flyteidl.admin import launch_plan_pb2, task_pb2

    plans, retries = {}, {}
    with tarfile.open(tmp_path / "road.tgz") as packaged:
        for member in packaged:
            name, content = member.name, packaged.extractfile(member).read()
            if name.endswith("_3.pb"):
                plan = launch_plan_pb2.LaunchPlan.FromString(content).spec
                plans[name.split("_", 1)[1]] = plan.entity_metadata.schedule.cron_schedule.schedule
            elif name.endswith("_1.pb"):
                of = task_pb2.TaskSpec.FromString(content).template
                retries[of.id.name.rpartition(".")[2]] = (of.metadata.retries.retries, of.metadata.discoverable)
    assert plans["nightly_3.pb"] == "0 4 * * *"
    assert retries["trained"] == (3, True) and retries["prepared"] == (3, True) and retries["published"] == (3, False)


def test_it_runs_from_a_shell_with_help():
    command = [Path(sys.executable).parent / "pyflyte", "run", "workflows/road.py", "road", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--settings" in done.stdout and "--home" in done.stdout and "--day" in done.stdout
