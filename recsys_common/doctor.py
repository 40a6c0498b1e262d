"""Is this machine ready, and for which scale?

    python -m recsys_common.doctor        (make doctor)

Prints a line for each check, [OK], [FAIL] with the mend, or [skip] with the reason, and exits with 1 when something
that SCALE=small needs has failed. TensorFlow is not imported: its version is read from the installed packages, and
devices from the operating system.

Needs: scale.py embedded_bigquery.py bigquery.py tpu_matrix.json
"""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recsys_common import scale

MEMORY_GB = {"small": 4, "medium": 16}
DISK_GB = {"small": 6, "medium": 20}  # .venv takes 3
LOCK = Path(__file__).parent.parent / "requirements.txt"
TPU_LOCK = "pip install --no-deps --require-hashes -r requirements-tpu.txt"
# As TPU_ACCELERATOR_TYPE begins, such as v5litepod-8.
GENERATIONS = {"v5litepod": "v5e", "v4": "v4", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
COLUMNS = ("TPUStrategy", "TPUEmbedding")  # of tpu_matrix.json


class Skip(Exception):
    """The check does not apply here; the message says why."""


def python() -> str:
    """Python 3.11 to 3.13."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise RuntimeError(
            f"Python {platform.python_version()}, expected 3.11 to 3.13 (TensorFlow 2.21 has no wheel for others): "
            "install one and run `rm -rf .venv; make book PYTHON=python3.12`"
        )
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def lock() -> str:
    """Every installed package has the locked version."""
    name, mend = ("requirements.txt", "`rm -rf .venv` and `make book`")
    if _installed("tensorflow-tpu"):
        name, mend = ("requirements-tpu.txt", f"`{TPU_LOCK}`")
    file = LOCK.with_name(name)
    if not file.exists():
        raise Skip(f"no {name} beside the package: this is not a checkout")
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+?) \\$", file.read_text(), re.MULTILINE))
    there = {re.sub("[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}
    found = {name: there.get(re.sub("[-_.]+", "-", name).lower(), "missing") for name in locked}
    wrong = [f"{name} {found[name]} (locked: {locked[name]})" for name in locked if found[name] != locked[name]]
    if wrong:
        raise RuntimeError(f"{len(wrong)} packages differ from the lock {name}: {', '.join(wrong[:4])}; run {mend}")
    named = [f"{each} {locked[each]}" for each in ("tensorflow", "tensorflow-tpu", "tf-keras") if each in locked]
    return f"{len(locked)} packages as locked, {', '.join(named)}"


def _installed(name: str) -> str:
    """The version of a package, "" if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def memory() -> str:
    """Enough memory for small; says whether for medium too."""
    gb = scale.machine()["memory_gb"]
    if gb < MEMORY_GB["small"]:
        raise RuntimeError(
            f"{gb} GB, SCALE=small needs {MEMORY_GB['small']}: close other programs or take another machine"
        )
    return f"{gb} GB" + ("" if gb >= MEMORY_GB["medium"] else f"; SCALE=medium wants {MEMORY_GB['medium']}")


def disk() -> str:
    """Enough free disk where results and downloads go."""
    gb = shutil.disk_usage(".").free / 2**30
    if gb < DISK_GB["small"]:
        raise RuntimeError(
            f"{gb:.1f} GB free here, SCALE=small needs {DISK_GB['small']}: free some, or move the checkout"
        )
    return f"{gb:.0f} GB free" + ("" if gb >= DISK_GB["medium"] else f"; SCALE=medium wants {DISK_GB['medium']}")


def processor() -> str:
    """What trains at small and medium."""
    machine = scale.machine()
    return f"{machine['cores']} cores, {machine['cpu']}"


def gpu() -> str:
    """NVIDIA GPUs, as their driver tells."""
    if not shutil.which("nvidia-smi"):
        raise Skip("no NVIDIA driver; small and medium run on the CPU")
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:200]}; mend the driver")
    return "; ".join(done.stdout.strip().splitlines()) + "; the locked TensorFlow runs on the CPU all the same"


def tpu() -> str:
    """TPU chips of this machine, and the TensorFlow that they need."""
    matrix = json.loads((Path(__file__).parent / "tpu_matrix.json").read_text())
    newest = matrix["packages"][0]
    wanted = {"tensorflow-tpu": newest["version"], "libtpu": newest["libtpu there"][0], "tf-keras": newest["tf-keras"]}
    rows = [row for row in matrix["works"] if row["tensorflow"] == newest["version"]]
    needs = ", ".join(f"{name} {version}" for name, version in wanted.items())
    chips = _tpu_chips()
    if not chips:
        able = {name: [row["generation"] for row in rows if row[name] not in ("no", "not known")] for name in COLUMNS}
        can = ", ".join(f"{name} on {' '.join(generations)}" for name, generations in able.items())
        raise Skip(f"none here; chapter 5 compiles for one all the same. Training on one takes {needs}: {can}")
    kind = os.environ.get("TPU_ACCELERATOR_TYPE", "")
    generation = GENERATIONS.get(kind.partition("-")[0], "")
    row = next((row for row in rows if row["generation"] == generation), dict.fromkeys(COLUMNS, "not known"))
    wrong = [f"{name} {_installed(name) or 'missing'}" for name in wanted if _installed(name) != wanted[name]]
    if _installed("tensorflow"):
        wrong.append("tensorflow over the files of tensorflow-tpu")
    if wrong:
        raise RuntimeError(
            f"{chips} chips ({kind or 'kind not told'}), but {', '.join(wrong)}; expected {needs} and no tensorflow: "
            f"run `{TPU_LOCK}` in an environment of its own"
        )
    return f"{chips} chips, {generation or kind or 'of a generation not told'}: {needs}; " + ", ".join(
        f"{name} {row[name]}" for name in COLUMNS
    )


def _tpu_chips() -> int:
    """How many; v2 to v4 are accelerator devices, newer ones pass through VFIO, which has other uses too."""
    chips = list(Path("/dev").glob("accel*"))
    if "TPU_ACCELERATOR_TYPE" in os.environ:
        chips += Path("/dev/vfio").glob("[0-9]*")
    return len(chips)


def embedded_bigquery() -> str:
    """The embedded BigQuery starts and answers."""
    from recsys_common import bigquery

    start = time.perf_counter()
    warehouse = bigquery.connect()
    ready = time.perf_counter() - start
    answer = warehouse.query("SELECT FARM_FINGERPRINT('a') AS h")["h"][0].as_py()
    atexit.unregister(warehouse.close)  # the server stops by itself when this process ends; nobody need wait for it
    if answer != -5528939962900187677:
        raise RuntimeError(
            f"FARM_FINGERPRINT('a') is {answer}; the embedded BigQuery is broken, run `rm -rf .venv` and `make book`"
        )
    return f"answers after {ready:.1f} s"


def google() -> str:
    """Credentials for Google Cloud."""
    found = scale.credentials()
    if not found:
        raise Skip("none; only SCALE=full needs them: `gcloud auth application-default login`")
    return found


def full() -> str:
    """Project, bucket and table for SCALE=full, from the environment."""
    given = [os.environ.get(name, "") for name in ("PROJECT", "BUCKET", "DATASET")]
    if not any(given):
        raise Skip("PROJECT, BUCKET and DATASET are not set in the environment; only SCALE=full needs them")
    missing = scale.missing_for_full(*given)
    if missing:
        raise RuntimeError("missing: " + "; ".join(missing))
    return f"project {given[0]}, bucket {given[1]}, table {given[2]}"


CHECKS: dict[str, Callable[[], str]] = {
    "Python": python,
    "packages": lock,
    "memory": memory,
    "disk": disk,
    "processor": processor,
    "GPU": gpu,
    "TPU": tpu,
    "embedded BigQuery": embedded_bigquery,
    "Google credentials": google,
    "SCALE=full": full,
}


def main() -> int:
    """Run the checks; 0 when nothing failed."""
    argparse.ArgumentParser(
        description="Check this machine, one line a check; exits with 1 when one fails."
    ).parse_args()
    failed = 0
    for name, check in CHECKS.items():
        try:
            mark, text = "[OK]  ", check()
        except Skip as reason:
            mark, text = "[skip]", str(reason)
        except Exception as error:  # a doctor reports every failure, of whatever kind, and goes on
            mark, text, failed = "[FAIL]", f"{error}", failed + 1
        print(f"{mark} {name:19}{text}", flush=True)
    print("ready for SCALE=small and medium" if not failed else f"{failed} failed: mend them from the top")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
