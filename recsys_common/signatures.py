"""What does a served model compute? From raw ids to embeddings, scores and lists, as TensorFlow signatures.

    inputs = signatures.inputs(model, vocabularies, config)         # what a client sends
    places = {name: signatures.Places(ids) for name, ids in vocabularies.items()}
    rows = signatures.rows(inputs, places, {"user_id": tf.constant([5])})

saving.py puts `Serving` into a SavedModel. Ids and vectors are variables: none of them ends in the graph, which
protobuf limits to 2 GB. A raw id is found by binary search, so there is no lookup table to initialise, and nothing of
this project to import.

Needs: artifact.py features.py embeddings.py
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from recsys_common.artifact import Input
from recsys_common.embeddings import write_rows
from recsys_common.features import fingerprint_bucket, hash_bucket

SLICE = 1 << 18  # rows that are written at once


def inputs(model, vocabularies: dict[str, np.ndarray], config=None) -> list[Input]:
    """What a client sends, those of the user first, then the item.

    A feature's input is called as the feature, without `_index`, plus `_id`; a history is called as its feature, with
    `<history>_length` beside it, and a number too.

    Args:
      model: has `user_features` or `user`, and `item`: names of features; and `rows`, its `embeddings.Embeddings`.
      vocabularies: feature -> ids. A history without its own has that of the feature whose table it shares.
      config: None for a model made by hand: user and item are rows, and row 0 is for unknown ids.

    Raises:
      ValueError: a feature without the ids it needs, or whose rows are not 1 for each id and those before them.
    """
    names = [(name, "user") for name in getattr(model, "user_features", None) or (model.user,)] + [(model.item, "item")]
    return [_input(model, name, side, vocabularies, config) for name, side in names]


def _input(model, name: str, side: str, vocabularies: dict, config) -> Input:
    plain = {"feature": name, "side": side, "length": None, "rows": None, "oov_buckets": None, "buckets": None}
    plain |= {"salt": None, "vocabulary": None, "shape": [None]}
    feature = config.features[name] if config else None
    kind = feature.kind if feature else "index"
    if kind == "number":
        return Input(**plain | {"name": name, "kind": kind, "dtype": "float32"})
    owner = (feature.table if feature else None) or name
    found = {"name": name.removesuffix("_index") + "_id", "kind": kind}
    if kind == "history":
        found |= {"name": name, "shape": [None, feature.length], "length": f"{name}_length"}
    if config and config.features[owner].kind == "hash":
        rows = config.features[owner].rows
        return Input(**plain | found | {"dtype": "int64", "rows": rows, "buckets": rows, "salt": owner})
    if owner not in vocabularies:
        raise ValueError(f"feature {name!r}: vocabularies has no ids of {owner!r}; there are {[*vocabularies]}")
    ids, oov = vocabularies[owner], config.data.oov_buckets if config else 1
    rows = config.features[owner].rows if config else model.rows.features[owner].rows
    if rows < len(ids) + oov or (not config and rows > len(ids) + oov):
        raise ValueError(f"feature {owner!r}: {len(ids):,} ids and {oov} rows for unknown ones, but {rows:,} rows")
    dtype = "string" if _are_strings(ids) else "int64"
    # vocabularies.sql salts with the name of the column: 'user' of user_index.
    salt = (config.features[owner].column if config else owner).removesuffix("_index")
    return Input(**plain | found | {"dtype": dtype, "rows": rows, "oov_buckets": oov, "salt": salt})


def owner(given: Input, config=None) -> str:
    """The feature whose ids an input's are: of a history, that of the table it shares."""
    return (config.features[given.feature].table if config and given.kind != "number" else None) or given.feature


def checked(name: str, ids) -> np.ndarray:
    """Ids as int64, or as an array of str.

    Raises:
      ValueError: no ids, neither integers nor strings, or one that occurs twice.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or not ids.size or not (_are_strings(ids) or np.can_cast(ids.dtype, np.int64)):
        raise ValueError(f"vocabulary {name!r}: found {ids.dtype} {ids.shape}, expected strings or int64 of shape (n,)")
    if _are_strings(ids):
        ids = np.array([each.decode() if isinstance(each, bytes) else each for each in ids.tolist()], object)
        if wrong := [each for each in ids if not isinstance(each, str)]:
            raise ValueError(f"vocabulary {name!r}: {wrong[0]!r} is {type(wrong[0]).__name__}, expected str")
    return ids if _are_strings(ids) else ids.astype(np.int64, copy=False)


def _are_strings(ids) -> bool:
    return np.asarray(ids).dtype.kind in "OUS"


class Places(tf.Module):
    """Where an id stands among ids: a function, int64 or string of any shape -> int64 of that shape, -1 if nowhere.

    By binary search; strings by their 64-bit fingerprints, then they are compared. 12 bytes an id.

    Args:
      ids: [n], as `checked` gives them.

    Raises:
      ValueError: an id occurs twice.
    """

    def __init__(self, name: str, ids: np.ndarray):
        super().__init__()
        self.strings = None
        if _are_strings(ids):
            self.strings = tf.Variable(ids.tolist(), trainable=False, dtype=tf.string)
            ids = _fingerprints(self.strings).numpy()
        order = None
        if (ids[1:] <= ids[:-1]).any():
            order = np.argsort(ids).astype(np.int32 if len(ids) < 2**31 else np.int64)
        self.sorted, last = _zeros(ids.shape, tf.int64), None
        for begin in range(0, len(ids), SLICE):  # never a second copy of all
            part = ids[begin : begin + SLICE] if order is None else ids[order[begin : begin + SLICE]]
            write_rows(self.sorted, begin, part)
            part = part if last is None else np.concatenate([last, part])
            if (same := np.flatnonzero(part[1:] == part[:-1])).size:
                twice = int(part[same[0]]) if self.strings is None else self._text(part[same[0]])
                raise ValueError(f"vocabulary {name!r}: id {twice!r} occurs twice; each id has one row")
            last = part[-1:]
        self.order = None if order is None else _variable(order)

    def __call__(self, wanted: tf.Tensor) -> tf.Tensor:
        """The places of ids."""
        flat = tf.reshape(wanted, [-1])
        keys = flat if self.strings is None else _fingerprints(flat)
        ordered = self.sorted.read_value()  # whole, both times: read by rows as well, it would be copied at each call
        place = tf.minimum(tf.searchsorted(ordered, keys, out_type=tf.int64), tf.size(ordered, tf.int64) - 1)
        found = tf.gather(ordered, place) == keys
        place = place if self.order is None else tf.cast(tf.gather(self.order, place), tf.int64)
        if self.strings is not None:
            found &= tf.gather(self.strings, place) == flat
        return tf.reshape(tf.where(found, place, -1), tf.shape(wanted))

    def _text(self, fingerprint: int) -> str:
        return self.strings.numpy()[_fingerprints(self.strings).numpy() == fingerprint][0].decode()


def _zeros(shape: tuple[int, ...], dtype) -> tf.Variable:
    return tf.Variable(lambda: tf.zeros(shape, dtype), trainable=False)


def _variable(values: np.ndarray) -> tf.Variable:
    """A variable of an array, which may be mapped; tf.Variable(values) would have it in memory twice for a moment."""
    variable = _zeros(values.shape, values.dtype)
    for begin in range(0, len(values), SLICE):
        write_rows(variable, begin, np.array(values[begin : begin + SLICE]))
    return variable


def _fingerprints(strings) -> tf.Tensor:
    return tf.bitcast(tf.fingerprint(strings), tf.int64)


def rows(inputs: list[Input], places: dict[str, Places], raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Raw inputs as a batch of features: rows of tables int32, lengths int32, numbers float32.

    Args:
      places: by feature, for each input that has a vocabulary.
    """
    batch = {}
    for given in inputs:
        value = raw[given.name]
        if given.kind == "number":
            batch[given.feature] = value
        elif given.buckets:
            batch[given.feature] = hash_bucket(value, given.buckets, given.salt)
        else:
            place = places[given.feature](value)
            unknown = tf.zeros_like(place)
            if given.oov_buckets > 1:
                unknown = tf.cast(fingerprint_bucket(value, given.oov_buckets, given.salt), tf.int64)
            batch[given.feature] = tf.cast(tf.where(place < 0, unknown, place + given.oov_buckets), tf.int32)
        if given.length:
            batch[given.length] = raw[given.length]
    return batch


class Serving(tf.Module):
    """What is saved: `functions`, by the names of their signatures, and the variables that they read.

    Args:
      model: has users(batch) -> [n, D] and items(rows) -> [n, D]; a `temperature` is divided into the users' vectors.
      inputs: as `inputs` gives them.
      places: feature -> `Places`, for each input with a vocabulary.
      catalogue: places of the items that may be recommended.
      item_ids: [I], their ids.
      item_vectors: float32 [I, D].
      about: JSON, what `metadata` returns.
    """

    def __init__(self, model, inputs: list[Input], places: dict, catalogue: Places, item_ids, item_vectors, about: str):
        super().__init__()
        self.places, self.catalogue = places, catalogue
        strings = catalogue.strings is not None
        self.item_ids = catalogue.strings if strings else _variable(item_ids)
        self.item_vectors = _variable(item_vectors)
        users, [item] = [[each for each in inputs if each.side == side] for side in ("user", "item")]
        user_specs = {name: spec for each in users for name, spec in specs(each).items()}
        item_spec, nothing = specs(item)[item.name], tf.constant("" if strings else -1, self.item_ids.dtype)
        seen_spec = tf.TensorSpec([None, None], self.item_ids.dtype, "seen_item_id")

        def embedding(raw):
            return users_vectors(model, rows(users, places, raw))

        def item_vectors_of(item_id):
            return tf.cast(model.items(rows([item], places, {item.name: item_id})[item.feature]), tf.float32)

        def user_embedding(**raw):
            return {"embedding": embedding(raw)}

        def item_embedding(**raw):
            return {"embedding": item_vectors_of(raw[item.name])}

        def score(**raw):
            return {"score": tf.reduce_sum(embedding(raw) * item_vectors_of(raw[item.name]), 1)}

        def recommend(k, seen_item_id, **raw):
            scores = tf.matmul(embedding(raw), self.item_vectors, transpose_b=True)  # [n, I]
            seen = catalogue(seen_item_id)
            known = tf.where(seen >= 0)
            columns = tf.gather_nd(seen, known)
            cells = tf.stack([known[:, 0], columns], 1)
            scores = tf.tensor_scatter_nd_update(scores, cells, tf.fill(tf.shape(columns), -np.inf))
            best = tf.math.top_k(scores, tf.minimum(k, tf.shape(scores)[1]))
            ids = tf.where(best.values == -np.inf, nothing, tf.gather(self.item_ids, best.indices))
            rest = [[0, 0], [0, tf.maximum(k - tf.shape(scores)[1], 0)]]
            return {
                "item_id": tf.pad(ids, rest, constant_values=nothing),
                "score": tf.pad(best.values, rest, constant_values=-np.inf),
            }

        def metadata():
            return {"json": tf.constant(about)}

        def traced(function, given):
            return tf.function(function, autograph=False).get_concrete_function(**given)

        asked = {"k": tf.TensorSpec([], tf.int32, "k"), "seen_item_id": seen_spec}
        self.functions = {
            "user_embedding": traced(user_embedding, user_specs),
            "item_embedding": traced(item_embedding, {item.name: item_spec}),
            "score": traced(score, user_specs | {item.name: item_spec}),
            "recommend": traced(recommend, user_specs | asked),
            "metadata": traced(metadata, {}),
        }
        # In the order in which they are captured: `function.variables` has another one in each process.
        handles = {id(each.handle): each for function in self.functions.values() for each in function.variables}
        captured = {id(outer): None for function in self.functions.values() for outer, _ in function.graph.captures}
        own = {id(each.handle) for each in self.variables}
        self.model_variables = [handles[each] for each in captured if each in handles and each not in own]


def users_vectors(model, batch: dict[str, tf.Tensor]) -> tf.Tensor:
    """Float32 [n, D], whose inner product with an item's vector is the score: divided by a temperature."""
    return tf.cast(model.users(batch), tf.float32) / getattr(model, "temperature", 1.0)


def specs(given: Input) -> dict[str, tf.TensorSpec]:
    """Name -> what a signature takes of an input: a history with its length."""
    found = {given.name: tf.TensorSpec(given.shape, given.dtype, given.name)}
    return found | ({given.length: tf.TensorSpec([None], tf.int32, given.length)} if given.length else {})


def batch_specs(users: list[Input]) -> dict[str, tf.TensorSpec]:
    """Feature -> what a batch has of it, once ids are rows."""
    dtypes = {"number": tf.float32}
    found = {each.feature: tf.TensorSpec(each.shape, dtypes.get(each.kind, tf.int32)) for each in users}
    return found | {each.length: tf.TensorSpec([None], tf.int32) for each in users if each.length}
