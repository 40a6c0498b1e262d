"""How does a conversion run on many machines? As an Apache Beam pipeline, here or on Google Cloud Dataflow.

    manifest = convert("gs://bucket/train", ParquetFiles("gs://bucket/export/*.parquet"), columns, dataflow_flags)

or, without a line of Python:

    python -m recsys_common.beam_conversion --parquet 'gs://bucket/export/*.parquet' --to gs://bucket/train \
        --columns user_id:int64,rating:float32 --runner DataflowRunner --project my-project --region us-central1 \
        --temp_location gs://bucket/temp --sdk_container_image IMAGE --number_of_worker_harness_threads 2
    python -m recsys_common.beam_conversion --table examples --where split=train --project my-project ...

An element of the pipeline is the number of a unit; what a unit is, and why one that is done twice counts once, stands
in `conversion.py`. Whatever is killed (a worker, the pipeline, this process), the same call continues. Dataflow itself
tries a bundle of units four times before a job fails, and a job stops when it is cancelled, not when this process ends.

Workers need this package and TensorFlow. IMAGE has them: `FROM apache/beam_python3.11_sdk:2.77.0`, with the Python and
the Beam of the launcher, and `pip install` of this repository. `--setup_file ./pyproject.toml` needs no image but the
package `build`; then each worker installs all of that before it starts. A worker's memory holds `rows_per_file` rows
for each of its threads. Without flags, Beam's DirectRunner does one unit at a time in this process.

Sources: beam.apache.org/documentation/sdks/python-pipeline-dependencies, and of cloud.google.com/dataflow/docs
reference/pipeline-options, guides/build-container-image, guides/common-errors, guides/stopping-a-pipeline.

Needs: bigquery.py conversion.py embedded_bigquery.py record_batches.py scale.py (and the extra `beam`)
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from functools import partial

from recsys_common import bigquery, scale
from recsys_common.conversion import ROWS_PER_FILE, Conversion, ParquetFiles, TableShards, begin
from recsys_common.record_batches import Column, Manifest


def convert(
    folder: str | os.PathLike,
    source: ParquetFiles | TableShards,
    columns: dict[str, str] | list[Column],
    options: list[str] | object = (),
    **begin_options,
) -> Manifest:
    """Convert a source into record batches by a Beam pipeline; the same files as `conversion.convert` makes.

    Args:
      folder, source, columns: as for `conversion.convert`; workers reach `folder` and the source by the same names.
      options: flags such as ["--runner=DataflowRunner"], or a `PipelineOptions`.
      **begin_options: seed, rows_per_file, rows_per_record, compression, as in `conversion.begin`.

    Raises: as `run`. What was finished stays, and the same call continues.
    """
    work = begin(folder, source, columns, **begin_options)
    if work.pending:
        run(work, options)
    return work.finish()


def run(work: Conversion, options: list[str] | object = ()):
    """Do the pending units of a conversion in a pipeline, and wait for its end. Returns Beam's `PipelineResult`.

    Its counters `units` and `rows` tell how far it is. The conversion is sent to workers in pickled form: 1 MB for
    10,000 files, which Beam compresses to some 30 kB (a Dataflow job takes up to 10 MB).

    Raises:
      RuntimeError: the pipeline failed or was cancelled; its message has that of the unit.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    options = options if isinstance(options, PipelineOptions) else PipelineOptions(list(options))
    pipeline = beam.Pipeline(options=options)
    units = pipeline | "units" >> beam.Create(work.pending)
    # Without it, a runner may fuse both steps and do all units on the one worker that made the numbers.
    units = units | "spread" >> beam.Reshuffle()
    units | "convert" >> beam.Map(partial(_unit, work))
    result = pipeline.run()
    if (state := result.wait_until_finish()) != PipelineState.DONE:
        raise RuntimeError(f"the pipeline ended as {state}: run the same command again, it continues")
    return result


def _unit(work: Conversion, number: int) -> None:
    from apache_beam.metrics import Metrics

    Metrics.counter("conversion", "rows").inc(work.unit(number))
    Metrics.counter("conversion", "units").inc()


def _columns(text: str) -> dict[str, str]:
    columns = dict(pair.partition(":")[::2] for pair in text.split(","))
    try:
        return {name: Column(name, dtype).dtype for name, dtype in columns.items()}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not name:dtype,name:dtype,...: {error}") from error


def _arguments(words: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the flags in it that are Beam's."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = argparse.ArgumentParser(
        prog="python -m recsys_common.beam_conversion",
        usage="%(prog)s (--parquet PATTERN | --table TABLE) --to FOLDER --columns COLUMNS [options] [Beam's flags]",
        description="Convert Parquet files or a table into record batches with Apache Beam; killed, it continues.",
        epilog="All other flags are Beam's, such as --runner DataflowRunner; the module's docstring names the usual.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--parquet", metavar="PATTERN", help="files, such as 'gs://bucket/export/*.parquet'")
    source.add_argument("--table", help="a BigQuery table of --dataset with a column `shard`")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="replaces an export there, once it is whole")
    parser.add_argument("--columns", required=True, type=_columns, help="such as user_id:int64,rating:float32")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=VALUE", help="which rows of --table")
    parser.add_argument("--project", default="", help="Google Cloud project to bill, for --table and for Dataflow")
    parser.add_argument("--bucket", default="", help="Cloud Storage bucket of the warehouse, without gs://")
    parser.add_argument("--dataset", default=bigquery.DATASET, help="of --table (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows (%(default)s)")
    parser.add_argument("--compression", choices=["ZLIB"], default="", help="of the files; none if not given")
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE, help="about (%(default)s)")
    given, flags = parser.parse_known_args(words)
    flags += [f"--project={given.project}"] * bool(given.project)
    options = PipelineOptions(flags)
    if unknown := options.get_all_options(retain_unknown_options=True).keys() - options.get_all_options().keys():
        parser.error(f"--{', --'.join(sorted(unknown))}: a flag neither of this command nor of Beam")
    if given.table and not ((given.project and given.bucket) or scale.rehearsing()):
        parser.error("--table needs --project and --bucket: without them there is no warehouse that has it")
    if given.rows_per_file < 1:
        parser.error(f"--rows-per-file {given.rows_per_file}: expected 1 or more")
    if given.where and (given.parquet or not all("=" in where for where in given.where)):
        parser.error(
            f"--where {' '.join(given.where)}: expected name=value, and --table: Parquet files are taken whole"
        )
    return given, flags


def main(words: list[str] | None = None) -> int:
    """The command line. Returns 0, or 1 after saying what failed; a wrong command line ends with 2."""
    # Beam warns of what it was installed without, and logs what an exception says as well.
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("apache_beam.runners.dataflow").setLevel(logging.INFO)  # where the job is, and how far
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        given, flags = _arguments(words)
        begin_options = {name: getattr(given, name) for name in ("seed", "compression", "rows_per_file")}
        with contextlib.ExitStack() as stack:
            if given.parquet:
                source = ParquetFiles(given.parquet)
            else:
                warehouse = stack.enter_context(bigquery.connect(given.project, given.bucket, given.dataset))
                source = TableShards(warehouse, given.table, dict(where.split("=", 1) for where in given.where))
            manifest = convert(given.to, source, given.columns, flags, **begin_options)
    except (ImportError, OSError, RuntimeError, ValueError, GoogleAPIError, GoogleAuthError) as error:
        advice = " Install the extra: pip install 'recsys-common[beam]'." if isinstance(error, ImportError) else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        return 1
    print(f"{manifest.folder}: {len(manifest.files):,} files, {manifest.rows:,} rows, {manifest.bytes:,} bytes")
    return 0


if __name__ == "__main__":
    from recsys_common import beam_conversion

    # Not main(): what lies in `__main__` would be sent to workers as code instead of by name.
    sys.exit(beam_conversion.main())
