"""Do the models of the chapters still reach what they reached? Reads what the chapters recorded at SCALE=small.

The bands are around values measured at the committed seed. Each is tighter than the distance to the popularity
baseline, so a model that recommends nothing, or only what is popular, is outside.
"""

import json
import math
from pathlib import Path

import notebooks
import pytest

ROOT = Path(__file__).resolve().parent.parent

ROUTES = ("csv.gz", "csv", "tfrecord row", "parquet", "storage read", "table stream", "packed")
# chapter -> case -> (lowest, highest) value; cases named in FLOORS are what a model must beat.
BANDS = {
    1: {
        "matrix factorization NDCG@10": (0.232, 0.264),
        "popularity NDCG@10": (0.180, 0.186),
        "best reachable NDCG@10": (0.345, 0.357),
        "chance NDCG@10": (0.012, 0.021),
    },
    # Chapter 2 has no model: every route delivers every row (-1 where it does not), and the files have their size.
    2: {
        **{f"rows {route}": (100_000, 100_000) for route in ROUTES},
        "rows": (100_000, 100_000),
        "hash equal to TensorFlow": (1, 1),
        "bytes/row storage read": (28, 28.28),
        "ids that share a row, hash, 1 rows an id": (0.58, 0.68),
        "cases kept, storage read": (10, 10),
    },
    # Chapter 3 has no model: rows are read once by however many workers, and a stopped run goes on exactly.
    3: {
        **{f"rows read by {count} workers": (70_000, 70_000) for count in (1, 2, 7)},
        "each row once": (1, 1),
        "resumed exactly": (1, 1),
        "resume state": (100, 1000),
        "data, times the memory allowed on top": (4, 5),
        "naive way failed": (1, 1),
        "windows finished": (1, 1),
        "bottlenecks named": (3, 3),
        "rows": (100_000, 100_000),
    },
    # Chapter 4: a lazy model as good as chapter 1's, a killed run that ends the same, steps that do not grow.
    4: {
        "lazy adam NDCG@10": (0.22, 0.27),
        "popularity NDCG@10": (0.180, 0.186),
        "losses equal after SIGKILL": (1, 1),
        "LazyAdam, longest / shortest table": (0.3, 3),
        "RowWiseAdagrad, longest / shortest table": (0.3, 3),
        "Adam, longest / shortest table": (5, 1000),
    },
    # Chapter 5: what the TPU's compiler says, which is the same on every machine.
    5: {
        "lazy adam NDCG@10": (0.199, 0.215),
        "popularity NDCG@10": (0.180, 0.186),
        "HBM of the first program": (16.7, 16.8),
        "16 numbers: moved": (2600, 2800),
        "128 numbers: moved": (1500, 1620),
    },
    # Chapter 6: a run that repeats exactly, better than popularity on rows it did not choose by, and the same in C.
    6: {
        "validation NDCG@10": (0.174, 0.192),
        "validation, popularity NDCG@10": (0.137, 0.141),
        "test NDCG@10": (0.158, 0.182),
        "test, popularity NDCG@10": (0.129, 0.133),
        "metrics repeated to the last bit": (1, 1),
        "golden C": (0, 1e-5),
        "golden Node.js": (0, 1e-5),
    },
}
# chapter -> the models, and the baseline that each must leave behind.
FLOORS = {
    1: {"matrix factorization NDCG@10": "popularity NDCG@10"},
    2: {},
    3: {},
    4: {"lazy adam NDCG@10": "popularity NDCG@10"},
    5: {"lazy adam NDCG@10": "popularity NDCG@10"},
    6: {f"{part} NDCG@10": f"{part}, popularity NDCG@10" for part in ("validation", "test")},
}


def recorded(number):
    """The recorded values of one chapter by case."""
    path = ROOT / "runs" / "small" / f"chapter-{number}" / "metrics.json"
    assert path.is_file(), f"{path.relative_to(ROOT)} is missing: run make test, or make chapter-{number}, first"
    return {row["case"]: row["value"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def violations(values, bands):
    """The cases that are missing or outside of their bands, one line each; NaN is outside of any."""
    missing = [f"{case}: not recorded; recorded: {sorted(values)}" for case in bands if case not in values]
    outside = [
        f"{case}: {values[case]} is outside of {low} to {high}"
        for case, (low, high) in bands.items()
        if case in values and not low <= values[case] <= high
    ]
    return missing + outside


def test_every_chapter_has_bands():
    assert list(BANDS) == list(notebooks.chapters(ROOT / "chapters"))
    assert list(FLOORS) == list(BANDS)


@pytest.mark.parametrize("number", BANDS)
def test_recorded_metrics_lie_in_their_bands(number):
    assert violations(recorded(number), BANDS[number]) == []


@pytest.mark.parametrize("number", BANDS)
def test_bands_are_tighter_than_the_distance_to_the_baseline(number):
    for model, baseline in FLOORS[number].items():
        low, high = BANDS[number][model]
        top_of_baseline = BANDS[number][baseline][1]
        assert low > top_of_baseline, f"{model} may fall to {low}, which {baseline} reaches"
        assert high - low < (low + high) / 2 - top_of_baseline, f"the band of {model} is too wide"


@pytest.mark.parametrize("number", BANDS)
def test_the_gate_can_fail(number):
    good = recorded(number)
    for model, baseline in FLOORS[number].items():
        for bad in (0.0, good[baseline], math.nan):
            (told,) = violations(good | {model: bad}, BANDS[number])
            assert told.startswith(f"{model}: {bad} is outside of")
        (told,) = violations({case: value for case, value in good.items() if case != model}, BANDS[number])
        assert told.startswith(f"{model}: not recorded")


@pytest.mark.parametrize("number", BANDS)
def test_the_check_stayed_within_memory_and_says_how_long_it_took(number, tell):
    path = ROOT / "runs" / "small" / f"chapter-{number}" / "check.json"
    assert path.is_file(), f"{path.relative_to(ROOT)} is missing: run make check first"
    record = json.loads(path.read_text(encoding="utf-8"))
    seconds, memory = record["seconds"], record["peak_memory_mb"]
    slow = " - over its budget of 75 s" if seconds > 75 else ""  # told, not failed: the machine may be slow
    tell(f"chapter {record['chapter']}: {seconds:.0f} s, {memory:,} MB at the small scale{slow}")
    assert memory <= 4_000, f"peak memory {memory} MB, the budget is 4 GB"
