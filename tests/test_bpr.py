"""Does BPR make the steps of its equations, and find what is there to be found?"""

import numpy as np
import pytest
from planted import hit_rate, taste_of_groups

from recsys_common.interactions import Interactions
from recsys_common.models import bpr

RNG = np.random.default_rng


def fit(train, seed=0, after_epoch=None, **settings):
    return bpr.fit(train, bpr.Parameters(**settings), seed, after_epoch)


def copies(model):
    return model.users.copy(), model.items.copy(), model.item_bias.copy()


def objective(p, q, b, l2):
    """-ln sigmoid of the triple (user 0, item 1, item 2), and the penalty of its rows, by hand in float64."""
    x = sum(p[0, d] * (q[1, d] - q[2, d]) for d in range(len(p[0]))) + b[1] - b[2]
    penalty = l2[0] * (p[0] ** 2).sum() + l2[1] * (q[1] ** 2).sum() + l2[2] * (q[2] ** 2).sum()
    return np.log(1 + np.exp(-x)) + (penalty + l2[3] * (b[1] ** 2 + b[2] ** 2)) / 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_the_gradient_of_the_objective(bias):
    """One pair and two items: each pass is one step of the one triple that there is."""
    l2, rate, after = (0.3, 0.2, 0.1, 0.4), 0.5, []
    train = Interactions.of_pairs([0], [1], num_users=1, num_items=3)
    names = dict(zip(("l2_user", "l2_positive", "l2_negative", "l2_bias"), l2, strict=True))
    settings = {"dim": 5, "epochs": 2, "learning_rate": rate, "decay": 1.0, "bias": bias, **names}
    fit(train, seed=3, after_epoch=lambda model, _: after.append(copies(model)), **settings)
    before, now = ([each.astype(np.float64) for each in state] for state in after[-2:])
    moved = [(old - new) / rate for old, new in zip(before, now, strict=True)]
    for number, table in enumerate(before):
        for cell in np.ndindex(table.shape):
            change = []
            for step in (1e-6, -1e-6):
                other = [each.copy() for each in before]
                other[number][cell] += step
                change.append(objective(*other, l2))
            slope = (change[0] - change[1]) / 2e-6 if bias or number < 2 else 0.0
            assert moved[number][cell] == pytest.approx(slope, abs=2e-5), (number, cell)
    assert all(np.abs(each).max() > 0.01 for each in moved[: 2 + bias])  # the steps are not of zeros


def test_the_rate_falls_by_decay_after_each_pass():
    states = {}
    train = Interactions.of_pairs([0], [1], num_users=1, num_items=3)
    for decay in (1.0, 0.5):
        found = states[decay] = []
        fit(train, after_epoch=lambda model, _, to=found: to.append(copies(model)), decay=decay, epochs=2, dim=4)
    np.testing.assert_array_equal(states[1.0][0][0], states[0.5][0][0])
    step, half = (states[decay][1][0] - states[decay][0][0] for decay in (1.0, 0.5))
    np.testing.assert_allclose(half, step / 2, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_negatives_are_drawn_by_their_share_and_never_of_the_user_s_own(power):
    """Items 1 to 9 were taken 100 times each, 10 to 19 once, the others, 20 to 99, never: which counts as once."""
    random = RNG(1)
    items = np.concatenate([np.repeat(np.arange(1, 10), 100), np.arange(10, 20)])
    own = np.array([4, 9, 15])  # of user 1; the others are user 0's
    train = Interactions.of_pairs(np.isin(items, own).astype(int), items, 2, 100)
    draws = bpr.draws(train, power)
    drawn = np.array([bpr.other(1, own, *draws, random) for _ in range(20_000)])
    assert not np.isin(drawn, [0, *own]).any()
    share = np.where(np.arange(100) < 10, 100.0, 1.0) ** power
    share[[0, *own]] = 0
    expected = share / share.sum() * len(drawn)
    counts = np.bincount(drawn, minlength=100)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_every_pair_is_marked():
    random, size = RNG(2), 3000
    users, items = random.integers(0, 500, size), random.integers(1, 90_000, size)
    train = Interactions.of_pairs(users, items, 500, 90_000)
    marks = bpr.draws(train, 0)[2]
    for user, item in zip(train.users[:500], train.items[:500], strict=True):
        assert marks[bpr._mark.py_func(int(user), int(item), len(marks))]
        assert marks[bpr._mark(np.int64(user), np.int64(item), len(marks))]
    assert marks.mean() < 0.15  # or they would spare no search


def test_it_finds_the_taste_of_groups_and_nothing_in_shuffled_items():
    users, items, asked = taste_of_groups(400, 8)
    train = Interactions.of_pairs(users, items, 400, 201)
    # The list of 10 from the 13 items of the group that are left: 10/13. From all 188 that are left: 10/188.
    assert hit_rate(fit(train, dim=16, epochs=30), train, asked) == pytest.approx(10 / 13, abs=0.09)
    chance = 10 / 188
    train = Interactions.of_pairs(users, RNG(1).permutation(items), 400, 201)
    model = fit(train, dim=16, epochs=30)
    assert hit_rate(model, train, asked) == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 400))


def test_one_seed_gives_one_model():
    users, items, _ = taste_of_groups(400, 8)
    train = Interactions.of_pairs(users, items, 400, 201)
    first, same, other = (copies(fit(train, seed, dim=8, epochs=3)) for seed in (4, 4, 5))
    for table, again, different in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(table, again)
        assert (table != different).any()


def test_after_epoch_may_end_it():
    epochs = []
    train = Interactions.of_pairs([0, 1], [1, 2], 2, 3)
    fit(train, after_epoch=lambda model, epoch: epochs.append(epoch) or epoch == 3, dim=2, epochs=9)
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize(
    ("users", "items", "num_users", "num_items"),
    [
        ([0], [1], 1, 2),  # nothing is left that could be the other item
        ([0, 0, 0], [1, 1, 1], 1, 2),  # one pair thrice
        ([1], [2], 4, 6),  # users and items without anything
        ([], [], 3, 4),
    ],
)
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_edges(users, items, num_users, num_items, power):
    train = Interactions.of_pairs(np.array(users, int), items, num_users, num_items)
    model = fit(train, dim=4, epochs=2, negative_power=power)
    scores = model.scores(train, np.arange(num_users))
    assert (scores.dtype, scores.shape) == (np.float32, (num_users, num_items))
    assert np.isfinite(scores).all()
    for user in set(range(num_users)) - set(users):
        np.testing.assert_array_equal(scores[user], model.item_bias)
