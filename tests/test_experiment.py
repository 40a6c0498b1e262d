"""Is a model evaluated and tuned on what it should be, from Python and from the command line?"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from recsys_common import experiment, splits
from recsys_common.__main__ import main


@pytest.fixture(scope="module")
def pairs():
    """Four groups of people with 25 items each; ids as in a file."""
    random = np.random.default_rng(3)
    weight = 1 / np.arange(1, 26)
    rows = [
        (user + 100, 25 * (user % 4) + item + 7)
        for user in range(240)
        for item in random.choice(25, 8, replace=False, p=weight / weight.sum())
    ]
    return np.array(rows).T


@pytest.fixture(scope="module")
def files(pairs, tmp_path_factory):
    """The same as files: all, and parted into training and test."""
    folder = tmp_path_factory.mktemp("plain")
    parts = splits.leave_one_out(*pairs)["test"]
    (folder / "all.txt").write_text("".join(f"{user} {item}\n" for user, item in pairs.T))
    for name, data in (("train", parts.seen), ("test", parts.test)):
        histories = [(parts.user_ids[row], parts.item_ids[data.history(row)]) for row in range(data.num_users)]
        (folder / f"{name}.txt").write_text(
            "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in histories)
        )
    stars = np.random.default_rng(0).integers(1, 6, pairs.shape[1])
    (folder / "ratings.dat").write_text(
        "".join(f"{user}::{item}::{star}\n" for (user, item), star in zip(pairs.T, stars, strict=True))
    )
    return folder


def printed(capsys, *arguments) -> dict:
    assert main(["evaluate", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_and_python_say_the_same(pairs, files, capsys):
    found = printed(capsys, "--model", "ease", "--sequences", files / "all.txt", "--k", 5, 10, "--set", "model.l2=40")
    expected = experiment.run("ease", splits.leave_one_out(*pairs)["test"], {"l2": 40.0}, k=(5, 10))
    measured = [name for name in expected if not name.endswith(("seconds", "memory_gb"))]
    assert {name: found[name] for name in measured} == {name: expected[name] for name in measured}
    assert {"hr@5", "ndcg@10", "recall@10", "capped-recall@10", "map@5", "mrr", "coverage@5", "users"} < set(measured)
    assert (found["protocol"], found["dataset"], found["parameters"]) == ("leave-one-out", "all.txt", {"l2": 40.0})
    assert found["ndcg@10"] > 0.15


def test_train_and_test_from_files(files, capsys, tmp_path):
    command = ["--train", files / "train.txt", "--test", files / "test.txt", "--output", tmp_path / "result.json"]
    found = printed(capsys, "--model", "item-knn", *command, "--set", "model.neighbours=30", "model.shrinkage=1")
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert found["users"] == 240 and found["protocol"] == "given" and found["ndcg@10"] > 0.15
    assert found["ndcg@10"] > 2 * printed(capsys, "--model", "popularity", *command)["ndcg@10"]


def test_strong_generalisation_and_the_validation_part(files, capsys):
    command = ["--sequences", files / "all.txt", "--protocol", "strong-generalisation", "--held-out", 20]
    test = printed(capsys, "--model", "ease", *command)
    validation = printed(capsys, "--model", "ease", *command, "--on", "validation")
    assert test["users"] == validation["users"] == 20
    assert test["ndcg@10"] != validation["ndcg@10"]


def test_tuning_from_the_command_line(files, capsys):
    command = ["--model", "ease", "--sequences", files / "all.txt", "--tune", 4]
    found = printed(capsys, *command)
    assert found["tuned"]["trials"] == 4 and found["tuned"]["metric"] == "ndcg@10"
    assert printed(capsys, *command)["parameters"] == found["parameters"]  # the same search again
    fixed = printed(capsys, *command, "--set", "model.l2=33")
    assert fixed["parameters"] == {"l2": 33} and fixed["tuned"]["trials"] == 1


def test_data_sets_by_name(capsys):
    found = printed(capsys, "--model", "popularity", "--dataset", "simulated", "--rows", 10_000)
    assert found["protocol"] == "temporal" and found["users"] > 20
    four = printed(capsys, "--model", "popularity", "--dataset", "simulated", "--rows", 10_000, "--minimum-rating", 4)
    assert 0 < four["users"] < found["users"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "eease"], "--model: found 'eease', expected one of .*ease.*popularity"),
        (["--model", "ease", "--set", "model.l3=1"], "model.l3: no such setting of ease; there are l2"),
        (["--model", "ease", "--set", "model.l2=-1"], r"model.l2: found -1, expected greater than 0 \(of \(1\)"),
        (["--model", "ease", "--set", "l2=1"], r"--set: found 'l2=1', expected model.NAME=VALUE"),
        (["--model", "ease"], "ease takes its data from --train with --test or --sequences or --ratings or --dataset"),
        (["--model", "ease", "--train", "train.txt"], "--train and --test: expected as many files"),
        (["--model", "ease", "--sequences", "absent.txt"], "absent.txt"),
        (["--model", "ease", "--sequences", "bad.txt"], r"bad\.txt, line 2: found '3 x', expected integers"),
        (["--model", "ease", "--sequences", "all.txt", "--protocol", "temporal"], "no clock; take leave-one-out"),
        (["--model", "ease", "--sequences", "all.txt", "--protocol", "90/10"], "for models that predict ratings"),
        (["--model", "ease", "--sequences", "all.txt", "--k", "0"], "--k: found 0"),
        (["--model", "ease", "--train", "train.txt", "--test", "test.txt", "--tune", "2"], "no validation part"),
        (["--model", "biased-mf", "--sequences", "all.txt"], "biased-mf takes its data from"),
        (["--model", "biased-mf", "--train", "all.txt", "--test", "test.txt"], r"all\.txt, line 1: found"),
    ],
)
def test_faults_end_with_2_and_a_message(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    (files / "bad.txt").write_text("1 2\n3 x\n")
    assert main(["evaluate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err), shown.err


def test_from_a_shell(files):
    command = [sys.executable, "-m", "recsys_common", "evaluate", "--model", "popularity", "--k", "10", "20"]
    done = subprocess.run(
        [*command, "--train", files / "train.txt", "--test", files / "test.txt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hr@20"] >= json.loads(done.stdout)["hr@10"] > 0


# --- tuning -----------------------------------------------------------------------------------------------------


def test_tuning_never_sees_the_test(pairs):
    parts = splits.leave_one_out(*pairs)
    tuned = experiment.tune("item-knn", parts["validation"], trials=5, seed=2)
    assert len(tuned.trials) == 5 and tuned.trials[0]["settings"] == {}  # the defaults first
    assert tuned.value == max(row["value"] for row in tuned.trials)
    again = experiment.run("item-knn", parts["validation"], tuned.settings)
    assert again["ndcg@10"] == pytest.approx(tuned.value, abs=1e-12)
    same = experiment.tune("item-knn", parts["validation"], trials=5, seed=2)
    assert [row["settings"] for row in same.trials] == [row["settings"] for row in tuned.trials]


def test_fixed_settings_stay(pairs):
    validation = splits.leave_one_out(*pairs)["validation"]
    tuned = experiment.tune("item-knn", validation, trials=3, fixed={"weighting": "bm25", "neighbours": 40})
    assert all(row["settings"]["neighbours"] == 40 for row in tuned.trials)
    assert {row["settings"]["weighting"] for row in tuned.trials} == {"bm25"}


def test_a_model_with_passes_gets_the_best_number_of_them(pairs, monkeypatch):
    # A stand-in whose quality is known: it grows up to the fourth pass and falls after it.
    from recsys_common.models import popularity

    class Fake:
        folds_in = True

        def __init__(self, epoch):
            self.epoch = epoch

        def scores(self, seen, rows):
            ideal = parts["validation"].test.rows(rows).matrix().toarray()
            noise = np.random.default_rng(self.epoch).random(ideal.shape)
            return (ideal * max(0, 5 - abs(4 - self.epoch)) / 5 + noise).astype(np.float32)

    epochs_seen = []

    class Settings(popularity.Parameters):
        epochs: int = 30

    def fit(train, parameters, seed, after_epoch):
        for epoch in range(1, parameters.epochs + 1):
            epochs_seen.append(epoch)
            if after_epoch(Fake(epoch), epoch):
                break
        return Fake(epoch)

    parts = splits.leave_one_out(*pairs)
    monkeypatch.setattr(popularity, "fit", fit)
    monkeypatch.setattr(popularity, "Parameters", Settings)
    tuned = experiment.tune("popularity", parts["validation"], trials=1)
    assert tuned.settings["epochs"] == 4  # looked at after 2, 4, 6, 8, 10: 4 is best
    assert max(epochs_seen) == 4 + 2 * experiment.PATIENCE
    Settings.model_fields["epochs"].default = 5
    Settings.model_rebuild(force=True)
    assert experiment.tune("popularity", parts["validation"], trials=1).settings["epochs"] == 4  # each one of few


def test_a_trial_that_diverges_is_not_the_best_and_is_told(pairs, monkeypatch):
    from recsys_common.models import item_knn

    fit = item_knn.fit

    def failing(train, parameters, seed, after_epoch):
        if parameters.neighbours != 200:
            raise FloatingPointError("too fast")
        return fit(train, parameters, seed, after_epoch)

    monkeypatch.setattr(item_knn, "fit", failing)
    validation = splits.leave_one_out(*pairs)["validation"]
    tuned = experiment.tune("item-knn", validation, trials=4)
    assert tuned.settings == {} and [row.get("fault") for row in tuned.trials] == [None, *["too fast"] * 3]
    with pytest.raises(ValueError, match="item-knn: all 2 trials diverged; the last one: too fast"):
        experiment.tune("item-knn", validation, trials=2, fixed={"neighbours": 7})


def test_a_table_of_users_refuses_strangers(pairs, monkeypatch):
    from recsys_common.models import popularity

    monkeypatch.setattr(popularity.Popularity, "folds_in", False)
    part = splits.strong_generalisation(*pairs, held_out=20)["test"]
    with pytest.raises(ValueError, match="popularity has a table of users, and 20 of 20 users"):
        experiment.run("popularity", part)
    experiment.run("popularity", splits.leave_one_out(*pairs)["test"])
