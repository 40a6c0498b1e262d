"""Does the matrix factorization learn what its equations say?"""

import math
import re

import numpy as np
import pytest
import tensorflow as tf
from planted import taste_of_groups

from recsys_common import evaluation, training
from recsys_common.models.matrix_factorization import MatrixFactorization

Adagrad = tf.keras.optimizers.Adagrad


def batch(users, items):
    return {"user_index": tf.constant(users, tf.int32), "item_index": tf.constant(items, tf.int32)}


def dataset(users, items, size):
    """Batches of `size` rows in the order given."""
    columns = {"user_index": np.asarray(users, np.int32), "item_index": np.asarray(items, np.int32)}
    return tf.data.Dataset.from_tensor_slices(columns).batch(size, drop_remainder=True)


def tables(model):
    """Copies of p [users, dim], q [items, dim] and b [items]."""
    p, q, b = (table.numpy().copy() for table in (model.user_table, model.item_table, model.item_bias))
    return p, q, b[:, 0]


def with_tables(num_users, num_items, dim=4, seed=0, scale=1.0, **more):
    """A model whose tables, bias too, hold numbers large enough to matter."""
    model = MatrixFactorization(num_users, num_items, dim, seed=seed, **more)
    random = np.random.default_rng(seed)
    for table in (model.user_table, model.item_table, model.item_bias):
        table.assign(scale * random.normal(size=table.shape))
    return model


# --- the equations ----------------------------------------------------------------------------------------------


def test_scores_are_equation_1():
    model = with_tables(7, 9)
    p, q, b = tables(model)
    users = np.array([3, 0, 6, 3])
    scores = model.scores(users)
    assert (scores.dtype, scores.shape) == (np.float32, (4, 9))
    by_hand = [[sum(p[u, d] * q[i, d] for d in range(4)) + b[i] for i in range(9)] for u in users]
    np.testing.assert_allclose(scores, by_hand, rtol=1e-5, atol=1e-6)


def loss_by_hand(p, q, b, users, items, frequency):
    """Equation (2) in float64, row by row; another pair of the same item is no negative (an accidental hit)."""
    p, q, b = (np.asarray(table, np.float64) for table in (p, q, b))
    log_q = np.zeros(len(b))
    if frequency is not None:
        log_q = np.log(np.maximum(frequency, 1) / np.sum(frequency))
    total = 0.0
    for row, (user, item) in enumerate(zip(users, items, strict=True)):
        logit = {other: p[user] @ q[j] + b[j] - log_q[j] for other, j in enumerate(items) if other == row or j != item}
        total -= logit[row] - math.log(sum(math.exp(value) for value in logit.values()))
    return total


@pytest.mark.parametrize(
    ("items", "frequency"),
    [
        ([1, 2, 3, 4, 5, 6], None),
        ([1, 2, 1, 1, 5, 2], None),  # accidental hits
        ([1, 2, 3, 4, 5, 6], [0, 500, 300, 100, 60, 30, 10, 0]),
        ([1, 2, 1, 7, 5, 2], [0, 500, 300, 100, 60, 30, 10, 0]),  # 7 was never counted
        ([1, 2, 1, 3, 4, 5], [0, 9e8, 1e8, 300, 30, 3, 1, 1]),  # shares down to 3e-9
        ([4, 4, 4, 4, 4, 4], [0, 1, 1, 1, 1, 1, 1, 1]),  # nothing to choose from
    ],
)
def test_the_loss_is_equation_2(items, frequency):
    model = with_tables(5, 8, item_frequency=frequency)
    users = [0, 4, 2, 2, 1, 3]
    loss = float(model.compute_loss(batch(users, items), training=True))
    assert loss == pytest.approx(loss_by_hand(*tables(model), users, items, frequency), rel=1e-5, abs=1e-5)


def test_log_q_makes_the_scores_the_log_of_what_users_choose():
    """Three items with Q = .6, .175, .225 and two users who choose among them at known rates.

    In batches of two rows the optimum is known: with the correction s(u, i) = log P(i|u), without it log P(i|u) -
    log Q(i), both up to a constant for each user. The expectation over all batches is minimised, so nothing is left
    to chance. (In larger batches the rule is only near: the positive is not drawn as the negatives are, but given.)
    """
    chosen = np.array([[0.8, 0.15, 0.05], [0.4, 0.2, 0.4]])  # P(i | u), both users equally often
    popularity = chosen.mean(0)
    cells = [(user, item, chosen[user, item] / 2) for user in range(2) for item in range(3)]
    # Two rows of the same item choose between nothing and cost nothing.
    draws = [
        (batch([u + 1, v + 1], [i + 1, j + 1]), 2 * a * b)
        for n, (u, i, a) in enumerate(cells)
        for v, j, b in cells[n:]
        if i != j
    ]

    def learned(frequency):
        model = MatrixFactorization(3, 4, dim=2, item_frequency=frequency, seed=1)
        optimizer = tf.keras.optimizers.Adam(0.05)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.add_n([weight * model.compute_loss(draw) for draw, weight in draws])
            variables = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        for _ in range(400):
            step()
        return centred(model.scores(np.array([1, 2]))[:, 1:])

    def centred(scores):
        return scores - scores.mean(1, keepdims=True)

    truth = np.log(chosen)
    np.testing.assert_allclose(learned([0, *(1000 * popularity)]), centred(truth), atol=0.02)
    np.testing.assert_allclose(learned(None), centred(truth - np.log(popularity)), atol=0.02)


# --- the tables -------------------------------------------------------------------------------------------------


def test_a_batch_updates_only_the_rows_that_it_touched():
    model = MatrixFactorization(1000, 1000, 8, item_frequency=np.arange(1000), seed=3)
    model.compile(optimizer=Adagrad(0.1))
    before = tables(model)
    users, items = [1, 999, 17, 17, 500, 2], [5, 6, 7, 5, 998, 40]
    model.fit(dataset(users, items, 6), epochs=2, verbose=0)
    for old, new, touched in zip(before, tables(model), (users, items, items), strict=True):
        changed = (old != new).reshape(1000, -1)
        assert set(np.flatnonzero(changed.any(1)).tolist()) == set(touched)
        assert changed[touched].all()


def test_one_seed_gives_one_model():
    first, same, other = (tables(MatrixFactorization(50, 60, 8, seed=seed)) for seed in (4, 4, 5))
    for table, again in zip(first, same, strict=True):
        np.testing.assert_array_equal(table, again)
    for table in (0, 1):
        assert (first[table] != other[table]).mean() > 0.99
        assert 0.02 < first[table].std() < 0.05  # uniform in +-0.05: 0.029
    assert not np.array_equal(first[0][:50], first[1][:50]), "users and items start with the same rows"
    assert (first[2] == 0).all()


@pytest.mark.parametrize("frequency", [np.ones(5), np.ones(7), np.ones((6, 1)), 1.0])
def test_item_frequency_of_another_shape_is_refused(frequency):
    message = re.escape(f"item_frequency has shape {np.shape(frequency)}, expected (6,)")
    with pytest.raises(ValueError, match=message):
        MatrixFactorization(4, 6, item_frequency=frequency)


# --- does it learn? ---------------------------------------------------------------------------------------------


def test_it_overfits_one_batch():
    users, items = list(range(1, 9)), [8, 7, 6, 5, 4, 3, 2, 1]
    model = MatrixFactorization(9, 9, 8, item_frequency=np.ones(9))
    model.compile(optimizer=Adagrad(0.5))
    losses = training.fit(model, dataset(users, items, 8).repeat(), epochs=5, steps_per_epoch=30, batch_size=8)
    untrained = with_tables(9, 9, scale=0).compute_loss(batch(users, items))
    assert float(untrained) == pytest.approx(8 * math.log(8))
    assert losses[-1] < 0.02 * float(untrained)
    assert model.scores(np.array(users)).argmax(1).tolist() == items


def test_it_finds_the_taste_of_groups_and_nothing_in_shuffled_labels():
    random = np.random.default_rng(0)
    users, items, asked = taste_of_groups(400, 8)
    rows = np.stack([users, items])[:, random.permutation(len(users))]

    def hit_rate(items):
        model = MatrixFactorization(400, 201, 16, item_frequency=np.bincount(items, minlength=201))
        model.compile(optimizer=Adagrad(0.3))
        data = dataset(rows[0], items, 160).repeat()
        training.fit(model, data, epochs=6, steps_per_epoch=30, batch_size=160)
        return evaluation.evaluate(model.scores, np.arange(400), asked, *rows, num_items=201, k=10)["HR@10"]

    # The list of 10 from the 13 items of the group that are left: 10/13. From all 188 that are left: 10/188.
    assert hit_rate(rows[1]) == pytest.approx(10 / 13, abs=0.09)
    chance = 10 / 188
    assert hit_rate(random.permutation(rows[1])) == pytest.approx(
        chance, abs=4 * math.sqrt(chance * (1 - chance) / 400)
    )


# --- training.py ------------------------------------------------------------------------------------------------


def test_fit_returns_the_loss_of_the_last_batch_of_each_epoch():
    model = with_tables(20, 20, scale=0.3)
    model.compile(optimizer=Adagrad(0.0))  # nothing moves, so the losses can be computed afterwards
    random = np.random.default_rng(2)
    users, items = random.integers(0, 20, 48), random.integers(0, 20, 48)
    losses = training.fit(model, dataset(users, items, 8), epochs=2, steps_per_epoch=3, batch_size=8)
    last = [loss_by_hand(*tables(model), users[at : at + 8], items[at : at + 8], None) for at in (16, 40)]
    assert losses == pytest.approx(last, rel=1e-5)
    assert all(type(loss) is float for loss in losses)


def test_a_loss_that_is_not_finite_is_an_error_with_its_epoch():
    model = with_tables(9, 9)
    model.compile(optimizer=Adagrad(1e38))  # the first step's loss is still that of the initial tables
    data = dataset(range(1, 9), range(1, 9), 8).repeat()
    with pytest.raises(FloatingPointError, match=r"the loss of epoch 2 is (nan|inf).*smaller learning rate"):
        training.fit(model, data, epochs=3, steps_per_epoch=1, batch_size=8)


def test_a_damaged_file_is_an_error_that_says_how_to_find_it(tmp_path):
    path = tmp_path / "rows"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for _ in range(64):
            writer.write(b"\1\0\0\0\1\0\0\0")
    path.write_bytes(path.read_bytes()[:-7])
    pairs = tf.data.TFRecordDataset(str(path)).map(lambda record: tf.io.decode_raw(record, tf.int32))
    data = pairs.batch(8, drop_remainder=True).map(lambda rows: {"user_index": rows[:, 0], "item_index": rows[:, 1]})
    model = with_tables(2, 2)
    model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
    with pytest.raises(tf.errors.DataLossError) as error:
        training.fit(model, data, epochs=1, steps_per_epoch=8, batch_size=8)
    assert "record_batches.verify" in error.value.__notes__[0]


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_progress_goes_to_stderr_and_can_be_silenced(monkeypatch, capfd, steps_per_execution):
    model = with_tables(9, 9)
    model.compile(optimizer=Adagrad(0.1), steps_per_execution=steps_per_execution)
    data = dataset(range(1, 9), range(1, 9), 8).repeat()

    def told(wanted):
        monkeypatch.setenv("RECSYS_PROGRESS", wanted)
        training.fit(model, data, epochs=2, steps_per_epoch=4, batch_size=8)
        return capfd.readouterr()

    told("0")  # TensorFlow's own words about the first trace
    assert tuple(told("0")) == ("", "")
    out, err = told("1")
    assert out == ""
    last = err.rstrip().rsplit("\r", 1)[-1]
    assert re.match(r"training: 100%.* 64\.0/64\.0 \[.*row/s, epoch 2, loss \d", last), last


def test_seconds_per_step_does_not_end_with_the_data():
    model = with_tables(9, 9)
    model.compile(optimizer=Adagrad(0.1))
    before = tables(model)[0]
    one_batch = dataset(range(1, 9), range(1, 9), 8)
    seconds = training.seconds_per_step(model, one_batch, steps=4, warm_up=2)
    assert type(seconds) is float and 0 < seconds < 5
    assert (tables(model)[0] != before).any(), "no step was made"
    assert int(model.optimizer.iterations) == 6
