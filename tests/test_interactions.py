"""Do plain files become histories, line by line, and are they parted as the protocols say?"""

import warnings

import numpy as np
import pytest

from recsys_common import interactions, splits
from recsys_common.interactions import Interactions


def written(folder, text: bytes):
    path = folder / "data.txt"
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("text", "users", "items"),
    [
        (b"1 10\n1 11\n7 10\n", [1, 1, 7], [10, 11, 10]),
        (b"1\t10\r\n\r\n7  10  \n", [1, 7], [10, 10]),
        (b"1 10 11 12\n2 5\n3\n4 6 6", [1, 1, 1, 2, 4, 4], [10, 11, 12, 5, 6, 6]),  # user 3 has nothing
        (b"0 999999999999999999\n", [0], [999999999999999999]),
    ],
)
def test_pairs_and_lists(tmp_path, text, users, items):
    found = interactions.read(written(tmp_path, text))
    assert [each.tolist() for each in found] == [users, items]
    assert {each.dtype for each in found} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        (b"1 2\n\n3\n", 3, "found '3', expected two integers"),
        (b"1 2\n3 x\n", 2, "found '3 x', expected integers"),
        (b"1 2\n3 -4\n", 2, "found '3 -4', expected integers"),
        (b"user item\n1 2\n", 1, "found 'user item', expected integers"),
        (b"1 2.0\n", 1, "found '1 2.0', expected integers"),
        (b"1 2\n1 1234567890123456789\n", 2, "18 digits at most"),
        (b"1 2\n\xff\xfe\n", 2, "expected integers"),
        (b"1 2\n" + b"3 " * 100 + b"x\n", 2, r"found '3 3 .*\.\.\.', expected integers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, line, found):
    with pytest.raises(ValueError, match=rf"data\.txt, line {line}: .*{found}"):
        interactions.read(written(tmp_path, text))


@pytest.mark.parametrize("text", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"data\.txt: no interactions were found"):
        interactions.read(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"data\.txt: no ratings were found"):
        interactions.read_ratings(written(tmp_path, text))


@pytest.mark.parametrize("between", [b"::", b"\t", b",", b"  "])
def test_ratings_in_movielens_layouts(tmp_path, between):
    lines = [[b"1", b"20", b"3.5", b"978300760"], [b"2", b"21", b"5", b"978300761"]]
    text = b"\n".join(between.join(line) for line in lines)
    users, items, ratings, times = interactions.read_ratings(written(tmp_path, text))
    assert (users.tolist(), items.tolist(), ratings.tolist()) == ([1, 2], [20, 21], [3.5, 5])
    assert times.tolist() == [978300760, 978300761]
    *_, none = interactions.read_ratings(written(tmp_path, b"\n".join(between.join(line[:3]) for line in lines)))
    assert none is None


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        (b"1 2 3\n1 2\n", 2, "found '1 2', expected 3 numbers"),
        (b"1 2 3 4\n1 2 3\n", 2, "found '1 2 3', expected 4 numbers"),
        (b"1::2::3\n1::2::x\n", 2, "found '1::2::x'"),
        (b"1 2 3\n1 2 3.4.5\n", 2, r"found '1 2 3\.4\.5'"),
        (b"1 2 3\n1.5 2 3\n", 2, "integers"),
        (b"userId,movieId,rating\n1,2,3\n", 1, "found 'userId,movieId,rating'"),
    ],
)
def test_a_bad_rating_is_named(tmp_path, text, line, found):
    with pytest.raises(ValueError, match=rf"data\.txt, line {line}: .*{found}"):
        interactions.read_ratings(written(tmp_path, text))


def test_histories():
    data = Interactions.of_pairs([2, 0, 2, 2], [3, 1, 1, 3], 4, 5, values=[1, 2, 3, 4], times=[9, 8, 7, 6])
    assert [data.history(row).tolist() for row in range(4)] == [[1], [], [3, 1, 3], []]  # in order
    assert (data.lengths.tolist(), data.users.tolist()) == ([1, 0, 3, 0], [0, 2, 2, 2])
    assert data.frequency.tolist() == [0, 2, 0, 2, 0]
    assert data.matrix().toarray().tolist()[2] == [0, 1, 0, 1, 0]  # had twice is had
    assert data.history(2).tolist() == [3, 1, 3]  # which does not touch the order
    assert data.matrix(values=True).toarray().tolist()[2] == [0, 3, 0, 5, 0]
    some = data.rows([2, 1, 0, 2])
    assert (some.offsets.tolist(), some.items.tolist()) == ([0, 3, 3, 4, 7], [3, 1, 3, 1, 3, 1, 3])
    assert (some.values.tolist(), some.times.tolist()) == ([1, 3, 4, 2, 1, 3, 4], [9, 7, 6, 8, 9, 7, 6])
    assert data.rows([]).matrix().shape == (0, 5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (([0, 4], [1, 1]), "users has 0 to 4, expected 0 to 3"),
        (([0], [-1]), "items has -1 to -1, expected 0 to 4"),
        (([0], [5]), "items has 5 to 5, expected 0 to 4"),
        (([0, 1], [1]), "2 users, 1 items"),
    ],
)
def test_rows_out_of_range_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        Interactions.of_pairs(*pairs, 4, 5)


# --- splits -----------------------------------------------------------------------------------------------------


def as_pairs(data: Interactions, split: splits.Split) -> list[tuple[int, int]]:
    """(id of user, id of item) of each interaction."""
    return list(zip(split.user_ids[data.users].tolist(), split.item_ids[data.items].tolist(), strict=True))


def test_leave_one_out_by_hand():
    users = np.array([7, 9, 7, 5, 7, 5, 7, 5])
    items = np.array([1, 1, 2, 4, 3, 5, 8, 6])
    parts = splits.leave_one_out(users, items)
    train = [(5, 4), (7, 1), (7, 2), (9, 1)]  # user 9 has one item: it is trained on
    assert as_pairs(parts["validation"].train, parts["validation"]) == train
    assert as_pairs(parts["validation"].seen, parts["validation"]) == train
    assert as_pairs(parts["validation"].test, parts["validation"]) == [(5, 5), (7, 3)]
    assert parts["test"].train is not None and as_pairs(parts["test"].train, parts["test"]) == train
    assert as_pairs(parts["test"].seen, parts["test"]) == [(5, 4), (5, 5), (7, 1), (7, 2), (7, 3), (9, 1)]
    assert as_pairs(parts["test"].test, parts["test"]) == [(5, 6), (7, 8)]
    assert parts["test"].test.num_items == 8  # 1 2 3 4 5 6 8, and none: items of the test are ranked too


def test_a_last_item_that_was_had_before_is_not_asked_for():
    parts = splits.leave_one_out(np.array([1, 1, 1, 1]), np.array([3, 4, 5, 3]))
    assert as_pairs(parts["test"].test, parts["test"]) == []
    assert as_pairs(parts["validation"].test, parts["validation"]) == [(1, 5)]


def test_temporal_by_hand():
    users, items = np.array([1, 1, 2, 2, 3, 1, 1, 2, 3, 3]), np.array([1, 2, 1, 3, 1, 3, 1, 2, 2, 3])
    times = np.array([1, 2, 3, 4, 5, 6, 8, 7, 8, 9])
    parts = splits.temporal(users, items, times, (0.5, 0.2))
    assert sorted(as_pairs(parts["test"].train, parts["test"])) == [(1, 1), (1, 2), (2, 1), (2, 3), (3, 1)]
    assert sorted(as_pairs(parts["validation"].test, parts["validation"])) == [(1, 3), (2, 2)]
    assert sorted(as_pairs(parts["test"].test, parts["test"])) == [(3, 2), (3, 3)]  # (1, 1) was had before
    assert parts["test"].train.times.max() == 5 and parts["test"].seen.times.max() == 7


def test_of_equal_times_none_is_parted_from_the_others():
    parts = splits.temporal(np.arange(10), np.arange(10), np.array([1] * 9 + [2]), (0.5, 0.2))
    assert (len(parts["test"].train), len(parts["test"].test)) == (9, 1)


def test_strong_generalisation_keeps_users_apart():
    random = np.random.default_rng(3)
    users = np.repeat(np.arange(300), random.integers(1, 40, 300))
    items = random.integers(0, 500, len(users))
    users, items = np.unique(np.stack([users, items]), axis=1)
    parts = splits.strong_generalisation(users, items, 40)
    asked = {name: set(np.unique(part.test.users).tolist()) for name, part in parts.items()}
    trained = set(np.unique(parts["test"].train.users).tolist())
    assert not trained & asked["test"] and not trained & asked["validation"] and not asked["test"] & asked["validation"]
    count = np.bincount(users, minlength=300)
    assert min(count[list(trained)]) == 5 and len(trained) == (count >= 5).sum() - 80
    part = parts["test"]
    known = set(part.item_ids[np.unique(part.train.items)].tolist())
    for user in asked["test"]:
        told, wanted = part.seen.history(user), part.test.history(user)
        had = [item for item in items[users == user].tolist() if item in known]
        assert sorted(part.item_ids[[*told, *wanted]].tolist()) == had  # nothing is lost, nothing twice
        assert len(wanted) == len(had) // 5
    again = splits.strong_generalisation(users, items, 40)
    assert as_pairs(again["test"].test, again["test"]) == as_pairs(part.test, part)
    with pytest.raises(ValueError, match="users have 5 items or more, expected over 2 x 200 held out"):
        splits.strong_generalisation(users, items, 200)


def test_given_files_and_pairs_that_were_seen():
    train, test = (np.array([1, 1, 2]), np.array([4, 5, 4])), (np.array([1, 2, 3]), np.array([4, 6, 5]))
    with pytest.warns(UserWarning, match="1 of 3 pairs of the test were seen before, such as user 1, item 4"):
        parts = splits.given(train, test)
    assert [*parts] == ["test"]
    assert as_pairs(parts["test"].test, parts["test"]) == [(2, 6), (3, 5)]  # user 3 is cold
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = splits.given(train, (np.array([1]), np.array([9])), (np.array([3]), np.array([5])))
    assert [*parts] == ["validation", "test"]
    assert as_pairs(parts["test"].seen, parts["test"]) == [(1, 4), (1, 5), (1, 9), (2, 4)]


def test_folds_of_ratings_are_disjoint_and_whole():
    folds = splits.random_folds(1003, 0.2, seed=4)
    assert len(folds) == 5 and (np.sum(folds, 0) == 1).all() and {fold.sum() for fold in folds} == {200, 201}
    assert not (splits.random_folds(1003, 0.2, seed=5)[0] == folds[0]).all()
    split = splits.rated(
        ([5, 5, 9], [1, 2, 1], [3.0, 4.0, 5.0]), (np.array([9, 7]), np.array([3, 1]), np.array([1, 2]))
    )
    assert split.user_ids[split.users].tolist() == [9, 7] and split.item_ids[split.items].tolist() == [3, 1]
    assert split.train.matrix(values=True).toarray().tolist() == [[0, 3, 4, 0], [0, 0, 0, 0], [0, 5, 0, 0]]
