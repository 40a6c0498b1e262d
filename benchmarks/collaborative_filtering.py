"""What do the simple models reach when each is tuned with the same small budget, and what decides it?

    python benchmarks/collaborative_filtering.py --data-dir folder          (make bench DATA_DIR=folder)

Writes benchmarks/collaborative_filtering.json. `folder` holds ml-1m and ml-100k (data/README.md). Parts:

    ranking      each model on ml-1m leave-one-out, ml-100k and simulated ratings by time: tuned on validation
    ratings      RMSE on ml-1m 90/10 and the five folds of ml-100k, with settings chosen within training rows
    questions    hashing, bias terms, negatives, regularisation: one thing changed, the same users compared
    als          our iALS beside the library `implicit`, in turns, in an environment of its own (build/implicit)
    speed        exact ranking beside the matrix product that it needs

Each row is written as soon as it is there; a part that is called again goes on with the rows that it lacks, unless
--again. The whole takes about an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from _finish import finish, quoted

from recsys_common import datasets, experiment, features, interactions, metrics, scale, splits

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "benchmarks" / "collaborative_filtering.json"
PARTS = ("ranking", "ratings", "questions", "als", "speed")
PACKAGES = ("numba", "optuna", "scipy", "scikit-learn")
MODELS = ("popularity", "item-knn", "ease", "ials", "bpr", "matrix-factorization", "lightgcn")
DATASETS = ("ml-1m", "ml-100k", "simulated")
TRIALS, SEEDS = 8, (1, 2, 3)
RANDOM = ("ials", "bpr", "matrix-factorization", "lightgcn")  # a seed makes a difference
KS = (10, 20)
KLENITSKIY = "Klenitskiy & Vasilev, RecSys 2023, arXiv 2309.07602"
PETROV = "Petrov & Macdonald, RecSys 2022, arXiv 2207.07483"
PUBLISHED = {  # (model, metric) on ml-1m leave-one-out -> value, source
    ("bpr", "hr@10"): (0.0740, PETROV),
    ("bpr", "ndcg@10"): (0.0377, PETROV),
}
OTHERS = [  # rows of the same file and protocol that are not ours
    {"model": "sasrec", "hr@10": 0.2500, "ndcg@10": 0.1341, "source": KLENITSKIY},
    {"model": "sasrec, full softmax", "hr@10": 0.3152, "ndcg@10": 0.1821, "source": KLENITSKIY},
]
VASP = "Vancura & Kordik, VASP, 2021, arXiv 2102.05774, table III"
ML_20M = [  # strong generalisation by the protocol of Liang et al.: others' results
    {"model": "ease", "capped-recall@20": 0.391, "capped-recall@50": 0.521, "ndcg@100": 0.420, "source": VASP},
    {"model": "mult-dae", "capped-recall@20": 0.387, "capped-recall@50": 0.524, "ndcg@100": 0.419, "source": VASP},
    {"model": "mult-vae", "capped-recall@20": 0.395, "capped-recall@50": 0.537, "ndcg@100": 0.426, "source": VASP},
]


# The data ----------------------------------------------------------------------------------------------


@functools.cache
def parts_of(name: str, data_dir: str) -> dict[str, splits.Split]:
    """The validation and test parts of a data set; in time, of people who are in training, as in chapter 1."""
    if name == "ml-1m":
        return splits.leave_one_out(*interactions.read(f"{data_dir}/ml-1m/sasrec-ml-1m.txt"))
    tables = datasets.load(name, data_dir)
    users, items, _, times = (tables.ratings[column].to_numpy() for column in tables.ratings.column_names)
    found = splits.temporal(users, items, times)
    return {part: dataclasses.replace(each, test=known(each)) for part, each in found.items()}


def known(split: splits.Split) -> interactions.Interactions:
    """What is asked of people who are in training."""
    test = split.test
    there = split.train.lengths[test.users] > 0
    return interactions.Interactions.of_pairs(test.users[there], test.items[there], test.num_users, test.num_items)


def protocol_of(name: str) -> str:
    """What the parts are."""
    return "leave-one-out" if name == "ml-1m" else "temporal"


# Rows --------------------------------------------------------------------------------------------------


class Results:
    """The result file, written after each row."""

    def __init__(self, parts: list[str], again: bool):
        before = json.loads(PATH.read_text()) if PATH.exists() else {"rows": []}
        self.rows = [row for row in before["rows"] if not (again and row.get("part") in parts)]
        self.tuned = {name: row for name, row in before.get("tuned", {}).items() if not (again and "ranking" in parts)}
        self.commit = scale.commit()

    def has(self, case: str) -> bool:
        """Whether a row is there."""
        return any(row["case"] == case for row in self.rows)

    def content(self) -> dict:
        """The result file's content."""
        content = scale.result(
            "collaborative_filtering", self.rows, scale="benchmark", dataset="ml-1m, ml-100k, simulated"
        )
        own = {name: importlib.metadata.version(name) for name in PACKAGES}
        return content | {"packages": own, "tuned": self.tuned, "ml-20m published": ML_20M, "others": OTHERS}

    def add(self, part: str, rows: list[dict]) -> None:
        """Rows of a part, instead of those of the same cases."""
        cases = {row["case"] for row in rows}
        self.rows = [row for row in self.rows if row["case"] not in cases]
        self.rows += [row | {"part": part, "made at": self.commit} for row in rows]
        scale.write_json(PATH, self.content())
        for row in rows:
            print(f"{row['case']}: {row['value']:.4f}", file=sys.stderr, flush=True)


def row_of(model, dataset, protocol, metric, value, more: dict | None = None, case: str = "", unit: str = "") -> dict:
    """One row, with the columns that the other chapters' files have too."""
    published, source = PUBLISHED.get((model, metric), (None, None)) if dataset == "ml-1m" else (None, None)
    row = {"case": case or f"{model}, {dataset}, {protocol}, {metric}", "model": model, "dataset": dataset}
    row |= {"protocol": protocol, "metric": metric, "value": value, "unit": unit}
    return row | {"published": published, "source": source} | (more or {})


# Ranking -----------------------------------------------------------------------------------------------


def judged(model: str, split: splits.Split, settings: dict, seed: int):
    """The ranking of a model that is fitted, with its seconds, and the memory of the process."""
    start = time.perf_counter()
    fitted = experiment.fit(model, split, settings, seed)
    seconds = time.perf_counter() - start
    return experiment.rank(fitted, split, max(KS)), seconds


def ranking_rows(results: Results, data_dir: str, models: list[str]) -> None:
    """Tune on validation; then the test, once for each seed."""
    for dataset in DATASETS:
        protocol = protocol_of(dataset)
        for model in models:
            if results.has(f"{model}, {dataset}, {protocol}, ndcg@10"):
                continue
            parts = parts_of(dataset, data_dir)
            key = f"{model}, {dataset}"
            if key not in results.tuned:
                found = experiment.tune(model, parts["validation"], TRIALS)
                results.tuned[key] = dataclasses.asdict(found)
            settings, seeds = results.tuned[key]["settings"], SEEDS if model in RANDOM else SEEDS[:1]
            rankings, seconds = zip(*(judged(model, parts["test"], settings, seed) for seed in seeds), strict=True)
            of_users = [metrics.per_user(each, KS) for each in rankings]
            mean = {name: np.mean([each[name] for each in of_users], 0) for name in of_users[0]}
            about = {"seconds": round(float(np.mean(seconds)), 2), "memory_gb": peak_gb(), "seeds": list(seeds)}
            about |= {"parameters": settings, "trials": len(results.tuned[key]["trials"])}
            rows = []
            for name, values in mean.items():
                low, high = metrics.interval(values)
                every = [float(each[name].mean()) for each in of_users]
                rows.append(
                    row_of(model, dataset, protocol, name.lower(), float(values.mean()), about)
                    | {"low": low, "high": high, "of seeds": every}
                )
            seen, sliced = np.bincount(parts["test"].seen.users, minlength=parts["test"].seen.num_users), rankings[0]
            of_sample = metrics.per_user(metrics.sampled(sliced, seen), (10,), ("NDCG",))["NDCG@10"]
            rows.append(row_of(model, dataset, protocol, "ndcg@10 among 100 sampled", float(of_sample.mean()), about))
            rows.append(row_of(model, dataset, protocol, "coverage@10", metrics.coverage(sliced, 10), about))
            for name, found in metrics.by_popularity(sliced, parts["test"].train.frequency).items():
                for what, value in found.items():
                    rows.append(row_of(model, dataset, protocol, f"{what}, {name}", value, about))
            np.save(kept(model, dataset), mean["NDCG@10"])
            results.add("ranking", rows)
    paired_rows(results)


def kept(model: str, dataset: str) -> Path:
    """Where NDCG@10 of each user lies, to compare models that were judged in another call."""
    folder = ROOT / "build" / "collaborative_filtering"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}, {dataset}.npy"


def paired_rows(results: Results) -> None:
    """The best model of each data set beside each of the others, person by person."""
    for dataset in DATASETS:
        best = {model: np.load(kept(model, dataset)) for model in MODELS if kept(model, dataset).exists()}
        if not best:
            continue
        top = max(best, key=lambda name: best[name].mean())
        results.rows = [row for row in results.rows if (row["metric"], row["dataset"]) != ("difference", dataset)]
        for model in best:
            if model != top:
                found = metrics.paired(best[top], best[model])
                case = f"{top} less {model}, {dataset}, {protocol_of(dataset)}, ndcg@10"
                more = {"low": found.low, "high": found.high, "p": found.p}
                row = row_of(model, dataset, protocol_of(dataset), "difference", found.difference, more, case)
                results.add("ranking", [row])


def peak_gb() -> float:
    """Peak memory of this process so far."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


# Ratings -----------------------------------------------------------------------------------------------

AUTOREC = "Sedhain et al., WWW 2015, and its followers"
SURPRISE = "Surprise's README, its defaults and random folds"
RATINGS = {  # name -> model, fixed settings, published RMSE of ml-1m and of ml-100k
    "biases alone": (
        "biased-mf",
        {"dim": 0, "solver": "als", "epochs": 15, "learning_rate": 0.015, "l2": 0.0},
        {"ml-100k": (0.944, SURPRISE)},
    ),
    "biased-mf": ("biased-mf", {}, {"ml-1m": (0.845, AUTOREC), "ml-100k": (0.934, SURPRISE)}),
    "biased-mf, als": ("biased-mf", {"solver": "als", "dim": 64, "learning_rate": 0.015, "epochs": 12}, {}),
    "svdpp": ("svdpp", {}, {"ml-100k": (0.920, SURPRISE)}),
}


@functools.cache
def rating_splits(dataset: str, data_dir: str) -> tuple[splits.RatingSplit, ...]:
    """ml-1m: three random tenths; ml-100k: the five folds that it comes with."""
    if dataset == "ml-100k":
        folds = [(f"{data_dir}/ml-100k/u{fold}.base", f"{data_dir}/ml-100k/u{fold}.test") for fold in range(1, 6)]
        return tuple(splits.rated(*map(interactions.read_ratings, files)) for files in folds)
    columns = interactions.read_ratings(f"{data_dir}/ml-1m/ratings_no_timestamp.dat")[:3]
    tests = splits.random_folds(len(columns[0]), 0.1)[:3]
    return tuple(splits.rated([c[~test] for c in columns], [c[test] for c in columns]) for test in tests)


def within(split: splits.RatingSplit) -> splits.RatingSplit:
    """A tenth of the training rows to tune on."""
    columns = split.train.users, split.train.items, split.train.values
    test = splits.random_folds(len(columns[0]), 0.1, seed=1)[0]
    return splits.rated([column[~test] for column in columns], [column[test] for column in columns])


def ratings_rows(results: Results, data_dir: str, models: list[str]) -> None:
    """Tuned within the training rows of the first split, or fold; RMSE and MAE over all of them."""
    for dataset, protocol in (("ml-1m", "90/10"), ("ml-100k", "5-fold")):
        for name, (model, fixed, published) in RATINGS.items():
            if results.has(f"{name}, {dataset}, {protocol}, rmse"):
                continue
            folds, key = rating_splits(dataset, data_dir), f"{name}, {dataset}, ratings"
            if key not in results.tuned:
                results.tuned[key] = dataclasses.asdict(experiment.tune(model, within(folds[0]), TRIALS, fixed))
            settings = results.tuned[key]["settings"]
            runs = [experiment.run(model, fold, settings, seed) for fold in folds for seed in SEEDS[:1]]
            about = {"seconds": round(float(np.mean([run["seconds"] for run in runs])), 2), "memory_gb": peak_gb()}
            about |= {"seeds": list(SEEDS[:1]), "parameters": settings, "trials": len(results.tuned[key]["trials"])}
            rows = []
            for metric in ("rmse", "mae"):
                every = [run[metric] for run in runs]
                value, source = published.get(dataset, (None, None)) if metric == "rmse" else (None, None)
                row = row_of(name, dataset, protocol, metric, float(np.mean(every)), about)
                row |= {"of splits": every, "low": min(every), "high": max(every)}
                rows.append(row | {"published": value, "source": source})
            results.add("ratings", rows)


def regularisation_rows(results: Results, data_dir: str) -> None:
    """Bias terms on and off, with no regularisation, that of the tuned model, and ten times as much."""
    split, tuned = rating_splits("ml-1m", data_dir)[0], results.tuned
    settings, alone = tuned["biased-mf, ml-1m, ratings"]["settings"], tuned["biases alone, ml-1m, ratings"]["settings"]
    plain = experiment.parameters("biased-mf", settings).model_dump()
    for name, biases in (("biases alone", alone), ("factors alone", plain | {"biases": False}), ("both", plain)):
        for factor in (0, 1, 10):
            case = f"{name}, regularisation times {factor}, ml-1m, rmse"
            if results.has(case):
                continue
            full = experiment.parameters("biased-mf", biases).model_dump()
            changed = full | {each: full[each] * factor for each in ("l2", "l2_bias")}
            value = experiment.run("biased-mf", split, changed)["rmse"]
            row = row_of("biased-mf", "ml-1m", "90/10", "rmse", value, {"parameters": changed}, case)
            results.add("questions", [row])


# Questions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Hashed:
    """A model that sees buckets in the place of items; items of one bucket are one to it."""

    model: object
    bucket: np.ndarray
    folds_in = True

    def scores(self, seen, rows):
        """As of any model."""
        data = interactions.Interactions(seen.offsets, self.bucket[seen.items], int(self.bucket.max()) + 1)
        return self.model.scores(data, rows)[:, self.bucket]


def hashed(model: str, split: splits.Split, settings: dict, buckets: int) -> Hashed:
    """A model whose items are hashed to so many buckets."""
    bucket = np.append(0, 1 + np.asarray(features.hash_bucket(split.item_ids[1:], buckets, "item"))).astype(np.int32)
    train = interactions.Interactions(split.train.offsets, bucket[split.train.items], buckets + 1)
    seen = interactions.Interactions(split.seen.offsets, bucket[split.seen.items], buckets + 1)
    return Hashed(experiment.fit(model, dataclasses.replace(split, train=train, seen=seen), settings), bucket)


def question_rows(results: Results, data_dir: str, models: list[str]) -> None:
    """One thing changed, on ml-1m: NDCG@10, and the paired difference from the tuned model."""
    regularisation_rows(results, data_dir)
    split = parts_of("ml-1m", data_dir)["test"]
    for model, questions in QUESTIONS.items():
        if model not in models or all(results.has(f"{model}, {question}, ml-1m") for question in questions):
            continue
        settings = results.tuned[f"{model}, ml-1m"]["settings"]
        base = metrics.per_user(judged(model, split, settings, 1)[0], (10,), ("NDCG",))["NDCG@10"]
        for question, change in questions.items():
            if "buckets" in change:
                fitted = hashed(model, split, settings, round(change["buckets"] * (split.test.num_items - 1)))
                ranking = experiment.rank(fitted, split)
            else:
                times = change.get("times", {})
                changed = {name: settings.get(name, default) * factor for name, (default, factor) in times.items()}
                ranking, _ = judged(model, split, settings | changed | change.get("set", {}), 1)
            values = metrics.per_user(ranking, (10,), ("NDCG",))["NDCG@10"]
            found = metrics.paired(values, base)
            more = {"difference": found.difference, "low": found.low, "high": found.high, "p": found.p}
            more |= {"base": float(base.mean())}
            case = f"{model}, {question}, ml-1m"
            results.add(
                "questions", [row_of(model, "ml-1m", "leave-one-out", "ndcg@10", float(values.mean()), more, case)]
            )


POWERS, IALS = (0.0, 0.5, 1.0), experiment.parameters("ials", {})
HASHING = {f"items hashed to {share:g} buckets an item": {"buckets": share} for share in (4, 2, 1, 0.5, 0.25)}
QUESTIONS: dict[str, dict[str, dict]] = {
    "ease": HASHING | {f"l2 times {factor:g}": {"times": {"l2": (500.0, factor)}} for factor in (0.01, 0.1, 10, 100)},
    "ials": HASHING
    | {f"l2 times {factor:g}": {"times": {"l2": (IALS.l2, factor)}} for factor in (0.1, 10)}
    | {f"alpha0 times {factor:g}": {"times": {"alpha0": (IALS.alpha0, factor)}} for factor in (0.1, 10)}
    | {"regularisation not scaled by frequency": {"set": {"nu": 0.0}}},
    "bpr": {f"negatives in proportion to frequency^{power:g}": {"set": {"negative_power": power}} for power in POWERS}
    | {"no bias": {"set": {"bias": False}}},
}


# Speed -------------------------------------------------------------------------------------------------


def speed_rows(results: Results, data_dir: str, models: list[str]) -> None:
    """Exact ranking beside the product of the factors: of ml-1m's size, and 100,000 users x 100,000 items."""
    from recsys_common import evaluation

    for users, items, rounds in ((6040, 3417, 7), (100_000, 100_000, 3)):
        random = np.random.default_rng(0)
        p = random.normal(size=(users, 64)).astype(np.float32)
        q = np.ascontiguousarray(random.normal(size=(items, 64)).astype(np.float32).T)
        test, seen = random.integers(1, items, users), random.integers(1, items, 100 * users)
        of_seen = np.repeat(np.arange(users), 100)
        ranking, product = [], []
        for _ in range(rounds):  # in turns
            start = time.perf_counter()
            for begin in range(0, users, 1024):
                p[begin : begin + 1024] @ q
            product.append(time.perf_counter() - start)
            start = time.perf_counter()
            evaluation.evaluate(lambda rows: p[rows] @ q, np.arange(users), test, of_seen, seen, items, 10)  # noqa: B023
            ranking.append(time.perf_counter() - start)
        size = f"{users:,} users x {items:,} items"
        ratio = [one / other for one, other in zip(ranking, product, strict=True)]
        rows = [
            ("exact ranking", ranking, "s"),
            ("matrix product", product, "s"),
            ("ranking / product", ratio, "times"),
        ]
        for case, values, unit in rows:
            row = scale.spread(f"{case}, {size}", values, unit)
            more = {"model": "", "dataset": "random vectors", "protocol": size, "metric": case}
            results.add("speed", [more | row])


def readme(content: dict, text: str) -> str:
    """README.md with the figures of this result file in their places."""
    of = {row["case"]: row for row in content["rows"]}
    lines = [
        "What simple models reach, chapter 7: ml-1m, each user's last item, every item ranked; each tuned with the "
        f"same {TRIALS} trials ([benchmarks/collaborative_filtering.json](benchmarks/collaborative_filtering.json), "
        f"{content['machine']['cores']} cores).",
        "",
        "| model | HR@10 | NDCG@10 | 95% interval | seconds to fit |",
        "|---|---|---|---|---|",
    ]
    ours = [of[f"{model}, ml-1m, leave-one-out, ndcg@10"] for model in MODELS]
    for row in sorted(ours, key=lambda row: row["value"]):
        hits = of[f"{row['model']}, ml-1m, leave-one-out, hr@10"]["value"]
        lines.append(
            f"| {row['model']} | {hits:.4f} | {row['value']:.4f} | {row['low']:.4f} to {row['high']:.4f} | "
            f"{row['seconds']:.1f} |"
        )
    for row in OTHERS:
        lines.append(f"| {row['model']}, published | {row['hr@10']:.4f} | {row['ndcg@10']:.4f} | | |")
    seconds = of.get("chapter 7", {}).get("value")
    return quoted(text, "collaborative_filtering", lines, 7, seconds)


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the simple models; writes collaborative_filtering.json.")
    parser.add_argument("--data-dir", default=str(ROOT / "data"), help="folder of ml-1m and ml-100k (data)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="measure these parts")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="these models alone")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    arguments = parser.parse_args()
    results = Results(arguments.only, arguments.again)
    of_part = {"ranking": ranking_rows, "ratings": ratings_rows, "questions": question_rows, "speed": speed_rows}
    for part in arguments.only:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # pairs of the test that were seen before: counted by the split
            of_part[part](results, arguments.data_dir, arguments.models)
        print(f"{part} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if all(results.has(f"{model}, {name}, {protocol_of(name)}, ndcg@10") for model in MODELS for name in DATASETS):
        finish(7, results.content(), readme)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
