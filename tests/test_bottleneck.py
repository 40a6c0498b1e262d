"""Does the finder name what really takes the time, and does its sentence say what to turn?"""

import random
import time

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import bottleneck, record_batches
from recsys_common.bottleneck import explain
from recsys_common.input_pipeline import Worker

SECONDS, ROWS, WIDTH = 0.1, 2**17, 12
HEAVY = tf.random.stateless_normal([900, 900], (1, 2))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same wide rows without compression, and with; and many rows of narrow columns, whose shuffle is the work."""
    random_ = np.random.default_rng(1)
    columns = {f"c{number}": random_.integers(0, 1000, ROWS) for number in range(WIDTH)}
    table = pa.table(columns | {"rating": random_.random(ROWS, np.float32)})
    types = dict.fromkeys(columns, "int64") | {"rating": "float32"}
    tables = [table.slice(begin, ROWS // 4) for begin in range(0, ROWS, ROWS // 4)]
    folder = tmp_path_factory.mktemp("wide")
    wide = {
        kind: record_batches.write(folder / (kind or "plain"), tables, types, compression=kind, rows_per_record=4096)
        for kind in ("", "ZLIB")
    }
    narrow = pa.table({name: random_.integers(0, 100, 2**19, np.int8) for name in ("rating", *"abcdefg")})
    return wide | {
        "narrow": record_batches.write(folder / "narrow", [narrow], dict.fromkeys(narrow.column_names, "int8"))
    }


def light(batch):
    """A model that costs next to nothing."""
    return batch["rating"]


@tf.function
def heavy(batch):
    product = HEAVY * batch["rating"][0]
    for _ in range(6):
        product = tf.linalg.matmul(product, HEAVY) * 0.01
    return tf.reduce_sum(product)


def as_text(batch, key):
    texts = [tf.strings.as_string(batch[f"c{number}"]) for number in range(8)]
    return {"rating": batch["rating"], "hash": tf.strings.to_hash_bucket_strong(texts, 1000, [1, 2])}


def slow_storage(monkeypatch):
    """Each record comes after a wait, as from far away; nothing else of reading changes."""
    real = tf.data.TFRecordDataset

    def wait(record):
        time.sleep(0.005)
        return record

    def slow(*args, **options):
        return real(*args, **options).map(lambda record: tf.ensure_shape(tf.py_function(wait, [record], tf.string), []))

    monkeypatch.setattr(tf.data, "TFRecordDataset", slow)


PLANTED = {  # compression, batch size, step, settings
    "storage": ("", 4096, light, {"seed": 1, "window": 4096}),
    "decode": ("ZLIB", 4096, light, {"seed": 1, "window": 4096}),
    "shuffle": ("narrow", 8192, light, {"seed": 1}),
    "features": ("", 4096, light, {"seed": 1, "features": as_text}),
    "hand-over": ("", 32, light, {"seed": 1}),
    "model": ("", 4096, heavy, {"seed": 1, "columns": ["rating"]}),
}


def test_nine_of_ten_planted_bottlenecks_are_named(stored, monkeypatch):
    wrong = []
    draw = random.Random(2026)
    for part in [*PLANTED, *draw.choices(list(PLANTED), k=4)]:  # each once, four more at random
        compression, batch_size, step, settings = PLANTED[part]
        with monkeypatch.context() as patch:
            if part == "storage":
                slow_storage(patch)
            found = explain(stored[compression], batch_size, step, seconds=SECONDS, **settings)
        print(f"planted {part}\n{found}\n")
        if found.bottleneck != part:
            wrong.append(f"planted {part}, found:\n{found}")
    assert len(wrong) <= 1, "\n\n".join(wrong)


def test_the_sentence_names_model_or_input_and_the_knob():
    found = bottleneck.Explanation({"storage": 1.0, "decode": 3.0, "model": 2.0}, "decode")
    assert "The input is the bottleneck: 4 ms a batch, the model 2; 75% is decode. Leave out columns" in str(found)
    assert "columns=" in found.advice
    found = bottleneck.Explanation({"storage": 1.0, "decode": 3.0, "model": 5.0}, "model")
    assert "The model is the bottleneck: 5 ms a batch, its input 4." in str(found)
    knobs = {"shuffle": "window=", "hand-over": "batch_size", "features": "SQL", "storage": "disk", "model": "step"}
    for part, knob in knobs.items():
        found = bottleneck.Explanation({part: 1.0}, part)
        assert knob in found.advice and knob in str(found)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """1,000 rows with a history of up to 4 values, in three files."""
    lists = [list(range(number % 5)) for number in range(1000)]
    table = pa.table({"row": np.arange(1000), "history": pa.array(lists, pa.list_(pa.int64()))})
    tables = [table.slice(0, 500), table.slice(500, 300), table.slice(800)]
    types = {"row": "int64", "history": "int64"}
    return record_batches.write(tmp_path_factory.mktemp("small"), tables, types, rows_per_record=64)


SHUFFLED = ["storage", "decode", "shuffle", "hand-over"]
HISTORIES = {"lengths": {"history": 4}}


@pytest.mark.parametrize(
    ("batch_size", "settings", "parts"),
    [
        (50, {}, ["storage", "decode", "hand-over"]),
        (9, {"seed": 1, "limit": 70, "epochs": 3, "start": 1, "worker": Worker(1, 3, 2)}, SHUFFLED),
        (5000, {"seed": 1, "remainder": "pad", "window": 10**9}, SHUFFLED),
    ],
    ids=["no seed", "limit below a window, workers, replicas", "batch and window above the rows"],
)
def test_parts_of_settings(small, batch_size, settings, parts):
    found = explain(small, batch_size, seconds=0.01, **settings, **HISTORIES)
    assert list(found.milliseconds) == parts and found.bottleneck in parts
    assert sum(found.milliseconds.values()) > 0 <= min(found.milliseconds.values())


def test_features_are_measured_with_key_and_batch_and_the_model_gets_what_they_return(small):
    keys, seen = [], []

    def features(batch, key):
        keys.append(key.shape)
        return batch["row"] * 0 + 7, batch["history_length"]

    def step(batch):
        seen.append(batch)
        return {"loss": tf.reduce_sum(batch[0])}

    found = explain(small, 50, step, seconds=0.01, seed=1, features=features, **HISTORIES)
    assert list(found.milliseconds) == ["storage", "decode", "shuffle", "hand-over", "features", "model"]
    assert keys and set(map(tuple, keys)) == {(2,)}
    assert all(rows.numpy().tolist() == [7] * 50 and lengths.shape == (50,) for rows, lengths in seen)
    assert len(seen) >= 3 * bottleneck.ROUNDS


@pytest.mark.parametrize(
    ("batch_size", "settings", "message"),
    [
        (5000, HISTORIES, "not one full batch"),
        (50, {}, "lengths for"),
        (50, {"columns": ["rwo"]}, "no column rwo"),
        (50, HISTORIES | {"window": 0}, "window 0"),
    ],
)
def test_errors_of_batches_pass_through(small, batch_size, settings, message):
    with pytest.raises(ValueError, match=message):
        explain(small, batch_size, **settings)
