"""Ids to rows: each function against NumPy, SQL or a distribution, and whether all of it leaves Python.

The statistical tests draw from fixed keys, so they pass or fail for good. Their bound is 4.5 standard deviations of
chi-square (Wilson and Hilferty's approximation): by chance, 3 in a million exceed it.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from test_sql import EDGES, put

from recsys_common import bigquery
from recsys_common.features import (
    fingerprint_bucket,
    hash_bucket,
    log_q,
    negative_sampler,
    pad_histories,
    vocabulary,
)
from recsys_common.models.matrix_factorization import MatrixFactorization


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        yield connected


def deviations(counts: np.ndarray, expected: np.ndarray) -> float:
    """By how many standard deviations chi-square exceeds its mean."""
    degrees = len(counts) - 1
    ratio = ((counts - expected) ** 2 / expected).sum() / degrees
    return float((ratio ** (1 / 3) - 1 + 2 / 9 / degrees) / (2 / 9 / degrees) ** 0.5)


def frequencies(items: int, seed: int) -> np.ndarray:
    """A long tail, in no order, with a share of zeros."""
    counts = 100_000 // np.arange(1, items + 1)
    counts[items * 4 // 5 :] = 0
    return np.random.default_rng(seed).permutation(counts)


# Hashing -----------------------------------------------------------------------------------------------


def farmhash(values: np.ndarray) -> np.ndarray:
    """Fingerprint64 of 8 bytes, by Google's farmhash.cc (HashLen0to16)."""
    rotated = lambda x, by: (x >> np.uint64(by)) | (x << np.uint64(64 - by))  # noqa: E731
    k2 = np.uint64(0x9AE16A3B2F90404F)
    with np.errstate(over="ignore"):
        mul = k2 + np.uint64(16)
        a, b = values + k2, values
        c, d = rotated(b, 37) * mul + a, (rotated(a, 25) + b) * mul
        a = (c ^ d) * mul
        b = (d ^ a ^ (a >> np.uint64(47))) * mul
        return (b ^ (b >> np.uint64(47))) * mul


@pytest.mark.parametrize("buckets", [1, 2, 1000, 2**20, 2**31 - 1])
def test_hash_bucket_is_farmhash_of_the_bytes(buckets):
    ids = np.r_[EDGES, np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 1000)]
    salt = farmhash(np.frombuffer(b"item_ids", np.uint64))
    upper = farmhash(ids.astype(np.uint64) ^ salt) >> np.uint64(32)
    expected = [int(x) * buckets >> 32 for x in upper]
    found = hash_bucket(tf.constant(ids), buckets, "item_ids")
    assert found.dtype == tf.int32 and found.numpy().tolist() == expected


def patterns() -> dict[str, np.ndarray]:
    """50,000 ids each, of shapes that weak hashes stumble over."""
    k, random = np.arange(50_000), np.random.default_rng(2)
    starts = random.integers(0, 2**40, 100)[:, None]
    ids = {"sequential": k, "negative": -1 - k, "random": random.integers(-(2**63), 2**63 - 1, 50_000)}
    ids |= {f"multiples of 2^{bits}": k << bits for bits in (1, 8, 16, 32, 47)}
    ids |= {"multiples of 1000": k * 1000, "runs": (starts + np.arange(500)).ravel()}
    ids |= {"grid of 2^16": ((k // 250) << 16) + k % 250, "grid of 2^32": ((k // 250) << 32) + k % 250}
    return ids | {"both halves alike": k * (2**32 + 1), "snowflakes": ((k // 4) << 22) + ((k % 4) << 12)}


def test_buckets_fill_as_by_chance_whatever_the_pattern_of_ids():
    worst = {}
    for (pattern, ids), buckets in itertools.product(patterns().items(), [16, 1000, 1024, 10_007]):
        counts = np.bincount(hash_bucket(tf.constant(ids), buckets, "item").numpy(), minlength=buckets)
        worst[pattern, buckets] = deviations(counts, np.full(buckets, len(ids) / buckets))
    assert max(worst.values()) < 4.5, worst
    # Evener than chance is no randomness either: the mean of 56 deviations has a standard deviation of 0.13.
    assert abs(np.mean(list(worst.values()))) < 4.5 * len(worst) ** -0.5


def test_features_do_not_collide_alike():
    ids = tf.range(4000, dtype=tf.int64)
    one, other = (hash_bucket(ids, 64, name).numpy() for name in ("user", "item"))
    counts = np.bincount(one * 64 + other, minlength=4096)
    assert deviations(counts, np.full(4096, 4000 / 4096)) < 4.5  # all pairs of buckets as often
    assert abs((one == other).mean() - 1 / 64) < 4.5 * (1 / 64 / 4000) ** 0.5


def test_hash_bucket_takes_any_shape_and_kind_of_integer():
    expected = hash_bucket([5, 6, 7, 8], 1000, "item").numpy()
    for kind in (tf.int8, tf.uint16, tf.int32, tf.uint64):
        assert (hash_bucket(tf.constant([[5, 6], [7, 8]], kind), 1000, "item") == expected.reshape(2, 2)).numpy().all()
    assert hash_bucket(5, 1000, "item").numpy() == expected[0]
    assert hash_bucket(tf.zeros([0, 3], tf.int64), 1000, "item").shape == [0, 3]


def test_what_no_hash_can_take():
    for buckets in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"'item': {buckets} buckets, expected 1 to"):
            hash_bucket([5], buckets, "item")
    for function in (hash_bucket, fingerprint_bucket):
        with pytest.raises(TypeError, match="ids are integers"):
            function([5.0], 10, "item")
    with pytest.raises(TypeError, match="take fingerprint_bucket"):
        hash_bucket(["gold"], 10, "item")
    with pytest.raises(ValueError, match="0 less than minimum 1"):
        tf.data.Dataset.range(3).map(lambda x: fingerprint_bucket(x, 0, "item"))


def test_hash_bucket_is_bigquerys(warehouse):
    """By the SQL in the docstring.

    The embedded service fingerprints strings only. So the ids are such that their salted bytes are ASCII, and so a
    string; that the other bytes count likewise is known from `farmhash` above.
    """
    octets = np.random.default_rng(4).integers(1, 128, [300, 8])
    salted = octets @ (1 << np.arange(0, 64, 8))
    salt = warehouse.query("SELECT FARM_FINGERPRINT('user') AS salt").to_pylist()[0]["salt"]
    ids = (salted ^ salt).tolist()
    points = ", ".join(f"(v >> {bits}) & 255" for bits in range(0, 64, 8))
    v_bytes = f"SAFE_CONVERT_BYTES_TO_STRING(CODE_POINTS_TO_BYTES([{points}]))"
    for buckets in (1, 1000, 2**31 - 1):
        found = warehouse.query(
            f"SELECT id, ((FARM_FINGERPRINT({v_bytes}) >> 32) & 0xffffffff) * @n >> 32 AS bucket "
            "FROM (SELECT id, id ^ FARM_FINGERPRINT('user') AS v FROM UNNEST(@ids) AS id)",
            ids=ids, n=buckets,
        )  # fmt: skip
        found = {row["id"]: row["bucket"] for row in found.to_pylist()}
        assert [found[i] for i in ids] == hash_bucket(ids, buckets, "user").numpy().tolist()


@pytest.mark.parametrize("buckets", [1, 1000, 2**31, 2**31 + 1, 2**62])
def test_fingerprint_bucket_is_that_of_hashed_ids(warehouse, buckets):
    ids = np.r_[EDGES, np.random.default_rng(5).integers(-(2**63), 2**63 - 1, 100)]
    same = {"rating": np.zeros(len(ids)), "timestamp": np.arange(len(ids)), "split": ["train"] * len(ids)}
    put(warehouse, "split_ratings", {"user_id": ids, "item_id": ids[::-1]} | same)
    warehouse.run("hashed_ids.sql", user_buckets=buckets, item_buckets=7)
    rows = warehouse.query("SELECT user_bucket, item_bucket FROM hashed_examples ORDER BY timestamp").to_pylist()
    users = fingerprint_bucket(ids.reshape(-1, 1), buckets, "user")
    assert users.shape == [len(ids), 1] and users.dtype == (tf.int32 if buckets <= 2**31 else tf.int64)
    assert users.numpy()[:, 0].tolist() == [row["user_bucket"] for row in rows]
    assert fingerprint_bucket(ids[::-1], 7, "item").numpy().tolist() == [row["item_bucket"] for row in rows]
    strings = [str(i) for i in ids]
    assert (fingerprint_bucket(strings, buckets, "user").numpy() == users.numpy()[:, 0]).all()
    assert (fingerprint_bucket([f"user{i}" for i in ids], buckets, "").numpy() == users.numpy()[:, 0]).all()


# Vocabulary --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oov_buckets", [1, 5])
def test_vocabulary_numbers_as_the_sql_does(warehouse, oov_buckets):
    """Users lie densely, and are looked up directly; items are spread over all integers, and are searched for."""
    random = np.random.default_rng(6)
    users, items = random.integers(-50, 50, 600), random.choice(random.integers(-(2**63), 2**63 - 1, 90), 600)
    put(warehouse, "split_ratings", {"user_id": users, "item_id": items, "split": random.choice(["train", "x"], 600)})
    warehouse.run("vocabularies.sql", oov_buckets=oov_buckets, minimum_frequency=4, pieces=3)
    for name in ("user", "item"):
        table = warehouse.query(f"SELECT {name}_id, {name}_index FROM {name}_vocabulary").to_pydict()
        ids, rows = (np.array(column) for column in table.values())
        known = rows >= oov_buckets
        assert 10 < known.sum() < len(ids) - 10
        for given in (known, known | True):  # what the SQL says of the others may be given, and changes nothing
            found = vocabulary(ids[given], rows[given], oov_buckets, name)(ids)
            assert found.dtype == tf.int32 and (found.numpy() == rows).all()


@pytest.mark.parametrize("ids", [[3, 4, 6], [-(2**63), 4, 2**63 - 1], [2**63 - 3, 2**63 - 1, 2**63 - 2], [0]])
def test_ids_out_of_the_vocabulary(ids):
    asked = np.array([*EDGES, 3, 4, 5, 6, 7, 2**63 - 2, 2**63 - 3, -(2**63) + 1])
    known = {i: 100 + place for place, i in enumerate(ids)}
    for oov_buckets in (1, 7):
        others = tf.strings.to_hash_bucket_fast([f"user{i}" for i in asked], oov_buckets).numpy().tolist()
        expected = [known.get(i, other) for i, other in zip(asked.tolist(), others, strict=True)]
        lookup = vocabulary(ids, list(known.values()), oov_buckets, "user")
        assert lookup(asked).numpy().tolist() == expected
        assert lookup(asked.reshape(-1, 1)).shape == [len(asked), 1]
        assert lookup(np.zeros([0, 2], int)).shape == [0, 2]


def test_rows_past_the_int32_are_int64():
    for ids in ([1, 2], [1, 2**62]):
        found = vocabulary(ids, [2**31, 5], 2, "user")([*ids, 9])
        assert found.dtype == tf.int64 and found.numpy().tolist()[:2] == [2**31, 5]
        assert found.numpy()[2] == fingerprint_bucket(9, 2, "user").numpy()


@pytest.mark.parametrize(
    ("ids", "rows", "oov_buckets", "error", "message"),
    [(np.zeros(0, int), np.zeros(0, int), 1, ValueError, r"vocabulary 'user': \(0,\) ids"),
     ([1, 2], [1], 1, ValueError, r"\(2,\) ids, \(1,\) rows"),
     ([1, 2], [1, 2], 0, ValueError, "0 oov_buckets; expected"),
     ([1, 2], [1, -2], 1, ValueError, "rows from -2"),
     ([1, 7, 1], [1, 2, 3], 1, ValueError, "id 1 occurs twice"),
     ([1.5, 2], [1, 2], 1, TypeError, "float64"),
     (np.array([1, 2**63], np.uint64), [1, 2], 1, TypeError, "uint64")],
)  # fmt: skip
def test_what_is_no_vocabulary(ids, rows, oov_buckets, error, message):
    with pytest.raises(error, match=message):
        vocabulary(ids, rows, oov_buckets, "user")


# Histories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "histories",
    [[[1, 2], [], [3, 4, 5, 6, 7], [8, 9, 10]], [[], [], []], [[]], [], [[1, 2, 3, 4, 5, 6]], [[1, 2, 3], [4, 5, 6]]],
)
@pytest.mark.parametrize(("side", "kind"), [("left", np.int32), ("right", np.int64)])
def test_histories_keep_the_last_items(histories, side, kind):
    flat = np.array([i for history in histories for i in history], kind)
    ragged = tf.RaggedTensor.from_row_lengths(flat, np.array([len(history) for history in histories], np.int32))
    for length, pad in itertools.product([1, 3, 5, 9], [0, -1]):
        last = [history[-length:] for history in histories]
        blank = [[pad] * (length - len(history)) for history in last]
        expected = [b + h if side == "left" else h + b for h, b in zip(last, blank, strict=True)]
        items, lengths = pad_histories(ragged, length, pad, side)
        assert items.dtype == kind and items.shape == [len(histories), length] and items.numpy().tolist() == expected
        assert lengths.dtype == tf.int32 and lengths.numpy().tolist() == [len(history) for history in last]


def test_padding_is_left_and_zero_unless_asked_otherwise():
    items, _ = pad_histories(tf.ragged.constant([[5], [6, 7, 8]]), 2)
    assert items.numpy().tolist() == [[0, 5], [7, 8]]
    items, _ = pad_histories(tf.ragged.constant([["a", "b"], []]), 3, "")
    assert items.numpy().tolist() == [[b"", b"a", b"b"], [b"", b"", b""]]


def test_what_no_history_can_take():
    ragged = tf.ragged.constant([[5]])
    with pytest.raises(ValueError, match="length=0"):
        pad_histories(ragged, 0)
    with pytest.raises(ValueError, match="side='top'"):
        pad_histories(ragged, 3, side="top")


# Negatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [frequencies(1000, 7), np.ones(1000), frequencies(1000, 8) ** 0.75, [0, 3, 0]])
def test_negatives_follow_the_frequencies(frequency):
    frequency = np.asarray(frequency, float)
    items, logs = negative_sampler(frequency)([8, 15], [1000, 300])
    assert items.dtype == tf.int32 and items.shape == [1000, 300] and logs.shape == [1000, 300]
    counts = np.bincount(items.numpy().ravel(), minlength=len(frequency))
    assert len(counts) == len(frequency) and (counts[frequency == 0] == 0).all()
    there = frequency > 0
    expected = frequency[there] / frequency.sum() * 300_000
    assert expected.min() > 5
    if there.sum() > 1:
        assert abs(deviations(counts[there], expected)) < 4.5
        rows, columns = np.unique(items.numpy()[:, :2], axis=0).T  # neighbours are drawn apart
        assert abs(len(rows) - 1000) < 250 and abs(np.corrcoef(rows, columns)[0, 1]) < 4.5 / len(rows) ** 0.5
    share = np.log(frequency[there] / frequency.sum())
    if frequency[there].min() >= 1:
        np.testing.assert_allclose(logs.numpy(), np.log(frequency / frequency.sum() + 1e-300)[items.numpy()], rtol=1e-6)
        assert share.min() == pytest.approx(logs.numpy().min(), rel=1e-6)


def test_the_key_alone_decides_the_draws():
    draw = negative_sampler(frequencies(1000, 9))
    graph = tf.function(lambda key: draw(key, [64, 8]))
    first = draw([3, 4], [64, 8])[0].numpy()
    assert (first == draw(tf.constant([3, 4], tf.int64), [64, 8])[0].numpy()).all()
    assert (first == graph(tf.constant([3, 4], tf.int64))[0].numpy()).all()
    for other in ([4, 3], [3, 5], [2**40 + 3, 4]):
        assert (first == draw(other, [64, 8])[0].numpy()).mean() < 0.1
    with pytest.raises(ValueError, match="frequency of shape"):
        negative_sampler([0, 0])


def test_log_q_by_hand():
    # 8 rows of training: 4/8, 3/8, 1/8, and an item never seen, which counts as one
    assert log_q([4, 3, 1, 0]) == pytest.approx(np.log([0.5, 0.375, 0.125, 0.125]), rel=1e-6)
    assert log_q([4, 3, 1, 0]).dtype == np.float32
    assert log_q(np.ones(50)) == pytest.approx(np.full(50, -np.log(50)), rel=1e-6)
    _, logs = negative_sampler(np.ones(50))([1, 2], [3, 4])
    assert logs.numpy() == pytest.approx(np.full([3, 4], -np.log(50)), rel=1e-6)


def test_log_q_is_what_matrix_factorization_takes_off():
    frequency = frequencies(200, 10)
    model = MatrixFactorization(3, 200, 2, item_frequency=frequency)
    np.testing.assert_allclose(log_q(frequency), np.log(model.sampling_probability.numpy()), rtol=1e-5)


@pytest.mark.parametrize("frequency", [[], [0, 0], [1, -1], [1, np.nan], [1, np.inf], [[1, 2]], 5])
def test_what_are_no_frequencies(frequency):
    with pytest.raises(ValueError, match="frequency of shape"):
        log_q(frequency)


# In a pipeline -----------------------------------------------------------------------------------------


def all_features(batches: int = 3) -> tf.data.Dataset:
    """Every function in one `Dataset.map`, of batches of 16 rows."""
    random = np.random.default_rng(11)
    near, far = np.arange(50), random.integers(-(2**63), 2**63 - 1, 50)
    lookups = [vocabulary(ids, np.arange(3, 53), 3, "item") for ids in (near, far)]
    direct = vocabulary(near, np.arange(1, 51), 1, "user")
    draw = negative_sampler(frequencies(100, 12))
    lengths = np.arange(16 * batches, dtype=np.int32) % 6
    history = tf.RaggedTensor.from_row_lengths(random.integers(0, 60, lengths.sum()), lengths)
    rows = {"id": np.resize(np.r_[near, far, EDGES], 16 * batches), "history": history}

    def features(step, batch):
        ids, history = batch["id"], batch["history"]
        items, lengths = pad_histories(history.with_values(lookups[0](history.values)), 4)
        negatives, logs = draw(tf.stack([7, step]), [16, 5])
        return {
            "hashed": hash_bucket(ids, 1000, "user"), "fingerprint": fingerprint_bucket(ids, 1000, "user"),
            "near": lookups[0](ids), "far": lookups[1](ids), "direct": direct(ids), "items": items, "lengths": lengths,
            "right": pad_histories(history, 4, side="right")[0], "negatives": negatives, "logs": logs,
        }  # fmt: skip

    return tf.data.Dataset.from_tensor_slices(rows).batch(16, drop_remainder=True).enumerate().map(features)


def test_shapes_are_static():
    shapes = {name: tuple(spec.shape) for name, spec in all_features().element_spec.items()}
    flat = dict.fromkeys(["hashed", "fingerprint", "near", "far", "direct", "lengths"], (16,))
    assert shapes == flat | {"items": (16, 4), "right": (16, 4), "negatives": (16, 5), "logs": (16, 5)}


def test_a_dataset_leaves_python():
    """Serialized, it has neither a Python function nor a lookup table; a worker of the tf.data service runs it."""
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=all_features()._variant_tensor, strip_device_assignment=True)
    graph = tf.compat.v1.GraphDef.FromString(graph.numpy())
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    ops = {node.op for node in nodes}
    assert {"Fingerprint", "StringToHashBucketFast", "LowerBound", "UpperBound", "RaggedTensorToTensor"} <= ops
    assert [op for op in ops if "PyFunc" in op or "Table" in op or "Generator" in op] == []
    expected = list(all_features().as_numpy_iterator())
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    worker = service.WorkerServer(service.WorkerConfig(dispatcher.target.split("://")[1]))
    found = list(all_features().apply(service.distribute("parallel_epochs", dispatcher.target)).as_numpy_iterator())
    del worker
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)
