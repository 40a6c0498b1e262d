"""What do small, medium and full mean, what does this machine have, and where do a run's results go?

    check("medium", "ml-1m")                          # ValueError with the valid names
    missing_for_full(project, bucket, dataset)        # what SCALE=full lacks, all at once
    record_metrics("../runs", "small", "chapter-1", rows, dataset="simulated")

The scale changes data, endpoints and device, never the code path. Nothing here imports TensorFlow.

Needs: nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from pathlib import Path

SCALES = ("small", "medium", "full")
MOVIELENS = ("ml-latest-small", "ml-100k", "ml-1m", "ml-1m-ratings", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
DATASETS = {
    "small": ("simulated", "sample"),
    "medium": ("simulated", *MOVIELENS, "netflix"),
    "full": (),  # a BigQuery table of the reader's, project.dataset.table
}
# What `make rehearse` plays the full scale with; `bigquery.connect` puts the tables there.
REHEARSAL = {
    "PROJECT": "rehearsal",
    "BUCKET": "rehearsal-bucket",
    "DATASET": "rehearsal.shop.ratings",
    "ITEMS_TABLE": "rehearsal.shop.items",
}
DEFAULT_DATASET = {"small": "simulated", "medium": "ml-latest-small", "full": ""}
MEDIUM_DATASET = {3: "simulated"}  # chapter -> its own, where it is another
SIMULATED_ROWS = {"small": 100_000, "medium": 1_000_000}
MANY_SIMULATED_ROWS = {"small": 100_000, "medium": 100_000_000}  # in chapter 3: more than memory
TABLE = re.compile(r"^[A-Za-z][A-Za-z0-9:-]*\.[A-Za-z0-9_]+\.[A-Za-z0-9_-]+$")
# The versions that a result may depend on.
VERSIONS = (
    "tensorflow",
    "tensorflow-tpu",  # on a TPU machine, in its place
    "tf-keras",
    "tensorflow-recommenders",
    "numpy",
    "pyarrow",
    "google-cloud-bigquery",
    "bqemulator",
)


def check(scale: str, dataset: str) -> None:
    """Refuse a scale or data set that does not exist, before anything runs.

    Raises:
      ValueError: naming what was given and what is valid.
    """
    if scale not in SCALES:
        raise ValueError(f"SCALE={scale!r} is not a scale; expected one of {', '.join(SCALES)}")
    if scale == "full":
        if dataset and not TABLE.match(dataset):
            raise ValueError(
                f"DATASET={dataset!r}: at SCALE=full the data set is a BigQuery table, project.dataset.table "
                "(columns user_id, item_id, rating, timestamp)"
            )
    elif dataset not in DATASETS[scale]:
        hint = " (at SCALE=medium)" if dataset in DATASETS["medium"] else ""
        raise ValueError(
            f"DATASET={dataset!r} is not a data set of SCALE={scale}{hint}; "
            f"expected one of {', '.join(DATASETS[scale])}"
        )


def missing_for_full(project: str, bucket: str, dataset: str) -> list[str]:
    """What SCALE=full still lacks, one line each; empty when it can start. Asks no network."""
    missing = []
    if not project:
        missing.append('a Google Cloud project to bill: EXTRA="project=my-project"')
    if not bucket:
        missing.append('a Cloud Storage bucket for exports, in the place of the data: EXTRA="bucket=my-bucket"')
    if not dataset:
        missing.append("a BigQuery table of ratings: DATASET=project.dataset.table")
    if not credentials():
        missing.append(
            "Google credentials: `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=key.json"
        )
    return missing


def credentials() -> str:
    """Where Google credentials would come from, "" if from nowhere. Does not ask the metadata server: that takes
    seconds on a machine that has none."""
    key = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    if key:
        return key if Path(key).is_file() else ""
    config = Path(os.environ.get("CLOUDSDK_CONFIG", Path.home() / ".config" / "gcloud"))
    login = config / "application_default_credentials.json"
    if login.is_file():
        return str(login)
    product = Path("/sys/class/dmi/id/product_name")
    on_google = product.is_file() and "Google" in product.read_text(errors="replace")
    return "this machine's service account" if on_google else ""


def rehearsing() -> bool:
    """Whether this is `make rehearse`: the full path against the embedded services."""
    return os.environ.get("RECSYS_REHEARSE", "") == "1"


def progress() -> bool:
    """Whether to draw progress bars; `RECSYS_PROGRESS=0` keeps them out of notebooks whose outputs are compared."""
    return os.environ.get("RECSYS_PROGRESS", "1") != "0"


def machine() -> dict:
    """{"cpu": model name, "cores": usable logical cores, "memory_gb": physical memory}."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"model name\s*:\s*(.*)", info.read_text(errors="replace"))
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"cpu": cpu, "cores": cores, "memory_gb": round(memory / 2**30)}


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result may depend on."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that is not installed
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The git revision of the code, with "+" when files differ from it; "" outside a checkout or without git."""
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short=12", "HEAD")
    return revision + ("+" if revision and git("status", "--porcelain", "--untracked-files=no") else "")


def result(name: str, rows: list[dict], *, scale: str, dataset: str) -> dict:
    """A result file: `rows` of {"case", "value", "unit"} with the machine, versions, commit and date."""
    return {
        "name": name,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "scale": scale,
        "dataset": dataset,
        "rows": rows,
    }


def spread(case: str, values: list[float], unit: str) -> dict:
    """A row of a result file: the median of repeated measurements, their number, the least and the most."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return {"case": case, "value": middle, "unit": unit, "repeats": len(values), "min": least, "max": most}


def write_json(path: str | Path, content: dict) -> Path:
    """Write JSON beside `path` and rename it into place, so that no reader sees half a file.

    A list of numbers stands on one line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    text = json.dumps(content, indent=1)
    # It begins with a line break, which JSON has in no string.
    text = re.sub(r"\[\n[-+.\de,\s]+\]", lambda found: re.sub(r"\s+", "", found[0]).replace(",", ", "), text)
    beside.write_text(text + "\n")
    beside.replace(path)
    return path


def run_folder(runs_dir: str, scale: str, chapter: str) -> Path:
    """Where a chapter leaves what it made: `runs_dir/<scale>/<chapter>`, or `runs_dir/rehearsal/<chapter>`."""
    folder = Path(runs_dir) / ("rehearsal" if rehearsing() else scale) / chapter
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def record_metrics(
    runs_dir: str, scale: str, chapter: str, values: dict[str, tuple[float, str]], *, dataset: str
) -> Path:
    """Write `runs_dir/<scale>/<chapter>/metrics.json`, which the metric gate reads.

    Args:
      values: case -> (value, unit), such as {"matrix factorization NDCG@10": (0.071, "")}.
    """
    rows = [{"case": case, "value": float(value), "unit": unit} for case, (value, unit) in values.items()]
    path = run_folder(runs_dir, scale, chapter) / "metrics.json"
    return write_json(path, result(chapter, rows, scale=scale, dataset=dataset))
