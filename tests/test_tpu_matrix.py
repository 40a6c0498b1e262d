"""Which TensorFlow trains on which TPU: does the matrix say what was found, and what its packages say?"""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import tpu_matrix

from recsys_common import doctor

ROOT = Path(__file__).resolve().parent.parent
MATRIX = json.loads((ROOT / "recsys_common" / "tpu_matrix.json").read_text())
PACKAGES = {each["version"]: each for each in MATRIX["packages"]}
WORKS = {(row["generation"], row["tensorflow"]): row for row in MATRIX["works"]}


def test_the_newest_tensorflow_has_no_package_for_tpus():
    assert MATRIX["packages"][0]["version"] == "2.20.0" and MATRIX["tensorflow"] == "2.21.0"
    for generation in tpu_matrix.GENERATIONS:
        row = WORKS[generation, "2.21.0"]
        assert row["package"] == "" and {row[name] for name in tpu_matrix.COLUMNS} == {"no"}


def test_each_package_names_its_libtpu():
    assert PACKAGES["2.20.0"]["libtpu"] == "~=0.0.14" and PACKAGES["2.20.0"]["libtpu there"][0] == "0.0.14"
    assert PACKAGES["2.19.1"]["libtpu"] == "==0.0.10" and "<2.2" in PACKAGES["2.19.1"]["numpy"]
    assert PACKAGES["2.18.0"]["libtpu"] == "==2.18.0" and PACKAGES["2.18.0"]["libtpu there"] == []


def test_what_works_on_which_generation():
    newest = {generation: WORKS[generation, "2.20.0"] for generation in tpu_matrix.GENERATIONS}
    able = {name for name, row in newest.items() if row["TPUEmbedding"] not in ("no", "not known")}
    assert able == {"v5p", "v6e"} and newest["v5e"]["TPUEmbedding"] == "no"
    assert {newest["tpu7x"][name] for name in ("TPUStrategy", "TPUEmbedding")} == {"not known"}
    assert [name for name, row in newest.items() if row["Colab"] != "no"] == ["v5e"]
    assert WORKS["v6e", "2.19.1"]["TPUEmbedding"] == "seen"
    chips = json.loads((ROOT / "recsys_common" / "chips.json").read_text())
    assert all(chips[name]["sparse_cores"] > 0 for name in able) and chips["v5e"]["sparse_cores"] == 0


def test_every_fact_has_a_source_and_a_date_and_the_file_is_the_tools():
    for row in MATRIX["works"]:
        for column in tpu_matrix.COLUMNS:
            assert row[column] in MATRIX["values"]
            source = row["sources"][column]
            assert re.search(r"\(read 20\d\d-\d\d-\d\d\)$", source) or "there is no tensorflow-tpu" in source
    assert tpu_matrix.works(MATRIX["packages"], MATRIX["tensorflow"]) == MATRIX["works"], "run tools/tpu_matrix.py"
    assert MATRIX["import"] == tpu_matrix.IMPORTS
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", MATRIX["read"])


def test_a_later_fact_replaces_an_earlier_one_where_its_version_fits(monkeypatch):
    facts = [(("v5e", "v6e"), ">=0", name, "no", "old", "2026-01-01") for name in tpu_matrix.COLUMNS]
    monkeypatch.setattr(tpu_matrix, "GENERATIONS", ("v5e", "v6e"))
    monkeypatch.setattr(tpu_matrix, "FACTS", [*facts, (("v6e",), ">=3.1", "Colab", "seen", "new", "2026-02-02")])
    packages = [{"version": "3.1.0"}, {"version": "3.0.2"}, {"version": "2.17.0"}]
    found = {(row["generation"], row["tensorflow"]): row for row in tpu_matrix.works(packages, "3.1.0")}
    assert set(found) == {(chip, version) for chip in ("v5e", "v6e") for version in ("3.1.0", "3.0.2")}
    assert [name for name, row in found.items() if row["Colab"] == "seen"] == [("v6e", "3.1.0")]
    assert found["v6e", "3.1.0"]["sources"]["Colab"] == "new (read 2026-02-02)"


# The lock of TPU machines ------------------------------------------------------------------------------


def locked(name):
    text = (ROOT / name).read_text()
    assert re.search(r"^--|://", text, re.M) is None, "no option, no address"
    blocks = re.findall(r"^([\w.-]+)==(\S+)[^\\\n]*\\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    assert len(blocks) == len(re.findall("==", re.sub(r" ;.*", "", text))), "a package without a hash"
    return {package: version for package, version, _ in blocks}


def test_the_second_lock_holds_what_pyproject_says_and_the_matrix_allows():
    of_tpu, of_book = locked("requirements-tpu.txt"), locked("requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["tpu"]
    names = {re.match(r"[\w.-]+", each)[0] for each in asked} - {"recsys-common"}
    assert names - set(of_tpu) == {"tensorflow"}, (
        "which has the same files as tensorflow-tpu, and no TPU: make lock-tpu"
    )
    for name, version in re.findall(r"^([\w.-]+)==([\w.*]+)", "\n".join(asked), re.M):
        assert of_tpu[name].startswith(version.rstrip("*")), f"{name}: make lock-tpu"
    newest = MATRIX["packages"][0]
    assert of_tpu["tensorflow-tpu"] == newest["version"] and of_tpu["tf-keras"] == newest["tf-keras"]
    assert of_tpu["libtpu"] in MATRIX["import"]["imports"] and of_book["libtpu"] in MATRIX["import"]["aborts"]
    assert of_tpu["tensorflow-recommenders"] == of_book["tensorflow-recommenders"] == "0.7.7"
    other = {name for name in set(of_tpu) & set(of_book) if of_tpu[name] != of_book[name]}
    assert other == {"libtpu", "tf-keras"}, "everything else is as in requirements.txt"


# What doctor says of it --------------------------------------------------------------------------------


def test_doctor_says_what_a_tpu_needs(monkeypatch):
    monkeypatch.setattr(doctor, "_tpu_chips", lambda: 0)
    with pytest.raises(doctor.Skip) as skipped:
        doctor.tpu()
    said = str(skipped.value)
    assert "tensorflow-tpu 2.20.0, libtpu 0.0.14, tf-keras 2.20.1" in said
    assert said.endswith("TPUStrategy on v4 v5e v5p v6e, TPUEmbedding on v5p v6e") and len(said) < 240


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, r"8 chips \(v5litepod-8\), but tensorflow-tpu missing, libtpu missing, tf-keras missing; expected"),
        ({"libtpu": "0.0.52"}, r"but libtpu 0\.0\.52; expected .*libtpu 0\.0\.14.*requirements-tpu\.txt"),
        ({"tensorflow": "2.20.0"}, "but tensorflow over the files of tensorflow-tpu; expected"),
    ],
)
def test_doctor_names_what_a_tpu_machine_lacks(monkeypatch, installed, said):
    right = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.14", "tf-keras": "2.20.1"} if installed else {}
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    monkeypatch.setattr(doctor, "_tpu_chips", lambda: 8)
    monkeypatch.setattr(doctor, "_installed", lambda name: (right | installed).get(name, ""))
    with pytest.raises(RuntimeError, match=said):
        doctor.tpu()
    monkeypatch.setattr(doctor, "_installed", right.get)
    if right:
        found = doctor.tpu()
        assert found.startswith("8 chips, v5e: ") and found.endswith("TPUStrategy expected, TPUEmbedding no")


def test_doctor_takes_the_lock_of_the_tensorflow_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "requirements.txt")
    for name, version in (("requirements.txt", sys.version), ("requirements-tpu.txt", "0.0.1")):
        (tmp_path / name).write_text(f"numpy=={version.split()[0]} \\\n    --hash=sha256:00\n")
    monkeypatch.setattr(doctor, "_installed", {"tensorflow-tpu": "2.20.0"}.get)
    with pytest.raises(
        RuntimeError, match=r"lock requirements-tpu\.txt: numpy .* \(locked: 0\.0\.1\); run `pip install"
    ):
        doctor.lock()
