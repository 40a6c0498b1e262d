"""How does a model leave Python? As a folder that any language can use, and check before it does.

    saving.export("model", model, {"user": user_ids, "item": item_ids}, config)
    saving.load("model").signatures["recommend"](user_id=..., k=..., seen_item_id=...)["item_id"]

artifact.py says what is in the folder, signatures.py what it computes. `tf.saved_model.load("model/saved_model")` opens
it with TensorFlow alone, and gives the same numbers: `export` tries that before it lets the folder stand. Nothing is
pickled, and `load` refuses a graph with operations that it does not know to stay within the graph.

    signature        takes                                           gives
    user_embedding   the user's inputs [n]                           embedding float32 [n, D]
    item_embedding   item_id [n]                                     embedding float32 [n, D]
    score            the user's inputs, item_id [n]                  score float32 [n]
    recommend        the user's inputs, k int32 [], seen_item_id     item_id [n, k], score float32 [n, k], best first
                     [n, S]; what is no item's id (-1, "") is padding
    metadata                                                         json, string []

Where fewer than k items are left, id -1 or "" with score -inf fills up.

Needs: artifact.py signatures.py golden.py saved_graph.py onnx_export.py item_index.py features.py embeddings.py
  masking.py
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

from recsys_common import artifact, golden, item_index, onnx_export, saved_graph, signatures
from recsys_common.artifact import Metadata
from recsys_common.masking import masked

GRAPH_LIMIT = 64 << 20  # bytes of saved_model.pb; protobuf itself ends at 2 GB
READ_BACK = 16 << 20  # bytes of a variable that is read from the disk to compare
BLOCK = 1 << 16  # items whose vectors are computed at once
SAMPLE = 1000  # users by whom the index is measured
ANY_IDS = np.random.default_rng(0).integers(-(2**40), 2**40, 1000)  # of a hashed user whose ids are not told
PACKAGES = ("recsys-common", "tensorflow", "tf-keras", "numpy", "onnx", "onnxruntime", "tf2onnx", "usearch")


def export(
    folder: str | Path, model, vocabularies: dict, config=None, *, about: dict | None = None,
    index: bool = True, onnx: bool = True,
) -> Path:  # fmt: skip
    """Write a model's folder, whole or not at all.

    Args:
      folder: replaced if it exists, once the whole new one is there; killed between two renames, the old one is
        `<folder>.old`.
      model: users(batch) -> [n, D], items(rows) -> [n, D], names of features in `user` or `user_features` and `item`,
        and maybe a `temperature`.
      vocabularies: feature -> ids, int64 or strings, of rows oov_buckets on, in the order of rows. Of a hashed item:
        the items that may be recommended; of a hashed user, ids for golden vectors and for measuring the index.
      config: whose model it is; None for one made by hand, whose row 0 is for unknown ids.
      about: of what is not in the model: name, commit, data, run, metrics. Credentials in it are masked.
      index, onnx: write those parts too; they need packages of the extra `serving`.

    Raises:
      ValueError: the vocabularies do not fit the model, the graph is above 64 MB or has operations that `load` would
        refuse, or what was written gives other numbers than the model.
    """
    folder = Path(folder)
    vocabularies = {name: signatures.checked(name, ids) for name, ids in vocabularies.items()}
    inputs = signatures.inputs(model, vocabularies, config)
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for part in ("items", "vocabulary"):
            (beside / part).mkdir(parents=True)
        _write(beside, folder.name, model, vocabularies, inputs, config, about or {}, index, onnx)
        artifact.write_manifest(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    else:
        beside.rename(folder)
    return folder


def load(folder: str | Path):
    """The SavedModel of an artifact, once it is found to be whole and to keep to itself.

    Raises:
      ValueError: as `artifact.verify`; or an operation in its graph that is not known to stay within the graph.
    """
    artifact.verify(folder)
    saved_graph.check(Path(folder) / "saved_model")
    return tf.saved_model.load(str(Path(folder) / "saved_model"))


def _write(folder, name, model, vocabularies, inputs, config, about, index, onnx) -> None:
    if strange := about.keys() - {"name", "commit", "data", "run", "metrics"}:
        raise ValueError(f"about has {strange.pop()!r}; expected name, commit, data, run, metrics")
    item, users = inputs[-1], [each for each in inputs if each.side == "user"]
    owners = {each.feature: signatures.owner(each, config) for each in inputs}
    if item.feature not in vocabularies:
        raise ValueError(f"feature {item.feature!r} is hashed: vocabularies must have the items to recommend")
    ids = {each.feature: vocabularies.get(owners[each.feature], ANY_IDS) for each in inputs}
    catalogue_ids = ids[item.feature]
    if (pad := "" if item.dtype == "string" else -1) in catalogue_ids:
        raise ValueError(f"feature {item.feature!r}: {pad!r} is an item's id, but fills up lists that are too short")
    made, files = {}, {}
    for owner in sorted({owners[each.feature] for each in inputs if each.oov_buckets}):
        made[owner] = signatures.Places(owner, vocabularies[owner])
        files[owner] = artifact.Vocabulary(**_write_ids(folder, f"vocabulary/{owner}", vocabularies[owner]))
    for number, each in enumerate(inputs):
        inputs[number] = each.model_copy(update={"vocabulary": files.get(owners[each.feature])})
    places = {each.feature: made[owners[each.feature]] for each in inputs if each.oov_buckets}
    catalogue = places.get(item.feature) or signatures.Places(item.feature, catalogue_ids)
    vectors = _write_vectors(folder / "items/vectors.f32", model, item, places, catalogue_ids)
    known = {
        "version": artifact.VERSION,
        "name": about.get("name") or (config.name if config else name),
        "commit": about.get("commit"),
        "versions": _versions(),
        "model": {
            "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
            "config": config.tree() if config else None,
            "hash": config.hash if config else None,
            "parameters": sum(each.shape.num_elements() for each in model.trainable_variables),
            "dim": vectors.shape[1],
        },
        "inputs": [each.model_dump() for each in inputs],
        "items": {
            "ids": {"file": _write_ids(folder, "items/ids", catalogue_ids)["file"], "dtype": item.dtype},
            "vectors": {"file": "items/vectors.f32", "shape": list(vectors.shape)},
        },
        "data": about.get("data"),
        "run": about.get("run"),
        "metrics": about.get("metrics") or {},
    }
    known = masked(known)
    serving = signatures.Serving(model, inputs, places, catalogue, catalogue_ids, vectors, json.dumps(known))
    _save(serving, folder / "saved_model")
    written = {"signatures": saved_graph.signatures(folder / "saved_model"), "onnx": {}}
    written["golden"] = golden.vectors(model, inputs, ids, vectors)
    if onnx:
        written["onnx"]["user_embedding"] = _write_onnx(folder, model, users)
    known["items"]["index"] = None
    if index:
        sample = golden.raw_users(users, ids, SAMPLE, seed=3)
        batch = signatures.rows(users, places, {key: tf.constant(value) for key, value in sample.items()})
        found = item_index.build(
            folder / "items/index.usearch", vectors, signatures.users_vectors(model, batch).numpy()
        )
        known["items"]["index"] = {"file": "items/index.usearch"} | found
    written["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    metadata = Metadata(**known, **written)
    _check(folder, metadata, _variables(serving))
    (folder / artifact.METADATA).write_text(metadata.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _write_ids(folder: Path, name: str, ids: np.ndarray) -> dict:
    """Write ids; what artifact.Vocabulary has."""
    if ids.dtype == object:
        name += ".txt"
        with open(folder / name, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in ids)
    else:
        name += ".i64"
        np.ascontiguousarray(ids, "<i8").tofile(folder / name)
    return {"file": name, "ids": len(ids), "sha256": artifact.sha256(folder / name)}


def _write_vectors(path: Path, model, item, places: dict, ids: np.ndarray) -> np.ndarray:
    """Write the vectors of the items, in the order of their ids; float32 [I, D], mapped from the file."""
    with open(path, "wb") as stream:
        for begin in range(0, len(ids), BLOCK):
            raw = {item.name: tf.constant(ids[begin : begin + BLOCK].tolist(), item.dtype)}
            block = model.items(signatures.rows([item], places, raw)[item.feature])
            stream.write(np.ascontiguousarray(tf.cast(block, tf.float32).numpy(), "<f4").data)
    return np.memmap(path, "<f4", "r", shape=(len(ids), block.shape[1]))


def _versions() -> dict[str, str]:
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _save(serving, folder: Path) -> None:
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # "Assets written to" is no news
    try:
        tf.saved_model.save(serving, str(folder), signatures=serving.functions)
    finally:
        logger.setLevel(level)
    if (size := (folder / "saved_model.pb").stat().st_size) > GRAPH_LIMIT:
        raise ValueError(
            f"the graph has {size:,} bytes, at most {GRAPH_LIMIT:,} are allowed: the model has an array as a constant "
            "(tf.constant, or NumPy in a function). Make it a tf.Variable(trainable=False)."
        )
    saved_graph.check(folder)


def _write_onnx(folder: Path, model, users: list) -> dict:
    (folder / "onnx").mkdir()

    def user_embedding(batch):
        return {"embedding": signatures.users_vectors(model, batch)}

    found = onnx_export.export(folder / "onnx", "user_embedding", user_embedding, signatures.batch_specs(users))
    return found | {"file": f"onnx/{found['file']}"}


def _check(folder: Path, metadata: Metadata, own: dict[str, tf.Variable]) -> None:
    """Run all golden vectors by what was written.

    Small variables are read back. Of large ones a second copy would be too much memory: the loaded graph borrows those
    of the model, and TensorFlow's checksums in variables.index, at which every load looks, vouch for what is on disk.
    """
    options, lent = tf.saved_model.LoadOptions(experimental_skip_checkpoint=True), []
    loaded = tf.saved_model.load(str(folder / "saved_model"), options=options)
    try:
        for path, variable in _variables(loaded).items():
            if variable.dtype == tf.string or own[path].shape.num_elements() * variable.dtype.size <= READ_BACK:
                variable.assign(_stored(folder, path, variable.dtype))
            else:
                _move(own[path], variable)
                lent.append((own[path], variable))
        for each in metadata.golden:
            spec = metadata.signatures[each.signature].inputs
            found = loaded.signatures[each.signature](**golden.tensors(each.inputs, spec))
            golden.compare(f"saved_model, {each.signature}", each.outputs, {k: v.numpy() for k, v in found.items()})
    finally:
        for variable, borrower in lent:
            _move(borrower, variable)
    for name, function in metadata.onnx.items():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / function.file, providers=["CPUExecutionProvider"])
        for each in (each for each in metadata.golden if each.signature == name):
            rows = {key: np.asarray(each.rows[key], spec.dtype) for key, spec in function.inputs.items()}
            found = dict(zip(function.outputs, session.run([*function.outputs], rows), strict=True))
            golden.compare(function.file, each.outputs, found)


def _move(source: tf.Variable, target: tf.Variable) -> None:
    """Let `target` have the memory of `source`. Both may not have it: TensorFlow copies what two variables hold."""
    tf.raw_ops.AssignVariableOp(resource=target.handle, value=source.read_value_no_copy())
    tf.raw_ops.AssignVariableOp(resource=source.handle, value=tf.zeros([0], source.dtype))


def _stored(folder: Path, path: str, dtype: tf.DType) -> tf.Tensor:
    prefix, name = str(folder / "saved_model/variables/variables"), f"{path}/.ATTRIBUTES/VARIABLE_VALUE"
    return tf.raw_ops.RestoreV2(prefix=prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype])[0]


def _variables(root) -> dict[str, tf.Variable]:
    """Path of attributes -> variable, each by one path, as in the checkpoint's names."""
    found, seen, queue = {}, set(), [("", root)]
    for path, part in queue:
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, tf.Variable):
            found[path] = part
        else:
            children = tf.train.TrackableView.children(part)
            queue += [(f"{path}/{name}".lstrip("/"), child) for name, child in children.items()]
    return found
