"""Does LightGCN propagate and learn as its equations say?"""

import numpy as np
import pytest
from planted import hit_rate, taste_of_groups

from recsys_common.interactions import Interactions
from recsys_common.models import lightgcn

RNG = np.random.default_rng


def fit(train, seed=0, after_epoch=None, **settings):
    return lightgcn.fit(train, lightgcn.Parameters(**settings), seed, after_epoch)


def some(num_users=5, num_items=7, seed=0):
    """About a third of all pairs, one of them twice; the last user and the last item have none."""
    users, items = np.nonzero(RNG(seed).random((num_users - 1, num_items - 2)) < 0.4)
    return Interactions.of_pairs(np.append(users, users[0]), np.append(items, items[0]) + 1, num_users, num_items)


def dense_propagation(train, layers):
    """P of equation (2) by dense linear algebra in float64."""
    nodes = train.num_users + train.num_items
    A = np.zeros((nodes, nodes))
    for user, item in zip(train.users, train.items, strict=True):
        A[user, train.num_users + item] = A[train.num_users + item, user] = 1
    degree = np.maximum(A.sum(1), 1)
    A /= np.sqrt(np.outer(degree, degree))
    return sum(np.linalg.matrix_power(A, k) for k in range(layers + 1)) / (layers + 1)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_is_equation_2(layers):
    train = some()
    rows = RNG(1).normal(size=(12, 4)).astype(np.float32)
    expected = dense_propagation(train, layers) @ rows
    found = lightgcn._propagated(lightgcn._graph(train), rows.copy(), layers)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_adam_gets_is_the_gradient_of_equation_4(monkeypatch):
    """The first batch of `fit`, against differences of the loss in float64."""
    train, l2, layers, batch, given = some(), 0.3, 2, [], []
    draw = lightgcn._triples
    monkeypatch.setattr(lightgcn, "_triples", lambda *arguments: batch.append(draw(*arguments)) or batch[-1])
    # One triple is without an item that the user did not take.
    monkeypatch.setattr(lightgcn, "_gradient", _without_last(lightgcn._gradient))
    monkeypatch.setattr(lightgcn, "_adam", lambda rows, *arguments: given.append((rows.copy(), *arguments[:3])))
    fit(train, seed=1, epochs=1, dim=3, layers=layers, l2=l2, negative_power=0.0)
    [(rows, gradient, counts, weight)], [(users, items, others)] = given, batch
    P, rows = dense_propagation(train, layers), rows.astype(np.float64)
    assert len(users) == len(set(zip(train.users.tolist(), train.items.tolist(), strict=True)))

    def loss(rows):
        final, total = P @ rows, 0.0
        for u, i, j in zip(users[:-1], items[:-1], others[:-1], strict=True):
            x = final[u] @ (final[5 + i] - final[5 + j])
            total += np.log(1 + np.exp(-x)) + l2 / 2 * (rows[[u, 5 + i, 5 + j]] ** 2).sum()
        return total / len(users)

    found = gradient + weight * counts[:, None] * rows
    for cell in np.ndindex(rows.shape):
        change = []
        for step in (1e-5, -1e-5):
            other = rows.copy()
            other[cell] += step
            change.append(loss(other))
        assert found[cell] == pytest.approx((change[0] - change[1]) / 2e-5, abs=1e-6), cell
    assert np.abs(found).max() > 0.01


def _without_last(function):
    def changed(final, users, items, others, num_users):
        return function(final, users, items, np.append(others[:-1], 0).astype(np.int32), num_users)

    return changed


def test_updates_are_adam_s():
    random = RNG(3)
    start, gradients = random.normal(size=(4, 3)), random.normal(size=(5, 4, 3))
    counts, l2, rate = np.array([0, 1, 2, 3.0]), 0.1, 0.05
    rows, mean, squares = start.copy(), np.zeros((4, 3)), np.zeros((4, 3))
    found, moments = start.astype(np.float32), np.zeros((2, 4, 3), np.float32)
    for step, gradient in enumerate(gradients, 1):
        lightgcn._adam(
            found,
            gradient.astype(np.float32),
            counts.astype(np.float32),
            np.float32(l2),
            np.float32(rate),
            *moments,
            step,
        )
        g = gradient + l2 * counts[:, None] * rows
        mean, squares = 0.9 * mean + 0.1 * g, 0.999 * squares + 0.001 * g**2
        rows = rows - rate * (mean / (1 - 0.9**step)) / (np.sqrt(squares / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(found, rows, rtol=2e-4, atol=2e-4)


def test_triples_are_pairs_with_an_item_that_the_user_did_not_take(monkeypatch):
    train = some(30, 40, seed=4)
    had = set(zip(train.users.tolist(), train.items.tolist(), strict=True))
    drawn, original = [], lightgcn._triples
    monkeypatch.setattr(lightgcn, "_triples", lambda *given: drawn.append(original(*given)) or drawn[-1])
    fit(train, epochs=3, batch_size=50, dim=4)
    users, items, others = np.concatenate(drawn, 1)
    assert set(zip(users.tolist(), items.tolist(), strict=True)) <= had
    assert not set(zip(users.tolist(), others.tolist(), strict=True)) & had
    assert others.min() > 0
    assert len(users) == 3 * -(-len(had) // 50) * 50  # of each pass as many as there are pairs, or a batch more


@pytest.mark.parametrize("layers", [0, 3])
def test_it_finds_the_taste_of_groups_and_nothing_in_shuffled_items(layers):
    settings = {"dim": 16, "epochs": 40, "batch_size": 1024, "learning_rate": 0.02, "layers": layers}
    users, items, asked = taste_of_groups(400, 8)
    train = Interactions.of_pairs(users, items, 400, 201)
    # The list of 10 from the 13 items of the group that are left: 10/13. From all 188 that are left: 10/188.
    assert hit_rate(fit(train, **settings), train, asked) == pytest.approx(10 / 13, abs=0.09)
    chance = 10 / 188
    train = Interactions.of_pairs(users, RNG(1).permutation(items), 400, 201)
    found = hit_rate(fit(train, **settings), train, asked)
    assert found == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 400))


def test_one_seed_gives_one_model_whatever_the_number_of_threads():
    import numba

    users, items, _ = taste_of_groups(400, 8)
    train, threads = Interactions.of_pairs(users, items, 400, 201), numba.get_num_threads()
    settings = {"dim": 8, "epochs": 3, "batch_size": 1000}
    first, other = fit(train, 4, **settings), fit(train, 5, **settings)
    numba.set_num_threads(1)
    try:
        same = fit(train, 4, **settings)
    finally:
        numba.set_num_threads(threads)
    np.testing.assert_array_equal(first.users, same.users)
    np.testing.assert_array_equal(first.items, same.items)
    assert (first.users != other.users).any()


def test_after_epoch_may_end_it_and_sees_the_model_that_is_returned():
    seen, train = [], some()
    model = fit(train, after_epoch=lambda model, epoch: seen.append((epoch, model)) or epoch == 2, dim=2, epochs=9)
    assert [epoch for epoch, _ in seen] == [1, 2] and seen[-1][1] is model


@pytest.mark.parametrize(
    ("users", "items", "num_users", "num_items"),
    [
        ([0], [1], 1, 2),  # nothing is left that could be the other item
        ([0, 0, 0], [1, 1, 1], 1, 2),  # one pair thrice
        ([1], [2], 4, 6),  # users and items without anything
        ([], [], 3, 4),
    ],
)
def test_edges(users, items, num_users, num_items):
    train = Interactions.of_pairs(np.array(users, int), items, num_users, num_items)
    scores = fit(train, dim=4, epochs=2).scores(train, np.arange(num_users))
    assert (scores.dtype, scores.shape) == (np.float32, (num_users, num_items))
    assert np.isfinite(scores).all()
    assert not scores[sorted(set(range(num_users)) - set(users))].any()
