"""artifact.py: a folder is what its manifest says, or is refused by the name of the file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_common import artifact

METADATA = {
    "version": 1,
    "name": "hand-made",
    "created": "2026-01-02T03:04:05+00:00",
    "commit": None,
    "versions": {"tensorflow": "2.21.0"},
    "model": {"architecture": "a.B", "config": None, "hash": None, "parameters": 6, "dim": 2},
    "inputs": [],
    "items": {
        "ids": {"file": "items/ids.i64", "dtype": "int64"},
        "vectors": {"file": "items/vectors.f32", "shape": [1, 2]},
        "index": None,
    },
    "signatures": {},
    "onnx": {},
    "golden": [],
    "data": None,
    "run": None,
    "metrics": {},
}


@pytest.fixture
def folder(tmp_path):
    """A small artifact, whole."""
    (tmp_path / "model/items").mkdir(parents=True)
    (tmp_path / "model/saved_model").mkdir()
    (tmp_path / "model/items/ids.i64").write_bytes(bytes(8))
    (tmp_path / "model/items/vectors.f32").write_bytes(bytes(8))
    (tmp_path / "model/saved_model/fingerprint.pb").write_bytes(b"changes at every export")
    (tmp_path / "model/metadata.json").write_text(json.dumps(METADATA))
    artifact.write_manifest(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, *expected):
    with pytest.raises(ValueError) as error:
        artifact.verify(folder)
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_what_was_written_is_found_whole(folder):
    assert artifact.verify(folder).items.vectors.shape == [1, 2]
    manifest = json.loads((folder / "manifest.json").read_text())
    # sha256 of 8 zero bytes, by another program: head -c 8 /dev/zero | sha256sum
    zeros = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"
    assert [(each["name"], each["bytes"]) for each in manifest["files"]][:2] == [
        ("items/ids.i64", 8),
        ("items/vectors.f32", 8),
    ]
    assert manifest["files"][0]["sha256"] == zeros
    assert "saved_model/fingerprint.pb" not in [each["name"] for each in manifest["files"]]


def test_a_fingerprint_may_be_missing_or_another(folder):
    (folder / "saved_model/fingerprint.pb").write_bytes(b"another")
    artifact.verify(folder)
    (folder / "saved_model/fingerprint.pb").unlink()
    artifact.verify(folder)


def test_a_flipped_bit_a_missing_and_an_extra_file_are_refused_by_name(folder):
    ids = folder / "items/ids.i64"
    ids.write_bytes(bytes(7) + b"\1")
    refused(folder, "items/ids.i64", "SHA-256", "af5570f5", "export it again")
    ids.write_bytes(bytes(7))
    refused(folder, "items/ids.i64: has 7 bytes, expected 8")
    ids.unlink()
    refused(folder, "items/ids.i64: not there")
    ids.write_bytes(bytes(8))
    (folder / "items/more.py").write_text("print()")
    refused(folder, "items/more.py: there, but not in manifest.json")


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").write_bytes(bytes(8))
    (folder / "items/ids.i64").unlink()
    (folder / "items/ids.i64").symlink_to(tmp_path / "elsewhere")
    refused(folder, "items/ids.i64: a link")


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "saved_model/fingerprint.pb", "items/more"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo], ids=["link", "pipe"])
def test_what_is_no_plain_file_is_refused_before_it_is_read(folder, name, make, monkeypatch):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    # Reading either would never end.
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    refused(folder, f"{name}: a link or a device")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "items/../../elsewhere", "items//ids.i64", ".hidden"])
def test_a_manifest_names_no_file_outside(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, "manifest.json: files.0.name", name)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"version": 2}, "metadata.json: version"),
        ({"surprise": 1}, "metadata.json: surprise"),
        ({"metrics": None}, "metadata.json: metrics"),
        ({"model": METADATA["model"] | {"dim": "2"}}, "metadata.json: model.dim"),
        ({"items": METADATA["items"] | {"ids": {"file": "items/none.i64", "dtype": "int64"}}}, "names items/none.i64"),
    ],
)
def test_metadata_of_another_form_is_refused_with_its_place(folder, change, expected):
    (folder / "metadata.json").write_text(json.dumps(METADATA | change))
    artifact.write_manifest(folder)
    refused(folder, expected)


def test_no_manifest_half_a_manifest_and_one_twice(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    refused(folder, "manifest.json", "JSON")
    manifest = json.loads(text)
    path.write_text(json.dumps(manifest | {"files": manifest["files"] + manifest["files"][:1]}))
    refused(folder, "names a file twice")
    path.unlink()
    refused(folder, "manifest.json: not there")


def test_the_schema_takes_what_the_model_takes(folder):
    schema = artifact.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == set(METADATA) and schema["additionalProperties"] is False
    assert schema["$defs"]["Input"]["properties"]["kind"]["enum"] == ["index", "hash", "history", "number"]


def test_the_command_line_needs_no_tensorflow(folder, tmp_path):
    code = f"""
import sys
from recsys_common import artifact
assert artifact.main(["schema"]) == 0
assert artifact.main(["verify", {str(folder)!r}]) == 0
open({str(folder / "items/ids.i64")!r}, "w").close()
assert artifact.main(["verify", {str(folder)!r}]) == 2
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1]) == artifact.schema()
    assert "whole. hand-made, 6 parameters" in done.stdout
    assert "ids.i64: has 0 bytes, expected 8" in done.stderr and "Traceback" not in done.stderr


def test_a_copied_folder_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert artifact.verify(tmp_path / "copy") == artifact.verify(Path(folder))
