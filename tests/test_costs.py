"""The plan: hand arithmetic, prices that are refused, and what is said where something is not known."""

import json
import re
import sys
from pathlib import Path

import pytest
from google.cloud.bigquery import QueryJobConfig

from recsys_common import bigquery, costs

ROOT = Path(__file__).resolve().parent.parent
TIB, GIB = 2**40, 2**30
READ = {"currency": "USD", "region": "us", "read": "2026-01-31"}
# Rows a second and bytes a row that are easy to reckon with: 3.6 M rows/s are 12.96e9 rows an hour.
MEASURED = {
    "csv.gz": 3.6, "export csv.gz": 1.8, "bytes/row csv.gz": 10,
    "parquet": 9.9, "export parquet": 3.6, "write record batches": 7.2, "bytes/row parquet": 16,
    "storage read": 9.9, "export storage read": 0.9, "record batches": 36, "bytes/row record batches": 24,
    "table stream": 1.2,
}  # fmt: skip


def priced(**prices: float) -> dict[str, dict]:
    """prices.json as it is, with these prices filled in."""
    return costs.load_prices() | {k: costs.load_prices()[k] | READ | {"price": p} for k, p in prices.items()}


def benchmark_file(folder: Path, **changed: dict) -> Path:
    rows = [
        {"case": case, "value": value, "unit": "bytes" if case.startswith("bytes") else "M rows/s"}
        for case, value in MEASURED.items()
    ]
    rows = [row | changed.get(row["case"], {}) for row in rows]
    machine = {"cpu": "a made-up CPU", "cores": 3, "memory_gb": 7}
    path = folder / "data_export.json"
    path.write_text(json.dumps({"date": "2026-02-03T04:05:06+00:00", "commit": "c", "machine": machine, "rows": rows}))
    return path


def lines_of(text: str, rows: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """route -> cells, and route -> cost, of the part of a plan that is about so many rows."""
    table, cost = text.split(f"AT {rows:,} ROWS\n")[1].split("\n\n")[:2]
    cells = {line[:14].strip(): re.split(r"  +", line[14:].strip()) for line in table.splitlines()[1:]}
    return cells, {line[:14].strip(): line[14:] for line in cost.splitlines()[1:]}


# Prices ------------------------------------------------------------------------------------------------


def test_no_price_is_filled_in_without_having_been_read():
    prices = costs.load_prices()
    assert set(prices) == set(costs.KINDS)
    assert all(price["source"].startswith("https://cloud.google.com/") for price in prices.values())
    assert all((price["price"] is None) == (price["read"] is None) for price in prices.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": 5.0, **READ, "read": None}, "read None, expected the day on which the price was read"),
        ({"price": 5.0, **READ, "region": None}, "region None, expected where the price holds"),
        ({"price": 5.0, **READ, "read": "9999-01-01"}, "read '9999-01-01'.*not after today"),
        ({"price": 5.0, **READ, "read": "31.1.2026"}, "YYYY-MM-DD"),
        ({"price": 5.0, **READ, "source": ""}, "source '', expected the https:// address"),
        ({"price": 5.0, **READ, "currency": None}, "currency None"),
        ({"price": None, **READ}, "price None, expected a number"),
        ({"price": "5", **READ}, "price '5', expected a number"),
        ({"price": -1, **READ}, "price -1"),
        ({"price": True, **READ}, "price True"),
        ({"unit": "GB scanned"}, "unit 'GB scanned', expected one that begins with TiB, GiB, hour"),
        ({"note": "x"}, "expected the fields currency, price, read, region, source, unit"),
    ],
)
def test_a_price_that_cannot_be_traced_is_refused(tmp_path, change, message):
    content = json.loads(costs.PRICES.read_text())
    content["export"] |= change
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"prices.json, price 'export': .*{message}"):
        costs.load_prices(path)


def test_a_broken_file_of_prices_is_refused(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text('{\n"query": }')
    with pytest.raises(ValueError, match=r"prices\.json, line 2: not JSON"):
        costs.load_prices(path)
    path.write_text(json.dumps({"query": {}}))
    with pytest.raises(ValueError, match=r"prices \['query'\], expected \["):
        costs.load_prices(path)
    content = json.loads(costs.PRICES.read_text())
    content["query"] |= {"price": 1, **READ}
    content["worker"] |= {"price": 1, **READ, "currency": "EUR"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="EUR and USD, which cannot be added"):
        costs.load_prices(path)
    content["worker"]["currency"] = "USD"
    path.write_text(json.dumps(content))
    assert costs.load_prices(path)["worker"]["price"] == 1


def test_your_own_prices_stand_beside_those_that_were_read():
    prices = costs.given(priced(query=5), tpu_v5e=1.5, query=None)
    assert prices["tpu_v5e"]["price"] == 1.5 and prices["query"] == priced(query=5)["query"]
    assert prices["tpu_v5e"]["read"] is None and costs.load_prices()["tpu_v5e"]["price"] is None
    assert costs.given(prices, query=4)["query"] | READ == priced(query=4)["query"] | READ
    assert costs.given(prices, query=4)["query"]["read"] is None  # nobody read that on the page
    for wrong in ({"tpu_v9": 1}, {"cpu": -1}, {"cpu": float("nan")}):
        with pytest.raises(ValueError, match=r"expected a number from 0 up for one of query, .*cpu"):
            costs.given(prices, **wrong)


def test_a_bill_adds_what_is_priced_and_names_what_is_not():
    amounts = {"query": 3 * TIB, "cloud_storage": 500 * GIB, "worker": 2.5, "export": 0}
    assert costs.bill(amounts, costs.load_prices()) == "unread: 3.00 TiB query + 500 GiB files + 2.50 h worker"
    assert costs.bill(amounts, priced(query=5, worker=2)) == "20.00 USD + unread: 500 GiB files"
    assert costs.bill(amounts, priced(query=5, worker=2, cloud_storage=0.25)) == "145.00 USD"
    assert costs.bill(amounts | {"worker": None}, priced(query=5, worker=2, cloud_storage=0.25)) == (
        "140.00 USD + unread: ? h worker"
    )


# Chapter 1 ---------------------------------------------------------------------------------------------


def test_chapter_1_adds_up():
    text = costs.road_plan(2 * TIB, 0, priced(query=5))
    # bytes a row: check 32, popular 24, split 40, parts 22, vocabularies 30, examples 39, shards 15, pairs 38,
    # one person 39, csv 31 = 310; times 2 TiB of rows, at 5 a TiB
    assert f"\nquery    {310 * 2 * 5:,.2f} USD\n" in text
    assert f"\nread     unread: {31 * 2:.1f} TiB read\n" in text
    assert "TiB read through the Storage Read API" in text and "TiB written by EXPORT DATA" not in text
    chapter = (ROOT / "chapters" / "1_what_this_book_is_about.py").read_text()
    scripts = set(re.findall(r'"(\w+\.sql)"', chapter)) - {"last_seen.sql"}  # simulated ratings only
    assert scripts and [name for name in scripts if name not in text] == []


def test_chapter_1_counts_ids():
    ids = costs.road_plan(0, GIB, priced(query=1024))
    # vocabularies 48, examples 24, one person 8 = 80 bytes an id; a TiB costs 1024, so a GiB costs 1
    assert "\nquery    80.00 USD\n" in ids


# Chapter 2 ---------------------------------------------------------------------------------------------


def test_chapter_2_by_hand(tmp_path):
    rows = 12_960_000_000  # an hour at 3.6 M rows/s
    text = costs.routes_plan(rows, costs.load_prices(), costs.load_benchmark(benchmark_file(tmp_path)))
    cells, cost = lines_of(text, rows)
    assert list(cells) == list(cost) == list(costs.ROUTES) and len(cells) == 7
    shards = rows // costs.ROWS_PER_FILE
    table = f"{40 * rows / GIB:,.0f} GiB"
    # csv.gz: 32 + 48 of the own table, 8 to count shards, 40 exported = 128 scanned; 10 stored; 2 h, then 1 h
    scanned = f"{128 * rows / TIB:.2f} TiB"
    assert cells["csv.gz"] == [scanned, "-", table, f"{10 * rows / GIB:.0f} GiB", f"{shards:,}", "2.00", "1.00"]
    assert cost["csv.gz"] == (
        f"unread: {scanned} query + {10 * rows / TIB:.2f} TiB export + {table} tables + {10 * rows / GIB:.0f} GiB files"
    )
    # parquet: both kinds of files, 16 + 24 bytes; an hour of EXPORT DATA, which wrote the 16, half an hour of a worker
    both = f"{40 * rows / GIB:.0f} GiB"
    assert cells["parquet"] == [scanned, "-", table, both, f"{2 * shards:,}", "1.50", "0.10"]
    assert f"+ {16 * rows / TIB:.2f} TiB export" in cost["parquet"] and cost["parquet"].endswith(" + 0.50 h worker")
    # storage read: 32 + 48 + 8 scanned, 40 read, no export
    scanned, read = f"{88 * rows / TIB:,.2f} TiB", f"{40 * rows / GIB:,.0f} GiB"
    assert cells["storage read"][:4] == [scanned, read, table, f"{24 * rows / GIB:.0f} GiB"]
    assert cells["storage read"][5:] == ["4.00", "0.10"]
    assert "export" not in cost["storage read"] and cost["storage read"].endswith(" + 4.00 h worker")
    # a table stream: no files, no shards to count, no shard to read, 3 h an epoch
    assert cells["table stream"] == [
        f"{80 * rows / GIB:,.0f} GiB", f"{32 * rows / GIB:,.0f} GiB", table, "-", "-", "-", "3.00"
    ]  # fmt: skip
    # packed was not measured
    assert cells["packed"][3:] == ["?", f"{shards:,}", "?", "?"] and "? TiB export" in cost["packed"]
    assert "2026-02-03" in text and "3 cores (a made-up CPU) and 7 GB" in text


def test_every_route_is_told_at_50_billion_rows_too(tmp_path):
    text = costs.routes_plan(1e6, priced(query=6), costs.load_benchmark(benchmark_file(tmp_path)))
    cells, cost = lines_of(text, 50_000_000_000)
    assert cells["csv.gz"][-2:] == ["7.72", "3.86"]  # 50e9 / 1.8e6 / 3600, 50e9 / 3.6e6 / 3600
    assert cells["csv.gz"][4] == "12,500"
    money = 128 * 50e9 / TIB * 6
    assert cost["csv.gz"].startswith(f"{money:.2f} USD + unread: {10 * 50e9 / TIB:.2f} TiB export + ")
    assert costs.routes_plan(50e9, costs.load_prices(), None).count("AT 50,000,000,000 ROWS") == 1


def test_what_every_route_needs_is_billed_beside_the_routes(tmp_path):
    rows, billion = 1_000_000, 10**9
    text = costs.routes_plan(rows, priced(query=2**40 / billion, bigquery_storage=2**30 / billion), None)
    block = next(block for block in text.split("\n\n") if block.startswith("The chapter's other SQL"))
    bills = [line.rpartition(": ")[2] for line in block.splitlines()[-2:]]
    # a price of 1 for 1e9 bytes. Bytes a row scanned: split 40, vocabularies 30, hashed 55, histories 39, counts
    # 31 = 195; stored: 39 + 39 + 207 = 285. An id: 48 + 24 + 40 = 112 scanned, 32 stored. route_rows: 40
    # bytes for each of 32 M rows at most, scanned five times, stored once.
    small = (195 + 285 + 240) * rows + 144 * 2 * rows
    full = (195 + 285) * 50e9 + 240 * 32e6 + 144 * 100e6
    assert bills == [f"{small / billion:,.2f} USD", f"{full / billion:,.2f} USD"]
    assert "1,000,000 rows and 2,000,000 ids" in block and "50,000,000,000 rows and 100,000,000 ids" in block
    assert "with 20 items a history" in block
    fewer = costs.routes_plan(rows, priced(query=1), None, ids=70)
    assert "in all, 1,000,000 rows and 70 ids: " in fewer
    chapter = (ROOT / "chapters" / "2_data_export.py").read_text()
    scripts = {"temporal_split.sql", *re.findall(r'"(\w+\.sql)"', chapter)}
    assert "hashed_ids.sql" in scripts and [name for name in scripts if name not in text] == []
    assert f"SAMPLE_FILES = {costs.SAMPLED // costs.ROWS_PER_FILE} " in chapter and "HISTORY = 20\n" in chapter


def test_hours_come_from_the_case_nearest_to_a_full_run(tmp_path):
    path, rows = benchmark_file(tmp_path), 12_960_000_000
    content = json.loads(path.read_text())
    nearer = {"record batches, shuffled": 1.8, "storage read, 50M rows": 0.6, "write record batches, 50M rows": 1.2}
    content["rows"] += [{"case": case, "value": value, "unit": "M rows/s"} for case, value in nearer.items()]
    path.write_text(json.dumps(content))
    cells, cost = lines_of(costs.routes_plan(rows, costs.load_prices(), costs.load_benchmark(path)), rows)
    assert cells["parquet"][-2:] == ["4.00", "2.00"] and cost["parquet"].endswith(" + 3.00 h worker")  # 1 h of export
    assert cells["storage read"][-2:] == ["6.00", "2.00"] and cost["storage read"].endswith(" + 6.00 h worker")
    assert cells["csv.gz"][-2:] == ["2.00", "1.00"] and cells["table stream"][-2:] == ["-", "3.00"]
    content["rows"][-1]["unit"] = "rows/s"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'write record batches, 50M rows': 1\.2 rows/s, expected M rows/s"):
        costs.load_benchmark(path)


def test_a_plan_fits_a_terminal(tmp_path):
    benchmark = costs.load_benchmark(benchmark_file(tmp_path))
    every = dict.fromkeys(costs.WAREHOUSE, 0.123)
    for text in (
        costs.routes_plan(1e12, costs.load_prices(), benchmark, dict.fromkeys(costs.STATEMENTS, 2**46)),
        costs.routes_plan(1e6, priced(**every), benchmark),
        costs.road_plan(1e12, 1e9, costs.load_prices()),
    ):
        assert [line for line in text.splitlines() if len(line) >= 120] == []


def test_each_number_of_bytes_says_where_it_comes_from(tmp_path):
    rows = 3_000_000_000
    text = costs.routes_plan(rows, costs.load_prices(), None, {"check_ratings.sql": 2**37, "export_rows.sql": 2**38})
    check, export, *made = text.split("AT ")[0].splitlines()[2:9]
    assert check.startswith("check_ratings.sql: your table") and export.startswith("export_rows.sql: your table")
    assert "128 GiB, dry run" in check and "256 GiB, dry run" in export
    assert check.endswith("1.46 TiB, schema x rows")  # nobody dry-ran 50 billion rows
    assert len(made) == 5 and all(line.startswith("export_rows") for line in made)
    assert all(line.count("schema x rows") == 2 and "dry run" not in line for line in made)
    assert "does not exist yet, so no dry run can know it" in text
    assert "taken to be scanned alone, which is a lower bound: it may be smaller than a storage block" in text
    cells, _ = lines_of(text, rows)
    assert cells["table stream"][0] == "384 GiB"
    cells, _ = lines_of(text, 50_000_000_000)
    assert cells["table stream"][0] == f"{80 * 50e9 / TIB:.2f} TiB"
    assert "dry run" not in costs.routes_plan(rows, costs.load_prices(), None).split("Schema x rows")[0]


def test_without_the_benchmark_hours_are_not_made_up(tmp_path):
    assert costs.load_benchmark(tmp_path / "none.json") is None
    text = costs.routes_plan(1e9, costs.load_prices(), None)
    cells, cost = lines_of(text, 1_000_000_000)
    assert all(row[-1] == "?" for row in cells.values())
    assert cost["parquet"].endswith("+ ? GiB files + ? h worker")
    assert "not known (?). `make bench`, in a checkout, measures them" in text


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("export parquet", {"unit": "rows/s"}, "'export parquet': 3.6 rows/s, expected M rows/s above 0"),
        ("csv.gz", {"value": 0}, "'csv.gz': 0 M rows/s"),
        ("bytes/row parquet", {"value": -1}, "'bytes/row parquet': -1 bytes"),
    ],
)
def test_a_benchmark_in_other_units_is_refused(tmp_path, case, change, message):
    with pytest.raises(ValueError, match=message):
        costs.load_benchmark(benchmark_file(tmp_path, **{case: change}))


def test_shards_are_as_large_as_the_files_of_a_conversion():
    conversion = (ROOT / "recsys_common" / "conversion.py").read_text()
    assert f"ROWS_PER_FILE = {costs.ROWS_PER_FILE:_}" in conversion


# The command -------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["costs", *arguments])
    code = costs.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(costs, "BENCHMARK", tmp_path / "none.json")
    code, out, _ = command(monkeypatch, capsys)
    assert code == 0 and out.startswith("chapter 1, SCALE=full\n50,000,000,000 ratings, 100,000,000 ids\n")
    code, out, _ = command(
        monkeypatch, capsys, "--chapter", "2", "--rows", "2e9", "--price-query", "5", "--price-cloud-storage", "1"
    )
    _, cost = lines_of(out, 2_000_000_000)
    assert code == 0 and cost["table stream"].startswith(f"{80 * 2e9 / TIB * 5:.2f} in your currency + unread: ")
    assert "TiB scanned                            5.0 (as given)" in out
    assert cost["csv"].endswith(" + ? GiB files")


def test_a_plan_of_training_names_no_price_of_the_warehouse(monkeypatch, capsys, tmp_path):
    content = costs.load_prices()
    content["tpu_v5e"] |= READ | {"price": 1.25}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    monkeypatch.setattr("recsys_common.training_costs.BENCHMARKS", tmp_path)
    code, out, _ = command(monkeypatch, capsys, "--chapter", "5", "--prices", str(tmp_path / "mine.json"))
    assert code == 0 and out.startswith("chapter 5, SCALE=full\nTRAINING ON 50,000,000,000 EXAMPLES\n")
    assert "1.25 USD (2026-01-31)   cloud.google.com/tpu/pricing us\n" in out and "TiB" not in out
    _, out, _ = command(monkeypatch, capsys, "--chapter", "2", "--rows", "1e6")
    assert "TPU" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chapter", "7"], "chapter 7 has no full run yet; chapters 1 to 6 have"),
        (["--chapter", "5", "--utilisation", "1.5"], "utilisation 1.5, expected a share above 0, 1 at most"),
        (["--chapter", "5", "--input-rows", "0"], "input_rows 0.0, expected a number above 0"),
        (["--chapter", "5", "--price-tpu-v5e", "-1"], "price tpu_v5e=-1.0; expected a number from 0 up"),
        (["--prices", "nowhere.json"], "nowhere.json"),
        (["--table", "shop.ratings"], "'shop.ratings' is not a BigQuery table's name"),
        (["--table", "p.shop.ratings`; DROP TABLE x"], "is not a BigQuery table's name"),
        (["--table", "p.shop.ratings"], "no Google credentials to ask for the table's size"),
    ],
)
def test_the_command_refuses(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("recsys_common.scale.credentials", lambda: "")
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "") and message in err


# BigQuery ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect(maximum_bytes_billed=123_456_789) as connected:
        connected.query("CREATE TABLE bought AS SELECT 1 AS user_id, 2 AS item_id, 3.5 AS rating, 4 AS timestamp")
        yield connected


@pytest.fixture
def sent(warehouse, monkeypatch):
    """The configurations of the query jobs that the client sends."""
    found, post = [], warehouse.client._connection.api_request

    def request(*arguments, **options):
        if isinstance(data := options.get("data"), dict) and "query" in data.get("configuration", {}):
            found.append(data["configuration"])
        return post(*arguments, **options)

    monkeypatch.setattr(warehouse.client._connection, "api_request", request)
    return found


def test_every_query_has_a_limit(warehouse, sent):
    assert warehouse.query("SELECT @n AS n", n=5)["n"].to_pylist() == [5]
    assert warehouse.count("bought") == 1
    warehouse.client.query("SELECT 1", job_config=QueryJobConfig(use_query_cache=False)).result()
    warehouse.client.query("SELECT 1").result()
    assert [config["query"]["maximumBytesBilled"] for config in sent] == ["123456789"] * 4


def test_the_limit_is_10_tib_unless_another_is_given(warehouse, sent):
    usual = bigquery.Warehouse(warehouse.server, "embedded", "bucket", bigquery.DATASET, "US")
    assert usual.client.default_query_job_config.maximum_bytes_billed == 10 * TIB


def test_a_dry_run_changes_nothing_and_is_not_known_here(warehouse, sent):
    assert warehouse.scanned("DROP TABLE bought") is None
    assert warehouse.count("bought") == 1
    assert warehouse.scanned("SELECT rating FROM bought WHERE user_id = @u", u=1) is None
    assert [config.get("dryRun") for config in sent] == [True, None, True]
    assert int(sent[0]["query"]["maximumBytesBilled"]) > 2**60  # it may say how far above the limit a query is
    assert sent[2]["query"]["queryParameters"][0]["name"] == "u"
    with pytest.raises(Exception, match="nope"):
        warehouse.scanned("SELECT nope FROM bought")


def test_what_a_dry_run_says_on_google_cloud_is_returned(warehouse, monkeypatch):
    monkeypatch.setattr(warehouse, "embedded", False)  # the service is the embedded one: 0 bytes, but said
    assert warehouse.scanned("SELECT rating FROM bought") == 0


def test_dry_runs_are_of_the_statements_that_would_run(warehouse, monkeypatch):
    """The embedded service runs what would be dry-run, so that the rows can be seen; it has no bytes to tell."""
    answers, query = [], warehouse.client.query

    class Job:
        total_bytes_processed = 77

    def run(sql, job_config):
        job = query(sql, job_config=QueryJobConfig(query_parameters=job_config.query_parameters))
        answers.append(job.to_arrow(create_bqstorage_client=False))
        return Job

    monkeypatch.setattr(warehouse.client, "query", run)
    found = costs.look_up(warehouse.client, "embedded.recsys_common.bought")
    assert found == (1, {"check_ratings.sql": 77, "export_rows.sql": 77})
    check, export = answers
    assert check["rows"].to_pylist() == [1] and check["null_rating"].to_pylist() == [0]
    assert export.to_pylist() == [{"user_id": 1, "item_id": 2, "rating": 3.5, "timestamp": 4, "shard": 0}]


def test_a_table_is_looked_up_by_a_dry_run_that_the_embedded_service_answers(warehouse, sent):
    rows, dry_run = costs.look_up(warehouse.client, "embedded.recsys_common.bought")
    assert rows == 1 and dry_run is None
    assert [config["dryRun"] for config in sent] == [True, True]
    assert "COUNTIF(rating IS NULL)" in sent[0]["query"]["query"]  # the statements themselves, as far as they read
    assert "(users.fingerprint & 0x7fffffff)" in sent[1]["query"]["query"] and "CREATE" not in sent[1]["query"]["query"]
    warehouse.query("CREATE OR REPLACE TABLE other AS SELECT 1 AS user_id")
    with pytest.raises(ValueError, match=r"embedded\.recsys_common\.other: .*item_id"):
        costs.look_up(warehouse.client, "embedded.recsys_common.other")


def test_the_command_asks_about_a_table(warehouse, monkeypatch, capsys):
    monkeypatch.setattr("recsys_common.scale.credentials", lambda: "some")
    monkeypatch.setattr("google.cloud.bigquery.Client", lambda project: warehouse.client)
    warehouse.query("CREATE VIEW seen AS SELECT * FROM bought")
    question = ("--chapter", "2", "--table", "embedded.recsys_common.seen")
    code, _, err = command(monkeypatch, capsys, *question)
    assert code == 2 and "is a view, which has no size of its own, or empty: give --rows" in err
    code, out, _ = command(monkeypatch, capsys, *question, "--rows", "7e6")
    assert code == 0 and "AT 7,000,000 ROWS" in out and "dry run\n" not in out
    monkeypatch.setattr(
        costs, "look_up", lambda client, table: (9_000_000, dict.fromkeys(costs.STATEMENTS, 10 * GIB))
    )  # as Google Cloud would
    code, out, _ = command(monkeypatch, capsys, *question)
    assert code == 0 and "AT 9,000,000 ROWS" in out and out.count("10.0 GiB, dry run") == 2
    _, out, _ = command(monkeypatch, capsys, *question, "--rows", "7e6")
    assert "AT 7,000,000 ROWS" in out and "AT 9,000,000 ROWS" not in out


def test_the_plan_of_large_tables_is_hand_arithmetic(tmp_path):
    rows = [{"case": "row-wise adagrad 100M", "value": 3.6, "unit": "ms/step"}]
    (tmp_path / "embeddings.json").write_text(json.dumps({"rows": rows}))
    text = costs.tables_plan(8192 * 1e6, 2**28, 16, tmp_path / "embeddings.json")
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines() if line.startswith(("lazy", "row-wise"))]
    # 2**28 rows of 16 numbers of 4 bytes are 16 GiB; a million steps of 3.6 ms are an hour.
    assert lines == [
        ["lazy adam", "16.0 GiB", "32.0 GiB", "48.0 GiB", "192 GiB", "?"],
        ["lazy adam, row second moment", "16.0 GiB", "17.0 GiB", "33.0 GiB", "132 GiB", "?"],
        ["row-wise adagrad", "16.0 GiB", "1.00 GiB", "17.0 GiB", "68.0 GiB", "1.00"],
    ]
