"""Which TensorFlow trains on which TPU? Writes recsys_common/tpu_matrix.json from the metadata of published packages.

    python tools/tpu_matrix.py          (minutes of pip asking its package index; nothing is installed)

Versions and requirements are the packages' own. What works is in no metadata: `FACTS` below has it, each with source
and date. A TPU generation, a version of TensorFlow and the package that brings it make a row of "works".

Needs: recsys_common installed
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from recsys_common import scale

PYTHON = "3.11"  # whose wheels are asked for; requirements may differ by it
FILE = Path(__file__).resolve().parent.parent / "recsys_common" / "tpu_matrix.json"
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
COLUMNS = ("TPUStrategy", "TPUEmbedding", "Colab")
VALUES = {
    "seen": "somebody ran it and said so",
    "documented": "the vendor says that it works; nobody was found who says that it does not",
    "expected": "follows from what is documented or was seen of another version or chip; nobody was found who ran it",
    "not known": "nothing was found either way: take it for not working",
    "no": "does not work, or is not there",
}
# (generations, versions of TensorFlow, column, value, source, read). A later line replaces an earlier one.
FACTS = [
    (GENERATIONS, ">=0", "TPUStrategy", "not known", "no page and no thread says", "2026-11-23"),
    (GENERATIONS, ">=0", "TPUEmbedding", "not known", "no page and no thread says", "2026-11-23"),
    (GENERATIONS, ">=0", "Colab", "no", "googlecolab/colabtools issue 5566: v5e-1 is its only TPU", "2026-11-23"),
    (
        ("v4", "v5e", "v5p", "v6e"), "<=2.18.0", "TPUStrategy", "documented",
        "cloud.google.com/tpu/docs/runtimes: software versions tpu-vm-tf-2.18.0 and older", "2026-11-23",
    ),
    (
        ("v4", "v5e", "v5p", "v6e"), ">2.18.0", "TPUStrategy", "expected",
        "cloud.google.com/tpu/docs/runtimes ends with 2.18.0; tensorflow-tpu goes on", "2026-11-23",
    ),
    (
        ("v6e",), "==2.19.1", "TPUStrategy", "seen",
        "keras-team/keras-io pull request 2174: distributed_embedding_tf.py, run on a v6e-1", "2026-11-23",
    ),
    (
        ("v5p", "v6e"), ">=2.18.0", "TPUEmbedding", "expected",
        "tf.tpu.experimental.embedding.TPUEmbeddingV2 is for SparseCores, which these have", "2026-11-23",
    ),
    (
        ("v5p",), "==2.19.1", "TPUEmbedding", "documented",
        "keras-io, distributed_embedding_tf.py: to be run on a TPU v5p or v6e", "2026-11-23",
    ),
    (
        ("v6e",), "==2.19.1", "TPUEmbedding", "seen",
        "keras-team/keras-io pull request 2174: distributed_embedding_tf.py, run on a v6e-1", "2026-11-23",
    ),
    (("v5e",), ">=0", "TPUEmbedding", "no", "cloud.google.com/tpu/docs/v5e: no SparseCores", "2026-11-23"),
    (
        ("v5e",), ">=0", "Colab", "not known",
        "googlecolab/colabtools issues 5164, 5566: a v5e-1, TensorFlow not installed; nobody says that 2.20 works",
        "2026-11-23",
    ),
    (
        ("v5e",), "<=2.19.1", "Colab", "no",
        "googlecolab/colabtools issues 5209, 5419, tensorflow/tensorflow issue 96203: not installed, or no TPU found",
        "2026-11-23",
    ),
]  # fmt: skip
# What `import tensorflow` of tensorflow-tpu 2.20.0 does with a libtpu that its requirement allows.
IMPORTS = {
    "tensorflow-tpu": "2.20.0",
    "imports": ["0.0.14", "0.0.24", "0.0.30", "0.0.31"],
    "aborts": ["0.0.32", "0.0.33", "0.0.35", "0.0.37", "0.0.52"],
    "says": "TpuExecutable_FreeMaybeOwningDeviceMemoryArray not available in this library",
    "source": "tried on a machine without a TPU, Python 3.11",
    "read": "2026-11-23",
}


def pip(*words: str) -> str:
    """What pip prints; SystemExit with its error when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"pip {' '.join(words)}: {done.stderr[-500:]}")
    return done.stdout


def versions(name: str) -> list[str]:
    """Published versions of a package that this Python can install, the newest first."""
    found = re.search(r"^Available versions: (.*)$", pip("index", "versions", name), re.M)
    if not found:
        raise SystemExit(f"pip index versions {name} lists none")
    return found[1].split(", ")


def package(name: str, version: str, libtpus: list[str], tf_keras: list[str]) -> dict:
    """What the metadata of tensorflow-tpu says, and whether its libtpu can be had."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["install", "-qq", "--dry-run", "--no-deps", "--ignore-installed", "--target", folder]
        asked += ["--python-version", PYTHON, "--only-binary", ":all:", "--report", "-"]
        report = pip(*asked, f"{name}=={version}")
    metadata = json.loads(report)["install"][0]["metadata"]
    here = {"python_version": PYTHON, "platform_system": "Linux", "extra": ""}
    requirements = map(Requirement, metadata["requires_dist"])
    wants = {each.name: each.specifier for each in requirements if not each.marker or each.marker.evaluate(here)}
    fitting = list(wants["libtpu"].filter(libtpus))
    minor = version.rpartition(".")[0]
    return {
        "package": name,
        "version": version,
        "python": metadata["requires_python"],
        **{each: str(wants[each]) for each in ("libtpu", "numpy", "protobuf", "keras")},
        "libtpu there": [fitting[-1], fitting[0]] if fitting else [],
        "tf-keras": next((each for each in tf_keras if each.startswith(f"{minor}.")), ""),
    }


def works(packages: list[dict], newest: str) -> list[dict]:
    """A row for each generation and version: the last of each minor version from 2.18 on, and TensorFlow's newest."""
    by_version = {each["version"]: each for each in packages if SpecifierSet(">=2.18").contains(each["version"])}
    rows = []
    for version in [newest] * (newest not in by_version) + list(by_version):
        for generation in GENERATIONS:
            row = {"generation": generation, "tensorflow": version, "package": "", "sources": {}}
            if version in by_version:
                row["package"] = f"tensorflow-tpu {version}"
            for generations, which, column, value, source, read in FACTS:
                if generation in generations and SpecifierSet(which).contains(version):
                    row |= {column: value, "sources": row["sources"] | {column: f"{source} (read {read})"}}
            if not row["package"]:
                why = f"there is no tensorflow-tpu {version}"
                row |= dict.fromkeys(COLUMNS, "no") | {"sources": dict.fromkeys(COLUMNS, why)}
            rows.append(row)
    return rows


def main() -> None:
    libtpus, tf_keras, tensorflow = (versions(name) for name in ("libtpu", "tf-keras", "tensorflow"))
    packages = [package("tensorflow-tpu", each, libtpus, tf_keras) for each in versions("tensorflow-tpu")]
    content = {
        "read": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "note": "Written by tools/tpu_matrix.py. `packages`: their metadata; `libtpu there`: the oldest and the "
        "newest on the package index that fit; `tf-keras`: the newest of the same minor version. `works`: its FACTS.",
        "tensorflow": tensorflow[0],
        "packages": packages,
        "import": IMPORTS,
        "values": VALUES,
        "works": works(packages, tensorflow[0]),
    }
    print(scale.write_json(FILE, content))


if __name__ == "__main__":
    main()
