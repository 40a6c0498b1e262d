"""Does iALS solve its equations, by blocks as well as at once, and does it find what is there to be found?"""

import subprocess
import sys

import numpy as np
import pytest

from recsys_common import experiment, splits
from recsys_common.interactions import Interactions
from recsys_common.models import ials


@pytest.fixture(scope="module")
def data():
    """40 people, 25 items; somebody without items, an item without people, somebody with nearly all."""
    random = np.random.default_rng(4)
    had = random.random((40, 25)) < random.random(25) * 0.5
    had[7], had[:, 11] = False, False
    had[3] = np.arange(25) != 11
    rows, columns = np.nonzero(had)
    return Interactions.of_pairs(rows, columns + 1, 40, 26)


def settings(**changed):
    return ials.Parameters(**{"dim": 8, "l2": 0.05, "alpha0": 0.2, "nu": 0.7, "block": 8, "epochs": 3} | changed)


def penalties(X, p):
    """l2 of each user and of each item, as in (1); rows without interactions are not of the problem."""
    there = X.any(0).sum(), X.any(1).sum()
    return (p.l2 * (X.sum(axis) + p.alpha0 * n) ** p.nu for axis, n in ((1, there[0]), (0, there[1])))


def loss(X, U, V, p):
    """(1), pair by pair."""
    of_users, of_items = penalties(X, p)
    scores = U @ V.T
    total = ((scores - 1)[X > 0] ** 2).sum() + p.alpha0 * (scores**2).sum()
    return total + (of_users * (U**2).sum(1)).sum() + (of_items * (V**2).sum(1)).sum()


def test_a_half_pass_solves_the_normal_equations(data):
    X, p = data.matrix().toarray().astype(np.float64), settings(epochs=1)
    model = ials.fit(data, p, seed=2)
    U = model.users.astype(np.float64)  # the items were solved last: given these users
    _, of_items = penalties(X, p)
    for item in range(26):
        own = X[:, item] > 0
        H = U[own].T @ U[own] + p.alpha0 * U.T @ U + of_items[item] * np.eye(8)
        expected = np.linalg.solve(H, U[own].sum(0)) if own.any() else np.zeros(8)
        np.testing.assert_allclose(model.items[item], expected, atol=2e-5)
    assert (model.users[7] == 0).all() and (model.items[[0, 12]] == 0).all()


@pytest.mark.parametrize("block", [8, 3, 1])
def test_the_loss_falls_in_every_pass(data, block):
    X, p, losses = data.matrix().toarray(), settings(block=block, epochs=30), []

    def after(model, epoch):
        losses.append(loss(X, model.users.astype(np.float64), model.items.astype(np.float64), p))

    ials.fit(data, p, seed=1, after_epoch=after)
    assert len(losses) == 30 and np.diff(losses).max() < 1e-4 and losses[-1] < 0.9 * losses[0]
    if block < 8:  # blocks end where the exact solution does
        exact = ials.fit(data, settings(epochs=60), seed=1)
        at_once = loss(X, exact.users.astype(np.float64), exact.items.astype(np.float64), p)
        assert losses[-1] == pytest.approx(at_once, rel=0.02)


def test_a_stranger_is_told_what_training_would_have_said(data):
    p = settings(epochs=4)
    model = ials.fit(data, p, seed=3)
    X, V = data.matrix().toarray().astype(np.float64), model.items.astype(np.float64)
    of_users, _ = penalties(X, p)
    vectors = model.fold_in(data, [3, 7, 20])
    for vector, user in zip(vectors, (3, 7, 20), strict=True):
        own = X[user] > 0
        H = V[own].T @ V[own] + p.alpha0 * V.T @ V + of_users[user] * np.eye(8)
        np.testing.assert_allclose(vector, np.linalg.solve(H, V[own].sum(0)), atol=2e-5)
    np.testing.assert_allclose(model.scores(data, [3, 7, 20]), vectors @ model.items.T, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 7])
def test_one_model_for_a_seed_whatever_the_threads(data, monkeypatch, pieces):
    first = ials.fit(data, settings(block=3), seed=5)
    monkeypatch.setattr(ials, "PIECES", pieces)
    monkeypatch.setattr("os.cpu_count", lambda: pieces)
    again, other = ials.fit(data, settings(block=3), seed=5), ials.fit(data, settings(block=3), seed=6)
    np.testing.assert_array_equal(again.items, first.items)
    assert np.abs(other.items - first.items).max() > 1e-3


def test_longer_histories_than_a_tile():
    random = np.random.default_rng(0)
    rows, columns = np.nonzero(random.random((4, 1500)) < 0.8)
    data = Interactions.of_pairs(rows, columns + 1, 4, 1501)
    assert data.lengths.min() > 2 * ials.TILE
    p = settings(epochs=1, block=5)
    model, X = ials.fit(data, p, seed=0), data.matrix().toarray().astype(np.float64)
    V, of_users = model.items.astype(np.float64), next(iter(penalties(X, p)))
    own = X[2] > 0
    H = V[own].T @ V[own] + p.alpha0 * V.T @ V + of_users[2] * np.eye(8)
    np.testing.assert_allclose(model.fold_in(data, [2])[0], np.linalg.solve(H, V[own].sum(0)), rtol=1e-3, atol=1e-4)


def test_structure_is_found_and_chance_is_not_beaten():
    random = np.random.default_rng(7)
    weight = 1 / np.arange(1, 31)
    rows = [
        (user, 30 * (user % 6) + item)
        for user in range(600)
        for item in random.choice(30, 9, replace=False, p=weight / weight.sum())
    ]
    users, items = random.permutation(np.array(rows)).T

    def ndcg(name, items, **changed):
        return experiment.run(name, splits.leave_one_out(users, items)["test"], changed)["ndcg@10"]

    assert ndcg("ials", items, dim=16) > 2 * ndcg("popularity", items)
    shuffled = random.permutation(items)
    assert ndcg("ials", shuffled, dim=16) < 1.3 * ndcg("popularity", shuffled) + 0.01


def test_hardly_any_data():
    one = Interactions.of_pairs([0], [1], 1, 2)
    assert np.isfinite(ials.fit(one, settings()).scores(one, [0])).all()
    nobody = Interactions.of_pairs([], [], 2, 4)
    assert (ials.fit(nobody, settings()).scores(nobody, [0, 1]) == 0).all()


def test_the_blas_is_loaded_before_its_threads_are_limited():
    code = (
        "import threadpoolctl as t; from recsys_common.interactions import Interactions as I\n"
        "from recsys_common.models import ials\n"
        "def loaded(): return {each['filepath'] for each in t.threadpool_info()}\n"
        "before = loaded(); ials.fit(I.of_pairs([0], [1], 1, 2), ials.Parameters(epochs=1)); print(loaded() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
