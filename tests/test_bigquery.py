"""The warehouse: the real client against the embedded service."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pyarrow as pa
import pytest
from google.api_core.exceptions import GoogleAPIError

from recsys_common import bigquery, datasets, ratings_table, splits
from recsys_common.datasets import ITEMS_SCHEMA, RATINGS_SCHEMA, RatingTables
from recsys_common.ratings_table import load


def ratings(rows: list[tuple]) -> pa.Table:
    return pa.table(list(zip(*rows, strict=True)), schema=RATINGS_SCHEMA)


def small_tables() -> RatingTables:
    """4 users; user 4 appears only at the end, item 40 too."""
    rows = [
        (1, 10, 5.0, 100), (1, 20, 4.0, 200), (1, 30, 3.0, 900),
        (2, 10, 2.0, 110), (2, 20, 1.0, 210), (2, 40, 5.0, 950),
        (3, 10, 4.0, 120), (3, 30, 4.0, 300), (4, 20, 3.0, 960), (3, 20, 2.0, 130),
    ]  # fmt: skip
    items = pa.table(
        [[10, 20, 30, 40], ["A", "B", "C, or D", "E"], [["x"], [], ["x", "y"], ["y"]]], schema=ITEMS_SCHEMA
    )
    return RatingTables("small", ratings(rows), items, "seconds")


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        yield connected


@pytest.fixture
def loaded(warehouse):
    load(warehouse, small_tables())
    return warehouse


def rows_of(table: pa.Table) -> list[tuple]:
    return sorted(tuple(row.values()) for row in table.to_pylist())


def test_load_gives_the_same_rows_back(loaded):
    table = small_tables()
    assert rows_of(loaded.read("ratings")) == rows_of(table.ratings)
    assert rows_of(loaded.query("SELECT * FROM ratings")) == rows_of(table.ratings)
    read = {row["item_id"]: row for row in loaded.query("SELECT * FROM items").to_pylist()}
    assert read[30] == {"item_id": 30, "title": "C, or D", "genres": ["x", "y"]}


def test_loading_again_replaces(loaded):
    load(loaded, small_tables())
    assert loaded.count("ratings") == 10


def test_ids_at_the_edge_of_int64_survive(warehouse):
    edge = 2**63 - 1
    tables = small_tables()
    load(warehouse, RatingTables("edge", ratings([(edge, 10, 0.5, 0), (0, 20, 5.0, edge)]), tables.items, "seconds"))
    assert rows_of(warehouse.read("ratings")) == [(0, 20, 5.0, edge), (edge, 10, 0.5, 0)]


def test_temporal_split_shows_no_one_the_future(loaded):
    loaded.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    split = loaded.query("SELECT split, timestamp FROM split_ratings").to_pylist()
    train = [row["timestamp"] for row in split if row["split"] == "train"]
    test = [row["timestamp"] for row in split if row["split"] == "test"]
    assert len(train) + len(test) == 10
    assert max(train) < min(test)
    assert sorted(test) == [900, 950, 960]


def test_leave_one_out_holds_out_the_last_and_the_last_but_one(loaded):
    loaded.run("leave_last_out.sql", holdout=1)
    found = rows_of(loaded.query("SELECT user_id, item_id, split FROM split_ratings"))
    assert [(u, i) for u, i, s in found if s == "test"] == [(1, 30), (2, 40), (3, 30), (4, 20)]
    assert [(u, i) for u, i, s in found if s == "validation"] == [(1, 20), (2, 20), (3, 20)]


def test_leave_one_out_breaks_equal_times_by_item(warehouse):
    tables = small_tables()
    same_time = ratings([(1, item, 3.0, 5) for item in (20, 40, 10, 30)])
    load(warehouse, RatingTables("ties", same_time, tables.items, "seconds"))
    warehouse.run("leave_last_out.sql", holdout=1)
    assert rows_of(warehouse.query("SELECT item_id FROM split_ratings WHERE split = 'test'")) == [(40,)]


def test_vocabularies_number_training_ids_by_frequency(loaded):
    loaded.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    loaded.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=1)
    items = rows_of(loaded.query("SELECT item_index, item_id, frequency FROM item_vocabulary"))
    # 10 and 20 both have three training rows: the smaller id first; 40 has none
    assert items == [(0, 40, 0), (1, 10, 3), (2, 20, 3), (3, 30, 1)]
    users = rows_of(loaded.query("SELECT user_index, user_id FROM user_vocabulary"))
    assert users == [(0, 4), (1, 3), (2, 1), (3, 2)]


def test_examples_keep_every_row_once_and_spread_them(warehouse):
    tables = datasets.load("simulated", rows=20_000)
    load(warehouse, tables)
    warehouse.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=1)
    warehouse.run("examples.sql", shards=8)
    shards = list(warehouse.shards("examples", {"split": "train"}))
    sizes = [shard.num_rows for shard in shards]
    assert len(sizes) == 8 and min(sizes) > 0.8 * max(sizes)
    read = pa.concat_tables([*shards, *warehouse.shards("examples", {"split": "test"})])
    assert read.num_rows == 20_000
    back = warehouse.query(
        "SELECT user_id, item_id, timestamp, COUNT(*) OVER () AS n FROM examples "
        "JOIN user_vocabulary USING (user_index) JOIN item_vocabulary USING (item_index) "
        "WHERE user_index > 0 AND item_index > 0"
    )
    original = {(r["user_id"], r["item_id"], r["timestamp"]) for r in tables.ratings.to_pylist()}
    found = [(r["user_id"], r["item_id"], r["timestamp"]) for r in back.to_pylist()]
    assert len(found) == len(set(found)) and set(found) <= original
    # a shard is a random sample: each has about its share of the most popular item
    popular = [np.mean(shard["item_index"].to_numpy() == 1) for shard in shards]
    assert max(popular) < 3 * min(popular)


def test_a_table_knows_what_was_run_to_make_it():
    with bigquery.connect() as own:
        load(own, small_tables())
        own.run("leave_last_out.sql", holdout=2)
        own.query("CREATE OR REPLACE TABLE copied AS SELECT * FROM ratings")
        found = own.provenance("copied")
    assert found["tables"] == ["copied", "items", "ratings", "split_ratings"] and found["table"] == "copied"
    (check, split) = found["sql"]
    assert check["file"] == "check_ratings.sql" and split["parameters"] == {"holdout": 2}
    assert split["text"] == (bigquery.SQL_FOLDER / "leave_last_out.sql").read_text()


def test_only_what_was_made_in_this_dataset_is_known_as_made():
    with bigquery.connect() as own:
        own.client.create_dataset("shop")
        own.query("CREATE TABLE IF NOT EXISTS first AS SELECT 1 AS x")
        own.query("CREATE TABLE shop.ratings AS SELECT 1 AS x")
        own.query("CREATE TABLE IF NOT EXISTS shop.others AS SELECT 1 AS x")
        own.query("CREATE OR REPLACE VIEW second AS SELECT x FROM first")
        assert own.provenance("second")["tables"] == ["first", "second"]


def test_values_go_in_as_parameters(loaded):
    title = "C, or D'; DROP TABLE items; --"
    assert loaded.query("SELECT COUNT(*) AS n FROM items WHERE title = @t", t=title).to_pylist() == [{"n": 0}]
    found = loaded.query("SELECT title FROM items WHERE item_id IN UNNEST(@ids) ORDER BY title", ids=[10, 40])
    assert found["title"].to_pylist() == ["A", "E"]
    with pytest.raises(ValueError, match="not a plain table or column name"):
        loaded.count("items; DROP TABLE items")
    with pytest.raises(ValueError, match="not a plain"):
        list(loaded.shards("examples", {"split": "x' OR '1'='1"}))


@pytest.fixture
def theirs(loaded):
    """A reader's own dataset, `shop`, with the ratings and a TIMESTAMP; returns what runs SQL on it."""
    loaded.client.create_dataset("shop", exists_ok=True)
    loaded.query(
        "CREATE OR REPLACE TABLE shop.ratings AS "
        "SELECT user_id, item_id, rating, TIMESTAMP_SECONDS(timestamp) AS timestamp FROM ratings"
    )
    return lambda sql: loaded.query(f"CREATE OR REPLACE TABLE shop.other AS {sql}")


def in_place(name: str) -> RatingTables:
    return datasets.load(f"embedded.shop.{name}")


def test_an_existing_table_is_read_in_place(loaded, theirs):
    before = rows_of(loaded.query("SELECT * FROM ratings"))
    load(loaded, in_place("ratings"))
    assert rows_of(loaded.query("SELECT * FROM ratings")) == before
    assert loaded.count("items") == 0
    for kind in ("NUMERIC", "INT64"):  # whole numbers here, so that both hold them
        theirs(f"SELECT user_id, item_id, CAST(rating AS {kind}) AS rating, timestamp FROM shop.ratings")
        load(loaded, in_place("other"))
        assert loaded.read("ratings").schema.field("rating").type == pa.float64()
        assert rows_of(loaded.query("SELECT * FROM ratings")) == before
    load(loaded, small_tables())  # and a table in the place of the view again
    assert rows_of(loaded.query("SELECT * FROM ratings")) == before
    assert loaded.query("SELECT COUNT(*) AS n FROM shop.ratings")["n"][0].as_py() == 10


def test_items_without_a_title_are_shown_by_number(loaded, theirs):
    load(loaded, in_place("ratings"))
    loaded.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    loaded.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=1)
    titles = loaded.run("titles.sql", item_indices=[1, 2]).to_pylist()
    assert sorted(row["title"] for row in titles) == ["item 10", "item 20"]
    assert loaded.run("liked.sql", user_id=3, rows=2)["title"].to_pylist() == ["item 30", "item 10"]


def test_a_source_in_the_working_dataset_is_refused_and_kept(loaded):
    loaded.query("CREATE OR REPLACE TABLE mine AS SELECT * FROM ratings")
    with pytest.raises(ValueError, match="lies in recsys_common, where tables are replaced"):
        load(loaded, datasets.load("embedded.recsys_common.mine"))
    assert loaded.count("mine") == loaded.count("ratings") == 10


def test_a_dataset_that_is_not_ours_is_refused(loaded):
    loaded.client.create_dataset("production", exists_ok=True)
    with pytest.raises(ValueError, match=r"the dataset production exists with the labels .*: it is not ours"):
        bigquery.Warehouse(loaded.server, "embedded", "bucket", "production", "US")
    bigquery.Warehouse(loaded.server, "embedded", "bucket", bigquery.DATASET, "US")  # ours again: welcome


@pytest.mark.parametrize("name", ["a.b.c; DROP TABLE x", "p.d.`t`", "p..t"])
def test_a_table_name_is_checked_before_it_meets_sql(loaded, name):
    table = RatingTables(name, RATINGS_SCHEMA.empty_table(), ITEMS_SCHEMA.empty_table(), "seconds", table=name)
    with pytest.raises(ValueError, match=r"not a BigQuery table name; expected project\.dataset\.table"):
        load(loaded, table)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT user_id, item_id, timestamp FROM ratings", "column 'rating' is missing, expected FLOAT64 or"),
        (
            "SELECT CAST(user_id AS STRING) AS user_id, item_id, rating, timestamp FROM ratings",
            "column 'user_id' is STRING, expected INT64; the table has user_id, item_id, rating, timestamp",
        ),
        (
            "SELECT NULLIF(user_id, 1) AS user_id, item_id, "
            "IF(item_id = 40, CAST('nan' AS FLOAT64), rating) AS rating, timestamp FROM ratings",
            "other: 3 rows with null user_id, 1 rows with not finite_rating; expected none",
        ),
        ("SELECT * FROM ratings WHERE FALSE", "other has 0 ratings; there is nothing to train on"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(loaded, theirs, sql, says):
    theirs(sql)
    with pytest.raises(ValueError, match=re.escape(says)):
        load(loaded, in_place("other"))


def test_a_disk_that_is_too_small_is_noticed_before_loading(loaded, monkeypatch):
    usage = bigquery.shutil.disk_usage("/")
    monkeypatch.setattr(bigquery.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"needs about [\d,]+ bytes for this table, 100 are free.*TMPDIR"):
        load(loaded, small_tables())
    assert loaded.count("ratings") == 10


def test_a_disk_that_fills_while_loading_ends_soon_and_takes_nothing_for_whole():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))  # the server inherits it
    try:
        server = bigquery.connect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with server, pytest.raises(GoogleAPIError):
        start = time.perf_counter()
        load(server, datasets.load("simulated", rows=1_000_000))
    assert time.perf_counter() - start < 30


def test_loading_in_parts_keeps_no_copies_of_the_table(warehouse):
    """The emulator would copy the table after each part: eight parts then take the room of 36."""
    dice = np.random.default_rng(1)
    ids, rating = (dice.integers(2**60, size=300_000) for _ in range(3)), dice.random(300_000, np.float32)
    part = pa.table(dict(zip(("user_id", "item_id", "timestamp"), ids, strict=True)) | {"rating": rating})
    part = part.select(RATINGS_SCHEMA.names).cast(RATINGS_SCHEMA)
    database = warehouse.server.root / "db"
    before = sum(path.stat().st_size for path in database.iterdir())
    assert ratings_table.upload(warehouse, "ratings", [part] * 8) == 2_400_000
    taken = sum(path.stat().st_size for path in database.iterdir()) - before
    assert taken < 2 * 8 * part.nbytes, f"{taken / part.nbytes:.1f} times a part"


def test_no_rows_are_not_loaded():
    empty = RatingTables("empty", RATINGS_SCHEMA.empty_table(), small_tables().items, "seconds")
    with bigquery.connect() as fresh, pytest.raises(ValueError, match="'ratings' has 0 rows"):
        load(fresh, empty)


@pytest.mark.parametrize(
    ("how", "time", "says"),
    [
        ("tempral", "seconds", "SPLIT='tempral' is not a split; expected one of auto, temporal, leave-one-out"),
        ("temporal", "order", "SPLIT='temporal' needs timestamps in seconds"),
        ("auto", "none", "these ratings have neither a clock nor an order"),
        ("leave-one-out", "none", "these ratings have neither a clock nor an order"),
    ],
)
def test_a_split_that_the_timestamps_cannot_carry_is_refused(how, time, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        splits.split(None, how, time)


@pytest.mark.parametrize(
    ("how", "time", "file"),
    [
        ("auto", "seconds", "temporal_split.sql"),
        ("auto", "order", "leave_last_out.sql"),
        ("temporal", "seconds", "temporal_split.sql"),
        ("leave-one-out", "seconds", "leave_last_out.sql"),
    ],
)
def test_auto_splits_by_time_where_there_is_one(loaded, how, time, file):
    assert splits.split(loaded, how, time) == file
    assert loaded.count("split_ratings") == 10


def test_no_row_for_a_shard_export_is_an_error(loaded):
    loaded.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
    loaded.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=1)
    loaded.run("examples.sql", shards=2)
    with pytest.raises(ValueError, match="'examples' has no rows where split = 'validation'"):
        next(loaded.shards("examples", {"split": "validation"}))


def test_a_mistake_in_sql_fails_at_once(loaded):
    start = time.perf_counter()
    with pytest.raises(GoogleAPIError, match="no_such_table"):
        loaded.query("SELECT * FROM no_such_table")
    assert time.perf_counter() - start < 15


def test_two_warehouses_side_by_side_do_not_meet():
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: bigquery.connect(), range(2))
    with first, second:
        first.query("CREATE TABLE mine AS SELECT 1 AS x")
        second.query("CREATE TABLE mine AS SELECT 2 AS x")
        assert first.query("SELECT x FROM mine")["x"][0].as_py() == 1
        assert second.query("SELECT x FROM mine")["x"][0].as_py() == 2


def test_ports_that_are_in_use_do_not_matter():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        taken = {one.getsockname()[1], two.getsockname()[1]}
        with bigquery.connect() as warehouse:
            ours = {int(address.rsplit(":", 1)[1]) for address in (warehouse.server.rest, warehouse.server.grpc)}
            assert len(ours) == 2 and not ours & taken


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_server_and_no_files(how):
    code = """
        import sys
        from recsys_common import bigquery
        warehouse = bigquery.connect()
        print(warehouse.server._process.pid, warehouse.server.root, flush=True)
        sys.stdin.read()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    pid, root = parent.stdout.readline().split()
    server = psutil.Process(int(pid))
    assert server.is_running()
    parent.send_signal(how)
    parent.wait()
    server.wait(10)
    assert not os.path.exists(root)


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setenv("BQEMU_MAX_CONCURRENT_JOBS", "none")  # a setting that the emulator refuses
    with pytest.raises(RuntimeError, match=r"(?s)embedded BigQuery did not start.*max_concurrent_jobs.*make doctor"):
        bigquery.connect()


def test_a_rehearsal_finds_the_tables_that_a_reader_would_bring(monkeypatch):
    from recsys_common import scale

    monkeypatch.setenv("RECSYS_REHEARSE", "1")
    given = scale.REHEARSAL
    with bigquery.connect(given["PROJECT"], given["BUCKET"]) as warehouse:
        assert warehouse.embedded and warehouse.storage == "gs://rehearsal-bucket"
        load(warehouse, datasets.load(given["DATASET"]), given["ITEMS_TABLE"])
        assert warehouse.count("ratings") == ratings_table.REHEARSAL_ROWS
        assert warehouse.query("SELECT COUNT(*) AS n FROM ratings JOIN items USING (item_id)")["n"][0].as_py() == 20_000
        times = warehouse.query("SELECT MIN(timestamp) AS first, MAX(timestamp) AS last FROM ratings").to_pylist()[0]
        assert 1_577_836_800 <= times["first"] < times["last"] < 1_577_836_800 + 1461 * 86_400  # TIMESTAMP to seconds
