"""The SQL, each file against an independent computation in Python, NumPy or TensorFlow."""

import io
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from google.api_core.exceptions import GoogleAPIError
from google.cloud.bigquery import LoadJobConfig

from recsys_common import bigquery, datasets
from recsys_common.ratings_table import column_checks, load

ONE_BUCKET = {"oov_buckets": 1, "minimum_frequency": 1, "pieces": 1}
EDGES = [-(2**63), -(2**63) + 1, -(2**32), -1, 0, 1, 2**31, 2**32 - 1, 2**63 - 1]
BUCKETS = [1, 2, 7, 1000, 2**20, 2**31 - 1, 10**12 + 39, 2**62]


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        yield connected


def put(warehouse, name: str, columns: dict) -> None:
    """Replace a table, whatever its values; `ratings_table.load` would refuse some of them."""
    table = pa.table(columns)
    types = {pa.int64(): "INT64", pa.float64(): "FLOAT64", pa.string(): "STRING"}
    listed = ", ".join(f"{field.name} {types[field.type]}" for field in table.schema)
    warehouse.query(f"CREATE OR REPLACE TABLE {name} ({listed})")
    file = io.BytesIO()
    pq.write_table(table, file)
    target = f"{warehouse.project}.{warehouse.dataset}.{name}"
    config = LoadJobConfig(source_format="PARQUET")
    job = warehouse.client.load_table_from_file(file, target, rewind=True, job_config=config, num_retries=0)
    assert job.result().output_rows == table.num_rows


def rows_of(table: pa.Table) -> list[tuple]:
    """The rows, sorted; a list becomes a tuple."""
    return sorted(tuple(tuple(v) if isinstance(v, list) else v for v in row.values()) for row in table.to_pylist())


def text_of(file: str) -> str:
    return (bigquery.SQL_FOLDER / file).read_text()


def crowded(seed: int = 0) -> dict:
    """600 ratings of 40 users and 30 items in only 12 moments, in no order; every tenth row twice."""
    random = np.random.default_rng(seed)
    users, items = random.integers(0, 40, 600), (30 * random.random(600) ** 2).astype(int)
    rating, moment = random.integers(1, 11, 600) / 2, random.integers(0, 12, 600)
    rows = random.permutation(np.r_[np.arange(600), np.arange(0, 600, 10)])
    return {"user_id": users[rows], "item_id": items[rows], "rating": rating[rows], "timestamp": moment[rows]}


@pytest.mark.parametrize("values", [ONE_BUCKET, {"oov_buckets": 5, "minimum_frequency": 9, "pieces": 4}])
def test_vocabularies_are_dense_and_by_frequency(warehouse, values):
    put(warehouse, "ratings", crowded())
    warehouse.run("temporal_split.sql", train_fraction=0.5, validation_fraction=0.0)
    warehouse.run("vocabularies.sql", **values)
    split = warehouse.query("SELECT * FROM split_ratings WHERE split = 'train'").to_pylist()
    buckets, pieces = values["oov_buckets"], values["pieces"]
    for name in ("user", "item"):
        frequency = Counter(row[f"{name}_id"] for row in split)
        table = warehouse.query(f"SELECT * FROM {name}_vocabulary").to_pylist()
        found = {row[f"{name}_id"]: row[f"{name}_index"] for row in table}
        assert len(table) == len(found) == len(set(crowded()[f"{name}_id"].tolist()))
        fingerprint = {row[f"{name}_id"]: row["fingerprint"] for row in table}
        order = sorted(found, key=lambda i: (-frequency[i], fingerprint[i] % pieces, i))
        known = [i for i in order if frequency[i] >= values["minimum_frequency"]]
        assert len(known) > 5
        expected = {i: buckets + place for place, i in enumerate(known)}
        strings = [f"{name}{i}" for i in found]
        hashed = tf.strings.to_hash_bucket_fast(strings, buckets).numpy().tolist()
        assert found == {i: expected.get(i, bucket) for i, bucket in zip(found, hashed, strict=True)}
        assert {row[f"{name}_id"]: row["frequency"] for row in table} == {i: frequency[i] for i in found}


def test_ids_that_training_never_saw_stay_out_whatever_the_minimum(warehouse):
    put(warehouse, "split_ratings", {"user_id": [1, 2, 2], "item_id": [5, 5, 6], "split": ["train", "test", "test"]})
    warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=0, pieces=1)
    assert rows_of(warehouse.query("SELECT user_id, user_index FROM user_vocabulary")) == [(1, 1), (2, 0)]
    assert rows_of(warehouse.query("SELECT item_id, item_index FROM item_vocabulary")) == [(5, 1), (6, 0)]


def test_hashed_ids_are_tensorflows(warehouse):
    ids = np.r_[EDGES, np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 300)]
    rating, moment = np.arange(len(ids)) / 2, np.arange(len(ids))
    splits = np.where(moment % 3, "train", "test")
    columns = {"user_id": ids, "item_id": ids[::-1], "rating": rating, "timestamp": moment, "split": splits}
    put(warehouse, "split_ratings", columns)
    for user_buckets, item_buckets in zip(BUCKETS[::2], BUCKETS[1::2], strict=True):
        warehouse.run("hashed_ids.sql", user_buckets=user_buckets, item_buckets=item_buckets)
        users = tf.strings.to_hash_bucket_fast([f"user{i}" for i in ids], user_buckets).numpy()
        items = tf.strings.to_hash_bucket_fast([f"item{i}" for i in ids[::-1]], item_buckets).numpy()
        found = warehouse.query("SELECT user_bucket, item_bucket, rating, timestamp, split FROM hashed_examples")
        expected = zip(*(column.tolist() for column in (users, items, rating, moment, splits)), strict=True)
        assert rows_of(found) == sorted(expected)


@pytest.mark.parametrize(
    ("file", "column", "parameter", "end"),
    [("hashed_ids.sql", "users.fingerprint", "@user_buckets", "AS user_bucket"),
     ("hashed_ids.sql", "items.fingerprint", "@item_buckets", "AS item_bucket"),
     ("vocabularies.sql", "fingerprint", "@oov_buckets", ",\n    @oov_buckets + earlier")],
)  # fmt: skip
def test_the_buckets_of_any_string_are_tensorflows(warehouse, file, column, parameter, end):
    expression = "MOD(\n" + text_of(file).split(end)[0].rpartition("MOD(\n")[2]
    expression = expression.replace(column, "f").replace(parameter, "n")
    strings = ["", "user5", "é", "日本語", "🙂", "a" * 64, "\n' OR 1=1 --", *(f"item{i}" for i in range(300))]
    hashed = "SELECT s, FARM_FINGERPRINT(s) AS f FROM UNNEST(SPLIT(@strings, '|')) AS s"
    found = warehouse.query(
        f"SELECT n, s, {expression} AS bucket FROM ({hashed}) CROSS JOIN UNNEST(@buckets) AS n",
        strings="|".join(strings), buckets=BUCKETS,
    )  # fmt: skip
    assert rows_of(found) == tensorflows(strings, strings)
    # From BigQuery itself: issues 26 of github.com/lovell/farmhash and 18 of github.com/seiflotfy/rust-farmhash
    known = {"1footrue": -1541654101129638711, "a" * 127: 7531535164187061522, "a" * 128: -4747627967806356490}
    found = warehouse.query(
        f"SELECT n, f, {expression} AS bucket FROM UNNEST(@known) AS f CROSS JOIN UNNEST(@buckets) AS n",
        known=list(known.values()), buckets=BUCKETS,
    )  # fmt: skip
    assert rows_of(found) == tensorflows(list(known), known.values())


def tensorflows(strings: list[str], names) -> list[tuple]:
    """(number of buckets, name of the string, its bucket), sorted."""
    buckets = {n: tf.strings.to_hash_bucket_fast(strings, n).numpy().tolist() for n in BUCKETS}
    return sorted((n, *pair) for n in BUCKETS for pair in zip(names, buckets[n], strict=True))


def test_each_shard_is_a_random_sample(warehouse):
    load(warehouse, datasets.load("simulated", rows=20_000))
    warehouse.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    warehouse.run("vocabularies.sql", **ONE_BUCKET)
    warehouse.run("examples.sql", shards=8)
    table = warehouse.read("examples").to_pandas()
    assert len(table) == 20_000 and sorted(table["shard"].unique()) == list(range(8))
    size = table.groupby("shard").size()
    # 7 degrees of freedom: a random spread stays below 24 in 999 cases of 1000
    assert ((size - 2500) ** 2 / 2500).sum() < 24
    for column in ("user_index", "item_index"):
        of_it = table[table[column] == 1].groupby("shard").size().reindex(range(8), fill_value=0)
        assert of_it.sum() > 80
        assert ((of_it - of_it.mean()) ** 2 / of_it.mean()).sum() < 24
    moments = table.groupby("shard")["timestamp"].mean()
    assert np.abs(moments - table["timestamp"].mean()).max() < 4 * table["timestamp"].std() / 2500**0.5


@pytest.mark.parametrize("name", ["export_rows", "examples", "histories"])
def test_which_items_a_shard_has_differs_from_user_to_user(warehouse, name):
    """Sharded by the sum of the fingerprints, the shards of two users would differ by one number for all items."""
    users, items = np.indices((6, 100)).reshape(2, -1)
    moment = np.random.default_rng(1).permutation(600)
    put(warehouse, "ratings", {"user_id": users, "item_id": items, "rating": np.ones(600), "timestamp": moment})
    warehouse.run("temporal_split.sql", train_fraction=0.9, validation_fraction=0.0)
    warehouse.run("vocabularies.sql", **ONE_BUCKET)
    warehouse.run(f"{name}.sql", shards=8, **({"length": 1} if name == "histories" else {}))
    table = warehouse.read(name).to_pandas()
    shard = table.pivot(index=table.columns[0], columns=table.columns[1], values="shard").to_numpy()
    assert shard.shape == (6, 100)
    for one, other in itertools.combinations(shard, 2):
        assert np.bincount((one - other) % 8, minlength=8).max() < 30, "of 100 items; 12.5 are expected"


@pytest.mark.parametrize("split", ["temporal_split.sql", "leave_last_out.sql"])
def test_histories_hold_only_the_past(warehouse, split):
    put(warehouse, "ratings", crowded())
    fractions = {"train_fraction": 0.5, "validation_fraction": 0.2}
    warehouse.run(split, **({"holdout": 1} if split == "leave_last_out.sql" else fractions))
    warehouse.run("vocabularies.sql", oov_buckets=2, minimum_frequency=10, pieces=2)
    warehouse.run("examples.sql", shards=4)
    users, items = (
        dict(warehouse.query(f"SELECT {name}_id, {name}_index FROM {name}_vocabulary").to_pandas().to_numpy().tolist())
        for name in ("user", "item")
    )
    assert Counter(users.values())[0] > 1  # several users share a row of the table, and must not share a history
    of_user = defaultdict(list)
    for row in warehouse.query("SELECT * FROM split_ratings").to_pylist():
        part = ["train", "validation", "test"].index(row["split"])
        of_user[row["user_id"]].append((row["timestamp"], row["item_id"], row["rating"], part, row["split"]))
    for length in (4, 1000):
        warehouse.run("histories.sql", shards=4, length=length)
        expected = []
        for user, rows in of_user.items():
            taken = []
            for moment, item, rating, _, part in sorted(rows):
                expected.append((users[user], items[item], rating, moment, part, tuple(taken[-length:])))
                taken.append(items[item])
        assert rows_of(warehouse.query("SELECT * EXCEPT (shard) FROM histories")) == sorted(expected)
    without = warehouse.query("SELECT * EXCEPT (history) FROM histories")
    assert rows_of(without) == rows_of(warehouse.read("examples"))


def test_what_is_held_out_last_is_in_no_history(warehouse):
    """Five items at one moment, in an order of rows that is not theirs; first with one of them rated twice."""

    def rate(items: list[int], ratings: list[float]) -> None:
        same = {"user_id": [7] * len(items), "timestamp": [5] * len(items)}
        put(warehouse, "ratings", same | {"item_id": items, "rating": ratings})

    items, ratings = [20, 50, 40, 50, 10, 30], [3.0, 1.0, 2.0, 4.0, 5.0, 1.0]
    for turn in (1, -1):
        rate(items[::turn], ratings[::turn])
        warehouse.run("leave_last_out.sql", holdout=1)
        held = warehouse.query("SELECT split, item_id, rating FROM split_ratings WHERE split != 'train'")
        assert rows_of(held) == [("test", 50, 4.0), ("validation", 50, 1.0)]
    rate([20, 50, 40, 10, 30], [3.0, 1.0, 2.0, 5.0, 1.0])
    warehouse.run("leave_last_out.sql", holdout=1)
    warehouse.run("vocabularies.sql", **ONE_BUCKET)
    warehouse.run("histories.sql", shards=1, length=10)
    found = warehouse.query(
        "SELECT h.split, v.item_id, h.history FROM histories AS h JOIN item_vocabulary AS v USING (item_index) "
        "WHERE item_id IN (10, 20, 30)"
    )
    # known: 10, 20 and 30, with one row each, so rows 1, 2 and 3; 40 and 50 are held out
    assert rows_of(found) == [("train", 10, ()), ("train", 20, (1,)), ("train", 30, (1, 2))]
    held = warehouse.query("SELECT split, history FROM histories WHERE split != 'train'")
    assert rows_of(held) == [("test", (1, 2, 3, 0)), ("validation", (1, 2, 3))]


@pytest.mark.parametrize("fraction", [0.2, 0.8])
def test_equal_timestamps_at_the_cut_stay_together(warehouse, fraction):
    put(warehouse, "ratings", crowded())
    warehouse.run("temporal_split.sql", train_fraction=fraction, validation_fraction=0.0)
    parts = warehouse.query("SELECT timestamp, split FROM split_ratings").to_pandas()
    assert len(parts) == 660 and set(parts["split"]) == {"train", "test"}
    assert parts.groupby("timestamp")["split"].nunique().max() == 1
    assert parts[parts["split"] == "train"]["timestamp"].max() < parts[parts["split"] == "test"]["timestamp"].min()
    # a moment has about a twelfth of the rows, and the cut goes before the moment it falls into
    assert fraction - 0.12 < (parts["split"] == "train").mean() <= fraction + 0.01


def test_a_second_moment_parts_validation_from_test(warehouse):
    """Of 100 ratings at 100 moments, 80, 10 and 10, in the order of time."""
    moments = np.random.default_rng(3).permutation(100)
    put(warehouse, "ratings", {"user_id": moments % 7, "item_id": moments, "rating": moments / 2, "timestamp": moments})
    warehouse.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.1)
    found = warehouse.query("SELECT split, MIN(timestamp), MAX(timestamp), COUNT(*) FROM split_ratings GROUP BY split")
    parts = {part: numbers for part, *numbers in rows_of(found)}
    assert sum(count for *_, count in parts.values()) == 100 and list(parts) == ["test", "train", "validation"]
    assert parts["train"][0] == 0 and parts["test"][1] == 99  # and no moment between two parts is missing:
    assert parts["train"][1] + 1 == parts["validation"][0] and parts["validation"][1] + 1 == parts["test"][0]
    assert abs(parts["train"][2] - 80) <= 1 and abs(parts["validation"][2] - 10) <= 1


def test_item_frequencies_have_no_gaps(warehouse):
    buckets = 50  # more than there are items out of the vocabulary
    put(warehouse, "ratings", crowded())
    warehouse.run("temporal_split.sql", train_fraction=0.5, validation_fraction=0.0)
    warehouse.run("vocabularies.sql", oov_buckets=buckets, minimum_frequency=8, pieces=1)
    warehouse.run("examples.sql", shards=1)
    warehouse.run("item_frequencies.sql")
    found = warehouse.read("item_frequencies").sort_by("item_index")
    taken = warehouse.query("SELECT item_index FROM examples WHERE split = 'train'")["item_index"].to_numpy()
    assert found["item_index"].to_pylist() == list(range(taken.max() + 1))
    assert found["frequency"].to_pylist() == np.bincount(taken).tolist()
    assert taken[taken < buckets].size > 0 and 0 in found["frequency"].to_pylist()


def test_item_frequencies_of_more_items_than_an_array_holds(warehouse):
    put(warehouse, "item_vocabulary", {"item_index": [0, 1_234_567, 0, 999_999], "frequency": [1, 2, 3, 4]})
    warehouse.run("item_frequencies.sql")
    summary = "COUNT(*), COUNT(DISTINCT item_index), MAX(item_index), SUM(frequency), SUM(item_index * frequency)"
    found = rows_of(warehouse.query(f"SELECT {summary} FROM item_frequencies"))
    assert found == [(1_234_568, 1_234_568, 1_234_567, 10, 2 * 1_234_567 + 4 * 999_999)]


def random_columns(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {
        "user_id": np.r_[EDGES, random.integers(-(2**63), 2**63 - 1, rows - len(EDGES))],
        "item_id": random.zipf(1.3, rows).clip(max=10**9).astype(np.int64),
        "rating": np.r_[-0.5, 0.0, 1e-9, random.normal(0, 3, rows - 3)],
        "timestamp": random.integers(0, 2**33, rows),
    }


def test_column_checks_are_those_of_numpy_and_add_up(warehouse):
    columns = random_columns(20_000)
    put(warehouse, "ratings", columns)
    found = warehouse.run("column_checks.sql").to_pylist()[0]
    assert found == column_checks(columns)
    parts = [column_checks({name: column[k::3] for name, column in columns.items()}) for k in range(3)]
    assert found == {name: sum(part[name] for part in parts) for name in found}
    put(warehouse, "ratings", {name: column[::-1] for name, column in columns.items()})
    assert warehouse.run("column_checks.sql").to_pylist()[0] == found


def test_column_checks_notice_what_went_wrong(warehouse):
    whole = random_columns(200)
    whole["rating"] = np.round(whole["rating"] * 2) / 2
    whole["rating"][50], whole["rating"][51] = 4.5, 3.0

    def changed(wrong: dict) -> set[str]:
        put(warehouse, "ratings", wrong)
        found = warehouse.run("column_checks.sql").to_pylist()[0]
        assert found == column_checks(wrong)
        return {name for name, value in column_checks(whole).items() if found[name] != value}

    def with_values(name: str, at: list[int], values) -> dict:
        column = whole[name].copy()
        column[at] = values
        return whole | {name: column}

    every = set(column_checks(whole))
    assert changed(whole) == set()
    for name in whole:
        assert changed(with_values(name, [50, 51], whole[name][[51, 50]])) == {"row_cubes"}
    assert changed({name: np.delete(column, 60) for name, column in whole.items()}) == every
    assert changed({name: np.r_[column, column[60]] for name, column in whole.items()}) == every
    for kind in (np.float32, np.float64):
        last_bit = np.nextafter(kind(4.5), kind(9))
        assert {"rating_cubes", "row_cubes"} == changed(with_values("rating", [50], last_bit))
    # one up and one down, so that the sum stays
    assert changed(with_values("item_id", [50, 51], whole["item_id"][[50, 51]] + [1, -1])) == {
        "item_id_cubes",
        "row_cubes",
    }
    cut = with_values("user_id", list(range(200)), whole["user_id"] & 0xFFFFFFFF)  # an int64 through 32 bits
    assert changed(cut) == {"user_id_sum", "user_id_cubes", "row_cubes"}


def test_packed_batches_are_read_by_native_ops(warehouse):
    random = np.random.default_rng(3)
    names = ("user_id", "item_id", "rating", "timestamp")
    ids = np.r_[EDGES, EDGES, random.integers(-(2**63), 2**63 - 1, 982)]  # rows 0 and 9, 1 and 10, ... share an id
    columns = {
        "user_id": ids,
        "item_id": np.r_[EDGES, EDGES, random.integers(0, 9, 982)],
        "rating": np.r_[np.full(18, -2.5), random.integers(-(2**40), 2**40, 982) / 65536],
        "timestamp": np.r_[np.full(18, 2**63 - 1), random.integers(0, 2**31, 982)],
        "shard": np.r_[np.ones(18, int), random.integers(0, 3, 982)],
    }
    put(warehouse, "export_rows", columns)
    folder = Path(warehouse.local(warehouse.storage))
    for shard in range(3):
        options = f"uri='{warehouse.storage}/packed/{shard}-*.csv', format='CSV', header=false, overwrite=true"
        text = text_of("packed_batches.sql")
        warehouse.query(f"EXPORT DATA OPTIONS ({options}) AS\n{text}", shard=shard, rows_per_record=100)

    def decode(line):
        count, *texts = tf.io.decode_csv(line, [tf.constant(0, tf.int64), "", "", "", ""])
        return count, *(tf.io.decode_raw(tf.io.decode_base64(text), tf.int64, little_endian=False) for text in texts)

    found, counts = [], Counter()
    files = sorted(map(str, folder.glob("packed/*.csv")))
    for count, *values in tf.data.TextLineDataset(files).map(decode):
        assert {len(value) for value in values} == {int(count)}
        counts[int(count)] += 1
        found += zip(*(value.numpy().tolist() for value in values), strict=True)
    whole = [
        columns[name].tolist() if name != "rating" else (columns[name] * 65536).astype(int).tolist() for name in names
    ]
    assert sorted(found) == sorted(zip(*whole, strict=True))
    sizes = np.bincount(columns["shard"]).tolist()
    assert counts == Counter([100] * sum(size // 100 for size in sizes) + [size % 100 for size in sizes])


def test_records_mix_users_and_items(warehouse):
    users, items = np.divmod(np.arange(4000), 40)
    rows = {"user_id": users, "item_id": items, "rating": np.ones(4000), "timestamp": np.arange(4000)}
    put(warehouse, "export_rows", rows | {"shard": np.zeros(4000, int)})
    for record in warehouse.run("packed_batches.sql", shard=0, rows_per_record=1000).to_pylist():
        for name, different in (("user_id", 100), ("item_id", 40)):
            values = tf.io.decode_raw(tf.io.decode_base64(record[name]), tf.int64, little_endian=False).numpy()
            share = np.bincount(values, minlength=different) / 1000 * different
            assert share.min() > 0.3 and share.max() < 2  # each of them about as often as in the shard


@pytest.mark.parametrize("name", ["user_id", "item_id", "rating", "timestamp"])
def test_a_null_is_not_packed(warehouse, name):
    types = {c: pa.float64() if c == "rating" else pa.int64() for c in ("user_id", "item_id", "rating", "timestamp")}
    rows = {c: pa.array([1, 2, None if c == name else 3], kind) for c, kind in types.items()}
    put(warehouse, "export_rows", rows | {"shard": [4, 4, 4]})
    with pytest.raises(GoogleAPIError, match="export_rows, shard 4: a NULL in"):
        warehouse.run("packed_batches.sql", shard=4, rows_per_record=10)
