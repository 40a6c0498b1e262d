"""What must a client of a served model get? Inputs with their outputs, computed by the model itself in Python.

    vectors = golden.vectors(model, inputs, ids, item_vectors)    # for artifact.Golden
    golden.compare("SavedModel", expected, found)                 # raises where they differ

Row numbers are found here one by one, without the search that the served model does.

Needs: artifact.py signatures.py features.py embeddings.py item_index.py
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from recsys_common import item_index, signatures
from recsys_common.artifact import Input
from recsys_common.features import fingerprint_bucket, hash_bucket

TOLERANCE = 1e-5  # absolute up to 1, relative above
COUNT = 6  # users: the first, the last, an unknown one, and some between


def vectors(model, inputs: list[Input], ids: dict[str, np.ndarray], item_vectors: np.ndarray) -> list[dict]:
    """Golden vectors of all signatures but `metadata`, as artifact.Golden has them.

    Args:
      inputs: as `signatures.inputs` gives them.
      ids: feature -> ids that it may have; of the item those that may be recommended.
      item_vectors: float32 [I, D], theirs.
    """
    users, item = [each for each in inputs if each.side == "user"], inputs[-1]
    raw = raw_users(users, ids, COUNT, seed=1)
    for given in users:
        _at_the_edges(given, raw, ids[given.feature])
    catalogue = ids[item.feature]
    items = {item.name: np.random.default_rng(2).choice(catalogue, COUNT)}
    _at_the_edges(item, items, catalogue)

    user_rows, item_rows = _rows(users, raw, ids), _rows([item], items, ids)
    u = signatures.users_vectors(model, {name: tf.constant(rows) for name, rows in user_rows.items()}).numpy()
    v = tf.cast(model.items(tf.constant(item_rows[item.feature])), tf.float32).numpy()
    seen = np.full([COUNT, 2], _pad(item), catalogue.dtype)  # the best item of each, and padding
    if len(catalogue) > 1:
        seen[:, 0] = catalogue[item_index.exact(item_vectors, u, 1)[0][:, 0]]
    k = min(10, max(1, len(catalogue) - 1))
    places, scores = item_index.exact(item_vectors, u, k + 1)
    left = [np.flatnonzero(catalogue[row] != best)[:k] for row, best in zip(places, seen[:, 0], strict=True)]
    places, scores = (np.take_along_axis(each, np.stack(left), 1) for each in (places, scores))
    made = (
        ("user_embedding", raw, user_rows, {"embedding": u}),
        ("item_embedding", items, item_rows, {"embedding": v}),
        ("score", raw | items, user_rows | item_rows, {"score": (u * v).sum(1)}),
        ("recommend", raw | {"seen_item_id": seen}, user_rows, {"item_id": catalogue[places], "score": scores}),
    )
    return [
        {
            "signature": name,
            "inputs": {key: plain(value) for key, value in given.items()} | ({"k": k} if name == "recommend" else {}),
            "rows": {key: rows.tolist() for key, rows in rows.items()},
            "outputs": {key: plain(value) for key, value in outputs.items()},
        }
        for name, given, rows, outputs in made
    ]


def raw_users(users: list[Input], ids: dict[str, np.ndarray], count: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of the user's side at random: known ids, histories of 0 to all places, numbers around 0."""
    random, raw = np.random.default_rng(seed), {}
    for given in users:
        if given.kind == "number":
            raw[given.name] = random.normal(size=count).astype(np.float32)
            continue
        width = given.shape[1:]
        raw[given.name] = random.choice(ids[given.feature], [count, *width])
        if given.length:
            lengths = random.integers(0, width[0] + 1, count).astype(np.int32)
            raw[given.length] = lengths
            raw[given.name][np.arange(width[0]) < width[0] - lengths[:, None]] = _pad(given)
    return raw


def tensors(given: dict, spec: dict) -> dict[str, tf.Tensor]:
    """Inputs of a golden vector as tensors; `spec` has their dtypes, as artifact.Signature.inputs."""
    return {
        name: tf.constant(_integers(value) if spec[name].dtype == "int64" else value, spec[name].dtype)
        for name, value in given.items()
    }


def compare(where: str, expected: dict, found: dict[str, np.ndarray]) -> None:
    """Check outputs against a golden vector's: ids in the same order, but where scores are equal.

    Raises:
      ValueError: they differ by more than `TOLERANCE`; says where, and by how much.
    """
    for name, value in expected.items():
        if name == "item_id":
            continue
        wanted, got = np.asarray(value, np.float32), np.asarray(found[name])
        if got.shape != wanted.shape:
            raise ValueError(f"{where}: {name} is of shape {got.shape}, and the model's of {wanted.shape}")
        difference = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1)
        if not (difference <= TOLERANCE).all():
            raise ValueError(f"{where}: {name} differs from the model's by {difference.max()}, expected <= {TOLERANCE}")
    if "item_id" in expected:
        scores = np.asarray(expected["score"], np.float32)
        for row, (wanted, got) in enumerate(zip(expected["item_id"], plain(found["item_id"]), strict=True)):
            for place in (at for at, item in enumerate(got) if item != wanted[at]):
                there = wanted.index(got[place]) if got[place] in wanted else len(wanted) - 1
                gap = abs(scores[row, there] - scores[row, place])
                if gap > TOLERANCE * max(1, abs(scores[row, place])) or len(set(got)) < len(got):
                    raise ValueError(f"{where}: row {row} has {got[place]} at place {place}, the model {wanted[place]}")


def plain(value: np.ndarray) -> list:
    """An array as JSON has it: int64 as strings, float32 with as many digits as tell it from others."""
    value = np.asarray(value)
    if value.dtype == np.float32:
        return _nested(value, lambda number: float(str(number)))
    if value.dtype == np.int64:
        return _nested(value, str)
    if value.dtype == object:
        return _nested(value, lambda text: text.decode() if isinstance(text, bytes) else text)
    return value.tolist()


def _nested(value, one):
    return [_nested(each, one) for each in value] if isinstance(value, np.ndarray) else one(value)


def _integers(value):
    return [_integers(each) for each in value] if isinstance(value, list) else int(value)


def _pad(given: Input):
    return "" if given.dtype == "string" else -1


def unknown_id(ids: np.ndarray):
    """An id that is not among ids."""
    found = "nobody" if ids.dtype == object else 1000003
    while (ids == found).any():
        found = found + "?" if ids.dtype == object else found + 1
    return found


def _at_the_edges(given: Input, raw: dict, ids: np.ndarray) -> None:
    """The first three rows become the first id, the last and an unknown one; of histories the empty and the full."""
    if given.kind == "number":
        return
    value, edges = raw[given.name], (ids[0], ids[-1], unknown_id(ids))
    if not given.length:
        value[:3] = edges
        return
    length = value.shape[1]
    raw[given.length][:3] = 0, length, min(3, length)
    value[:3] = _pad(given)
    value[1] = ids[np.arange(length) % len(ids)]
    value[2, -min(3, length) :] = edges[: min(3, length)]


def _rows(inputs: list[Input], raw: dict, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = {}
    for given in inputs:
        value = raw[given.name]
        if given.kind == "number":
            rows[given.feature] = value
        elif given.buckets:
            rows[given.feature] = hash_bucket(tf.constant(value), given.buckets, given.salt).numpy()
        else:
            known = {each: np.flatnonzero(ids[given.feature] == each) for each in set(value.ravel().tolist())}
            out = {
                each: int(fingerprint_bucket(tf.constant([each]), given.oov_buckets, given.salt)[0])
                for each, places in known.items()
                if not len(places)
            }
            row = [
                out[each] if each in out else given.oov_buckets + int(known[each][0]) for each in value.ravel().tolist()
            ]
            rows[given.feature] = np.array(row, np.int32).reshape(value.shape)
        if given.length:
            rows[given.length] = raw[given.length]
    return rows
