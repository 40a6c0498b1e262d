"""Do architectures of the config train on plain interactions, and do factors leave by chapter 6's formats?"""

import numpy as np
import pytest
import tensorflow as tf
from planted import hit_rate, taste_of_groups

from recsys_common import fitted, saving
from recsys_common.config import Config
from recsys_common.interactions import Interactions
from recsys_common.models import bpr
from recsys_common.models.matrix_factorization import MatrixFactorization

RNG = np.random.default_rng
HISTORY = {"kind": "history", "column": "history", "length": 3, "table": "item"}
INDEX = {name: {"kind": "index", "column": f"{name}_index"} for name in ("user", "item")}


def config(*settings, architecture="matrix_factorization", **features):
    made = Config(model={"architecture": architecture}, features=INDEX | features)
    return made.override("training.steps_per_execution=7", *settings)


# --- rows -------------------------------------------------------------------------------------------------------


def test_every_interaction_is_a_row_with_what_its_user_had_before():
    users, items = [4, 0, 4, 4, 0, 4, 2], [7, 7, 1, 2, 3, 5, 6]
    train = Interactions.of_pairs(users, items, 5, 8)
    [table] = fitted._tables(train, 3, seed=1)
    rows = [(row["user_index"], row["item_index"], row["history"]) for row in table.to_pylist()]
    expected = [(1, 7, []), (1, 3, [7]), (3, 6, []), (5, 7, []), (5, 1, [7]), (5, 2, [7, 1]), (5, 5, [7, 1, 2])]
    assert sorted(rows) == sorted(expected)
    assert rows != expected, "rows are in the order of users: a file would be no random sample"
    [shorter] = fitted._tables(train, 2, seed=1)
    assert [1, 2] in shorter["history"].to_pylist() and [7, 1, 2] not in shorter["history"].to_pylist()
    [plain] = fitted._tables(train, 0, seed=1)
    assert plain.column_names == ["user_index", "item_index"]


def test_many_rows_are_dealt_out_to_files_and_none_is_lost(monkeypatch):
    random = RNG(2)
    train = Interactions.of_pairs(random.integers(0, 20, 500), random.integers(1, 30, 500), 20, 30)
    monkeypatch.setattr(fitted, "VALUES", 120)
    tables = list(fitted._tables(train, 3, seed=5))
    assert [len(table) for table in tables] == [40] * 12 + [20]
    found = sorted((r["user_index"], r["item_index"]) for table in tables for r in table.to_pylist())
    assert found == sorted(zip((train.users + 1).tolist(), train.items.tolist(), strict=True))


# --- training ---------------------------------------------------------------------------------------------------


def test_it_finds_the_taste_of_groups_and_nothing_in_shuffled_items():
    users, items, asked = taste_of_groups(160, 4)
    settings = "training.epochs=10", "training.batch_size=160", "model.embedding_dim=16", "optimizer.learning_rate=0.03"
    train = Interactions.of_pairs(users, items, 160, 101)
    rates = []
    model = fitted.fit(config(*settings), train, 1, lambda model, _: rates.append(hit_rate(model, train, asked)))
    assert len(rates) == 10 and rates[0] < rates[-1] == hit_rate(model, train, asked)
    assert rates[-1] == pytest.approx(10 / 13, abs=0.12)  # the list of 10 from the 13 items of the group that are left
    train, chance = Interactions.of_pairs(users, RNG(1).permutation(items), 160, 101), 10 / 88
    found = hit_rate(fitted.fit(config(*settings), train, 1), train, asked)
    assert found == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 160))


def test_scores_are_those_of_the_rows_of_the_tables():
    users, items, _ = taste_of_groups(160, 4)
    train = Interactions.of_pairs(users + 1, items, 162, 101)  # users 0 and 161 have nothing
    model = fitted.fit(config("training.epochs=1"), train)
    p, q, b = (np.asarray(t) for t in (model.model.user_table, model.model.item_table, model.model.item_bias))
    assert (p.shape, q.shape) == ((163, 32), (101, 32))
    found = model.scores(train, np.array([5, 0, 161, 160]))
    np.testing.assert_allclose(found, p[[6, 0, 0, 161]] @ q.T + b.T, rtol=1e-5, atol=1e-6)
    touched = np.abs(p) > 0.05  # initial rows are uniform in -.05 to .05
    assert not touched[[0, 1, 162]].any() and touched[2:162].any(1).mean() > 0.9
    assert not model.folds_in


def test_one_seed_gives_one_model_and_after_epoch_may_end_it():
    users, items, _ = taste_of_groups(160, 4)
    train, rows, epochs = Interactions.of_pairs(users, items, 160, 101), np.arange(160), []

    def scores(*settings):
        stop = lambda model, epoch: epochs.append(epoch) or epoch == 2  # noqa: E731
        return fitted.fit(config("training.epochs=9", *settings), train, 4, stop).scores(train, rows)

    np.testing.assert_array_equal(scores(), scores("seed=9"))  # the argument, not the config, says the seed
    assert epochs == [1, 2] * 2


def test_a_history_is_what_the_user_was_seen_to_have():
    users, items, _ = taste_of_groups(160, 4)
    train = Interactions.of_pairs(users, items, 160, 101)
    own = config("training.epochs=1", "model.hidden=[8]", architecture="two_tower", history=HISTORY)
    model = fitted.fit(own, train)
    seen = Interactions.of_pairs([0, 0, 0, 0, 2], [9, 8, 7, 6, 5], 160, 101)
    found = model.scores(seen, np.array([2, 0, 1]))
    batch = {"user": [3, 1, 2], "history": [[0, 0, 5], [8, 7, 6], [0, 0, 0]], "history_length": [1, 3, 0]}
    expected = model.model.scores({name: tf.constant(column, tf.int32) for name, column in batch.items()})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (np.abs(found - model.scores(train, np.array([2, 0, 1]))).max(1) > 1e-3).all()


def test_items_of_one_bucket_have_one_score_and_no_item_is_lost():
    users, items, _ = taste_of_groups(160, 4)
    train = Interactions.of_pairs(users, items, 160, 101)
    # As many buckets as there are items, but in another order, and some items share one.
    hashed = {"kind": "hash", "column": "item_index", "rows": 101}
    model = fitted.fit(config("training.epochs=1", item=hashed), train)
    raw = {"item_index": tf.range(101, dtype=tf.int64), "user_index": tf.zeros([101], tf.int32)}
    rows = model.config.transform()(raw)["item"].numpy()
    found, of_bucket = model.scores(train, [3]), model.model.scores(np.array([4]))
    assert of_bucket.shape == (1, 101) and len(np.unique(rows)) < 101
    np.testing.assert_array_equal(found, of_bucket[:, rows])
    frequency = np.bincount(rows, train.frequency, 101)
    np.testing.assert_allclose(model.model.sampling_probability, np.maximum(frequency, 1) / 1920, rtol=1e-6)


def test_fewer_rows_than_a_batch_are_one_batch():
    train = Interactions.of_pairs([1, 1, 1], [2, 2, 2], 4, 6)
    scores = fitted.fit(config("training.epochs=2"), train).scores(train, np.arange(4))
    assert (scores.dtype, scores.shape) == (np.float32, (4, 6)) and np.isfinite(scores).all()


def test_what_plain_interactions_do_not_have_is_refused():
    train = Interactions.of_pairs([0], [1], 1, 2)
    rating = {"kind": "label", "column": "rating"}
    with pytest.raises(ValueError, match=r"features\.rating: found column 'rating', kind label"):
        fitted.fit(config(rating=rating), train)
    with pytest.raises(ValueError, match="none has the column item_index; there are other"):
        fitted.fit(Config(features={"other": INDEX["user"]}), train)


def test_a_loss_that_is_not_finite_ends_it():
    users, items, _ = taste_of_groups(160, 4)
    train = Interactions.of_pairs(users, items, 160, 101)
    with pytest.raises(FloatingPointError, match="the loss of epoch 2 is not finite"):
        far = config("training.epochs=3", "training.batch_size=1920", "optimizer.learning_rate=1e30")
        fitted.fit(far, train)


# --- leaving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
def test_factors_leave_as_saved_model_onnx_and_index(tmp_path, with_bias):
    """Trained factors, exported, loaded, and asked by raw ids: the lists are NumPy's."""
    users, items, _ = taste_of_groups(160, 4)
    train = Interactions.of_pairs(users, items, 160, 101)
    own = bpr.fit(train, bpr.Parameters(dim=8, epochs=3, bias=with_bias), seed=2)
    bias = {"item_bias": own.item_bias} if with_bias else {}
    user_ids, item_ids = RNG(3).permutation(10_000)[:160], RNG(4).permutation(10_000)[:100]
    model = MatrixFactorization.of_factors(own.users, own.items, **bias)
    np.testing.assert_allclose(model.scores(np.arange(1, 161)), own.scores(train, np.arange(160)), rtol=1e-5, atol=1e-6)
    parts = {} if with_bias else {"onnx": False, "index": False}
    saving.export(tmp_path / "model", model, {"user_index": user_ids, "item_index": item_ids}, **parts)
    recommend = saving.load(tmp_path / "model").signatures["recommend"]
    asked = np.array([7, 0, 159])
    scores = own.scores(train, asked)
    seen = np.array([train.history(row) for row in asked])
    np.put_along_axis(scores, seen, -np.inf, 1)
    scores[:, 0] = -np.inf
    best = np.argsort(-scores, 1, kind="stable")[:, :5]
    found = recommend(
        user_id=tf.constant(user_ids[asked]), k=tf.constant(5), seen_item_id=tf.constant(item_ids[seen - 1])
    )
    np.testing.assert_array_equal(found["item_id"], item_ids[best - 1])
    np.testing.assert_allclose(found["score"], np.take_along_axis(scores, best, 1), rtol=1e-5, atol=1e-6)
    # An unknown user is scored as users are on average.
    stranger = recommend(
        user_id=tf.constant([-5], tf.int64), k=tf.constant(3), seen_item_id=tf.zeros([1, 0], tf.int64) - 1
    )
    mean = own.scores(train, np.arange(160)).mean(0)
    np.testing.assert_array_equal(stranger["item_id"][0], item_ids[np.argsort(-mean[1:], kind="stable")[:3]])
    if with_bias:
        assert (tmp_path / "model/onnx").is_dir() and (tmp_path / "model/items/index.usearch").is_file()


def test_long_tables_of_factors_are_written_in_slices(monkeypatch):
    from recsys_common.models import matrix_factorization

    monkeypatch.setattr(matrix_factorization, "SLICE", 4)
    random = RNG(6)
    users, items = (random.normal(size=(rows, 3)).astype(np.float32) for rows in (9, 11))
    model = MatrixFactorization.of_factors(users, items)
    np.testing.assert_allclose(model.user_table.numpy(), np.concatenate([users.mean(0)[None], users]), rtol=1e-6)
    np.testing.assert_array_equal(model.item_table.numpy(), items)
    assert not model.item_bias.numpy().any()


@pytest.mark.parametrize(
    ("users", "items", "bias"),
    [((0, 3), (4, 3), 4), ((5,), (4, 3), 4), ((5, 3), (4, 2), 4), ((5, 3), (4, 3), 3), ((5, 3), (4, 3), (4, 1))],
)
def test_factors_that_do_not_fit_together_are_refused(users, items, bias):
    with pytest.raises(ValueError, match=r"expected \[U, dim\], \[I, dim\] and \[I\]"):
        MatrixFactorization.of_factors(np.zeros(users), np.zeros(items), np.zeros(bias))
