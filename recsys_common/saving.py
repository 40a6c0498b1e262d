"""How does a model leave Python? As a SavedModel that takes the ids of the outside world.

    export(folder, user_ids, user_vectors, item_ids, item_vectors, {"model": "matrix factorization"})
    tf.saved_model.load(folder).signatures["recommend"](user_id=..., k=...)

Ids and vectors are variables: none of them ends in the graph, which protobuf limits to 2 GB. The raw id is found by
binary search in the sorted ids, so there is no lookup table to initialise and nothing of this project to import.

Needs: nothing else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf


def export(
    folder: str | Path,
    user_ids: np.ndarray,
    user_vectors: np.ndarray,
    item_ids: np.ndarray,
    item_vectors: np.ndarray,
    metadata: dict,
) -> None:
    """Write a SavedModel whose score is the dot product of a user's and an item's vector.

    Signatures:
      score: user_id int64 [n], item_id int64 [n] -> score float32 [n].
      recommend: user_id int64 [n], k int32 [] -> item_id int64 [n, k], score float32 [n, k], best first. Items that
        the user has already seen are the caller's to leave out.
    An id that is not in the vocabulary takes row 0.

    Args:
      folder: replaced if it exists, once the whole new model is there; killed between two renames, the old one is
        `<folder>.old`.
      user_ids: int64 [U], the id of user row r in place r - 1: row 0 is for unknown ids.
      user_vectors: float32 [U + 1, d].
      item_ids: int64 [I], likewise.
      item_vectors: float32 [I + 1, d].
      metadata: what a reader of the model wants to know; goes into `assets.extra/metadata.json`.

    Raises:
      ValueError: the number of ids and vectors do not fit, or an id occurs twice.
    """
    about = json.dumps(metadata, indent=1)
    module = tf.Module()
    for side, ids, vectors in (("user", user_ids, user_vectors), ("item", item_ids, item_vectors)):
        ids = np.asarray(ids, np.int64)
        if len(vectors) != len(ids) + 1:
            raise ValueError(
                f"{len(vectors)} {side} vectors for {len(ids)} ids; expected {len(ids) + 1} (row 0 is unknown)"
            )
        order = np.argsort(ids)
        if (np.diff(ids[order]) == 0).any():
            twice = ids[order][1:][np.diff(ids[order]) == 0][0]
            raise ValueError(f"{side} id {twice} occurs twice in the vocabulary")
        setattr(module, f"{side}_sorted", tf.Variable(ids[order], trainable=False))
        setattr(module, f"{side}_rows", tf.Variable(order + 1, trainable=False, dtype=tf.int64))
        setattr(module, f"{side}_vectors", tf.Variable(vectors, dtype=tf.float32))
    module.item_ids = tf.Variable(item_ids, trainable=False, dtype=tf.int64)

    def row(side: str, ids: tf.Tensor) -> tf.Tensor:
        ordered = getattr(module, f"{side}_sorted")
        place = tf.minimum(tf.searchsorted(ordered, ids), tf.size(ordered) - 1)
        found = tf.equal(tf.gather(ordered, place), ids)
        return tf.where(found, tf.gather(getattr(module, f"{side}_rows"), place), 0)

    def ids_of(name: str) -> tf.TensorSpec:
        return tf.TensorSpec([None], tf.int64, name)

    @tf.function(input_signature=[ids_of("user_id"), ids_of("item_id")])
    def score(user_id, item_id):
        user = tf.gather(module.user_vectors, row("user", user_id))
        item = tf.gather(module.item_vectors, row("item", item_id))
        return {"score": tf.reduce_sum(user * item, 1)}

    @tf.function(input_signature=[ids_of("user_id"), tf.TensorSpec([], tf.int32, "k")])
    def recommend(user_id, k):
        user = tf.gather(module.user_vectors, row("user", user_id))
        best = tf.math.top_k(tf.matmul(user, module.item_vectors[1:], transpose_b=True), k)
        return {"item_id": tf.gather(module.item_ids, best.indices), "score": best.values}

    module.score, module.recommend = score, recommend
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # "Assets written to" is no news
    try:
        tf.saved_model.save(module, str(beside), signatures={"score": score, "recommend": recommend})
    finally:
        logger.setLevel(level)
    extra = beside / "assets.extra"
    extra.mkdir(exist_ok=True)
    (extra / "metadata.json").write_text(about + "\n")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    else:
        beside.rename(folder)
