"""The routes from a table to tensors: every row once by each of them, or an error that says so."""

import base64
import re
import select
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys_common import bigquery, conversion, record_batches, route_checks, routes
from recsys_common.ratings_table import upload

COLUMNS = {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
ROWS, SHARDS = 5_000, 4
# Of the table `many`. With all columns it is over a megabyte, and a session has the 8 streams that are asked for. One
# column is less: that has one stream, of two blocks, as the embedded service sends 65,536 rows at a time.
MANY = 120_000


@pytest.fixture(scope="module")
def made() -> pa.Table:
    """Ratings with ids of all sizes, rows that are equal, and a time before 1970."""
    rng = np.random.default_rng(1)
    users = np.concatenate([rng.integers(-(2**62), 2**62, ROWS - 6), [-1, 0, 2**62, -(2**62), 2**53 + 1, -(2**63)]])
    columns = [users, rng.integers(1, 200, ROWS), rng.integers(1, 11, ROWS) / 2, rng.integers(-9, 2**31, ROWS)]
    columns = [np.concatenate([column, column[:3]]) for column in columns]
    return pa.table(columns, names=list(COLUMNS))


@pytest.fixture(scope="module")
def warehouse(made):
    with bigquery.connect() as connected:
        upload(connected, "ratings", [made])
        connected.query(f"CREATE TABLE export_rows AS SELECT *, MOD(item_id, {SHARDS}) AS shard FROM ratings")
        connected.query(
            "CREATE TABLE many AS SELECT x AS user_id, -x AS item_id, MOD(x, 10) / 2 AS rating, 7 * x AS timestamp, "
            f"MOD(x, {SHARDS}) AS shard FROM UNNEST(GENERATE_ARRAY(1, {MANY})) AS x"
        )
        yield connected


def rows_of(dataset: tf.data.Dataset, columns: dict[str, str] = COLUMNS) -> np.ndarray:
    """All rows, sorted: a structured array, so that a row's columns stay together. Checks the dtypes on the way."""
    parts = []
    for batch in dataset:
        assert {name: batch[name].dtype.name for name in batch} == columns
        part = np.empty(batch["user_id"].shape[0], list(columns.items()))
        for name in columns:
            part[name] = batch[name].numpy()
        parts.append(part)
    assert len(parts) > 1
    return np.sort(np.concatenate(parts))


def converted(folder, source) -> tf.data.Dataset:
    return record_batches.read(conversion.convert(folder, source, COLUMNS))


def by_csv(warehouse, folder, gzip):
    return routes.read_csv(routes.export_csv(warehouse, "export_rows", folder, COLUMNS, gzip=gzip), COLUMNS, 512)


WAYS = {
    "csv": lambda w, folder, tmp: by_csv(w, folder, gzip=False),
    "csv.gz": lambda w, folder, tmp: by_csv(w, folder, gzip=True),
    "tfrecord row": lambda w, folder, tmp: routes.read_rows(
        routes.export_rows(w, "export_rows", folder, COLUMNS), COLUMNS, 512
    ),
    "parquet": lambda w, folder, tmp: converted(
        tmp, conversion.ParquetFiles(routes.export_parquet(w, "export_rows", folder, COLUMNS))
    ),
    "storage read": lambda w, folder, tmp: converted(tmp, conversion.TableShards(w, "export_rows")),
    "table stream": lambda w, folder, tmp: routes.table_stream(w, "export_rows", COLUMNS, 512),
    "packed": lambda w, folder, tmp: routes.read_packed(routes.export_packed(w, "export_rows", folder, 100)),
}


def has_python(dataset: tf.data.Dataset) -> bool:
    ignore = tf.data.experimental.ExternalStatePolicy.IGNORE
    return b"PyFunc" in dataset._as_serialized_graph(external_state_policy=ignore).numpy()


@pytest.mark.parametrize("way", WAYS)
def test_every_route_gives_the_same_rows_and_only_one_needs_python(warehouse, made, tmp_path, way):
    dataset = WAYS[way](warehouse, f"{warehouse.storage}/same/{way.replace(' ', '-')}", tmp_path)
    assert has_python(dataset) == (way == "table stream")
    expected = np.empty(made.num_rows, list(COLUMNS.items()))
    for name in COLUMNS:
        expected[name] = made[name].to_numpy()
    assert np.array_equal(rows_of(dataset), np.sort(expected))


def test_an_export_replaces_the_one_before_when_it_is_whole(warehouse):
    folder = f"{warehouse.storage}/again"
    first = routes.export_parquet(warehouse, "export_rows", folder, COLUMNS)
    mine = warehouse.local(f"{folder}/mine.txt")
    tf.io.gfile.copy(first[0], mine)
    with pytest.raises(Exception, match="no_such_column"):
        routes.export_parquet(warehouse, "export_rows", folder, {"no_such_column": "int64"})
    assert all(map(tf.io.gfile.exists, first))
    second = routes.export_rows(warehouse, "export_rows", folder, COLUMNS)
    assert len(second) == SHARDS and all(map(tf.io.gfile.exists, second))
    there = tf.io.gfile.glob(warehouse.local(f"{folder}/*")) + tf.io.gfile.glob(warehouse.local(f"{folder}/*/*"))
    assert set(there) == {mine, second[0].rsplit("/", 1)[0], *second}


def test_one_file_a_shard_with_its_rows_only(warehouse):
    paths = routes.export_csv(warehouse, "export_rows", f"{warehouse.storage}/shards", COLUMNS, gzip=True)
    assert [re.search(r"shard-(\d+)-", path)[1] for path in paths] == ["00000", "00001", "00002", "00003"]
    for shard, path in enumerate(paths):
        items = np.concatenate([b["item_id"] for b in routes.read_csv([path], COLUMNS, 100)])
        assert set(items % SHARDS) == {shard}


def test_rows_that_an_export_would_lose_are_refused(warehouse):
    warehouse.query(
        "CREATE OR REPLACE TABLE odd AS SELECT user_id, [item_id] AS items, NULLIF(1, 1) AS shard FROM ratings"
    )
    with pytest.raises(ValueError, match=r"'odd': column 'shard' is NULL in 5,003 rows, which no file would hold"):
        routes.export_parquet(warehouse, "odd", f"{warehouse.storage}/refused", {"user_id": "int64"})
    with pytest.raises(ValueError, match=r"'odd', column 'items' is INTEGER REPEATED; CSV holds plain columns only"):
        routes.export_csv(warehouse, "odd", f"{warehouse.storage}/refused", {"items": "int64"}, gzip=False)


@pytest.mark.parametrize("folder", ["/tmp/x", "gs://bucket", "gs://b/x', format='CSV') AS SELECT 1 --", "gs://b/*"])
def test_a_folder_is_checked_before_it_meets_sql(warehouse, folder):
    with pytest.raises(ValueError, match="is not a gs://bucket/folder"):
        routes.export_csv(warehouse, "export_rows", folder, COLUMNS, gzip=False)


# The table stream --------------------------------------------------------------------------------------


def test_hosts_share_the_streams_of_one_session(warehouse):
    session = warehouse.open("many", list(COLUMNS), streams=8)
    assert len(session.streams) == 8
    counts, parts = [], []
    for host in range(3):
        dataset = routes.table_stream(
            warehouse, "many", COLUMNS, 1000, session=session, host=host, hosts=3, report=counts.append
        )
        parts.append(rows_of(dataset))
    users = [part["user_id"] for part in parts]
    assert [len(part) for part in users] == counts == [45_000, 45_000, 30_000]  # 3, 3 and 2 streams of 15,000
    assert np.array_equal(np.sort(np.concatenate(users)), np.arange(1, MANY + 1))
    for part in parts:
        assert np.array_equal(part["item_id"], -part["user_id"])
        assert np.array_equal(part["rating"], part["user_id"] % 10 / 2)


def test_a_stream_says_its_shapes_and_fills_its_batches(warehouse):
    dataset = routes.table_stream(warehouse, "many", COLUMNS | {"user_id": "int32"}, 7_000)
    assert dataset.element_spec["user_id"] == tf.TensorSpec([None], tf.int32)
    assert dataset.element_spec["rating"] == tf.TensorSpec([None], tf.float32)
    for _ in range(2):  # the count starts anew in each pass
        assert [batch["user_id"].shape[0] for batch in dataset] == [7_000] * 17 + [1_000]


def test_what_a_stream_cannot_do_is_said(warehouse):
    with pytest.raises(ValueError, match="3 hosts need one session in common"):
        routes.table_stream(warehouse, "many", COLUMNS, 100, hosts=3)
    small = warehouse.open("export_rows", list(COLUMNS))
    with pytest.raises(ValueError, match="'export_rows': a session of 1 streams for 2 hosts; each needs one"):
        routes.table_stream(warehouse, "export_rows", COLUMNS, 100, session=small, hosts=2)
    with pytest.raises(ValueError, match="host 2 of 2 hosts; expected 0 to 1"):
        routes.table_stream(warehouse, "export_rows", COLUMNS, 100, session=small, host=2, hosts=2)
    with pytest.raises(ValueError, match=r"the session lacks \['shard'\]"):
        routes.table_stream(warehouse, "export_rows", COLUMNS | {"shard": "int64"}, 100, session=small)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"'user_id': not int32: Integer value -?\d+ not in range"):
        list(routes.table_stream(warehouse, "export_rows", {"user_id": "int32"}, 100))
    warehouse.query("CREATE OR REPLACE TABLE nothing AS SELECT * FROM export_rows WHERE FALSE")
    with pytest.raises(ValueError, match="'nothing': a session of 0 streams"):
        routes.table_stream(warehouse, "nothing", COLUMNS, 100)


class Cut:
    """A TCP proxy that breaks its connections once, after so many bytes from the server; then it passes everything.

    `armed` is the number of bytes, None to break nothing; `broken` tells whether it has.
    """

    def __init__(self, target: str):
        host, port = target.rsplit(":", 1)
        self.target, self.armed, self.passed, self.broken = (host, int(port)), None, 0, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, limit: int) -> None:
        self.armed, self.passed, self.broken = limit, 0, False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    self.passed += len(data) if source is server else 0
                    if self.armed is not None and self.passed > self.armed:
                        self.armed, self.broken = None, True
                        time.sleep(1)  # a client throws away what it has not read of a connection that breaks
                        return
                    if not data:
                        return
                    (server if source is client else client).sendall(data)


@pytest.fixture(scope="module")
def cut(warehouse):
    proxy = Cut(warehouse.server.grpc)
    yield proxy
    proxy.listener.close()


@pytest.fixture(scope="module")
def behind(warehouse, cut):
    """The same warehouse; its Storage Read API is reached through the proxy."""
    real = warehouse.server
    server = SimpleNamespace(rest=real.rest, grpc=cut.address, root=real.root, wait=lambda: None, stop=lambda: None)
    with bigquery.Warehouse(server, "embedded", "embedded-bucket", bigquery.DATASET, "US") as connected:
        yield connected


ONE = {"user_id": "int64"}


def test_a_stream_that_breaks_in_its_first_block_loses_nothing(behind, cut):
    cut.arm(200_000)
    rows = rows_of(routes.table_stream(behind, "many", ONE, 1000), ONE)
    assert cut.broken
    assert np.array_equal(rows["user_id"], np.arange(1, MANY + 1))


def test_a_stream_that_breaks_half_way_is_noticed(behind, cut):
    """The client takes it up again at an offset, which the embedded service ignores: the first block comes twice."""
    dataset = routes.table_stream(behind, "many", ONE, 1000)
    cut.arm(65_536 * 8 + 200_000)
    with pytest.raises(
        tf.errors.OpError, match="table 'many': 185,536 rows arrived, the table has 120,000: rows were lost"
    ):
        for _ in dataset:
            pass
    assert cut.broken
    assert len(rows_of(dataset, ONE)) == MANY  # the next pass is whole


def test_hosts_can_tell_from_the_sum_that_a_stream_broke(behind, cut):
    counts, session = [], behind.open("many", ["user_id"])
    cut.arm(65_536 * 8 + 200_000)
    for _ in routes.table_stream(behind, "many", ONE, 1000, session=session, report=counts.append):
        pass
    assert cut.broken and counts == [65_536 + MANY]
    with pytest.raises(RuntimeError, match="lost or doubled"):
        routes.expect_rows("'many'", sum(counts), behind.count("many"))


@pytest.mark.parametrize("how", ["rows", "shards"])
def test_an_export_over_a_stream_that_breaks_is_not_taken_for_whole(behind, cut, how):
    behind.query("CREATE OR REPLACE TABLE one_shard AS SELECT user_id, 0 AS shard FROM many")
    cut.arm(65_536 * 8 + 200_000)
    with pytest.raises(RuntimeError, match=r"table 'one_shard', shard 0: .*185,536 rows"):
        if how == "rows":
            routes.export_rows(behind, "one_shard", f"{behind.storage}/broken", ONE)
        else:
            list(behind.shards("one_shard", {}, ["user_id"]))
    assert cut.broken
    assert tf.io.gfile.glob(behind.local(f"{behind.storage}/broken/*/*")) == []


# What survives, and what runs where --------------------------------------------------------------------


def test_what_arrives_of_values_that_are_easily_lost(warehouse, monkeypatch):
    by_hand = {
        # csv, tfrecord row, parquet, storage read, table stream
        "NULL integer": ["error", "error", "error", "error", "error"],
        "NULL string": ["becomes ''", "error", "error", "error", "error"],
        "string with line break": ["error", "kept", "kept", "kept", "kept"],
        "2^63 - 1": ["kept", "kept", "kept", "kept", "kept"],
        "2^31 read as int32": ["error", "error", "error", "error", "error"],
        # 0.1 in a float32 is 13421773 / 2^27
        "float64 0.1": ["kept", "becomes 0.10000000149011612", "kept", "kept", "kept"],
        "ARRAY []": ["error", "kept", "kept", "kept", "error"],
    }
    assert 13421773 / 2**27 == 0.10000000149011612
    monkeypatch.setattr(route_checks, "CASES", {case: route_checks.CASES[case] for case in by_hand})
    found = route_checks.survival(warehouse)
    for case, outcomes in by_hand.items():
        said = [row["outcome"] for row in found if row["case"] == case]
        assert [re.sub(r"^error: .+", "error", outcome) for outcome in said] == outcomes, (case, said)
    assert not tf.io.gfile.exists(warehouse.local(f"{warehouse.storage}/{route_checks.TABLE}"))
    assert route_checks.TABLE not in {table.table_id for table in warehouse.client.list_tables(bigquery.DATASET)}
    assert all("tmp" not in row["outcome"] and "{{" not in row["outcome"] for row in found)


def test_a_check_that_fails_leaves_nothing_either(warehouse, monkeypatch):
    monkeypatch.setattr(route_checks, "CASES", {"empty string": route_checks.CASES["empty string"]})

    def broken(*_):
        raise KeyError("broken")

    monkeypatch.setattr(route_checks, "ROUTES", {"csv": route_checks.ROUTES["csv"], "broken": broken})
    with pytest.raises(KeyError, match="broken"):
        route_checks.survival(warehouse)
    assert not tf.io.gfile.exists(warehouse.local(f"{warehouse.storage}/{route_checks.TABLE}"))
    assert route_checks.TABLE not in {table.table_id for table in warehouse.client.list_tables(bigquery.DATASET)}


def test_a_difference_in_the_last_bit_is_no_survival():
    same = route_checks._bits
    assert same(0.1) != same(np.nextafter(0.1, 1).item())
    assert same(-0.0) != same(0.0) and same(float("nan")) == same(-float("nan"))
    assert same(None) != same(0) and same("") != same(None)


def test_a_packed_line_decodes_and_one_with_other_rows_than_it_says_is_refused(tmp_path):
    columns = [[-2, 2**62], [3, -(2**63)], [1_600_000_000, -1], [4.5 * 65536, 0.25 * 65536]]
    packed = [base64.urlsafe_b64encode(np.array(column, ">i8").tobytes()).decode() for column in columns]
    for rows, path in ((2, tmp_path / "good.csv"), (3, tmp_path / "bad.csv")):
        path.write_text(",".join([str(rows), *packed]) + "\n")
    (batch,) = routes.read_packed([str(tmp_path / "good.csv")]).as_numpy_iterator()
    assert {name: values.tolist() for name, values in batch.items()} == {
        "user_id": [-2, 2**62], "item_id": [3, -(2**63)], "timestamp": [1_600_000_000, -1], "rating": [4.5, 0.25],
    }  # fmt: skip
    with pytest.raises(tf.errors.InvalidArgumentError, match="column user_id: other rows than the line says"):
        list(routes.read_packed([str(tmp_path / "bad.csv")]))
