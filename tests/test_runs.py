"""Runs: the same config gives the same metrics, killed or not; they are listed, compared, drawn and exported."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common import __main__ as program
from recsys_common import artifact, checkpoints, evaluation, prepare, runs, training
from recsys_common.config import Config

SETTINGS = [
    "data.rows=4000", "data.shards=2", "model.embedding_dim=8", "training.batch_size=64", "training.epochs=8",
    "training.log_every=10", "training.checkpoint_every=20", "training.tensorboard=false",
]  # fmt: skip
CONFIG = Config().override(*SETTINGS)
METRICS = ["HR@10", "recall@10", "NDCG@10", "MRR", "coverage@10", "users"]


@pytest.fixture(scope="module", autouse=True)
def quiet_and_as_before():
    """Without progress bars; afterwards operations are as they were for the tests of other files."""
    from tensorflow.python.framework import config as framework

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_PROGRESS", "0")
        yield
    framework.disable_op_determinism()


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(runs_dir):
    return runs.train(CONFIG, runs_dir=runs_dir)


def beside(runs_dir, folder) -> Path:
    """Another runs_dir with the same data."""
    shutil.copytree(runs_dir / "data", folder / "data")
    return folder


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log(folder) if "loss" in line}


def test_a_run_says_what_it_was(run, runs_dir):
    about = json.loads((run.folder / "run.json").read_text())
    resolved = Config.load(run.folder / "config.yaml")
    assert run.about == about and about["state"] == "finished" and about["stopped"] == "end"
    assert run.folder == runs_dir / "train" / resolved.name and about["config"] == resolved.hash and about["seed"] == 1
    assert resolved.override("features.user.rows=", "features.item.rows=") == CONFIG
    data = run.folder / about["data"]["folder"]
    assert (data / "data.json").is_file() and about["data"]["content"] == prepare.found(data, CONFIG).about["content"]
    assert about["versions"]["tensorflow"] == tf.__version__ and about["machine"]["cores"] > 0
    [start] = about["starts"]
    assert start["step"] == 0 and start["date"] <= about["ended"]
    if changed := [line for line in start["changed"] if not line.startswith("??") and not line.endswith(".ipynb")]:
        assert changed[0].split()[-1] in (run.folder / "changes.patch").read_text()
    text = (run.folder / "log.txt").read_text()
    assert "started at step 0" in text and text.count(" validation: HR@10 ") == 8 and f"finished: {run.folder}" in text
    assert about["steps"] == 8 * (about["data"]["counts"]["train"] // 64) and len(about["evaluations"]) == 8


def test_metrics_are_those_of_exact_ranking(run, runs_dir):
    prepared = prepare.prepare(CONFIG, runs_dir=runs_dir)
    latest = checkpoints.latest(run.folder / "checkpoints")
    model = runs.restored(prepared.config, prepared.frequency(), latest)
    popularity = lambda users: np.tile(prepared.frequency(), (len(users), 1))  # noqa: E731
    for part in ("validation", "test"):
        asked = *prepared.pairs(part), prepared.about["rows"]["item"], 10
        assert list(run.metrics[part]) == METRICS
        assert run.metrics[part] == evaluation.evaluate(model.scores, *asked)
        assert run.metrics[f"{part}, popularity"] == evaluation.evaluate(popularity, *asked)
    assert run.metrics["validation"]["NDCG@10"] == log(run.folder)[-1]["NDCG@10"]


def test_a_run_that_was_killed_ends_with_the_same_metrics_by_the_same_command(run, runs_dir, tmp_path):
    """SIGKILL comes after the first checkpoint; bit for bit, in another process than that of `run`."""
    folder = beside(runs_dir, tmp_path) / "train" / run.folder.name
    command = [sys.executable, "-m", "recsys_common", "train", "--runs-dir", str(tmp_path), "--set", *SETTINGS]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    while child.poll() is None and not (folder / "checkpoints" / "step-000000120" / "checkpoint.json").exists():
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert [row["state"] for row in runs.table(tmp_path / "train")] == ["killed"]
    again = runs.train(CONFIG, runs_dir=tmp_path)
    assert again.folder == folder and again.metrics == run.metrics and losses(folder) == losses(run.folder)
    first, second = again.about["starts"]
    assert first["step"] == 0 < second["step"] < again.about["steps"]
    assert f"resumed at step {second['step']}" in (folder / "log.txt").read_text()


def test_a_finished_run_is_returned_as_it_is(run, runs_dir, tmp_path, monkeypatch):
    def files():
        return {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != "log.txt"}

    before = files()
    assert runs.train(CONFIG, runs_dir=runs_dir) == run and files() == before
    with runs._log(run.folder), pytest.raises(BlockingIOError, match="another process is at work on this run"):
        runs.train(CONFIG, runs_dir=runs_dir)
    other = beside(runs_dir, tmp_path)
    about = next((other / "data").glob("*/data.json"))
    about.write_text(about.read_text().replace(run.about["data"]["content"], "0" * 64))
    shutil.copytree(runs_dir / "train", other / "train")
    with pytest.raises(ValueError, match=r"has a run of this config on other data: content \w{12}, now 0{12} in "):
        runs.train(CONFIG, runs_dir=other)


def test_what_ends_a_run_is_in_its_folder_and_the_same_call_goes_on(runs_dir, tmp_path, monkeypatch):
    beside(runs_dir, tmp_path)
    asked, real = CONFIG.override("training.epochs=2"), runs.evaluate
    for ends in ("error", "SIGTERM"):

        def evaluate(model, *of, ends=ends):
            if ends == "error":
                raise ValueError("the server said token=abcdefgh1234")
            os.kill(os.getpid(), signal.SIGTERM)
            return real(model, *of)

        monkeypatch.setattr(runs, "evaluate", evaluate)
        if ends == "error":
            with pytest.raises(ValueError, match="the server said"):
                runs.train(asked, runs_dir=tmp_path)
            [folder] = (tmp_path / "train").iterdir()
            about = runs.load(folder).about
            assert (about["state"], about["error"]) == ("failed", "ValueError: the server said token=[masked: token]")
            text = (folder / "log.txt").read_text()
            assert "Traceback" in text and "token=[masked: token]" in text
        else:
            stopped = runs.train(asked, runs_dir=tmp_path)
            assert stopped.about["state"] == "stopped" and stopped.metrics == {} and "error" not in stopped.about
    monkeypatch.setattr(runs, "evaluate", real)
    run = runs.train(asked, runs_dir=tmp_path)
    assert run.about["state"] == "finished" and [start["step"] > 0 for start in run.about["starts"]] == [
        False,
        True,
        True,
    ]


def test_runs_are_listed_compared_and_drawn(run, runs_dir, capsys):
    other = runs.train(CONFIG.override("training.epochs=3", "optimizer.learning_rate=0.02"), runs_dir=runs_dir)
    rows = runs.table(runs_dir / "train")
    assert [row["name"] for row in rows] == [run.folder.name, other.folder.name]
    assert [(row["training.epochs"], row["optimizer.learning_rate"]) for row in rows] == [(8, 0.01), (3, 0.02)]
    assert [row["state"] for row in rows] == ["finished"] * 2 and "seed" not in rows[0]
    for row, one in zip(rows, (run, other), strict=True):
        assert row["test NDCG@10"] == one.metrics["test"]["NDCG@10"]
        assert row["test, popularity NDCG@10"] == one.metrics["test, popularity"]["NDCG@10"]
    found = {(row["of"], row["name"]): (row["a"], row["b"]) for row in runs.compared(run.folder, other.folder)}
    assert {name for of, name in found if of == "config"} == {"training.epochs", "optimizer.learning_rate"}
    assert found["config", "training.epochs"] == (8, 3) and ("data", "content") not in found
    values = run.metrics["test"]["MRR"], other.metrics["test"]["MRR"]
    assert found["metrics", "test MRR"] == values and len({name for of, name in found if of == "metrics"}) == 24
    left, right = runs.curves([run.folder, other.folder]).axes
    drawn = left.lines[1].get_xydata()
    expected = [(step, loss / 64) for step, loss in losses(other.folder).items()]
    np.testing.assert_allclose(drawn, expected)
    judged = [line["NDCG@10"] for line in other.about["evaluations"]]
    assert right.lines[1].get_xdata().tolist() == [1, 2, 3] and right.lines[1].get_ydata().tolist() == judged

    hashes = [row["name"].rpartition("-")[2][:6] for row in rows]
    picture = runs_dir / "curves.png"
    assert program.main(["runs", str(runs_dir / "train"), "--compare", *hashes, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "training.epochs" in printed and f"{values[0]:.4f}".rstrip("0") in printed and picture.stat().st_size > 5000
    assert program.main(["runs", str(runs_dir / "train"), "--compare", "matrix", "none"]) == 1
    assert "'matrix': 2 runs in" in capsys.readouterr().err


@dataclasses.dataclass
class Fixed:
    """Stands for prepared data: what `evaluate` asks of it."""

    config: Config
    about: dict
    asked: tuple

    inputs = prepare.Prepared.inputs

    def pairs(self, part):
        return tuple(map(np.array, self.asked))

    def frequency(self):
        return np.array([9, 9, 9, 5, 1, 3])

    def histories(self, part):
        return {}


def test_rows_out_of_the_vocabulary_are_no_items_to_recommend():
    """Three buckets, items 3, 4, 5 with 5, 1, 3 training rows; the model gives its buckets and a spare row most."""
    config = CONFIG.override("data.oov_buckets=3", "evaluation.k=2", "evaluation.metric=NDCG@2")
    # user 7 had item 3 and is asked for 4 and for one out of the vocabulary; user 8 is asked for 3
    prepared = Fixed(config, {"rows": {"item": 6}}, ([7, 7, 8], [4, 1, 3], [7, 7], [3, 2]))

    class Model:
        def scores(self, users):
            return np.tile(np.array([99.0, 98, 97, 1, 2, 3, 100]), (len(users), 1))

    found = runs.evaluate(Model(), prepared, "test")
    # user 7 sees 5, 4: a hit at rank 2, of two asked for; user 8 sees 5, 4 and 3 is third
    assert found["HR@2"] == 0.5 and found["recall@2"] == 0.25 and found["MRR"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    popular = runs.evaluate(None, prepared, "test")
    # user 7: 5 (3 rows), 4 (1 row): the same; user 8: 3, with 5 rows, is first
    assert popular["HR@2"] == 1 and popular["MRR"] == pytest.approx((1 / 2 + 1) / 2)


def test_two_towers_with_a_history_learn_through_the_same_call(tmp_path):
    features = {
        "user": {"kind": "index", "column": "user_index"},
        "item": {"kind": "index", "column": "item_index"},
        "history": {"kind": "history", "column": "history", "length": 5, "table": "item"},
    }
    towers = {"architecture": "two_tower", "embedding_dim": 8, "hidden": [16, 8]}
    data = {"rows": 3000, "table": "histories", "shards": 2}
    asked = Config(data=data, features=features, model=towers).override(*SETTINGS[3:], "training.epochs=2")
    run = runs.train(asked, runs_dir=tmp_path)
    assert run.about["state"] == "finished" and list(run.metrics["test"]) == METRICS
    # the history of one user by hand: the last five items before the test, padded on the left
    prepared = prepare.prepare(asked, runs_dir=tmp_path)
    model = runs.restored(prepared.config, prepared.frequency(), checkpoints.latest(run.folder / "checkpoints"))
    histories = prepared.histories("test")
    user, items = min(histories.items(), key=lambda pair: len(pair[1]))
    inputs = prepared.inputs(np.array([user]), histories)
    assert inputs["history"].numpy().tolist() == [[0] * (5 - len(items)) + items]
    short = prepared.inputs(np.array([3, 2, 4]), {2: [7, 8], 3: [1, 2, 3, 4, 5, 6]})
    assert short["history"].numpy().tolist() == [[2, 3, 4, 5, 6], [0, 0, 0, 7, 8], [0] * 5]
    assert short["history_length"].numpy().tolist() == [5, 2, 0] and short["user"].numpy().tolist() == [3, 2, 4]
    batch = {"user": tf.constant([user]), "history": inputs["history"], "history_length": tf.constant([len(items)])}
    seen = []
    scores, model.scores = model.scores, lambda users: seen.append(users) or scores(users)
    assert runs.evaluate(model, prepared, "test") == run.metrics["test"]
    block = next(block for block in seen if user in block["user"].numpy())
    row = block["user"].numpy().tolist().index(user)
    np.testing.assert_allclose(scores(block)[row], scores(batch)[0], rtol=1e-5)


def test_export_gives_the_recommendations_of_the_run(run, runs_dir):
    from recsys_common import saving

    model = saving.load(runs.export(run.folder))
    prepared = prepare.prepare(CONFIG, runs_dir=runs_dir)
    mine = runs.restored(prepared.config, prepared.frequency(), checkpoints.latest(run.folder / "checkpoints"))
    row, oov = 3, 1
    user_id = prepared.vocabulary("user")[row - oov]
    inputs = {
        "user_id": tf.constant([user_id], tf.int64),
        "k": tf.constant(5),
        "seen_item_id": tf.constant([[-1]], tf.int64),
    }
    found = model.signatures["recommend"](**inputs)
    scores = mine.scores(np.array([row]))[0][oov:]
    best = np.argsort(-scores)[:5]
    assert found["item_id"].numpy()[0].tolist() == prepared.vocabulary("item")[best].tolist()
    np.testing.assert_allclose(found["score"].numpy()[0], scores[best], rtol=1e-5)
    about = json.loads((run.folder / "model" / "metadata.json").read_text())
    assert about["metrics"]["test"] == run.metrics["test"] and about["data"]["content"] == run.about["data"]["content"]
    assert about["run"]["name"] == run.folder.name


# The command line --------------------------------------------------------------------------------------


def test_faults_of_a_config_are_told_with_exit_code_2(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("training: {epoch: 2}\n")
    for words, said in (
        ([str(path)], "run.yaml: 1 fault in the config\n  training.epoch: no such field (nearest: training.epochs)"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        (
            ["small", "--set", "features.user.column=user_id"],
            "features.user: the table examples has no column 'user_id'",
        ),
    ):
        assert program.main(["train", *words, "--runs-dir", str(tmp_path)]) == 2
        shown = capsys.readouterr()
        assert said in shown.err and shown.out == "" and "Traceback" not in shown.err
    assert program.main(["export", str(tmp_path)]) == 1 and "no run.json" in capsys.readouterr().err
    assert program.main(["runs", str(tmp_path)]) == 0 and "no runs yet" in capsys.readouterr().out


def test_help_and_the_list_of_runs_need_no_tensorflow(run, runs_dir):
    code = f"""
import sys
from recsys_common.__main__ import COMMANDS, main
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit:
        pass
assert main(["runs", {str(runs_dir / "train")!r}]) == 0
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n") and run.folder.name in done.stdout, done.stderr
    assert all(option in done.stdout for option in ("--set", "--export", "--compare", "--allow-own-code"))


def test_nothing_of_the_folder_is_run_unless_it_is_asked_for(tmp_path):
    (tmp_path / "evil").mkdir()
    for name in ("evil/model.py", "yaml.py", "pydantic.py", "argparse.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'has_run')!r}, 'w')\n")
    (tmp_path / "evil.yaml").write_text("model: {architecture: evil.model}\n")
    clean = {name: value for name, value in os.environ.items() if name != "RECSYS_OWN_CODE"}

    def call(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)

    done = call("recsys_common", "train", "evil.yaml")
    assert done.returncode == 2 and "found 'evil.model', a module that would be run; if it is yours" in done.stderr
    done = call("recsys_common.config", "check", "evil.yaml")
    assert done.returncode == 1 and "found 'evil.model', a module that would be run" in done.stderr
    assert not (tmp_path / "has_run").exists()
    for name in ("yaml.py", "pydantic.py", "argparse.py"):
        (tmp_path / name).unlink()
    done = call("recsys_common.config", "--allow-own-code", "check", "evil.yaml")
    assert "lacks a class Parameters" in done.stderr and (tmp_path / "has_run").exists()


def test_the_first_ctrl_c_asks_for_a_checkpoint_and_the_next_one_ends():
    before = signal.getsignal(signal.SIGINT)
    try:
        with training._sigterm() as asked:
            program._interrupted()
            assert asked == [True] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):  # nobody listens to SIGTERM, which would end the process without a word
            program._interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_others_raise_is_masked_too(monkeypatch, capsys):
    class Others(Exception):
        pass

    def fails(given):
        raise Others("password=hunter2hunter2")

    monkeypatch.setitem(program.COMMANDS, "runs", ("", [], fails))
    assert program.main(["runs"]) == 1
    told = capsys.readouterr().err
    assert "Others: password=[masked: password]" in told and "hunter2hunter2" not in told


# Tracking ----------------------------------------------------------------------------------------------


def test_a_finished_run_goes_to_a_tracking_server_once(run, tmp_path):
    from recsys_common import tracking

    try:
        import mlflow
    except ImportError:
        with pytest.raises(ImportError, match=r"not installed: pip install 'recsys-common\[tracking\]'"):
            tracking.send(run.folder, "http://127.0.0.1:9")
        pytest.skip("the package mlflow is not installed (extra `tracking`)")
    pytest.importorskip("sqlalchemy", reason="without a server, only the full mlflow keeps runs in SQLite")
    uri = f"sqlite:///{tmp_path}/runs.db"
    sent = tracking.send(run.folder, uri)
    assert tracking.send(run.folder, uri) == sent
    kept = mlflow.MlflowClient(uri).get_run(sent)
    assert kept.data.params["training.epochs"] == "8" and kept.info.status == "FINISHED"
    assert kept.data.metrics["test/NDCG_at_10"] == run.metrics["test"]["NDCG@10"]
    history = mlflow.MlflowClient(uri).get_metric_history(sent, "NDCG_at_10")
    assert [point.value for point in history] == [line["NDCG@10"] for line in run.about["evaluations"]]


def test_early_stopping_ends_asks_and_exports_the_best_epoch(tmp_path, runs_dir):
    """A rate at which the metric falls after the first epochs; data that was made for another config is refused."""
    config = CONFIG.override("training.epochs=30", "training.early_stopping=2", "optimizer.learning_rate=0.2")
    data = prepare.prepare(CONFIG, runs_dir=runs_dir).folder
    stopped = runs.train(config, runs_dir=tmp_path, data=data)
    judged = [line["NDCG@10"] for line in stopped.about["evaluations"]]
    best = max(range(len(judged)), key=judged.__getitem__)
    assert stopped.about["stopped"] == "early stopping" and best == len(judged) - 3 and judged[best] > judged[-1]
    assert stopped.metrics["validation"]["NDCG@10"] == judged[best]
    exported = artifact.verify(runs.export(stopped.folder, data))
    assert exported.run["checkpoint"].startswith("best/") and exported.metrics == stopped.metrics
    prepared = prepare.found(data, stopped_config := Config.load(stopped.folder / "config.yaml"))
    best_model = runs.restored(stopped_config, prepared.frequency(), checkpoints.latest(stopped.folder / "best"))
    assert runs.evaluate(best_model, prepared, "test") == stopped.metrics["test"]
    with pytest.raises(ValueError, match=r"made for another config:\n  minimum_frequency: 1, now 2"):
        runs.train(config.override("data.minimum_frequency=2"), runs_dir=tmp_path, data=data)

    other = prepare.prepare(CONFIG.override("data.minimum_frequency=2"), runs_dir=tmp_path).folder
    with pytest.raises(ValueError, match="minimum_frequency"):
        runs.export(stopped.folder, other)
    short = CONFIG.override("training.epochs=1")
    warm = runs.train(short, runs_dir=tmp_path, data=data, before=stopped.folder)
    assert warm.about["before"] == stopped.about["name"]
    about = json.loads((stopped.folder / "run.json").read_text())
    about["data"]["split"] = "leave_last_out.sql"
    (stopped.folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"its split is leave_last_out\.sql, here temporal_split.sql"):
        runs.train(CONFIG.override("training.epochs=2"), runs_dir=tmp_path, data=data, before=stopped.folder)
