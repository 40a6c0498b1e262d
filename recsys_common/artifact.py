"""What is in the folder of a model that left, and is it still what was written?

    metadata = artifact.verify("runs/train/.../model")        # before anything of it is used
    metadata.inputs, metadata.signatures["recommend"].inputs["user_id"].tensor

    python -m recsys_common.artifact schema                    # JSON Schema of metadata.json
    python -m recsys_common.artifact verify <folder>

saving.py writes such a folder; without TensorFlow and without this project it can be read all the same:

    manifest.json           {"version": 1, "files": [{"name", "bytes", "sha256"}]}: every other file, but
                            saved_model/fingerprint.pb, which differs at every export. Written last.
    metadata.json           `Metadata`
    saved_model/            TensorFlow's; raw ids in
    onnx/                   the numeric part; rows of tables in. Its tables lie beside it, *.f32, and are mapped:
                            float32, little-endian, row after row
    items/                  vectors.f32, ids.i64 (int64, little-endian) or ids.txt, index.usearch
    vocabulary/*.i64, .txt  ids of a feature, in the order of its rows

A .txt has one JSON string a line. The manifest tells damage and mistakes; it is no signature: who can write all of the
folder can write a fitting manifest too. Send its SHA-256 by another way where that matters.

Needs: nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

VERSION = 1
MANIFEST, METADATA = "manifest.json", "metadata.json"
LEFT_OUT = (MANIFEST, "saved_model/fingerprint.pb")
BLOCK = 1 << 22  # bytes hashed at once

File = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", max_length=400)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Dtype = Literal["int64", "int32", "float32", "string"]


def _field(about: str, **more) -> Any:
    return Field(description=about, **more)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Architecture(_Part):
    """The model itself."""

    architecture: str = _field("module and class of the model")
    config: dict[str, Any] | None = _field("the run's config, all fields; null: made by hand")
    hash: Sha256 | None = _field("of the config")
    parameters: Count = _field("numbers that were learned")
    dim: Count = _field("D, numbers in a user's and an item's vector")


class Vocabulary(_Part):
    """The ids that have a row of their own."""

    file: File
    ids: Count = _field("how many")
    sha256: Sha256 = _field("of the file")


class Input(_Part):
    """What a client sends of a feature, and how it becomes rows of a table."""

    name: str = _field("in the signatures, of raw ids")
    feature: str = _field("in a batch, and in the ONNX files, of rows")
    side: Literal["user", "item"]
    kind: Literal["index", "hash", "history", "number"] = _field(
        "index: row of the id in the vocabulary; hash: FarmHash of the id's bytes; history: ids, by vocabulary if it "
        "has one, else hashed"
    )
    dtype: Dtype
    shape: list[int | None] = _field("[null], or [null, L] of a history, padded at the left; `length` says how much")
    length: str | None = _field("of a history: the input, int32 [null], that has how many of the last ids count")
    rows: Count | None = _field("of its table")
    oov_buckets: Count | None = _field(
        "by vocabulary: rows 0 to oov_buckets - 1 are for unknown ids. The i-th id of the vocabulary has row "
        "oov_buckets + i; an unknown one Fingerprint64(salt + id as text) modulo oov_buckets, unsigned"
    )
    buckets: Count | None = _field(
        "hashed: (Fingerprint64(8 bytes, little-endian, of id XOR Fingerprint64(salt)) >> 32) * buckets >> 32"
    )
    salt: str | None = _field("text that goes into the fingerprint")
    vocabulary: Vocabulary | None


class Ids(_Part):
    """The items' ids: the i-th belongs to the i-th vector."""

    file: File
    dtype: Literal["int64", "string"]


class Array(_Part):
    """A raw file of float32, little-endian, row after row."""

    file: File
    shape: list[Count]


class Recall(_Part):
    """What the index finds of the exact list."""

    k: Count
    value: float = _field("share of the exact first k that the index finds, mean of the users")
    users: Count = _field("whose vectors were asked for")


class Index(_Part):
    """An approximate index of the items' vectors: a usearch file whose keys are places in the catalogue."""

    file: File
    metric: Literal["ip"] = _field("its distance is 1 - score")
    dtype: Literal["f32"]
    dim: Count = _field("numbers in its vectors. Where that is D + 1, a 0 is appended to a user's embedding")
    connectivity: Count
    expansion_add: Count
    expansion_search: Count = _field("to be set after loading: the file does not hold it")
    recall: Recall


class Items(_Part):
    """The catalogue: items that may be recommended, in one order."""

    ids: Ids
    vectors: Array = _field("float32; a score is the inner product with a user's embedding")
    index: Index | None


class Tensor(_Part):
    """An input or output."""

    tensor: str = _field("its name in the graph, as TF_SessionRun and onnxruntime want it")
    dtype: Dtype
    shape: list[int | None]


class Signature(_Part):
    """Named inputs and outputs of a function."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Onnx(Signature):
    """A function as an ONNX file, with its tables in files beside it."""

    file: File
    opset: Count


class Golden(_Part):
    """Inputs, and what a right client gets. int64 are strings."""

    signature: str
    inputs: dict[str, Any]
    rows: dict[str, Any] = _field("what raw ids become: by feature, and `<history>_length`")
    outputs: dict[str, Any]


class Metadata(_Part):
    """metadata.json. int64 ids are strings, for JSON's numbers are doubles."""

    version: Literal[1]
    name: str
    created: str = _field("date and time, UTC, ISO 8601")
    commit: str | None = _field("of the code that trained it")
    versions: dict[str, str] = _field("of the packages that wrote it")
    model: Architecture
    inputs: list[Input]
    items: Items
    signatures: dict[str, Signature] = _field("of saved_model")
    onnx: dict[str, Onnx]
    golden: list[Golden]
    data: dict[str, Any] | None = _field("what it was trained on")
    run: dict[str, Any] | None = _field("which run trained it")
    metrics: dict[str, Any]


class _Entry(_Part):
    name: File
    bytes: Count
    sha256: Sha256


class _Manifest(_Part):
    version: Literal[1]
    files: list[_Entry]


def schema() -> dict:
    """JSON Schema (2020-12) of metadata.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Metadata.model_json_schema()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_ids(path: str | Path) -> np.ndarray | list[str]:
    """Ids in their order: int64, mapped into memory, or strings."""
    path = Path(path)
    if path.suffix == ".i64":
        return np.memmap(path, "<i8", "r")
    # Not splitlines: what else ends a line for Python may stand in a JSON string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_manifest(folder: str | Path) -> None:
    """Write manifest.json of all that is in the folder. Whoever writes an artifact does this last."""
    folder = Path(folder)
    files = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in _names(folder)
        if name not in LEFT_OUT
    ]
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}, indent=1) + "\n")


def verify(folder: str | Path) -> Metadata:
    """The metadata, once every file is found to be the one that was written.

    Raises:
      ValueError: a file is missing, changed, cut off or not in the manifest; manifest.json or metadata.json is none, or
        of another version. Names the file, what was found and what was expected.
    """
    folder = Path(folder)
    there = set(_names(folder)) - set(LEFT_OUT)  # before anything is read: of a link or a pipe there is no end
    manifest = _parsed(_Manifest, folder / MANIFEST)
    expected = {entry.name: entry for entry in manifest.files}
    if len(expected) != len(manifest.files) or METADATA not in expected:
        raise ValueError(f"{folder / MANIFEST}: names a file twice, or no {METADATA}. {_WHOLE}")
    if missing := sorted(expected.keys() - there):
        raise ValueError(f"{folder / missing[0]}: not there, but in {MANIFEST}. {_WHOLE}")
    if extra := sorted(there - expected.keys()):
        raise ValueError(f"{folder / extra[0]}: there, but not in {MANIFEST}. {_WHOLE}")
    for name, entry in expected.items():
        if (size := (folder / name).stat().st_size) != entry.bytes:
            raise ValueError(f"{folder / name}: has {size:,} bytes, expected {entry.bytes:,}. {_WHOLE}")
    for name, entry in expected.items():
        if (found := sha256(folder / name)) != entry.sha256:
            raise ValueError(f"{folder / name}: has SHA-256 {found}, expected {entry.sha256}. {_WHOLE}")
    metadata = _parsed(Metadata, folder / METADATA)
    if absent := sorted(_files(metadata.model_dump()) - expected.keys()):
        raise ValueError(f"{folder / METADATA}: names {absent[0]}, which is not there. {_WHOLE}")
    return metadata


_WHOLE = "The model is not as it was written: copy or export it again."


def _names(folder: Path) -> list[str]:
    """All files below a folder, relative, sorted.

    Raises:
      ValueError: something that is neither a file nor a folder, such as a link out of it.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: a link or a device, expected plain files. {_WHOLE}")
        if path.is_file():
            names.append(str(PurePosixPath(path.relative_to(folder))))
    return names


def _files(tree) -> set[str]:
    """What stands under the key "file", anywhere."""
    if isinstance(tree, list):
        return set().union(*map(_files, tree))
    if not isinstance(tree, dict):
        return set()
    own = {tree["file"]} if isinstance(tree.get("file"), str) else set()
    return own.union(*map(_files, tree.values()))


def _parsed(kind: type[_Part], path: Path):
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not there. {_WHOLE}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"{path}: {place}: {first['msg']}; found {str(first['input'])[:80]!r}. Version {VERSION} of this format "
            f"is expected. {_WHOLE}"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recsys_common.artifact", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("schema", help="JSON Schema of metadata.json")
    commands.add_parser("verify", help="check every file of a model's folder").add_argument("folder")
    given = parser.parse_args(arguments)
    if given.command == "schema":
        print(json.dumps(schema(), indent=1))
        return 0
    try:
        metadata = verify(given.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.folder}: whole. {metadata.name}, {metadata.model.parameters:,} parameters, {metadata.created}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
