"""The committed result files: measured with the versions of the lock, within what was promised, and quoted rightly."""

import asyncio
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUOTED = ("road", "data_export", "input_pipeline", "embeddings", "tpu_rehearsal", "serving")
NAMES = (*QUOTED, "data_service", "tensorflow_2_20")
CONTENTS = [json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) for name in NAMES]
ROAD, EXPORT, PIPELINE, TABLES, REHEARSAL, SERVING, SERVICE, OLDER = CONTENTS
sys.path.append(str(ROOT / "benchmarks"))  # the scripts share _finish.py
REAL = ("ml-latest-small", "ml-latest-small split=leave-one-out", "ml-1m")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def road():
    return script("road")


@pytest.fixture(scope="module")
def of(road):
    return road.values(ROAD)


@pytest.mark.parametrize("content", CONTENTS, ids=NAMES)
def test_it_was_measured_with_the_locked_versions(content):
    lock = set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert len(content["versions"]) == 7 and set(content["versions"].items()) <= lock
    assert content["machine"]["cores"] == 2 and re.fullmatch(r"[0-9a-f]{12}\+?", content["commit"])


@pytest.mark.parametrize("content", CONTENTS[: len(QUOTED)], ids=QUOTED)
def test_the_readme_quotes_it(content):
    page = (ROOT / "README.md").read_text()
    rendered = script(content["name"]).readme(content, page)
    assert rendered == page, "run make bench, or render the README from the result file"


def test_matrix_factorization_beats_popularity_everywhere(of):
    for name in ("simulated", *REAL):
        assert of[f"{name}: matrix factorization NDCG@10"] > of[f"{name}: popularity NDCG@10"], name
    assert of["simulated: matrix factorization NDCG@10"] < of["simulated: best reachable NDCG@10"]
    assert of["ml-1m: matrix factorization NDCG@10"] >= 0.036


def test_popularity_on_ml_1m_is_the_published_one(of):
    """Leave-one-out, full ranking, seen items removed: HR@10 .0369, NDCG@10 .0180."""
    assert round(of["ml-1m: popularity HR@10"], 4) == 0.0369
    assert round(of["ml-1m: popularity NDCG@10"], 4) == 0.0180


def test_the_road_is_as_fast_as_promised(of):
    assert of["simulated: chapter 1"] < 75 and of["simulated: peak memory"] < 3000
    assert of["ml-1m: chapter 1"] < 600
    assert of["ml-1m: rows"] == 999_611 and of["ml-1m: load to tensors"] < 60
    assert of["make book, fresh clone"] < 360
    assert of["make book, second call"] < 5
    assert of["import recsys_common after tensorflow"] < 0.3
    assert of["make doctor"] < 3 and of["warehouse start"] < 3


def test_the_simulator_resembles_ml_100k(of):
    cases = [case.removeprefix("ml-100k: ") for case in of if case.startswith("ml-100k: ") and "NDCG" not in case]
    assert len(cases) == 9
    for case in cases:
        real, simulated = of[f"ml-100k: {case}"], of[f"simulated: {case}"]
        assert abs(simulated / real - 1) < 0.3, f"{case}: simulated {simulated}, ml-100k {real}"
    # The gain over popularity itself, not only the ratio to it.
    gain = "gain of matrix factorization over popularity"
    assert abs((of[f"simulated: {gain}"] - 1) / (of[f"ml-100k: {gain}"] - 1) - 1) < 0.3


# data_export -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(road):
    return road.values(EXPORT)


def test_record_batches_read_as_fast_as_promised(export):
    """40 times gzipped CSV, and 65% of the same files without decoding."""
    assert export["record batches / csv.gz"] >= 40
    assert export["record batches / raw read"] >= 0.65
    rows = {row["case"]: row for row in EXPORT["rows"]}
    for case in ("record batches", "raw read", "csv.gz", "record batches / csv.gz", "record batches / raw read"):
        assert rows[case]["repeats"] >= 5 and rows[case]["min"] <= rows[case]["value"] <= rows[case]["max"]


def test_writing_is_fast_and_its_memory_flat(export):
    assert export["write record batches"] >= 5
    few, many = (export[f"write record batches, {rows} rows: peak memory"] for rows in ("2M", "50M"))
    assert many < 1.25 * few, "MB of the whole process, TensorFlow included"


def test_files_are_small(export):
    assert export["bytes/row columns"] == 28
    assert export["bytes/row record batches"] <= 1.01 * export["bytes/row columns"]
    assert export["bytes/row record batches ZLIB"] <= export["bytes/row parquet"]


def test_fifty_million_rows_arrived(export):
    assert export["storage read, 50M rows: rows"] == 50_000_000
    assert export["storage read, 50M rows: checks equal"] == 10
    assert export["kills, then equal to an undisturbed conversion"] == 10


def test_chapter_2_is_as_fast_as_promised(export):
    assert export["chapter 2"] < 75 and export["chapter 2: peak memory"] < 4000


def test_every_route_was_measured(export):
    routes = ("csv.gz", "csv", "tfrecord row", "parquet", "storage read", "packed")
    cases = {*routes, "table stream", "record batches", "raw read", "write record batches"}
    cases |= {f"export {route}" for route in routes} | {f"bytes/row {route}" for route in routes}
    assert cases - set(export) == set()
    assert export["record batches"] == max(export[case] for case in cases - {"raw read"} if "bytes" not in case)


# input_pipeline ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(road):
    return road.values(PIPELINE)


def test_the_shuffle_is_as_fast_as_promised(pipeline):
    assert pipeline["shuffled record batches / row shuffle"] >= 30
    assert pipeline["shuffled record batches / book pipeline"] >= 18
    # 12 and 7 were asked for, of a book pipeline that was half as fast. Hashing takes more time than the shuffle, and
    # writing numbers as text nearly all of the second; SQL can do either once.
    assert pipeline["shuffled, integer hash / book pipeline"] >= 11
    assert pipeline["shuffled, fingerprint hash / book pipeline"] >= 4
    assert pipeline["permute three columns: dynamic_stitch"] < pipeline["permute three columns: gather"]
    rows = {row["case"]: row for row in PIPELINE["rows"]}
    for case in ("book pipeline", "row shuffle", "shuffled record batches", "shuffled record batches / book pipeline"):
        assert rows[case]["repeats"] >= 5 and rows[case]["min"] <= rows[case]["value"] <= rows[case]["max"]


def test_memory_is_flat_and_less_than_the_data(pipeline):
    for kind in ("", ", not shuffled"):
        peaks = [pipeline[f"memory {rows}{kind}"] for rows in ("1M", "10M", "100M")]
        assert max(peaks) <= 1.1 * min(peaks), "MB of the whole process, TensorFlow included"
    rows = {row["case"]: row for row in PIPELINE["rows"]}
    for case in ("record batches", "shuffled record batches"):
        assert rows[f"limited: {case}"]["failure"] == ""
        assert 4 * rows[f"limited: {case}"]["limit"] < pipeline["limited: data"]
    for case in ("whole table", "cache()", "row buffer of all rows"):
        assert re.match("MemoryError|ResourceExhausted|SIGABRT|SIGSEGV", rows[f"limited: {case}"]["failure"])


def test_a_resume_is_fast_small_and_exact(pipeline):
    assert pipeline["resume"] < 2 and pipeline["resume state"] < 64_000
    assert pipeline["resume: goes on exactly"] == 1


def test_the_order_of_sharded_files_is_uniform_and_helps_the_model(pipeline):
    def of(order, case):
        return pipeline[f"order {order}: {case}"]

    sharded, by_sum = "windowed, sharded files", "windowed, shards by a sum"
    for order in (sharded, by_sum):
        for case in ("displacement", "spread of a batch", "rows of the same user in a batch"):
            assert abs(of(order, case) - 1) < 0.03
        assert abs(of(order, "label autocorrelation")) < 2 / 270_000**0.5 * 1.5
    rows = {row["case"]: row for row in PIPELINE["rows"]}
    for good in ("windowed", "windowed, sharded files"):
        for bad in ("none", "row buffer of 10,000"):
            assert rows[f"order {good}: NDCG@10"]["min"] > rows[f"order {bad}: NDCG@10"]["max"]
    # What no measure of the order sees, the model does.
    assert rows[f"order {sharded}: NDCG@10"]["min"] > rows[f"order {by_sum}: NDCG@10"]["max"]


def test_every_rung_was_measured(pipeline):
    rungs = [row["case"] for row in PIPELINE["rows"] if "change" in row]
    asked = ["tutorial slices", "row-by-row generator", "CSV", "batch, then parse", "gzip", "interleave", "prefetch"]
    asked += ["parallel map", "columns: record batches", "larger batches", "column shuffle", "private thread pools"]
    assert set([*asked, "direct device feed"]) <= set(rungs)
    assert all(pipeline[f"{rung}: peak memory"] > 100 for rung in rungs)


def test_chapter_3_is_as_fast_as_promised(pipeline):
    assert pipeline["chapter 3"] < 75 and pipeline["chapter 3: peak memory"] < 4000


# data_service ------------------------------------------------------------------------------------------


def test_the_service_reads_each_row_once_until_a_worker_is_lost():
    """What the chapter's text says of each mode."""
    rows = {row["case"]: row for row in SERVICE["rows"]}
    for mode in ("DYNAMIC", "FILE", "DATA", "HINT"):
        calm, killed = rows[f"{mode}: undisturbed"], rows[f"{mode}: killed, started again"]
        assert calm["once"] == calm["arrivals"] == 960_000
        assert killed["value"] > 0 if mode == "DYNAMIC" else killed["more"] > 0
    assert rows["OFF: undisturbed"]["arrivals"] == 3 * 960_000
    assert rows["DYNAMIC: undisturbed, batches"]["once"] == 960_000
    for case in ("killed", "killed, replaced"):
        assert rows[f"DYNAMIC: {case}"]["end"] == "no batch for 20 s"
    assert rows["DYNAMIC: dispatcher killed, started again"]["once"] == 960_000
    assert "Error" in rows["DYNAMIC: dispatcher killed, started again without journal"]["end"]


# embeddings --------------------------------------------------------------------------------------------

SIZES = ("10k", "100k", "1M", "10M")


@pytest.fixture(scope="module")
def tables():
    return {row["case"]: row for row in TABLES["rows"]}


def test_a_step_costs_what_it_touches(tables):
    for case in ("lazy adam, row second moment", "row-wise adagrad", "lazy adam, dimension 8"):
        assert tables[f"{case} 100M / 100k"]["value"] <= 1.5
        assert tables[f"{case} 100M / 100k, uniform ids"]["value"] <= 2
    assert tables["tf-keras adam / lazy adam, 10M"]["value"] >= 100
    assert tables["torch sparse adam / lazy adam, 10M"]["value"] >= 1.3
    optimizers = ("lazy adam", "row-wise adagrad", "tf-keras adam", "keras 3 adam", "torch sparse adam", "torch adam")
    for case in (f"{optimizer} {size}" for optimizer in optimizers for size in SIZES):
        assert tables[case]["repeats"] >= 5 and tables[case]["unit"] == "ms/step"


def test_a_hundred_million_rows_fit_and_are_made_once(tables):
    held = tables["memory 100M, lazy adam, row second moment"]
    assert 13 < held["value"] <= held["peak"] < 16
    for case in ("lazy adam, row second moment", "row-wise adagrad", "lazy adam, dimension 8"):
        assert tables[f"create 100M, {case}"]["value"] < 60
        assert tables[f"create 100M, {case}: peak"]["value"] <= 1.1


def test_a_checkpoint_takes_no_second_table_of_memory(tables):
    assert tables["checkpoint 100M: size"]["value"] > 13
    for way in ("save", "restore"):
        assert tables[f"checkpoint 100M: {way}, peak"]["value"] <= 1.2
        assert tables[f"checkpoint 100M: {way}, share of the disk's speed"]["value"] >= 0.7


def test_lazy_adam_is_within_five_per_cent_of_adam(tables):
    assert tables["quality: items"]["value"] == 1_000_000
    assert 0.5 < tables["quality: items never touched"]["value"] < 1
    assert tables["quality: tf-keras adam"]["value"] > 1.5 * tables["quality: popularity"]["value"]
    for way in ("lazy adam", "lazy adam, corrected for skipped steps"):
        change = tables[f"quality: {way} / tf-keras adam - 1"]  # the 95% interval of the mean
        assert len(tables[f"quality: {way}"]["seeds"]) == 5 and -0.05 < change["min"] < change["max"] < 0.05


def test_random_configs_and_killed_runs(tables):
    found = [tables[f"random configs: {what}"]["value"] for what in ("round trip", "refused")]
    assert sum(found) == tables["random configs"]["value"] == 10_000 and min(found) > 2000
    assert tables["kills"]["value"] == 10 and tables["kills: difference of the final loss"]["value"] == 0
    assert tables["kills: steps trained again"]["value"] > 0


def test_chapter_4_is_as_fast_as_promised(tables):
    assert tables["chapter 4"]["value"] < 75 and tables["chapter 4: peak memory"]["value"] < 4000


# tpu_rehearsal -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed():
    return {row["case"]: row for row in REHEARSAL["rows"]}


def test_every_model_was_compiled_for_every_chip_in_time(rehearsed):
    """Under 3 minutes and 6 GB each, tables of 100 million rows included."""
    from recsys_common import tpu_compiler

    assert REHEARSAL["compiler"] == tpu_compiler.TESTED
    bench = script("tpu_rehearsal")
    for model in bench.MODELS:
        for dim in bench.DIMS:
            for topology in bench.ONE_CHIP:
                row = rehearsed[f"{model}, dimension {dim}, {topology}"]
                assert row["seconds_to_compile"] < 180 and row["compiler_memory"] < 6e9
                assert row["arguments"] > 100e6 * dim * 4 * 2  # the table and its first moment
                assert row["compiles"] or "HbmOom" in row["error"]
                if row["compiles"] and row["fits"]:
                    assert row["hbm_bytes"] <= row["available"] and row["step_seconds_at_least"] > 0
                    assert row["bound"] in ("compute", "memory", "interconnect")
    for part in ("models", "variants", "slices"):
        assert rehearsed[f"{part}: peak memory of TensorFlow's process"]["value"] < 6


def test_flops_and_bytes_predict_this_cpu_within_a_factor_of_three(rehearsed):
    ratios = [row for case, row in rehearsed.items() if case.endswith("measured / predicted")]
    assert len(ratios) == 6 and all(1 / 3 < row["value"] < 3 for row in ratios)


def test_what_chapter_5_says_of_its_tables(rehearsed):
    for case, row in rehearsed.items():
        if row.get("part") == "models" and row.get("compiles") and row["fits"]:
            assert row["bound"] == "memory", case
    assert rehearsed["chapter 5"]["value"] < 100 and rehearsed["chapter 5: peak memory"]["value"] < 4000


# serving -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    return {row["case"]: row for row in SERVING["rows"]}


def test_three_languages_give_the_same_numbers(served):
    for language in ("Python", "C", "Node.js"):
        row = served[f"golden {language}"]
        assert len(row["each"]) == 2 and row["value"] == max(row["each"].values()) <= 1e-5 and row["wrong ids"] == 0


def test_a_list_from_a_million_items_is_as_fast_as_promised(served):
    """The vectors are of a model that learned something."""
    assert served["model: items"]["value"] == 1_000_000
    for case in (case for case in served if case.startswith("model: ")):
        assert re.fullmatch(r"[0-9a-f]{12}\+?", served[case]["made at"]), "a model that is kept outlives commits"
    assert served["model: NDCG@10"]["value"] > 1.5 * served["model: NDCG@10 of popularity"]["value"]
    assert served["exact top-100 C / read once"]["value"] <= 2
    for case in ("exact top-100 C", "read vectors once C", "index top-100 Node.js", "index top-100 Python"):
        assert served[case]["unit"] == "ms" and served[case]["repeats"] >= 5
    assert served["index top-100 Node.js"]["value"] < 2 and served["index top-100 Python"]["value"] < 2
    assert served["recall@100 Node.js"]["value"] >= 0.95 and served["recall@100 Node.js"]["users"] == 700
    recall = served["recall@100"]
    assert recall["value"] >= 0.95 and recall["users"] == 1000
    assert recall["value"] == served[f"recall@100, expansion_search {recall['expansion_search']}"]["value"]


WRONG = {  # what is answered -> is it what was asked for: 2 items, without 7
    (200, '{"items": [{"item_id": "3"}, {"item_id": "4"}]}'): True,
    (200, '{"items": []}'): False,
    (200, '{"items": [{"item_id": "3"}]}'): False,
    (200, '{"items": [{"item_id": "3"}, {"item_id": "3"}]}'): False,
    (200, '{"items": [{"item_id": "3"}, {"item_id": "7"}]}'): False,
    (500, '{"items": [{"item_id": "3"}, {"item_id": "4"}]}'): False,
}


@pytest.mark.parametrize("status, answer", WRONG)
def test_a_wrong_answer_is_a_failed_request(status, answer):
    async def answering(reader, writer):
        while head := await reader.readline():
            if head.startswith(b"content-length:"):
                await reader.readexactly(2 + int(head.split()[1]))
                await asyncio.sleep(0.02)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())
        writer.close()

    async def measured():
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return await script("_load").load(port, 6, 2, [[{"k": 2, "seen_item_id": [7, 8]}, 200]])

    found = asyncio.run(measured())
    assert found["failed"] == (0 if WRONG[status, answer] else 6) and found["statuses"] == {str(status): 6}
    assert len(found["ms"]) == 6 and 0.06 <= found["seconds"] < 0.001 * sum(found["ms"]), "three after another, by two"


def test_no_request_failed(served):
    assert served["service failed"]["value"] == 0 and served["service failed"]["of"] >= 10_000
    assert served["service: bad requests, answered 422"]["value"] == served["service failed"]["of"] // 50
    assert (
        served["service p50"]["requests"] >= 10_000 and served["service p50"]["value"] < served["service p99"]["value"]
    )


def test_saving_and_loading_hold_the_table_once(served):
    """At most 1.3 times the table, of 10 million rows."""
    for case in ("save", "load, load"):
        assert 0 < served[f"memory to {case}"]["value"] <= 1.3


# tensorflow_2_20 ---------------------------------------------------------------------------------------


def test_the_chapters_run_on_the_tensorflow_of_tpu_machines():
    from test_gate import BANDS

    lock = set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements-tpu.txt").read_text(), re.M))
    assert OLDER["other versions"]["tensorflow-tpu"] == "2.20.0" and set(OLDER["other versions"].items()) <= lock
    older = script("tensorflow_2_20")
    there = [number for number in older.CHAPTERS if list((ROOT / "chapters").glob(f"{number}_*.py"))]
    rows = {row["case"]: row for row in OLDER["rows"]}
    for number in there:
        assert rows[f"chapter {number}"]["build"] == older.CHAPTERS[number], "make bench"
        assert rows[f"chapter {number}"]["value"] < 150 and rows[f"chapter {number}: peak memory"]["value"] < 4000
        if number in older.METRICS:
            low, high = BANDS[number][older.METRICS[number]]
            assert low <= rows[f"chapter {number}: {older.METRICS[number]}"]["value"] <= high


def test_saved_models_and_checkpoints_cross_both_ways():
    rows = {row["case"]: row for row in OLDER["rows"]}
    for way in ("2.20 -> 2.21", "2.21 -> 2.20"):
        saved, checkpoint = (
            rows[f"SavedModel {way}: largest difference"],
            rows[f"checkpoint {way}: largest difference of a loss"],
        )
        assert set(saved["each"]) == {"score", "best", "tower"} and min(saved["largest value"].values()) > 0.01
        assert saved["value"] <= 1e-6 and rows[f"SavedModel {way}: lists equal"]["value"] == 1
        assert checkpoint["value"] <= 1e-6 * checkpoint["largest value"] and checkpoint["steps"] == 20
    # tf-keras's own reader, unlike TensorFlow's, knows only what it knew when it was made.
    works = [rows[f"tf-keras load_model {way}: works"]["value"] for way in ("2.20 -> 2.21", "2.21 -> 2.20")]
    assert works == [1, 0] and "optional" in rows["tf-keras load_model 2.21 -> 2.20: works"]["error"]


def test_the_benchmark_of_two_versions_installs_one_of_each_package(tmp_path):
    older = script("tensorflow_2_20")
    (tmp_path / "lock").write_text(
        "a==1 \\\n    --hash=sha256:0\n    # via b\nb==2 ; x == 'y' \\\n    --hash=sha256:1\n# end\n"
    )
    assert older.entries(tmp_path / "lock") == {
        "a": "a==1 \\\n    --hash=sha256:0\n    # via b\n",
        "b": "b==2 ; x == 'y' \\\n    --hash=sha256:1\n",
    }
