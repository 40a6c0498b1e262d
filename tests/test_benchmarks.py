"""The committed result files: measured with the versions of the lock, within what was promised, and quoted rightly."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROAD = json.loads((ROOT / "benchmarks" / "road.json").read_text())
REAL = ("ml-latest-small", "ml-latest-small split=leave-one-out", "ml-1m")


@pytest.fixture(scope="module")
def road():
    spec = importlib.util.spec_from_file_location("road", ROOT / "benchmarks" / "road.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def of(road):
    return road.values(ROAD)


def test_it_was_measured_with_the_locked_versions():
    lock = set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert len(ROAD["versions"]) == 7 and set(ROAD["versions"].items()) <= lock
    assert ROAD["machine"]["cores"] == 2 and re.fullmatch(r"[0-9a-f]{12}\+?", ROAD["commit"])


def test_the_readme_quotes_it(road):
    page = (ROOT / "README.md").read_text()
    assert road.readme(ROAD, page) == page, "run make bench, or render the README from the result file"


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
