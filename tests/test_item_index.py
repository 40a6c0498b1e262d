"""item_index.py: the exact list by hand, and how much of it the index finds."""

import numpy as np
import pytest

from recsys_common import item_index


def long_and_short(items=4000, users=200, dim=16, seed=1):
    """Vectors as models have them: a few directions, lengths that differ a lot, and a bias as the last number."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(4, dim))
    vectors = random.normal(size=(items, 4)) @ mix + 0.3 * random.normal(size=(items, dim))
    vectors *= random.lognormal(0, 0.7, size=(items, 1))
    asked = random.normal(size=(users, 4)) @ mix
    asked[:, -1] = 1
    return vectors.astype(np.float32), asked.astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    vectors, users = long_and_short()
    path = tmp_path_factory.mktemp("index") / "index.usearch"
    return path, vectors, users, item_index.build(path, vectors, users)


def test_exact_by_hand():
    vectors = np.array([[1, 0], [0, 2], [3, 3], [0, 2]], np.float32)
    places, scores = item_index.exact(vectors, np.array([[1, 0], [0, 1], [-1, -1]], np.float32), 3)
    assert places.tolist() == [[2, 0, 1], [2, 1, 3], [0, 1, 3]]  # of equal scores the lower place
    assert scores.tolist() == [[3, 1, 0], [3, 2, 2], [-1, -2, -2]]
    assert (places.dtype, scores.dtype) == (np.int64, np.float32)
    assert item_index.exact(vectors, np.ones([1, 2], np.float32), 9)[0].tolist() == [[2, 1, 3, 0]]


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_a_user_who_is_no_vector_is_refused(strange, built):
    users = np.ones([3, 16], np.float32)
    users[1, 4] = strange
    with pytest.raises(ValueError, match="row 1 has a number that is not finite"):
        item_index.exact(built[1], users, 3)
    with pytest.raises(ValueError, match="row 1 has a number that is not finite"):
        item_index.search(item_index.load(built[0], 64), users, 3)


def test_exact_in_blocks_is_a_sort(monkeypatch):
    random = np.random.default_rng(2)
    vectors = random.integers(-2, 3, [500, 4]).astype(np.float32)  # with many equal scores
    users = random.integers(-2, 3, [20, 4]).astype(np.float32)
    monkeypatch.setattr(item_index, "BLOCK", 64)
    for k in (1, 7, 100, 500):
        expected = np.argsort(-(users @ vectors.T), 1, kind="stable")[:, :k]
        np.testing.assert_array_equal(item_index.exact(vectors, users, k)[0], expected)


def test_the_index_finds_95_in_100_and_says_how(built):
    path, vectors, users, about = built
    index = item_index.load(path, about["expansion_search"])
    places, scores = item_index.search(index, users, 100)
    sorted_scores = np.argsort(-(users @ vectors.T), 1)[:, :100]
    found = np.mean([len(set(a) & set(b)) / 100 for a, b in zip(places.tolist(), sorted_scores.tolist(), strict=True)])
    assert found >= 0.95 and found == pytest.approx(about["recall"]["value"], abs=2e-4)
    assert about["recall"] == {"k": 100, "value": about["recall"]["value"], "users": 200}
    np.testing.assert_allclose(scores, np.take_along_axis(users @ vectors.T, places, 1), rtol=1e-4, atol=1e-3)
    assert (np.diff(scores) <= 1e-4).all() and about["dim"] == vectors.shape[1] + 1 and about["metric"] == "ip"


def test_search_parameters_are_the_least_that_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(item_index, "SEARCHES", (1, 4, 16, 64, 256, 1024))
    vectors, users = long_and_short()
    about = item_index.build(tmp_path / "index.usearch", vectors, users, k=1)
    right = item_index.exact(vectors, users, 1)[0]
    smaller = [each for each in item_index.SEARCHES if each < about["expansion_search"]]
    assert smaller and about["recall"]["value"] >= 0.95
    for expansion in smaller:
        found = item_index.search(item_index.load(tmp_path / "index.usearch", expansion), users, 1)[0]
        assert item_index.recall_of(found, right) < 0.95


def test_fewer_found_than_there_are_is_made_up_for(tmp_path):
    random = np.random.default_rng(1)
    vectors = random.normal(size=(3000, 4)) * random.lognormal(0, 2, size=(3000, 1))
    vectors, users = vectors.astype(np.float32), random.normal(size=(5, 4)).astype(np.float32)
    item_index._index(vectors, False, 1).save(str(tmp_path / "index.usearch"))
    index = item_index.load(tmp_path / "index.usearch", 64)
    expected = np.argsort(-(users @ vectors.T), 1, kind="stable")[:, :2500]
    for chosen in (slice(0, 5), slice(0, 1)):  # one user is another form of answer in usearch
        places, scores = item_index.search(index, users[chosen], 2500)
        few = (places == -1).any(1)
        assert few.any(), "usearch finds all: the test needs other vectors"
        assert (np.isneginf(scores) == (places == -1)).all()
        counted = np.mean([len({*row} - {-1} & {*right}) / 2500 for row, right in zip(places, expected, strict=False)])
        assert item_index.recall_of(places, expected[chosen]) == pytest.approx(counted) and counted < 1
        places, scores = item_index.search(index, users[chosen], 2500, vectors)
        np.testing.assert_array_equal(places[few], expected[chosen][few])
        assert np.isfinite(scores).all() and all(len(set(row)) == 2500 for row in places.tolist())


def test_places_that_are_none_are_not_counted():
    assert item_index.recall_of(np.array([[0, -1, -1]]), np.array([[0, 1, 2]])) == pytest.approx(1 / 3)


def test_a_recall_out_of_reach_is_told_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(item_index, "SEARCHES", (1,))
    vectors, users = long_and_short(1000, 20)
    about = item_index.build(tmp_path / "index.usearch", vectors, users, recall=1.01)
    assert about["expansion_search"] == 1 and 0 < about["recall"]["value"] <= 1


def test_two_builds_are_the_same_bytes(tmp_path, built):
    path, vectors, users, about = built
    assert item_index.build(tmp_path / "again.usearch", vectors, users) == about
    assert (tmp_path / "again.usearch").read_bytes() == path.read_bytes()


def test_vectors_of_one_length_are_left_as_they_are(tmp_path):
    vectors, users = long_and_short(2000, 50)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    about = item_index.build(tmp_path / "index.usearch", vectors, users)
    assert about["dim"] == vectors.shape[1] and about["recall"]["value"] >= 0.95
    places, _ = item_index.search(item_index.load(tmp_path / "index.usearch", about["expansion_search"]), users, 100)
    found = item_index.recall_of(places, item_index.exact(vectors, users, 100)[0])
    assert found == pytest.approx(about["recall"]["value"], abs=1e-6)


def test_recall_of():
    assert item_index.recall_of(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 5]])) == 0.75


def test_fewer_items_than_asked_for(tmp_path):
    vectors = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
    about = item_index.build(tmp_path / "index.usearch", vectors, np.eye(2, dtype=np.float32))
    assert about["recall"] == {"k": 3, "value": 1.0, "users": 2}
    places, scores = item_index.search(item_index.load(tmp_path / "index.usearch", 64), np.eye(2, dtype=np.float32), 9)
    assert places.tolist() == [[2, 0, 1], [2, 1, 0]]
    np.testing.assert_allclose(scores, [[3, 1, 0], [3, 2, 0]], atol=1e-5)
