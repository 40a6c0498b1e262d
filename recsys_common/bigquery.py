"""How do I ask BigQuery? One client and the same SQL, on this laptop or on Google Cloud.

    with connect() as warehouse:                        # embedded; connect("my-project", "my-bucket") is the real one
        warehouse.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
        warehouse.query("SELECT COUNT(*) AS n FROM ratings")
        for shard in warehouse.shards("examples", {"split": "train"}): ...

SQL lives in `sql/*.sql`, names its tables without project or dataset, and takes values only as query parameters.
Nothing here imports TensorFlow.

Needs: embedded_bigquery.py scale.py sql/ (the latter for the names given to `run`)
"""

from __future__ import annotations

import atexit
import base64
import datetime
import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from recsys_common.embedded_bigquery import EmbeddedBigQuery
from recsys_common.scale import rehearsing

SQL_FOLDER = Path(__file__).parent / "sql"
# Storage Read sessions offer as many streams as the service thinks useful; more than this only adds round trips.
STREAMS = 8
# BigQuery refuses a query that would scan more than this.
MAXIMUM_BYTES_BILLED = 10 * 1024**4
# The tables of a run are replaced without asking, so they live in a dataset of their own, which says so by its label.
DATASET = "recsys_common"
LABEL = {"made-by": "recsys-common"}


def connect(
    project: str = "",
    bucket: str = "",
    dataset: str = DATASET,
    location: str = "US",
    maximum_bytes_billed: int = MAXIMUM_BYTES_BILLED,
) -> Warehouse:
    """Open the warehouse.

    Args:
      project: Google Cloud project to bill; "" starts an embedded BigQuery that ends with this process.
      bucket: Cloud Storage bucket for exported files, without `gs://`; ignored when embedded.
      dataset: BigQuery dataset for this run's tables, which are replaced; created when absent, and refused when
        it exists without our label. Two people at work at once take two.
      location: where a new dataset is created. Keep the bucket in the same place.
      maximum_bytes_billed: BigQuery refuses a query that would scan more, before it costs anything.

    Raises:
      RuntimeError: the embedded server did not start.
      google.auth.exceptions.DefaultCredentialsError: no credentials for a real project (`make doctor` tells more).
    """
    # Started first: it comes up while the client library is imported.
    embedded = not project or rehearsing()
    server = EmbeddedBigQuery(tempfile.mkdtemp(prefix="recsys-bigquery-")) if embedded else None
    project, bucket = project or "embedded", bucket or "embedded-bucket"
    return Warehouse(server, project, bucket, dataset, location, maximum_bytes_billed)


@dataclass(frozen=True)
class Session:
    """What `Warehouse.open` opened: plain strings, so that one host can open and hand out the streams to others."""

    table: str
    schema: str
    streams: list[str]

    @property
    def arrow_schema(self) -> pa.Schema:
        """The columns' names and types."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.schema)))


class Warehouse:
    """A BigQuery dataset, and the folder that its exports go to. Made by `connect`.

    Attributes:
      embedded: whether this is the embedded service.
      storage: the `gs://` address of the bucket.
    """

    def __init__(
        self,
        server: EmbeddedBigQuery | None,
        project: str,
        bucket: str,
        dataset: str,
        location: str,
        maximum_bytes_billed: int = MAXIMUM_BYTES_BILLED,
    ):
        from google.cloud import bigquery, bigquery_storage

        self.embedded = server is not None
        self.project, self.dataset, self.storage = project, dataset, f"gs://{bucket}"
        self.server, self.location, self.maximum_bytes_billed = server, location, maximum_bytes_billed
        self._ran: dict[str, dict] = {}
        self._made: set[str] = set()
        # The client puts these into every query that does not set its own.
        config = bigquery.QueryJobConfig(
            default_dataset=f"{project}.{dataset}", maximum_bytes_billed=maximum_bytes_billed
        )
        options = {"default_query_job_config": config}
        if server is None:
            self.client = bigquery.Client(project, location=location, **options)
            self._reader = bigquery_storage.BigQueryReadClient(credentials=self.client._credentials)
        else:
            import grpc
            from google.auth.credentials import AnonymousCredentials
            from google.cloud.bigquery_storage_v1.services.big_query_read import transports

            server.wait()
            atexit.register(self.close)
            (server.root / "gcs" / bucket).mkdir(parents=True, exist_ok=True)
            options["client_options"] = {"api_endpoint": server.rest}
            self.client = bigquery.Client(project, credentials=AnonymousCredentials(), **options)
            self._channel = grpc.insecure_channel(server.grpc, options=[("grpc.max_receive_message_length", -1)])
            transport = transports.BigQueryReadGrpcTransport(channel=self._channel)
            self._reader = bigquery_storage.BigQueryReadClient(transport=transport)
        self._own(bigquery.Dataset(f"{project}.{dataset}"), location)

    def _own(self, dataset, location: str) -> None:
        """Create the dataset with our label, or make sure that the existing one carries it."""
        from google.api_core.exceptions import NotFound

        try:
            found = self.client.get_dataset(dataset.reference, retry=self.retry()).labels
        except NotFound:
            dataset.labels, dataset.location = LABEL, location
            self.client.create_dataset(dataset, retry=self.retry(), timeout=60)
            return
        if not LABEL.items() <= found.items():
            raise ValueError(
                f"the dataset {dataset.dataset_id} exists with the labels {found}, expected {LABEL}: it is not ours, "
                "and tables in it would be replaced. Name another one: connect(..., dataset='mine')."
            )

    def __enter__(self) -> Warehouse:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release the connection; an embedded service stops and its tables and files are gone."""
        self.client.close()
        if self.server is not None:
            self._channel.close()
            self.server.stop()
            atexit.unregister(self.close)

    def retry(self):
        """How often a call is tried again."""
        from google.cloud.bigquery.retry import DEFAULT_RETRY

        # The embedded service has no bad minutes to wait out: what fails there fails again for ten minutes.
        return DEFAULT_RETRY.with_timeout(10) if self.embedded else DEFAULT_RETRY

    def run(self, file: str, **parameters: int | float | str | list[int]) -> pa.Table:
        """Run one of `sql/*.sql`; its `@name`s are filled from `parameters`. Returns the last statement's rows."""
        path = SQL_FOLDER / file
        if not path.exists():
            raise FileNotFoundError(
                f"no {file} in {SQL_FOLDER.name}/; there are {sorted(p.name for p in SQL_FOLDER.glob('*.sql'))}"
            )
        # One job a statement: the embedded service hands no parameters to a script of several.
        for statement in filter(None, map(str.strip, re.split(r";$", path.read_text(), flags=re.MULTILINE))):
            rows = self.query(statement, **parameters)
        self._ran[file] = {"file": file, "text": path.read_text(), "parameters": parameters}
        return rows

    def query(self, sql: str, **parameters: int | float | str | list[int]) -> pa.Table:
        """Run SQL and return its rows as an Arrow table (for results that fit into memory many times over).

        Args:
          sql: BigQuery SQL; tables without a dataset are this warehouse's.
          **parameters: values for `@name`: int -> INT64, float -> FLOAT64, str -> STRING, list of int -> ARRAY<INT64>.
        """
        job = self.client.query(sql, job_config=_with(parameters), retry=self.retry())
        rows = job.result(retry=self.retry()).to_arrow(create_bqstorage_client=False)
        # Names without a dataset: those are ours.
        created = r"^\s*CREATE (?:OR REPLACE )?(?:TABLE|VIEW) (?:IF NOT EXISTS )?(?!IF NOT )(\w+)(?![\w.-])"
        self._made.update(re.findall(created, sql, re.MULTILINE))
        return rows

    def scanned(self, sql: str, **parameters: int | float | str | list[int]) -> int | None:
        """Bytes that `query` would be billed for, by a dry run, which is free and changes nothing.

        None where that is not known: the embedded service answers a dry run, and refuses wrong SQL, but says 0 bytes.
        """
        config = _with(parameters)
        # A dry run bills nothing, and is there to say how far a query is above the limit.
        config.dry_run, config.use_query_cache, config.maximum_bytes_billed = True, False, 2**62
        job = self.client.query(sql, job_config=config, retry=self.retry())
        return None if self.embedded else job.total_bytes_processed

    def count(self, table: str) -> int:
        """Rows of a table of this dataset."""
        return self.query(f"SELECT COUNT(*) AS n FROM {plain(table)}")["n"][0].as_py()

    def open(
        self, table: str, columns: list[str] | None = None, where: str = "", streams: int = STREAMS, snapshot: str = ""
    ) -> Session:
        """Open a table for reading through the Storage Read API: no SQL job, nothing parsed.

        Every stream of the session has other rows, and all of them together have each row once, as it was at one
        moment. On Google Cloud a session lives for hours; any process may read its streams.

        Args:
          table: a table of this dataset.
          columns: names to read; None for all.
          where: a row restriction in SQL, such as "shard = 3".
          streams: at most so many; the service may offer fewer.
          snapshot: RFC 3339 time of the rows to read, "" for now. The embedded service keeps no history and has now.
        """
        from google.cloud.bigquery_storage_v1 import types

        options = types.ReadSession.TableReadOptions(selected_fields=columns, row_restriction=where)
        wanted = types.ReadSession(
            table=f"projects/{self.project}/datasets/{self.dataset}/tables/{plain(table)}",
            data_format=types.DataFormat.ARROW,
            read_options=options,
        )
        if snapshot and not self.embedded:
            wanted.table_modifiers.snapshot_time = datetime.datetime.fromisoformat(snapshot)
        session = self._reader.create_read_session(
            parent=f"projects/{self.project}", read_session=wanted, max_stream_count=streams
        )
        schema = session.arrow_schema.serialized_schema
        return Session(table, base64.b64encode(schema).decode(), [stream.name for stream in session.streams])

    def blocks(self, session: Session, stream: str) -> Iterator[pa.RecordBatch]:
        """The rows of one stream of a session, in blocks of some ten thousand, in Arrow."""
        schema = session.arrow_schema
        # The client's own patience with a service that is gone is a day long, and silent.
        for response in self._reader.read_rows(stream, retry=self.retry()):
            yield pa.ipc.read_record_batch(pa.py_buffer(response.arrow_record_batch.serialized_record_batch), schema)

    def read(self, table: str, columns: list[str] | None = None, where: str = "", snapshot: str = "") -> pa.Table:
        """A table, or the rows of it that `where` names, in memory; arguments as for `open`."""
        session = self.open(table, columns, where, snapshot=snapshot)
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = pool.map(lambda stream: list(self.blocks(session, stream)), session.streams)
        return pa.Table.from_batches((block for blocks in streams for block in blocks), session.arrow_schema)

    def shards(self, table: str, equal: dict[str, str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read a table that has a `shard` column shard by shard, so that memory holds one shard at a time.

        Args:
          table: a table of this dataset with a column `shard` of 0..n-1.
          equal: column -> value that rows must have, such as {"split": "train"}.
          columns: names to read; None for all.

        Raises:
          ValueError: no row matches.
          RuntimeError: the rows read are not as many as the table has.
        """
        _, counts, condition = self.shard_counts(table, equal)
        for shard, expected in counts.items():
            rows = self.read(table, columns, " AND ".join(filter(None, [condition, f"shard = {shard}"])))
            if rows.num_rows != expected:
                raise RuntimeError(
                    f"table {table!r}, shard {shard}: read {rows.num_rows:,} rows, expected {expected:,}. The table "
                    "changed while it was read, or a stream broke: run the export again."
                )
            yield rows

    def shard_counts(self, table: str, equal: dict[str, str]) -> tuple[str, dict[int, int], str]:
        """What `open` needs to read a table shard by shard: a moment, rows of each shard then, the row restriction.

        Raises:
          ValueError: no row matches.
        """
        condition = " AND ".join(f"{plain(name)} = '{plain(value)}'" for name, value in equal.items())
        snapshot = self.query("SELECT CURRENT_TIMESTAMP() AS now")["now"][0].as_py().isoformat()
        # The embedded service keeps no history; nobody else writes there.
        at = "" if self.embedded else f" FOR SYSTEM_TIME AS OF TIMESTAMP '{snapshot}'"
        where = f" WHERE {condition}" if condition else ""
        counts = self.query(f"SELECT shard, COUNT(*) AS n FROM {plain(table)}{at}{where} GROUP BY shard ORDER BY shard")
        shards = dict(zip(counts["shard"].to_pylist(), counts["n"].to_pylist(), strict=True))
        if not shards:
            condition = f" where {condition}" if condition else ""
            raise ValueError(f"table {table!r} has no rows{condition}; there is nothing to export")
        if None in shards:
            raise ValueError(
                f"table {table!r}: column 'shard' is NULL in {shards[None]:,} rows, which no file would hold; expected "
                "0 to n-1. See sql/examples.sql for a shard number that is never NULL."
            )
        return snapshot, shards, condition

    def changed(self, table: str) -> str:
        """When a table was last changed."""
        found = self.client.get_table(f"{self.project}.{self.dataset}.{plain(table)}", retry=self.retry())
        return found.modified.isoformat()

    def provenance(self, table: str) -> dict:
        """Where a table came from: its name, all tables made in this dataset, the SQL files run, with parameters."""
        names = {"project": self.project, "dataset": self.dataset, "table": table, "tables": sorted(self._made)}
        return names | {"sql": list(self._ran.values())}

    def __reduce__(self):
        """Another process, such as a Beam worker, gets a connection of its own to the same warehouse."""
        server = self.server and self.server.address
        bucket = self.storage.removeprefix("gs://")
        return Warehouse, (server, self.project, bucket, self.dataset, self.location, self.maximum_bytes_billed)

    def expect_space(self, size: int) -> None:
        """Raise OSError unless the embedded service has about `size` bytes of disk for a table."""
        free = shutil.disk_usage(self.server.root).free if self.embedded else size
        if free < size:
            what = f"the embedded BigQuery needs about {size:,} bytes for this table, {free:,} are free"
            advice = "Free some, or set TMPDIR to a folder on a larger disk, and start again"
            raise OSError(errno.ENOSPC, f"{what}. {advice}", str(self.server.root))

    def local(self, address: str) -> str:
        """The path at which this process can open a `gs://` address: itself, or the embedded service's folder."""
        if not self.embedded:
            return address
        return str(self.server.root / "gcs" / address.removeprefix("gs://"))


def _with(parameters: dict[str, int | float | str | list[int]]):
    """A query's configuration with its parameters."""
    from google.cloud import bigquery

    types = {int: "INT64", float: "FLOAT64", str: "STRING"}
    return bigquery.QueryJobConfig(
        query_parameters=[
            bigquery.ArrayQueryParameter(name, "INT64", value)
            if isinstance(value, list)
            else bigquery.ScalarQueryParameter(name, types[type(value)], value)
            for name, value in parameters.items()
        ]
    )


def plain(name: str) -> str:
    """`name` if it is a plain identifier; SQL is never built from anything else."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is not a plain table or column name (letters, digits and _ only)")
    return name
