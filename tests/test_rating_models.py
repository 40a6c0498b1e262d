"""Do the models of ratings compute what their equations say, and find what is there to be found?"""

import os
from pathlib import Path

import numpy as np
import pytest

from recsys_common.interactions import Interactions, read_ratings
from recsys_common.models import biased_mf, svdpp

ROOT = Path(__file__).resolve().parents[1]
ML_100K = Path(os.environ.get("RECSYS_DATA_DIR") or ROOT.parent / "shared" / "data") / "ml-100k"
RNG = np.random.default_rng
ALL = {
    "sgd": (biased_mf, {"dim": 8, "learning_rate": 0.03, "epochs": 60, "l2": 0.01}),
    "als": (biased_mf, {"dim": 3, "solver": "als", "epochs": 15, "l2": 0.01}),
    "svdpp": (svdpp, {"dim": 8, "learning_rate": 0.03, "epochs": 60, "l2": 0.01}),
}


def fit(name, train, seed=0, after_epoch=None, **changes):
    module, settings = ALL[name]
    return module.fit(train, module.Parameters(**settings | changes), seed, after_epoch)


def rmse(model, users, items, values):
    return float(np.sqrt(np.mean((model.ratings(users, items) - values) ** 2, dtype=np.float64)))


def planted(noise=0.1, num_users=300, num_items=120, density=0.5):
    """Ratings of rank 3 with biases and noise: Interactions to train on, and (users, items, values) to predict."""
    rng = RNG(5)
    users, items = np.nonzero(rng.random((num_users, num_items)) < density)
    p, q = rng.normal(size=(num_users, 3)), rng.normal(size=(num_items, 3))
    b_u, b_i = 0.5 * rng.normal(size=num_users), 0.5 * rng.normal(size=num_items)
    values = 3 + b_u[users] + b_i[items] + (p[users] * q[items]).sum(1) + noise * rng.normal(size=len(users))
    kept = rng.random(len(users)) < 0.1
    train = Interactions.of_pairs(users[~kept], items[~kept] + 1, num_users, num_items + 1, values[~kept])
    return train, (users[kept], items[kept] + 1, values[kept])


@pytest.fixture(scope="module")
def low_rank():
    return planted()


def some_ratings(num_users=6, num_items=5, seed=0):
    """Two thirds of all pairs, in no order of items, rated 1 to 5."""
    rng = RNG(seed)
    users, items = np.nonzero(rng.random((num_users, num_items)) < 0.67)
    order = rng.permutation(len(users))
    return Interactions.of_pairs(
        users[order], items[order] + 1, num_users, num_items + 1, rng.integers(1, 6, len(users))
    )


# --- the equations ----------------------------------------------------------------------------------------------


def gradient(loss, tables):
    """Of `loss(*tables)`, by central differences in float64."""
    tables, slopes = [np.array(table, np.float64) for table in tables], []
    for table in tables:
        slope = np.zeros_like(table)
        for place in np.ndindex(table.shape):
            there = table[place]
            ends = []
            for step in (1e-5, -1e-5):
                table[place] = there + step
                ends.append(loss(*tables))
            table[place] = there
            slope[place] = (ends[0] - ends[1]) / 2e-5
        slopes.append(slope)
    return slopes


def random_tables(*shapes, seed=1):
    rng = RNG(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_a_step_of_sgd_goes_down_the_slope_of_one_rating():
    tables = random_tables(3, 4, (3, 2), (4, 2))
    mean, l2_bias, l2, rate = 3.5, 0.3, 0.7, 0.01

    def half_squared_error(b_u, b_i, p, q):
        error = 2.0 - (mean + b_u[1] + b_i[3] + p[1] @ q[3])
        return (error**2 + l2_bias * (b_u[1] ** 2 + b_i[3] ** 2) + l2 * (p[1] @ p[1] + q[3] @ q[3])) / 2

    moved = [table.copy() for table in tables]
    pair = np.array([1], np.int32), np.array([3], np.int32), np.array([2], np.float32)
    rates = np.array([rate, l2_bias, rate, l2], np.float32)
    biased_mf._sgd_epoch(np.array([0]), *pair, np.float32(mean), *moved, *rates)
    for slope, before, after in zip(gradient(half_squared_error, tables), tables, moved, strict=True):
        np.testing.assert_allclose(after - before.astype(np.float64), -rate * slope, atol=1e-6)
        assert np.abs(slope).max() > 0.1  # all four move


def svdpp_epoch(tables, order, shuffled, ratings, had, mean, rates):
    share = (1 / np.sqrt(np.diff(had[0]))).astype(np.float32)
    svdpp._epoch(order, shuffled, *ratings, *had, share, np.float32(mean), *tables, *np.array(rates, np.float32))


def test_a_step_of_svdpp_goes_down_the_slope_of_one_rating():
    tables = random_tables(2, 5, (2, 3), (5, 3), (5, 3))
    had = np.array([1, 2, 4], np.int32)  # of user 1, who is asked about item 2
    mean, rate, l2_bias, l2, l2_implicit = 3.5, 0.01, 0.3, 0.7, 0.2

    def half_squared_error(b_u, b_i, p, q, y):
        error = 2.0 - (mean + b_u[1] + b_i[2] + q[2] @ (p[1] + y[had].sum(0) / np.sqrt(3)))
        penalty = l2_bias * (b_u[1] ** 2 + b_i[2] ** 2) + l2 * (p[1] @ p[1] + q[2] @ q[2])
        return (error**2 + penalty + l2_implicit * (y[had] ** 2).sum()) / 2

    moved = [table.copy() for table in tables]
    ratings = np.array([0, 0, 1]), np.array([2], np.int32), np.array([2], np.float32)
    had_of_all = np.array([0, 1, 4], np.int32), np.append(np.int32(3), had).astype(np.int32)
    svdpp_epoch(moved, np.array([1]), np.array([0]), ratings, had_of_all, mean, (rate, l2_bias, l2, l2_implicit))
    for slope, before, after in zip(gradient(half_squared_error, tables), tables, moved, strict=True):
        np.testing.assert_allclose(after - before.astype(np.float64), -rate * slope, atol=2e-6)
        assert np.abs(slope).max() > 0.1


def test_svdpp_puts_off_what_a_rating_does_to_all_of_the_user_s_items_and_gets_the_same():
    train = some_ratings(seed=2)
    fast = random_tables(6, 6, (6, 3), (6, 3), (6, 3))
    b_u, b_i, p, q, y = (table.astype(np.float64) for table in fast)
    mean, rate, l2_bias, l2, l2_implicit = 3.0, 0.05, 0.1, 0.2, 0.4
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = np.concatenate([RNG(u).permutation(np.arange(*train.offsets[u : u + 2])) for u in range(6)])
    had = train.offsets.astype(np.int32), train.items
    svdpp_epoch(
        fast, order, shuffled, (train.offsets, train.items, train.values), had, mean, (rate, l2_bias, l2, l2_implicit)
    )
    for u in order:  # (3) and (4) of the docstring, rating by rating
        theirs = train.history(u)
        for t in shuffled[train.offsets[u] : train.offsets[u + 1]]:
            i, norm = train.items[t], len(theirs) ** -0.5
            whole = p[u] + norm * y[theirs].sum(0)
            error = train.values[t] - (mean + b_u[u] + b_i[i] + q[i] @ whole)
            own, item = p[u].copy(), q[i].copy()
            b_u[u] += rate * (error - l2_bias * b_u[u])
            b_i[i] += rate * (error - l2_bias * b_i[i])
            p[u] += rate * (error * item - l2 * own)
            q[i] += rate * (error * whole - l2 * item)
            y[theirs] += rate * (error * norm * item - l2_implicit * y[theirs])
    for table, slow in zip(fast, (b_u, b_i, p, q, y), strict=True):
        np.testing.assert_allclose(table, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one", [1.0, 0.0])
def test_half_a_pass_of_als_solves_each_row(one):
    # Row 0 has more ratings than are gathered at a time, row 1 fewer than factors, row 2 none.
    rng, l2_bias, l2, mean = RNG(3), 0.3, 0.05, 3.2
    counts = np.array([biased_mf.BLOCK * 2 + 7, 2, 0, 30])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    others = rng.integers(0, 50, offsets[-1]).astype(np.int32)
    values = rng.integers(1, 6, offsets[-1]).astype(np.float32)
    bias, p, other_bias, q = random_tables(4, (4, 3), 50, (50, 3))
    before = bias[2], p[2].copy()
    biased_mf._als_half(offsets, others, values, bias, p, other_bias, q, np.float32(mean), one, l2_bias, l2)
    for row in (0, 1, 3):
        rated = slice(offsets[row], offsets[row + 1])
        x = np.column_stack([np.full(counts[row], one), q[others[rated]]])
        wanted = values[rated] - mean - other_bias[others[rated]]
        # Ridge regression as least squares: a row more for each parameter.
        weights = np.sqrt(counts[row] * np.array([l2_bias, l2, l2, l2]))
        solved, *_ = np.linalg.lstsq(np.vstack([x, np.diag(weights)]), np.append(wanted, np.zeros(4)), rcond=None)
        np.testing.assert_allclose([bias[row], *p[row]], solved, atol=2e-5)
    assert bias[2] == before[0] and (p[2] == before[1]).all()


def objective(model, train, l2_bias, l2):
    users, items = train.users, train.items
    b_u, b_i, p, q = (
        table.astype(np.float64) for table in (model.user_bias, model.item_bias, model.users, model.items)
    )
    error = train.values - (float(model.mean) + b_u[users] + b_i[items] + (p[users] * q[items]).sum(1))
    penalty = l2_bias * (b_u[users] ** 2 + b_i[items] ** 2) + l2 * ((p[users] ** 2).sum(1) + (q[items] ** 2).sum(1))
    return float((error**2 + penalty).sum())


@pytest.mark.parametrize("biases", [True, False])
def test_what_als_minimises_never_rises(low_rank, biases):
    train, found = low_rank[0], []

    def look(model, epoch):
        found.append(objective(model, train, 0.02, 0.05))

    model = fit("als", train, l2=0.05, l2_bias=0.02, biases=biases, after_epoch=look)
    assert len(found) == 15 and found[-1] < found[0] / 2
    assert (np.diff(found) <= 1e-5 * np.array(found[:-1])).all(), found
    assert (np.abs(model.user_bias).max() > 0.1) == biases
    assert (np.abs(model.item_bias).max() > 0.1) == biases


def test_biases_alone_are_a_ridge_regression():
    train, l2_bias = some_ratings(20, 15), 0.05
    design = np.zeros((len(train), 20 + 16))
    design[np.arange(len(train)), train.users] = 1
    design[np.arange(len(train)), 20 + train.items] = 1
    counts = np.diag(np.concatenate([train.lengths, train.frequency]))
    centred = train.values - train.values.mean()
    solved = np.linalg.lstsq(design.T @ design + l2_bias * counts, design.T @ centred, rcond=None)[0]
    exact = fit("als", train, dim=0, l2_bias=l2_bias, epochs=60)
    np.testing.assert_allclose(np.concatenate([exact.user_bias, exact.item_bias]), solved, atol=1e-4)
    step = fit("sgd", train, dim=0, l2_bias=l2_bias, epochs=500, decay=0.99)
    np.testing.assert_allclose(np.concatenate([step.user_bias, step.item_bias]), solved, atol=0.01)
    assert np.abs(solved).max() > 0.5


def test_without_biases_the_factors_are_left(low_rank):
    model = fit("sgd", low_rank[0], biases=False)
    assert not model.user_bias.any() and not model.item_bias.any()
    assert rmse(model, *low_rank[1]) < 0.3  # rank 5 then: the dim of 8 holds it


# --- what they find ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_planted_ratings_are_found_up_to_the_noise(low_rank, name):
    train, test = low_rank
    biases = rmse(fit("als", train, dim=0), *test)
    assert biases > 1.4  # the factors' part has a variance of 3
    assert 0.09 < rmse(fit(name, train, l2_bias=0.005), *test) < 0.15  # the noise is .1


@pytest.mark.parametrize("name", ALL)
def test_shuffled_ratings_hold_nothing_beyond_the_biases(low_rank, name):
    (train, (users, items, values)), rng = low_rank, RNG(1)
    shuffled = Interactions(train.offsets, train.items, train.num_items, rng.permutation(train.values))
    test = users, items, rng.permutation(values)
    assert rmse(fit(name, shuffled), *test) > 0.99 * rmse(fit("als", shuffled, dim=0), *test) > 1.5


def test_svdpp_learns_from_what_was_rated_alone():
    """Half of the users pick items of 1 to 20, the others of 21 to 40, and rate them alike, 3. They disagree on 41."""
    rng, rows = RNG(0), []
    for user in range(400):
        side = user % 2
        rows += [(user, item, 3.0) for item in rng.permutation(20)[:8] + 1 + 20 * side]
        if user < 300:
            rows.append((user, 41, 5.0 if side else 1.0))
    users, items, values = (np.array(column) for column in zip(*rows, strict=True))
    train = Interactions.of_pairs(users, items, 400, 42, values)
    asked = np.arange(300, 400)
    test = asked, np.full(100, 41), np.where(asked % 2, 5.0, 1.0)
    assert rmse(fit("svdpp", train, l2=0.1, l2_implicit=0.001), *test) < 0.5
    assert rmse(fit("sgd", train, l2=0.1), *test) > 1.5


@pytest.mark.parametrize(
    ("module", "published"), [(biased_mf, 0.934), (svdpp, 0.920)], ids=["biased_mf", "svdpp"]
)  # means of five folds; this one is the hardest of the official ones
@pytest.mark.skipif(not ML_100K.is_dir(), reason="no MovieLens-100K here; RECSYS_DATA_DIR says where it is")
def test_a_fold_of_movielens_comes_out_as_published(module, published, tell):
    users, items, values, _ = read_ratings(ML_100K / "u1.base")
    asked, wanted, truth, _ = read_ratings(ML_100K / "u1.test")
    model = module.fit(Interactions.of_pairs(users - 1, items, 943, 1683, values))
    found = rmse(model, asked - 1, wanted, truth)
    tell(f"ml-100k, u1, {module.__name__}: RMSE {found:.4f}")
    assert found < published


# --- edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_who_is_not_known_gets_what_is_known(name):
    # User 1 and item 3 have no ratings.
    train = Interactions.of_pairs([0, 0, 2, 2, 2], [1, 2, 1, 2, 4], 3, 5, [5, 4, 2, 1, 3])
    model = fit(name, train, l2_bias=0.1)
    assert (model.users[1] == 0).all() and (model.items[[0, 3]] == 0).all()
    assert (model.user_bias[1], model.item_bias[0], model.item_bias[3]) == (0, 0, 0)
    predicted = model.ratings([-1, -1, 1, 0, 0, 1], [0, 2, 2, 0, 3, 3])
    b_u, b_2 = model.user_bias[0], model.item_bias[2]
    np.testing.assert_allclose(predicted, 3 + np.array([0, b_2, b_2, b_u, b_u, 0]), rtol=1e-6)
    assert min(abs(b_u), abs(b_2)) > 0.01
    both = 3 + b_u + b_2 + model.users[0] @ model.items[2]
    assert model.ratings([0], [2]) == pytest.approx(np.clip(both, 1, 5), rel=1e-5)


def test_ratings_stay_in_the_range_of_training():
    biases = np.array([2, -2], np.float32), np.array([0, 1, -1], np.float32)
    factors = np.ones((2, 1), np.float32), np.array([[0.25], [0], [0]], np.float32)
    model = biased_mf.BiasedMF(3.5, 1, 5, *biases, *factors)
    assert model.ratings([1], [0]).tolist() == [1.5]  # not 1.75: item 0 stands for none
    assert model.ratings([0, 1, 0, 1], [1, 2, 2, 1]).tolist() == [5, 1, 4.5, 2.5]
    assert model.ratings([], []).shape == (0,)
    for users, items in (([2], [1]), ([-2], [1]), ([0], [3]), ([0], [-1])):
        with pytest.raises(IndexError, match="expected"):
            model.ratings(users, items)


@pytest.mark.parametrize("name", ALL)
def test_one_rating_is_enough(name):
    model = fit(name, Interactions.of_pairs([0], [1], 1, 2, [4]))
    assert model.ratings([0, -1], [1, 0]).tolist() == [4, 4]


def test_few_ratings_and_many_factors_need_no_regularisation():
    train = some_ratings()
    model = fit("als", train, dim=20, l2=0.0, l2_bias=0.0)
    assert np.isfinite(model.users).all()
    assert rmse(model, train.users, train.items, train.values) < 0.01


@pytest.mark.parametrize("name", ALL)
def test_a_seed_gives_one_model_and_the_ratings_stay_as_they_were(name):
    train = some_ratings(40, 30)  # its items are in no order, so that sorting them would show
    before = [getattr(train, each).copy() for each in ("offsets", "items", "values")]
    first, again, other = (fit(name, train, seed, epochs=5) for seed in (1, 1, 2))
    for table in ("user_bias", "item_bias", "users", "items"):
        assert (getattr(first, table) == getattr(again, table)).all()
        assert getattr(first, table).dtype == np.float32
    assert (first.users != other.users).any()
    for array, now in zip(before, (train.offsets, train.items, train.values), strict=True):
        assert (array == now).all()


@pytest.mark.parametrize("name", ALL)
def test_training_ends_when_it_is_told_to(name):
    seen, train = [], some_ratings()

    def stop(model, epoch):
        seen.append((epoch, rmse(model, train.users, train.items, train.values)))
        return epoch == 3

    model = fit(name, train, after_epoch=stop)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert seen[2][1] == rmse(model, train.users, train.items, train.values) < seen[0][1]


def test_an_item_that_was_rated_twice_is_one_of_the_user_s_items():
    twice = Interactions.of_pairs([0, 0, 0, 1], [2, 1, 2, 2], 2, 3, [4, 1, 5, 3])
    model = fit("svdpp", twice)
    assert np.isfinite(model.ratings([0, 0], [1, 2])).all()
    assert model.ratings([0], [2]) > model.ratings([0], [1]) + 1


def test_what_cannot_be_fitted_is_refused():
    nothing = np.zeros(0, np.int32)
    for module in (biased_mf, svdpp):
        with pytest.raises(ValueError, match="no ratings"):
            module.fit(Interactions.of_pairs([0], [1], 1, 2))
        with pytest.raises(ValueError, match="no ratings"):
            module.fit(Interactions.of_pairs(nothing, nothing, 1, 2, nothing))
        with pytest.raises(ValueError, match="rating 1, of item 2, is nan"):
            module.fit(Interactions.of_pairs([0, 0], [1, 2], 1, 3, [1, np.nan]))
        with pytest.raises(FloatingPointError, match="take a smaller one"):
            module.fit(some_ratings(), module.Parameters(learning_rate=50.0))
