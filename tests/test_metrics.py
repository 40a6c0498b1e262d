"""Are the metrics what their formulas, trec_eval and scikit-learn say, and does an interval hold what it should?"""

import math

import numpy as np
import pytest
import pytrec_eval
from sklearn import metrics as independent

from recsys_common import evaluation, metrics
from recsys_common.evaluation import Ranking

LOG2_3 = math.log2(3)


def ranking_of(ranks, users, items=None, shown=((1,),), num_items=10):
    items = np.ones(len(ranks), np.int64) if items is None else np.array(items)
    return Ranking(np.array(ranks, float), np.array(users), items, np.array(shown), num_items)


def test_every_metric_by_hand():
    # User 4 wanted three items, at 1, 3 and 12; user 7 one that cannot be shown.
    found = metrics.per_user(ranking_of([3, 12, 1, math.inf], [4, 4, 4, 7]), k=(2, 10))
    hand = {
        "HR@2": 1, "recall@2": 1 / 3, "capped-recall@2": 1 / 2, "precision@2": 1 / 2,
        "NDCG@2": 1 / (1 + 1 / LOG2_3), "MAP@2": 1 / 2,
        "HR@10": 1, "recall@10": 2 / 3, "capped-recall@10": 2 / 3, "precision@10": 2 / 10,
        "NDCG@10": 1.5 / (1.5 + 1 / LOG2_3), "MAP@10": (1 + 2 / 3) / 3, "MRR": 1,
    }  # fmt: skip
    assert {name: values[0] for name, values in found.items()} == pytest.approx(hand, abs=1e-12)
    assert all(values[1] == 0 for values in found.values())


def test_only_what_is_asked_for():
    found = metrics.per_user(ranking_of([1], [0]), (5,), ("NDCG", "MRR"))
    assert [*found] == ["NDCG@5", "MRR"]


@pytest.fixture(scope="module")
def random_case():
    """Scores of 40 users for 60 items, some equal, with several targets each; and the ranking of it."""
    random = np.random.default_rng(8)
    table = random.normal(size=(40, 61)).astype(np.float32)
    test = np.unique(np.stack([random.integers(0, 40, 200), random.integers(1, 61, 200)]), axis=1)
    return table, test, evaluation.rank(lambda users: table[users], *test, [], [], 61, 10)


def test_trec_eval_says_the_same(random_case):
    table, test, ranking = random_case
    wanted, run = {}, {}
    for user, item in test.T.tolist():
        wanted.setdefault(f"u{user}", {})[f"i{item}"] = 1
    for user in wanted:
        run[user] = {f"i{item}": float(table[int(user[1:]), item]) for item in range(1, 61)}
    measures = {"ndcg_cut_5,10", "recall_5,10", "P_5,10", "success_5,10", "map_cut_5,10", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(wanted, measures).evaluate(run)
    ours = metrics.per_user(ranking, (5, 10))
    users = np.unique(ranking.users)
    assert len(users) == len(theirs) > 30
    names = {"NDCG": "ndcg_cut", "recall": "recall", "precision": "P", "HR": "success", "MAP": "map_cut"}
    for place, user in enumerate(users):
        its, targets = theirs[f"u{user}"], len(wanted[f"u{user}"])
        for k in (5, 10):
            for name, their_name in names.items():
                # trec_eval divides average precision by all targets, though only k can be shown
                theirs_scaled = its[f"{their_name}_{k}"] * (targets / min(targets, k) if name == "MAP" else 1)
                assert ours[f"{name}@{k}"][place] == pytest.approx(theirs_scaled, abs=1e-9)
        assert ours["MRR"][place] == pytest.approx(its["recip_rank"], abs=1e-9)


def test_scikit_learn_says_the_same_of_ndcg(random_case):
    table, test, ranking = random_case
    users = np.unique(ranking.users)
    relevant = np.zeros((40, 61))
    relevant[tuple(test)] = 1
    theirs = independent.ndcg_score(relevant[users][:, 1:], table[users][:, 1:], k=10)
    assert metrics.per_user(ranking)["NDCG@10"].mean() == pytest.approx(theirs, abs=1e-12)


def test_coverage_counts_the_first_k():
    ranking = ranking_of([1], [0], shown=[[5, 2, 0], [5, 3, 0]], num_items=6)
    assert [metrics.coverage(ranking, k) for k in (1, 2, 3)] == [1 / 5, 3 / 5, 3 / 5]


def test_slices_by_popularity_by_hand():
    # Thirds of 12 interactions end at 4 and 8: item 1 begins in the first, 3 in the second, 4, 2 and 5 in the third.
    frequency = np.array([0, 6, 1, 2, 2, 1])
    ranking = ranking_of([1, 4, 2, 9], [0, 0, 1, 2], items=[1, 3, 5, 0], shown=[[1, 3], [1, 5], [1, 0]], num_items=6)
    found = metrics.by_popularity(ranking, frequency, k=2)
    assert found["head"] == pytest.approx({"items": 1 / 5, "targets": 1 / 4, "shown": 3 / 5, "recall@2": 1})
    assert found["middle"] == pytest.approx({"items": 1 / 5, "targets": 1 / 4, "shown": 1 / 5, "recall@2": 0})
    assert found["tail"] == pytest.approx({"items": 3 / 5, "targets": 1 / 4, "shown": 1 / 5, "recall@2": 1})


def test_cold_users_stand_apart():
    ranking = ranking_of([1, 20, 1, 2], [0, 1, 2, 3])
    rows = metrics.by_history(ranking, np.array([0, 0, 9, 50]), k=10)
    assert [(row["history"], row["users"]) for row in rows] == [((0, 0), 2), ((1, 9), 1), ((50, None), 1)]
    assert [row["NDCG@10"] for row in rows] == pytest.approx([0.5, 1, 1 / LOG2_3])


# --- chance -----------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = (random.random((200, 150)) < 0.2).astype(float)  # 200 evaluations of 150 users; the truth is .2
    bounds = np.array([metrics.interval(sample, draws=300, seed=1) for sample in samples])
    held = np.mean((bounds[:, 0] <= 0.2) & (bounds[:, 1] >= 0.2))
    assert 0.88 <= held <= 0.99
    width = np.mean(bounds[:, 1] - bounds[:, 0])
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.2 * 0.8 / 150), rel=0.1)


def test_the_paired_test_sees_what_intervals_do_not():
    random = np.random.default_rng(2)
    common = random.random(500)  # users differ far more than the models do
    worse, better = common + random.normal(0, 0.02, 500), common + 0.01 + random.normal(0, 0.02, 500)
    low, high = metrics.interval(better)
    assert low < worse.mean() < high
    found = metrics.paired(better, worse)
    assert found.p < 0.002 and 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(0.01, abs=0.004)


def test_equal_models_differ_by_chance_only():
    random = np.random.default_rng(3)
    p = [metrics.paired(*random.normal(size=(2, 80)), draws=200, seed=trial).p for trial in range(150)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1  # five in a hundred
    same = np.ones(9)
    assert metrics.paired(same, same) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="9 and 8 users"):
        metrics.paired(same, same[1:])


def test_one_user_has_an_interval_of_a_point():
    assert metrics.interval(np.array([0.3])) == (0.3, 0.3)


# --- sampled metrics --------------------------------------------------------------------------------------------


def test_sampled_ranks_are_those_of_scoring_a_sample():
    # 3,000 users want the item that stands 50th of 999; each compares it with 100 others at random.
    users = np.arange(3000)
    ranking = ranking_of(np.full(3000, 50.0), users, num_items=1000)
    found = metrics.sampled(ranking, np.zeros(3000, int), negatives=100)
    random = np.random.default_rng(1)
    scored = [1 + np.sum(random.choice(998, 100, replace=False) < 49) for _ in users]  # 49 of 998 are above
    assert found.ranks.mean() == pytest.approx(np.mean(scored), abs=0.2)
    assert found.ranks.std() == pytest.approx(np.std(scored), abs=0.15)


def test_a_sample_prefers_the_model_that_is_worse():
    # One model puts a tenth of the targets first and loses the rest; the other puts all at place 60 of 1,000.
    users = np.arange(2000)
    first = ranking_of(np.where(users % 10 == 0, 1.0, 900.0), users, num_items=1001)
    second = ranking_of(np.full(2000, 60.0), users, num_items=1001)
    exact = [metrics.per_user(each)["NDCG@10"].mean() for each in (first, second)]
    of_sample = [
        metrics.per_user(metrics.sampled(each, np.zeros(2000, int)))["NDCG@10"].mean() for each in (first, second)
    ]
    assert exact[0] == pytest.approx(0.1) and exact[1] == 0
    assert of_sample[1] > 3 * of_sample[0]


def test_each_target_of_a_sample_is_a_list_of_its_own():
    found = metrics.sampled(ranking_of([1, 2, 900], [4, 4, 4], num_items=1000), np.zeros(5, int))
    assert len(np.unique(found.users)) == 3
    assert metrics.per_user(found)["NDCG@10"].max() <= 1


def test_an_item_that_cannot_be_shown_is_last_of_the_sample():
    found = metrics.sampled(ranking_of([math.inf], [0], num_items=500), np.array([10]), negatives=100)
    assert found.ranks.tolist() == [101]


# --- ratings and clicks -----------------------------------------------------------------------------------------


def test_rating_errors_by_hand():
    assert metrics.rating_errors([3, 5, 1], np.array([4, 5, 3])) == {"RMSE": math.sqrt(5 / 3), "MAE": 1}


def test_clicks_against_scikit_learn():
    random = np.random.default_rng(5)
    probability = random.random(5000).round(2)  # many are equal; some are 0 and 1
    clicked = (random.random(5000) < probability).astype(int)
    found = metrics.click_errors(probability, clicked)
    assert found["AUC"] == pytest.approx(independent.roc_auc_score(clicked, probability), abs=1e-12)
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    assert found["logloss"] == pytest.approx(independent.log_loss(clicked, clipped), abs=1e-9)
    assert metrics.click_errors(np.full(4, 0.5), [0, 1, 1, 0])["AUC"] == 0.5
    with pytest.raises(ValueError, match="4 clicks and 0 rows without"):
        metrics.click_errors(np.full(4, 0.5), np.ones(4))
