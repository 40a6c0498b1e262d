"""Do popularity, item-kNN and EASE compute their equations, and find what is there to be found?"""

import numpy as np
import pytest

from recsys_common import experiment, splits
from recsys_common.interactions import Interactions
from recsys_common.models import ease, item_knn, popularity

DAY = 86_400


def random_data(users=30, items=12, seed=0):
    random = np.random.default_rng(seed)
    had = random.random((users, items)) < random.random(items) * 0.6
    had[0], had[:, 3] = False, False  # somebody without items, an item without people
    rows, columns = np.nonzero(had)
    return Interactions.of_pairs(rows, columns + 1, users, items + 1)


@pytest.fixture(scope="module")
def groups():
    """Six groups of people who have items of their own group, with one item of another; popular items in each."""
    random = np.random.default_rng(7)
    of_group = 1 / np.arange(1, 31)
    rows = [
        (user, 30 * (user % 6) + item)
        for user in range(600)
        for item in random.choice(30, 9, replace=False, p=of_group / of_group.sum())
    ]
    users, items = np.array(rows).T
    order = random.permutation(len(users))
    return users[order], items[order]


def ndcg(name, users, items, **settings):
    return experiment.run(name, splits.leave_one_out(users, items)["test"], settings)["ndcg@10"]


@pytest.mark.parametrize(
    ("name", "settings"), [("ease", {"l2": 50.0}), ("item-knn", {}), ("item-knn", {"weighting": "bm25"})]
)
def test_structure_is_found_and_chance_is_not_beaten(groups, name, settings):
    users, items = groups
    floor = ndcg("popularity", users, items)
    assert ndcg(name, users, items, **settings) > 2 * floor
    shuffled = np.random.default_rng(1).permutation(items)
    assert ndcg(name, users, shuffled, **settings) < 1.3 * ndcg("popularity", users, shuffled) + 0.01


def test_ease_is_the_minimum_of_its_equation():
    data = random_data()
    X, B = data.matrix().toarray().astype(np.float64), ease.fit(data, ease.Parameters(l2=7.0)).weights
    assert (np.diagonal(B) == 0).all()
    # Zero gradient of |X - XB|^2 + l2 |B|^2 off the diagonal: X'(XB - X) + l2 B.
    gradient = X.T @ (X @ B - X) + 7.0 * B
    np.fill_diagonal(gradient, 0)
    assert np.abs(gradient).max() < 1e-4 < np.abs(X.T @ X).max()
    np.testing.assert_allclose(ease.fit(data).scores(data, [5, 0, 9]), X[[5, 0, 9]] @ ease.fit(data).weights, atol=1e-6)


def test_ease_refuses_what_does_not_fit(monkeypatch):
    from recsys_common import scale

    monkeypatch.setattr(scale, "machine", lambda: {"memory_gb": 4})
    data = Interactions.of_pairs([0], [1], 1, 50_000)
    with pytest.raises(ValueError, match=r"ease needs 9\.3 GB for 50,000 x 50,000 items, found 4 GB"):
        ease.fit(data)


@pytest.mark.parametrize("cells", [item_knn.CELLS, 20])
def test_cosine_with_shrinkage_by_definition(monkeypatch, cells):
    monkeypatch.setattr(item_knn, "CELLS", cells)  # blocks of one item
    data = random_data()
    X = data.matrix().toarray()
    n = X.sum(0)
    expected = (X.T @ X) / np.maximum(np.sqrt(np.outer(n, n)) + 3.0, 1e-9)
    np.fill_diagonal(expected, 0)
    model = item_knn.fit(data, item_knn.Parameters(shrinkage=3.0, neighbours=100))
    np.testing.assert_allclose(model.similarity.toarray(), expected, atol=1e-6)
    np.testing.assert_allclose(model.scores(data, [4, 0]), X[[4, 0]] @ expected.T, atol=1e-5)
    few = item_knn.fit(data, item_knn.Parameters(shrinkage=3.0, neighbours=2)).similarity.toarray()
    for row, kept in enumerate(few):
        np.testing.assert_allclose(np.sort(kept)[-2:], np.sort(expected[row])[-2:], atol=1e-6)
        assert (kept > 0).sum() <= 2


def test_bm25_by_definition():
    data = random_data()
    X = data.matrix().toarray()
    items, n_i, n_u = data.num_items - 1, X.sum(0), X.sum(1)
    w = np.zeros_like(X)
    for user, item in zip(*np.nonzero(X), strict=True):
        length = n_i[item] / n_i[1:].mean()
        w[user, item] = np.log(items / n_u[user]) * (1.5 + 1) / (1.5 * (1 - 0.4 + 0.4 * length) + 1)
    expected = w.T @ w
    np.fill_diagonal(expected, 0)
    model = item_knn.fit(data, item_knn.Parameters(weighting="bm25", k1=1.5, b=0.4, neighbours=100))
    np.testing.assert_allclose(model.similarity.toarray(), expected, atol=1e-5)


def test_popularity_decays():
    times = np.array([0, 10, 20, 20]) * DAY
    data = Interactions.of_pairs([0, 1, 2, 0], [1, 1, 2, 3], 3, 5, times=times)
    model = popularity.fit(data, popularity.Parameters(half_life=10.0))
    np.testing.assert_allclose(model.scores(data, [1])[0], [0, 0.25 + 0.5, 1, 1, 0])
    assert popularity.fit(data).scores(data, [0, 2]).tolist() == [[0, 2, 1, 1, 0]] * 2
    without_clock = Interactions.of_pairs([0, 1], [1, 1], 2, 3)
    assert popularity.fit(without_clock, popularity.Parameters(half_life=1.0)).item_bias.tolist() == [0, 2, 0]


@pytest.mark.parametrize("module", [ease, item_knn, popularity])
def test_hardly_any_data(module):
    one = Interactions.of_pairs([0], [1], 1, 2)  # one user, one item
    assert np.isfinite(module.fit(one).scores(one, [0])).all()
    nobody = Interactions.of_pairs([], [], 2, 4)
    assert module.fit(nobody).scores(nobody, [0, 1]).shape == (2, 4)
