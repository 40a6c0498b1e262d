"""How do files become shuffled batches? With native ops alone, from a folder or from `gs://`.

    dataset = batches(manifest, batch_size=8192, epochs=3, seed=1)
    model.fit(dataset, epochs=3, steps_per_epoch=steps_per_epoch(manifest, 8192))

Rows are shuffled three times over: the order of files, the record batches of several files interleaved, and all rows
of a window of record batches permuted by one `gather` for each column. Rows are never handled one by one:
`unbatch().shuffle().batch()` is fifty times slower. The order is a function of (seed, epoch, position) alone.

Needs: record_batches.py
"""

from __future__ import annotations

import tensorflow as tf

from recsys_common.record_batches import Manifest, decoder

FILES_AT_ONCE = 8  # files whose record batches are interleaved
WINDOW = 16  # record batches whose rows are permuted together


def steps_per_epoch(manifest: Manifest, batch_size: int, drop_remainder: bool = True) -> int:
    """Batches that one epoch of `batches` yields.

    Raises:
      ValueError: the batch is larger than the data.
    """
    steps = manifest.rows // batch_size if drop_remainder else -(-manifest.rows // batch_size)
    if steps == 0:
        raise ValueError(
            f"batch_size {batch_size:,} is more than the {manifest.rows:,} rows of {manifest.folder}: not one full "
            "batch. Choose a smaller batch_size, or drop_remainder=False."
        )
    return steps


def batches(
    manifest: Manifest,
    batch_size: int,
    *,
    epochs: int = 1,
    seed: int | None = None,
    drop_remainder: bool = True,
) -> tf.data.Dataset:
    """Batches of `{column: tensor [batch_size]}` for `epochs` passes over the files.

    Args:
      manifest: what to read.
      batch_size: rows in a batch.
      epochs: passes; every pass has an order of its own.
      seed: of the shuffle; None keeps the order of the files.
      drop_remainder: leave out the rows that do not fill a last batch of the pass, so that every batch has the
        same static shape (a TPU needs that). With a seed, other rows are left out in each pass.

    Raises:
      ValueError: the batch is larger than the data.
    """
    steps = steps_per_epoch(manifest, batch_size, drop_remainder)
    decode = decoder(manifest)

    def one_pass(epoch: tf.Tensor) -> tf.data.Dataset:
        paths = tf.constant(manifest.paths)
        if seed is not None:
            paths = tf.random.experimental.stateless_shuffle(paths, tf.stack([tf.cast(seed, tf.int64), epoch]))
        dataset = tf.data.Dataset.from_tensor_slices(paths).interleave(
            lambda path: tf.data.TFRecordDataset(path).map(decode),
            cycle_length=FILES_AT_ONCE if seed is not None else 1,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        if seed is not None:
            dataset = dataset.rebatch(WINDOW * manifest.rows_per_record).enumerate()
            dataset = dataset.map(
                lambda number, window: _permute(window, seed, epoch, number),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
        return dataset.rebatch(batch_size, drop_remainder=drop_remainder)

    dataset = tf.data.Dataset.range(epochs).flat_map(one_pass)
    return dataset.apply(tf.data.experimental.assert_cardinality(epochs * steps)).prefetch(tf.data.AUTOTUNE)


def _permute(window: dict[str, tf.Tensor], seed: int, epoch: tf.Tensor, number: tf.Tensor) -> dict[str, tf.Tensor]:
    """All columns of a window in one random order of its rows."""
    rows = tf.shape(next(iter(window.values())), tf.int64)[0]
    key = tf.stack([tf.cast(seed, tf.int64) * 1_000_003 + epoch, number])  # one for each (seed, epoch, window)
    order = tf.random.experimental.stateless_shuffle(tf.range(rows), key)
    return {name: tf.gather(column, order) for name, column in window.items()}
