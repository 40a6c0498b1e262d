"""How do ids become rows of a table? By a vocabulary or by hashing; with histories, negatives and their log-Q.

    users = vocabulary(user_ids, user_rows, oov_buckets=1, name="user")    # once
    draw = negative_sampler(item_frequency)                                # once

    def features(batch, key):                                              # for every batch
        negatives, negatives_log_q = draw(key, [8192, 64])
        history, lengths = pad_histories(batch["history"], 200)
        return {"user": users(batch["user_id"]), "item": hash_bucket(batch["item_id"], 2**20, "item"), ...}

Which one for ids? A vocabulary gives each known id a row of its own; taken from SQL (vocabularies.sql) it costs
nothing here. `hash_bucket` needs no table of ids; some ids share a row. `fingerprint_bucket` is the same over strings,
for names and for tables that hashed_ids.sql made: ten times the cost.

All of it works on whole batches with TensorFlow's own CPU ops, without Python and without `tf.lookup` tables. So it
runs in `Dataset.map`, on the host of a TPU, in the workers of the tf.data service and in a SavedModel. Of a ragged
column of ids take the values: `history.with_values(items(history.values))`.

Needs: nothing else.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def hash_bucket(ids: tf.Tensor, buckets: int, name: str) -> tf.Tensor:
    """The bucket of an integer id: the upper half of the FarmHash fingerprint of its 8 bytes, scaled to `buckets`.

    A multiplication between two xor-shifts is hardly cheaper, and fills the buckets unevenly for some patterns of ids
    (tests/test_features.py has them). BigQuery computes the same, with v for `id ^ FARM_FINGERPRINT('user')`:

        ((FARM_FINGERPRINT(CODE_POINTS_TO_BYTES([v & 255, (v >> 8) & 255, ..., (v >> 56) & 255])) >> 32)
          & 0xffffffff) * buckets >> 32

    Args:
      ids: integers of any shape.
      buckets: 1 to 2^31 - 1. One bucket's probability exceeds another's by buckets / 2^32 of it at most.
      name: the feature's; ids that share a bucket under one name share it under another only by chance.

    Returns:
      int32 of the shape of `ids`, 0 to buckets - 1.

    Raises:
      TypeError: ids are not integers.
      ValueError: buckets out of range.
    """
    if not 1 <= buckets < 2**31:
        raise ValueError(f"{name!r}: {buckets} buckets, expected 1 to 2^31 - 1 (fingerprint_bucket takes more)")
    salted = tf.bitwise.bitwise_xor(tf.reshape(_int64(ids), [-1, 1]), tf.bitcast(tf.fingerprint([name]), tf.int64))
    half = tf.bitwise.right_shift(tf.bitcast(tf.fingerprint(salted), tf.uint64), 32)
    # Multiplied and shifted: cheaper than the remainder of a division, and no more uneven.
    return tf.reshape(tf.cast(tf.bitwise.right_shift(half * buckets, 32), tf.int32), tf.shape(ids))


def fingerprint_bucket(values: tf.Tensor, buckets: int, name: str) -> tf.Tensor:
    """The bucket of 'user5' or 'usergold': that of hashed_ids.sql, and of `tf.strings.to_hash_bucket_fast`.

    Writing the number as a string, and joining, take nine tenths of the time.

    Args:
      values: integers or strings, of any shape.
      buckets: 1 to 2^63 - 1.
      name: goes before the value, so that user 5 and item 5 are two strings; may be "".

    Returns:
      int32, or int64 if `buckets` is above 2^31, of the shape of `values`; 0 to buckets - 1.

    Raises:
      TypeError: values are neither integers nor strings.
      ValueError: buckets below 1 (in a graph; tf.errors.InvalidArgumentError outside of one).
    """
    values = tf.convert_to_tensor(values)
    strings = values if values.dtype == tf.string else tf.strings.as_string(_int64(values))
    bucket = tf.strings.to_hash_bucket_fast(tf.strings.join([name, strings]) if name else strings, buckets)
    return tf.cast(bucket, tf.int32) if buckets <= 2**31 else bucket


def vocabulary(ids: np.ndarray, rows: np.ndarray, oov_buckets: int, name: str):
    """A function from ids (integers, any shape) to rows of a table, as vocabularies.sql numbers them.

    An id out of the vocabulary takes `fingerprint_bucket(id, oov_buckets, name)`, so a served model gives it the row
    that the training files gave it. Looked up directly where the ids lie so densely that an array over all of their
    range is small, otherwise by binary search. Either array goes into the dataset's graph when the tf.data service
    takes it: up to some ten million ids. Beyond that, let SQL write the rows into the files.

    Args:
      ids: integers [n], in any order, each once.
      rows: integers [n], their rows.
      oov_buckets: rows 0 to oov_buckets - 1 are for ids out of the vocabulary; 1 or more.
      name: "user" or "item", as in vocabularies.sql.

    Returns:
      A function; its rows are int32, or int64 if one is above 2^31 - 1.

    Raises:
      TypeError: ids or rows are not integers that fit into int64.
      ValueError: no ids, more or fewer rows than ids, an id twice, a negative row, or oov_buckets below 1.
    """
    ids, rows = (np.asarray(column).astype(np.int64, casting="safe") for column in (ids, rows))
    if ids.ndim != 1 or ids.shape != rows.shape or not ids.size or rows.min() < 0 or oov_buckets < 1:
        found = f"{ids.shape} ids, {rows.shape} rows from {rows.min(initial=0)}, {oov_buckets} oov_buckets"
        raise ValueError(f"vocabulary {name!r}: {found}; expected (n,) of both, n and oov_buckets > 0, rows from 0")
    order = np.argsort(ids)
    ids, rows = ids[order], rows[order].astype(np.int32 if rows.max() < 2**31 else np.int64)
    if (twice := ids[1:][ids[1:] == ids[:-1]]).size:
        raise ValueError(f"vocabulary {name!r}: id {twice[0]} occurs twice; each id has one row")
    low, span = ids[0], int(ids[-1]) - int(ids[0]) + 1
    if dense := span <= max(2**20, 8 * ids.size):
        table = np.full(span + 1, -1, rows.dtype)  # the last place is for ids out of range
        table[ids - low] = rows
    ids, rows = tf.constant(ids), tf.constant(table if dense else rows)

    def lookup(wanted: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(_int64(wanted), [-1])
        if dense:
            place = tf.minimum(tf.bitcast(flat - low, tf.uint64), span)  # unsigned: below `low` is far above
            found = tf.gather(rows, tf.bitcast(place, tf.int64))
        else:
            place = tf.minimum(tf.searchsorted(ids, flat), tf.size(ids) - 1)
            found = tf.where(tf.gather(ids, place) == flat, tf.gather(rows, place), -1)
        if oov_buckets == 1:
            return tf.reshape(tf.maximum(found, 0), tf.shape(wanted))
        unknown = tf.where(found < 0)  # strings are slow: only for those that need one
        buckets = fingerprint_bucket(tf.gather_nd(flat, unknown), oov_buckets, name)
        found = tf.tensor_scatter_nd_update(found, unknown, tf.cast(buckets, found.dtype))
        return tf.reshape(found, tf.shape(wanted))

    return lookup


def pad_histories(history: tf.RaggedTensor, length: int, pad=0, side: str = "left") -> tuple[tf.Tensor, tf.Tensor]:
    """The last `length` items of each history, filled up with `pad`.

    Padding stands at the left unless asked otherwise: the latest item is then in place -1 of every row, where a model
    reads off its prediction without a `gather`, as SASRec does; it is also the faster side. Tell padding from items by
    the lengths: `pad` 0 is also the row of an item out of the vocabulary.

    Args:
      history: ragged [B, None], the oldest item first.
      length: places in a row, 1 or more.
      pad: what stands in an empty place; a history without items is all `pad`.
      side: "left" or "right", where the padding goes.

    Returns:
      The items, [B, length] of the dtype of `history` with `length` (and B, if known) as static shape; and how many of
      them are not padding, int32 [B].

    Raises:
      ValueError: length below 1, or an unknown side.
    """
    if length < 1 or side not in ("left", "right"):
        raise ValueError(f"length={length}, side={side!r}; expected a length of 1 or more, and 'left' or 'right'")
    lengths, shape = history.row_lengths(), [history.shape[0], length]
    if side == "left":
        # `to_tensor` keeps the first items and pads at the right. With everything backwards these are the last ones,
        # and the left, in about half the time of slicing the ragged tensor first.
        values, rows = tf.reverse(history.values, [0]), tf.reverse(lengths, [0])
        backwards = tf.RaggedTensor.from_row_lengths(values, rows, validate=False)
        dense = tf.reverse(backwards.to_tensor(pad, shape=shape), [0, 1])
    else:
        dense = history[:, -length:].to_tensor(pad, shape=shape)
    return dense, tf.cast(tf.minimum(lengths, length), tf.int32)


def log_q(frequency: np.ndarray) -> np.ndarray:
    """log Q of the log-Q correction: Q of an item is its share of the training rows.

    As `models/matrix_factorization.py` has it. A frequency below 1 counts as 1, so that the logarithm of an item that
    training never saw is finite. For uniform sampling give every item a frequency of 1: log Q is then -log(n). The
    number of negatives, a factor common to all items, cancels in a softmax and is left out.

    Args:
      frequency: counts (not shares) [n], as in item_frequencies.sql, in the order of the rows.

    Returns:
      float32 [n].

    Raises:
      ValueError: not one dimension, no items, a negative number or NaN, or nothing but zeros.
    """
    frequency = np.asarray(frequency, np.float64)
    if frequency.ndim != 1 or not frequency.size or not (frequency >= 0).all() or not 0 < frequency.sum() < np.inf:
        raise ValueError(f"frequency of shape {frequency.shape}: expected (n,), numbers >= 0, not all 0")
    return np.log(np.maximum(frequency, 1) / frequency.sum()).astype(np.float32)


def negative_sampler(frequency: np.ndarray):
    """A function that draws items with replacement, each with the probability of its share of `frequency`.

    By binary search among the running totals. An item with frequency 0 is never drawn. A draw may hit an item that the
    user took; the loss is where that is masked.

    Args:
      frequency: numbers [n], as for `log_q`. `np.ones(n)` draws uniformly, `frequency**0.75` in between.

    Returns:
      draw(key, shape) -> items int32, log_q float32, both of `shape`. The draws are a function of `key` (int64 [2], as
      for tf.random.stateless_uniform) alone: a second sampler wants a key of its own.

    Raises:
      ValueError: as `log_q`.
    """
    logs, total = log_q(frequency), np.cumsum(frequency, dtype=np.float64)
    logs, ends = tf.constant(logs), tf.constant(total / total[-1])

    def draw(key: tf.Tensor, shape) -> tuple[tf.Tensor, tf.Tensor]:
        place = tf.random.stateless_uniform(shape, key, dtype=tf.float64, alg="philox")  # the same on every device
        items = tf.reshape(tf.searchsorted(ends, tf.reshape(place, [-1]), side="right"), shape)
        return items, tf.gather(logs, items)

    return draw


def _int64(ids: tf.Tensor) -> tf.Tensor:
    tf.debugging.assert_integer(ids, "ids are integers; of names, take fingerprint_bucket")
    return tf.cast(ids, tf.int64)
