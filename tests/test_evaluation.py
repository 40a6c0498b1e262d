"""Are the metrics what their formulas say, and is nobody shown what they have already had?"""

import math
import os
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from recsys_common import evaluation
from recsys_common.evaluation import evaluate, rank

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("RECSYS_DATA_DIR") or ROOT.parent / "shared" / "data") / "ml-1m" / "sasrec-ml-1m.txt"
NONE = ([], [])
LOG2_3 = math.log2(3)


def pairs(*of_users):
    """(user, items), ... -> the two columns that `evaluate` takes."""
    rows = [(user, item) for user, items in of_users for item in items]
    return [user for user, _ in rows], [item for _, item in rows]


def by_id(num_items):
    """Scores of a model that puts the highest item first, for everyone."""
    return lambda users: np.tile(np.arange(num_items, dtype=np.float32), (len(users), 1))


def constant(num_items):
    return lambda users: np.full((len(users), num_items), 0.25, np.float32)


# --- hand arithmetic --------------------------------------------------------------------------------------------


def test_the_metrics_by_hand():
    # Everyone's ranking is 5 4 3 2 1, for user 11 without the 5.
    test = pairs((7, [5, 3, 1]), (11, [1]), (40, [4, 0]))
    result = evaluate(by_id(6), *test, *pairs((11, [5])), num_items=6, k=3)
    # user 7: ranks 1, 3, 5.  user 11: rank 4.  user 40: rank 2, and an item outside the vocabulary.
    assert result == pytest.approx(
        {
            "HR@3": (1 + 0 + 1) / 3,
            "recall@3": (2 / 3 + 0 + 1 / 2) / 3,
            "NDCG@3": ((1 + 1 / 2) / (1 + 1 / LOG2_3 + 1 / 2) + 0 + (1 / LOG2_3) / (1 + 1 / LOG2_3)) / 3,
            "MRR": (1 + 1 / 4 + 1 / 2) / 3,
            "coverage@3": 4 / 5,  # 5 4 3 and 4 3 2
            "users": 3,
        },
        abs=1e-12,
    )


def test_a_perfect_list_has_ndcg_1_though_it_is_shorter_than_the_targets():
    result = evaluate(by_id(6), *pairs((0, [5, 4, 3])), *NONE, num_items=6, k=2)
    assert (result["NDCG@2"], result["recall@2"], result["HR@2"]) == (1, 2 / 3, 1)


def test_mrr_looks_at_the_whole_ranking():
    result = evaluate(by_id(101), *pairs((0, [1])), *NONE, num_items=101, k=10)
    assert (result["MRR"], result["HR@10"], result["NDCG@10"]) == (1 / 100, 0, 0)


def test_ranks_and_lists_by_hand():
    test = pairs((9, [2, 0, 4]), (3, [5]))
    ranks, users, _, shown, _ = rank(by_id(6), *test, *pairs((9, [5, 3]), (4, [5])), num_items=6, k=2)
    assert users.tolist() == [3, 9, 9, 9]
    assert ranks.tolist() == [1, 2, 1, math.inf]  # item 5 of user 3; items 2, 4 and 0 of user 9
    assert shown.tolist() == [[5, 4], [4, 2]]


# --- against a slow computation ---------------------------------------------------------------------------------


def slowly(score, test, seen, num_items, k, tie_order):
    """The definitions, one user and one item at a time. `score` is {user: scores}, `test` and `seen` list pairs."""
    known = sorted({pair for pair in test if pair[1] > 0} - set(seen))
    asked = known + [pair for pair in test if pair[1] == 0]
    ranking = {
        user: sorted(
            (item for item in range(1, num_items) if (user, item) not in seen and score[user][item] > -math.inf),
            key=lambda item: (-score[user][item], tie_order.index(item)),
        )
        for user, _ in test
    }
    ranks = [ranking[user].index(item) + 1 if item in ranking[user] else math.inf for user, item in asked]
    sums = {"HR": 0.0, "recall": 0.0, "NDCG": 0.0, "MRR": 0.0}
    users = sorted({user for user, _ in asked})
    for user in users:
        mine = [place for place, (owner, _) in zip(ranks, asked, strict=True) if owner == user]
        hits = [place for place in mine if place <= k]
        sums["HR"] += bool(hits)
        sums["recall"] += len(hits) / len(mine)
        perfect = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(mine)) + 1))
        sums["NDCG"] += sum(1 / math.log2(1 + place) for place in hits) / perfect
        sums["MRR"] += 1 / min(mine)
    shown = {user: ranking[user][:k] for user in sorted(ranking)}
    means = {name if name == "MRR" else f"{name}@{k}": value / len(users) for name, value in sums.items()}
    means[f"coverage@{k}"] = len({item for items in shown.values() for item in items}) / (num_items - 1)
    return asked, ranks, shown, means | {"users": len(users)}


def tie_order_of(num_items):
    """The order that items of equal score get, read from outside."""
    return rank(constant(num_items), [0], [1], *NONE, num_items, num_items).shown[0].tolist()


@st.composite
def cases(draw):
    num_items = draw(st.integers(2, 9))
    users = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 500, 10**9]), min_size=1, max_size=8, unique=True))
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.0, 0.5, 2.0, math.inf])  # few values, so that many are equal
    row = st.lists(value, min_size=num_items, max_size=num_items)
    pair = st.tuples(st.sampled_from(users), st.integers(0, num_items - 1))
    score = {user: draw(row) for user in users}
    return score, draw(st.lists(pair, min_size=1, max_size=20)), draw(st.lists(pair, max_size=25)), num_items


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(case=cases(), k=st.integers(1, 12), block=st.integers(1, 4), sorted_from=st.integers(0, 3))
def test_it_agrees_with_the_definitions(case, k, block, sorted_from):
    score, test, seen, num_items = case
    hypothesis.assume(any(item == 0 or (user, item) not in seen for user, item in test))
    columns = (*zip(*test, strict=True), *(zip(*seen, strict=True) if seen else NONE))
    asked, ranks, lists, means = slowly(score, test, seen, num_items, k, tie_order_of(num_items))

    def scores(users):
        return np.array([score[user] for user in users.tolist()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BLOCK", block)
        patch.setattr(evaluation, "SORTED_FROM", sorted_from)
        got_ranks, got_users, _, shown, _ = rank(scores, *columns, num_items, k)
        result = evaluate(scores, *columns, num_items, k)
    assert got_users.tolist() == [user for user, _ in asked]
    assert got_ranks.tolist() == ranks
    length = min(k, num_items - 1)
    assert shown.tolist() == [items + [0] * (length - len(items)) for items in lists.values()]
    assert result == pytest.approx(means, abs=1e-12)


def test_the_list_and_the_ranks_agree(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 3)
    random = np.random.default_rng(5)
    num_items, k = 60, 10
    users = random.choice(1000, 25, replace=False)  # with gaps, unsorted
    table = random.normal(size=(1000, num_items)).round(1)  # some scores equal
    test = np.unique(np.stack([random.choice(users, 400), random.integers(1, num_items, 400)]), axis=1)
    seen = np.stack([random.integers(0, 1000, 6000), random.integers(0, num_items, 6000)])
    ranks, rank_users, _, shown, _ = rank(lambda block: table[block], *test, *seen, num_items, k)
    pairs_seen = set(map(tuple, seen.T.tolist()))
    asked = [pair for pair in test.T.tolist() if tuple(pair) not in pairs_seen]
    lists = dict(zip(np.unique(test[0]).tolist(), shown.tolist(), strict=True))
    assert [user for user, _ in asked] == rank_users.tolist()
    for (user, item), place in zip(asked, ranks, strict=True):
        assert (item in lists[user]) == (place <= k)
        if place <= k:
            assert lists[user][int(place) - 1] == item
    assert 20 < (ranks <= k).sum() < len(ranks) - 20  # both happen


# --- ties -------------------------------------------------------------------------------------------------------


def test_equal_scores_are_chance():
    random = np.random.default_rng(1)
    users, num_items, k = 20_000, 201, 10
    test = np.arange(users), random.integers(1, num_items, users)
    result = evaluate(constant(num_items), *test, *NONE, num_items, k)
    chance = k / (num_items - 1)
    assert result[f"HR@{k}"] == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / users))
    # Every place from 1 to 200 is as likely as any other.
    assert result["MRR"] == pytest.approx(sum(1 / place for place in range(1, num_items)) / (num_items - 1), rel=0.05)


@pytest.mark.parametrize("favoured", [range(1, 21), range(181, 201)])
def test_equal_scores_favour_neither_low_nor_high_ids(favoured):
    # Vocabularies are numbered by frequency: an order by id would be the popularity baseline in disguise.
    users = np.arange(2000)
    items = np.resize(favoured, len(users))
    assert evaluate(constant(201), users, items, *NONE, 201, 20)["HR@20"] < 0.4  # by id: 1; chance: 0.1


def test_equal_scores_have_one_order_whoever_is_asked(monkeypatch):
    def ask(users):
        return rank(constant(50), users, np.full(len(users), 7), *NONE, 50, 5)

    ranks, _, _, shown, _ = ask(np.arange(10))
    assert (ranks == ranks[0]).all() and (shown == shown[0]).all()
    again_ranks, _, _, again, _ = ask(np.array([3, 700]))
    monkeypatch.setattr(evaluation, "BLOCK", 2)
    blocks_ranks, _, _, blocks, _ = ask(np.arange(10))
    np.testing.assert_array_equal(again_ranks, ranks[:2])
    np.testing.assert_array_equal(again, shown[:2])
    np.testing.assert_array_equal(blocks_ranks, ranks)
    np.testing.assert_array_equal(blocks, shown)


# --- what was seen, what is unknown -----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 4, 512])
def test_seen_items_are_never_shown(monkeypatch, block):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    random = np.random.default_rng(block)
    users = np.array([2, 3, 5, 6, 7, 40, 41, 1000, 5000])  # the gaps fall inside of blocks and between them
    strangers = np.array([0, 1, 4, 8, 39, 42, 999, 1001, 4999, 9000])  # have seen items, are not in the test
    seen_users = random.choice(np.concatenate([users, strangers]), 300)
    seen_items = random.integers(0, 30, 300)  # 0 occurs: an item outside the vocabulary was seen
    _, _, _, shown, _ = rank(by_id(30), users, np.zeros(len(users)), seen_users, seen_items, 30, 8)
    for user, items in zip(users, shown.tolist(), strict=True):
        unseen = sorted(set(range(1, 30)) - set(seen_items[seen_users == user].tolist()), reverse=True)
        assert items == unseen[:8]


def test_each_user_is_scored_once_in_blocks(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 3)
    blocks = []

    def scores(users):
        blocks.append(users.tolist())
        return by_id(5)(users)

    rank(scores, [8, 1, 8, 30, 2, 5, 90, 91], [1] * 8, [3], [1], 5, 2)
    assert blocks == [[1, 2, 5], [8, 30, 90], [91]]


def test_an_unknown_item_is_a_miss_and_is_never_shown():
    def scores(users):
        table = by_id(4)(users)
        table[:, 0] = 99  # row 0 may have any score
        return table

    ranks, _, _, shown, _ = rank(scores, *pairs((1, [0, 0, 3])), *NONE, 4, 10)
    assert ranks.tolist() == [1, math.inf, math.inf]
    assert shown.tolist() == [[3, 2, 1]]
    result = evaluate(scores, *pairs((1, [0, 0, 3])), *NONE, 4, 10)
    assert result["recall@10"] == 1 / 3  # each unknown item counts
    assert result["NDCG@10"] == pytest.approx(1 / (1 + 1 / LOG2_3 + 1 / 2))
    only_unknown = evaluate(scores, [1], [0], *NONE, 4, 10)
    assert [only_unknown[name] for name in ("HR@10", "recall@10", "NDCG@10", "MRR")] == [0, 0, 0, 0]


def test_the_unknown_row_may_be_nan():
    def scores(users):
        table = by_id(4)(users)
        table[:, 0] = np.nan
        return table

    assert evaluate(scores, [1], [3], *NONE, 4, 1)["HR@1"] == 1


def test_a_pair_that_occurs_twice_in_the_test_counts_once():
    once = evaluate(by_id(6), *pairs((0, [5, 1]), (1, [2])), *NONE, 6, 2)
    twice = evaluate(by_id(6), *pairs((0, [5, 1, 5, 5]), (1, [2, 2])), *NONE, 6, 2)
    assert twice == once


def test_a_pair_that_was_seen_is_not_asked_for():
    # User 0 asks for the item 5 again: it is left out, and the 1 stays. User 1 asks for nothing else: not counted.
    test, seen = pairs((0, [5, 1]), (1, [4]), (2, [2])), pairs((0, [5]), (1, [4]))
    ranks, users, *_ = rank(by_id(6), *test, *seen, 6, 2)
    assert (users.tolist(), ranks.tolist()) == ([0, 2], [4, 4])
    result = evaluate(by_id(6), *test, *seen, 6, 2)
    assert (result["users"], result["recall@2"], result["MRR"]) == (2, 0, 1 / 4)


def test_k_above_the_number_of_items():
    ranks, _, _, shown, _ = rank(by_id(4), *pairs((0, [1])), *NONE, 4, 100)
    assert (ranks.tolist(), shown.tolist()) == ([3], [[3, 2, 1]])
    result = evaluate(by_id(4), *pairs((0, [1])), *NONE, 4, 100)
    assert (result["HR@100"], result["NDCG@100"], result["coverage@100"]) == (1, 1 / 2, 1)


def test_who_has_seen_everything_is_shown_nothing():
    test, seen = pairs((0, [0]), (1, [0]), (2, [3])), pairs((0, [1, 2, 3]), (1, [2, 3]))
    _, _, _, shown, _ = rank(by_id(4), *test, *seen, 4, 2)
    assert shown.tolist() == [[0, 0], [1, 0], [3, 2]]
    assert evaluate(by_id(4), *test, *seen, 4, 2)["coverage@2"] == 1
    assert evaluate(by_id(4), *pairs((0, [0]), (1, [0])), *seen, 4, 2)["coverage@2"] == 1 / 3  # the 0s are no item


def test_an_item_that_the_model_rules_out_has_no_rank():
    def scores(users):
        return np.tile(np.array([0, -np.inf, 1, -np.inf], np.float32), (len(users), 1))

    ranks, _, _, shown, _ = rank(scores, *pairs((0, [1, 2, 3])), *NONE, 4, 3)
    assert (ranks.tolist(), shown.tolist()) == ([math.inf, 1, math.inf], [[2, 0, 0]])


# --- errors -----------------------------------------------------------------------------------------------------


def test_a_score_that_is_not_a_number_is_named(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 2)

    def scores(users):
        table = by_id(6)(users)
        table[users == 33, 4] = np.nan
        return table

    with pytest.raises(ValueError, match="the score of user 33 for item 4 is NaN"):
        evaluate(scores, [5, 6, 7, 33, 34], [1] * 5, *NONE, 6, 2)


@pytest.mark.parametrize(
    ("test", "seen", "k", "message"),
    [
        (NONE, NONE, 2, "the test has no pairs"),
        (([1], [6]), NONE, 2, r"test_items has 6\.\.6, expected 0\.\.5"),
        (([1, 1], [-1, 3]), NONE, 2, r"test_items has -1\.\.3, expected 0\.\.5"),
        (([1], [5]), ([1, 2], [2, 9]), 2, r"seen_items has 2\.\.9, expected 0\.\.5"),
        (([1, 2], [5, 4]), ([2, 1], [4, 5]), 2, "every test pair is also a seen pair"),
        (([1], [5]), NONE, 0, "k=0"),
        (([1, 2], [5]), NONE, 2, "same shape"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(test, seen, k, message):
    with pytest.raises(ValueError, match=message):
        evaluate(by_id(6), *test, *seen, 6, k)


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (1, 6), (6,)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="for 2 users and 6 items"):
        evaluate(lambda users: np.zeros(shape), [1, 2], [1, 1], *NONE, 6, 2)


# --- a published number -----------------------------------------------------------------------------------------


def test_popularity_on_movielens_1m():
    # SASRec's file, leave-one-out; the counts leave out each user's last two, as training does there.
    if not REAL.is_file():
        pytest.skip(f"no {REAL}: set RECSYS_DATA_DIR to the folder that has ml-1m/sasrec-ml-1m.txt")
    rows = np.loadtxt(REAL, dtype=np.int64)
    assert (np.diff(rows[:, 0]) >= 0).all()
    from_the_end = np.searchsorted(rows[:, 0], rows[:, 0], "right") - np.arange(len(rows))  # 1: the user's last
    num_items = int(rows[:, 1].max()) + 1
    count = np.bincount(rows[from_the_end > 2, 1], minlength=num_items)
    test, seen = rows[from_the_end == 1].T, rows[from_the_end > 1].T
    result = evaluate(lambda users: np.tile(count, (len(users), 1)), *test, *seen, num_items, 10)
    assert (result["users"], num_items) == (6040, 3417)
    assert (round(result["HR@10"], 4), round(result["NDCG@10"], 4)) == (0.0369, 0.0180)
