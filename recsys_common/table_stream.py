"""How do I train on a table itself, with no files between? For one pass over fresh data, on one host or many.

    dataset = table_stream(warehouse, "examples", {"user_index": "int32", "rating": "float32"}, batch_size=8192)

Storage Read streams go into `tf.data` block by block, in Arrow: Python runs once for each block of thousands of rows.
A stream that is read again is paid for again, in another order, and there is no shuffle but the table's own: for more
than one pass, files are cheaper and better (`conversion.py`).

Needs: bigquery.py embedded_bigquery.py scale.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import tensorflow as tf

from recsys_common.bigquery import Session, Warehouse


def table_stream(
    warehouse: Warehouse,
    table: str,
    columns: dict[str, str],
    batch_size: int,
    *,
    session: Session | None = None,
    host: int = 0,
    hosts: int = 1,
    report: Callable[[int], None] | None = None,
) -> tf.data.Dataset:
    """Batches straight from the table, for one pass over fresh data: Python runs once a block, never once a row.

    The last batch is smaller; `rebatch(batch_size, drop_remainder=True)` leaves it out. The order of rows is the
    service's, another on each run.

    Args:
      session: streams to read, from `warehouse.open(table, list(columns))`; None opens a session. Several hosts share
        one, that one of them opened: two sessions cut the table differently.
      host: number of this host, 0..hosts-1; it reads `session.streams[host::hosts]`.
      hosts: how many share the session.
      report: called with the rows of this host's pass when it ends. How many a stream has, nobody says beforehand:
        of a session that is given, only the sum over its hosts can be checked (`expect_rows`), and should be.

    Raises:
      ValueError: no rows, a column that is missing, several hosts without a common session, fewer streams than hosts.
      tf.errors.OpError: while iterating: a NULL, a value that does not fit its dtype, a list or a struct; or, at the
        end of a pass, "lost or doubled": the session was opened here and gave other rows than the table has.
    """
    bounds = None
    if session is None:
        if hosts > 1:
            raise ValueError(f"{hosts} hosts need one session in common: open it on one, hand it to all as session=")
        before = warehouse.count(table)
        session = warehouse.open(table, list(columns))
        # Rows may come in meanwhile. The session has those of one moment between the two counts.
        bounds = sorted((before, warehouse.count(table)))
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts} hosts; expected 0 to {hosts - 1}")
    streams = session.streams[host::hosts]
    if len(session.streams) < hosts or bounds == [0, 0]:
        raise ValueError(
            f"table {table!r}: a session of {len(session.streams)} streams for {hosts} hosts; each needs one. A table "
            "without rows has none, a small one has one. Use fewer hosts, or files."
        )
    if missing := set(columns) - set(session.arrow_schema.names):
        raise ValueError(f"table {table!r}: the session lacks {sorted(missing)}, it has {session.arrow_schema.names}")
    seen = {}  # stream -> rows of it in this pass

    def read(stream: bytes) -> Iterator[dict[str, np.ndarray]]:
        seen[stream] = 0
        for block in warehouse.blocks(session, stream.decode()):
            seen[stream] += block.num_rows
            yield _arrays(block, columns, table)

    def end() -> Iterator[dict[str, np.ndarray]]:
        # The client resumes a broken stream at an offset. Should a service start over instead, rows come twice.
        rows = sum(seen.values())
        if bounds:
            expect_rows(repr(table), rows, *bounds)
        if report:
            report(rows)
        yield from ()

    spec = {name: tf.TensorSpec([None], dtype) for name, dtype in columns.items()}
    blocks = tf.data.Dataset.from_tensor_slices(streams).interleave(
        lambda stream: tf.data.Dataset.from_generator(read, output_signature=spec, args=(stream,)),
        cycle_length=len(streams),
        num_parallel_calls=len(streams),
        deterministic=False,  # the order is the service's anyway: no stream waits for another
    )
    passed = tf.data.Dataset.from_generator(end, output_signature=spec)
    return blocks.concatenate(passed).rebatch(batch_size).prefetch(tf.data.AUTOTUNE)


def expect_rows(what: str, found: int, least: int, most: int | None = None) -> None:
    """Raise RuntimeError unless `found` rows are within `least` and `most` (None: exactly `least`)."""
    if not least <= found <= (least if most is None else most):
        raise RuntimeError(
            f"table {what}: {found:,} rows arrived, the table has {least:,}: rows were lost or doubled. A stream "
            "broke, or the table changed meanwhile: run it again."
        )


def _arrays(block: pa.RecordBatch, columns: dict[str, str], table: str) -> dict[str, np.ndarray]:
    """The columns of a block in NumPy; where the dtype is the table's own, on the block's memory."""
    arrays = {}
    for name, dtype in columns.items():
        column = block.column(name)
        if column.null_count:
            raise ValueError(
                f"table {table!r}: column {name!r} is NULL in {column.null_count:,} of {block.num_rows:,} rows of a "
                "block; expected values. Replace or drop them in the SQL that makes the table."
            )
        try:
            arrays[name] = column.cast(dtype).to_numpy(zero_copy_only=dtype != "string")
        except pa.ArrowException as error:
            raise ValueError(
                f"table {table!r}, column {name!r}: not {dtype}: {error}. Choose another dtype."
            ) from error
    return arrays
