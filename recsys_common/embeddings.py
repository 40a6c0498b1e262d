"""How does a table of 100 M rows become a layer?

    user, item = Table("user", 100_000_000, 16), Table("item", 1_000_000, 16)
    layer = Embeddings({"user_index": user, "item_index": item, "history": item})  # features may share a table
    vectors = layer(batch)  # {"user_index": float32 [B, 16], "item_index": ..., "history": ...}
    configs = tpu_features({"user_index": user, "item_index": item, "history": item}, LazyAdam(1e-3))  # for a TPU

A table is made of zeros and filled slice by slice, so that memory never holds it twice. An initial row is a pure
function of (seed, table name, row): neither the slices nor the shards of a partitioned table change it. Train it with
the optimizers of optimizers.py, whose step costs what the batch touches. Read and write parts of it by `read_rows` and
`write_rows`: `variable[a:b]` and `variable.numpy()` copy the whole table first.

Needs: nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import tensorflow as tf

BLOCK = 1 << 16  # rows drawn together; another number gives other initial tables


@dataclass(frozen=True)
class Table:
    """Rows of numbers that are learned, one for each id.

    Raises:
      ValueError: no row, no column, or not an integer of them; a negative `initial`, an unknown combiner or dtype.
    """

    name: str  # of the variable; also what its initial rows depend on
    rows: int
    dim: int
    combiner: str = "mean"  # of the rows of a history: sum, mean (sum / n) or sqrtn (sum / sqrt(n))
    dtype: str = "float32"  # of the stored rows: float32 or bfloat16 (half the memory); look-ups return float32
    initial: float = 0.05  # rows are drawn uniformly from -initial to initial; 0: zeros

    def __post_init__(self):
        for name, found, fits, expected in (
            ("rows", self.rows, hasattr(self.rows, "__index__") and self.rows >= 1, "an integer, 1 or more"),
            ("dim", self.dim, hasattr(self.dim, "__index__") and self.dim >= 1, "an integer, 1 or more"),
            ("combiner", self.combiner, self.combiner in ("sum", "mean", "sqrtn"), "sum, mean or sqrtn"),
            ("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("initial", self.initial, self.initial >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"table {self.name!r}: {name} is {found!r}, expected {expected}")


def initial_rows(table: Table, seed: int, begin: int, end: int) -> tf.Tensor:
    """Rows begin to end - 1 as `create` makes them, [end - begin, dim] of the table's dtype."""
    key, blocks = zlib.crc32(f"{seed}/{table.name}".encode()), []
    for block in range(begin // BLOCK, (end - 1) // BLOCK + 1):
        rows = tf.random.stateless_uniform(
            [BLOCK, table.dim], [key, block], -table.initial, table.initial, alg="philox"
        )
        blocks.append(rows[max(0, begin - block * BLOCK) : end - block * BLOCK])
    return tf.cast(tf.concat(blocks, 0), table.dtype)


def create(table: Table, seed: int = 0, slice_rows: int = 1 << 16) -> tf.Variable:
    """The variable [rows, dim] of a table, filled slice by slice: peak memory is the table and two slices.

    Under a strategy, call it in `strategy.scope()`.

    Args:
      slice_rows: rows written at once; the table is the same, bit for bit, whatever it is.
    """

    def zeros(partition_shape=None, partition_offset=None):  # the names by which ParameterServerStrategy asks
        return tf.zeros(partition_shape or [table.rows, table.dim], table.dtype)

    with tf.init_scope():
        variable = tf.Variable(zeros, name=table.name, dtype=table.dtype, shape=[table.rows, table.dim])
        drawn = table.initial and not getattr(variable, "shapes_only", False)  # of tpu.shapes_only: no memory to fill
        for begin in range(0, table.rows if drawn else 0, slice_rows):
            end = min(begin + slice_rows, table.rows)
            write_rows(variable, begin, initial_rows(table, seed, begin, end))
    return variable


def read_rows(variable: tf.Variable, begin: int, end: int) -> tf.Tensor:
    """Rows begin to end - 1 of a variable of any shape [rows, ...], without a copy of the others.

    From then on TensorFlow copies this variable whenever all of it is read, as it does after any sparse update. That is
    right for tables; read a dense layer's kernel by `variable.numpy()`.
    """
    return tf.concat([_here(piece).sparse_read(tf.range(a, b)) for piece, a, b in _pieces(variable, begin, end)], 0)


def write_rows(variable: tf.Variable, begin: int, rows: tf.Tensor) -> None:
    """Overwrite the rows from `begin` on, in place, where `variable[a:b].assign` would copy all of them first.

    Args:
      variable: [rows, ...]; of a mirrored variable every copy is written.
      rows: [n, ...] of the variable's dtype, or NumPy.

    Raises:
      IndexError: the variable has no such rows.
      ValueError: rows of another shape, which TensorFlow would repeat where they are too few numbers.
    """
    rows, at = tf.convert_to_tensor(rows, variable.dtype), 0
    if rows.shape[1:] != variable.shape[1:]:
        raise ValueError(f"{variable.name}: rows are of shape {rows.shape}, expected {[None, *variable.shape[1:]]}")
    for piece, a, b in _pieces(variable, begin, begin + rows.shape[0]):
        for copy in getattr(piece, "values", [piece]):
            tf.raw_ops.ResourceStridedSliceAssign(
                ref=copy.handle, begin=[a], end=[b], strides=[1], value=rows[at : at + b - a]
            )
        at += b - a


def _pieces(variable, begin: int, end: int) -> Iterator[tuple[tf.Variable, int, int]]:
    """The shards of a partitioned table that hold rows begin to end - 1, with the rows' places in each."""
    if not 0 <= begin <= end <= variable.shape[0]:
        raise IndexError(f"{variable.name}: rows {begin} to {end} asked for, it has {variable.shape[0]}")
    for piece in getattr(variable, "variables", [variable]):
        rows = piece.shape[0]
        if begin < rows and end > 0:
            yield piece, max(begin, 0), min(end, rows)
        begin, end = begin - rows, end - rows


class Embeddings(tf.keras.layers.Layer):
    """The features of a batch, each as the row of its id, or as the combined rows of its history.

    Args:
      features: table of each feature; features of one table share its rows.
      seed: of the initial tables.

    Attributes:
      tables: variables by table name.

    Raises:
      ValueError: two different tables have the same name.
    """

    def __init__(self, features: dict[str, Table], seed: int = 0):
        super().__init__(name="embeddings", autocast=False)
        self.features = dict(features)
        self.tables = {name: create(table, seed) for name, table in _named(features).items()}

    def call(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """float32 [B, dim] for each feature of this layer that the batch has.

        An int [B] gives rows. A padded int [B, L] with `<feature>_length` int [B] beside it (of each row the last
        `length` ids count), or a RaggedTensor [B, None], is a history: its rows are combined as its table says, an
        empty one to zeros. Training touches no row for padding, but row 0 in a batch of nothing else: its gradient is
        0, which LazyAdam's momentum and weight decay still move. A RaggedTensor saves the look-ups of padding; XLA
        (jit_compile=True) needs the padded form, whose shapes are static: its tf.unique, by which tf-keras sums
        duplicate ids, takes the padding of a dynamic shape for ids.

        Raises:
          ValueError: a padded history without its length.
        """
        return {name: self._lookup(name, batch) for name in self.features if name in batch}

    def _lookup(self, name, batch):
        table, ids = self.features[name], batch[name]
        variable = self.tables[table.name]
        if isinstance(ids, tf.RaggedTensor):
            length = ids.row_lengths()
            rows = lookup(variable, ids.flat_values)
            combined = tf.math.unsorted_segment_sum(rows, ids.value_rowids(), ids.nrows())
            combined.set_shape([ids.shape[0], table.dim])
        elif ids.shape.rank == 1:
            return lookup(variable, ids)
        else:
            counts = _counts(batch, name)
            length = tf.reduce_sum(tf.cast(counts, tf.int32), 1)
            # Padding looks up a row that the batch touches anyway (row 0 if it touches none): none is trained for it.
            rows = lookup(variable, tf.where(counts, ids, tf.reduce_max(tf.where(counts, ids, 0))))
            combined = tf.reduce_sum(tf.where(counts[:, :, None], rows, 0.0), 1)
        if table.combiner == "sum":
            return combined
        count = tf.cast(tf.maximum(length, 1), tf.float32)[:, None]
        return combined / (count if table.combiner == "mean" else tf.sqrt(count))


def lookup(variable: tf.Variable, ids: tf.Tensor) -> tf.Tensor:
    """The rows of ids [...], float32 [..., dim].

    `tf.nn.embedding_lookup` of a mirrored variable reads the whole table first; this reads the rows.
    """
    return tf.cast(tf.nn.embedding_lookup(_here(variable), ids), tf.float32)


def _here(variable):
    """Of a mirrored variable the copy on this replica's device: the whole cannot be read by rows."""
    return getattr(variable, "_get", lambda: variable)()


def _counts(batch, name):
    """bool [B, L]: which ids of a left-padded history are none of its padding."""
    length = batch.get(f"{name}_length")
    if length is None:
        raise ValueError(f"feature {name!r} is padded, of shape {batch[name].shape}; the batch must have {name}_length")
    width = tf.shape(batch[name])[1]
    return tf.range(width)[None, :] >= width - tf.cast(length, tf.int32)[:, None]


def history(batch: dict[str, tf.Tensor], name: str) -> tf.RaggedTensor:
    """A left-padded history [B, L] with `<name>_length` [B] as a RaggedTensor, without the padding."""
    return tf.ragged.boolean_mask(batch[name], _counts(batch, name))


def _named(features: dict[str, Table]) -> dict[str, Table]:
    tables = {}
    for feature, table in features.items():
        if tables.setdefault(table.name, table) != table:
            raise ValueError(f"feature {feature!r}: {table} and {tables[table.name]} have the same name")
    return tables


def tpu_features(features: dict[str, Table], optimizer) -> dict[str, tf.tpu.experimental.embedding.FeatureConfig]:
    """What `tfrs.layers.embedding.TPUEmbedding` takes, from the same description.

    Initial rows are equal in distribution, not in value. A TPU combines a RaggedTensor (see `history`), not a padded
    tensor; histories come out combined, so `max_sequence_length` stays 0.

    Args:
      optimizer: one of optimizers.py, or of `tf.tpu.experimental.embedding`, or None for one given elsewhere.

    Raises:
      ValueError: a bfloat16 table (a TPU stores float32), an optimizer that a TPU cannot follow.
    """
    tpu, configs = tf.tpu.experimental.embedding, {}
    optimizer = optimizer.tpu() if hasattr(optimizer, "tpu") else optimizer
    for name, table in _named(features).items():
        if table.dtype != "float32":
            raise ValueError(f"table {name!r} is stored as {table.dtype}; TPU embedding tables are float32")
        configs[name] = tpu.TableConfig(
            vocabulary_size=table.rows,
            dim=table.dim,
            initializer=tf.random_uniform_initializer(-table.initial, table.initial),
            optimizer=optimizer,
            combiner=table.combiner,
            name=name,
        )
    return {name: tpu.FeatureConfig(table=configs[table.name], name=name) for name, table in features.items()}
