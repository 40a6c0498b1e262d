# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Data export
#
# The rows are in BigQuery. TensorFlow wants tensors. Between the two stand a dozen formats, three APIs and a parser
# that is always too slow. **How do rows get from a BigQuery table to tensors, simply and fast, and what is lost on
# the way?**
#
# At the end of this page you will have
#
# - the SQL that leaves nothing to do for Python: ids as row numbers or hashes, histories without a look into the
#   future, frequencies, a shard number;
# - six routes from the table to tensors, each a call, all with the same rows;
# - a measured table: rows a second, bytes a row, hours at fifty billion rows, and what each route does to a NULL, a
#   quote or a float's last bit;
# - a file format that fits on one page, and an export that a `kill -9` does not hurt;
# - a plan of what the export costs, before it costs anything;
# - and one recommendation.
#
# The cell below is the only one that changes between a laptop and fifty billion rows.

# %% tags=["parameters"]
SCALE = "small"  # small: simulated, a laptop. medium: real ratings. full: BigQuery, Cloud Storage
DATASET = "simulated"
DATA_DIR = "../data"
SEED = 1
SPLIT = "auto"  # temporal, leave-one-out; auto: temporal where the ratings have a clock
PROJECT = ""  # Google Cloud project; "" is the embedded BigQuery
BUCKET = ""  # Cloud Storage bucket, without gs://
LOCATION = "US"  # where table and bucket are
ROWS_PER_FILE = 4_000_000
SAMPLE_FILES = 8  # what the slow routes get to carry
BATCH_SIZE = 4096
OOV_BUCKETS = 10  # rows of the embedding table for ids that training hardly saw
MINIMUM_FREQUENCY = 2  # training rows that an id needs for a row of its own
HISTORY = 20
RUNS_DIR = "../runs"

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from IPython.display import Markdown
from recsys_common import (
    bigquery,
    conversion,
    costs,
    datasets,
    ratings_table,
    record_batches,
    route_checks,
    routes,
    scale,
    splits,
)

# %% [markdown]
# ## The whole of it
#
# Four calls. The first makes a table that is ready to leave, the second and third carry it out (below, a sample of
# it), the fourth is what training reads. The rest of this page is about why these four.
#
# ```python
# warehouse.run("export_rows.sql", shards=num_files)
# source = conversion.TableShards(warehouse, "route_rows")
# manifest = conversion.convert(target, source, columns, seed=SEED)
# read["storage read"] = record_batches.read(manifest)
# ```
#
# ## The table
#
# As in chapter 1: simulated ratings here, a MovieLens folder at the medium scale, your own table at the full one.

# %%
warehouse = bigquery.connect(PROJECT, BUCKET, location=LOCATION)
tables = datasets.load(DATASET, DATA_DIR, rows=scale.SIMULATED_ROWS.get(SCALE, 0), seed=SEED)
ratings_table.load(warehouse, tables)
num_rows = warehouse.count("ratings")
tables.ratings.slice(0, 3).to_pandas()

# %% [markdown]
# ## What SQL should do
#
# A warehouse counts, sorts and joins billions of rows for a living, on machines that you do not have to start. What it
# has not done when the rows leave, your training loop does in every epoch. Five things belong there.
#
# **The split**, by time or by each user's last item. Rows with equal timestamps are where leaks happen: the cut in
# time puts all rows of a moment on the same side, and leave-one-out breaks ties by the item's id, always the same
# way.

# %%
made_by = splits.split(warehouse, SPLIT, tables.time)
parts = "SELECT split, COUNT(*) AS ratings FROM split_ratings GROUP BY split ORDER BY ratings DESC"
warehouse.query(parts).to_pandas()

# %% [markdown]
# **Dense ids by frequency.** The most frequent id of the training rows becomes the first row of the embedding table,
# and so on down. Ids that training saw fewer than `MINIMUM_FREQUENCY` times share the first `OOV_BUCKETS` rows, by
# hash: out of the vocabulary, but not all of them one and the same. One `ROW_NUMBER` over a hundred million ids would
# be sorted by a single worker, so the ids of one frequency are numbered in pieces.

# %%
vocabulary = {"oov_buckets": OOV_BUCKETS, "minimum_frequency": MINIMUM_FREQUENCY}
warehouse.run("vocabularies.sql", **vocabulary, pieces=1 + num_rows // 100_000_000)
about = """
SELECT IF(item_index < @oov, 'out of vocabulary', 'in') AS vocabulary, COUNT(*) AS items,
  SUM(frequency) AS training_rows, MIN(item_index) AS first_row, MAX(item_index) AS last_row
FROM item_vocabulary GROUP BY vocabulary ORDER BY first_row"""
warehouse.query(about, oov=OOV_BUCKETS).to_pandas()

# %% [markdown]
# **Hashed ids**, where a vocabulary is too much trouble: the row is the id's fingerprint modulo the rows of the
# table. `FARM_FINGERPRINT` and `tf.strings.to_hash_bucket_fast` are the same function, but SQL sees a signed number
# and TensorFlow an unsigned one. A plain `MOD(FARM_FINGERPRINT(id), n)` sends half of all ids elsewhere than the
# served model will. The SQL file goes through the unsigned value. If it is right, TensorFlow finds as many ratings in
# each bucket as SQL did.

# %%
warehouse.run("hashed_ids.sql", user_buckets=1000, item_buckets=1000)
in_sql = warehouse.query(
    "SELECT item_bucket, COUNT(*) AS n FROM hashed_examples GROUP BY item_bucket"
)
of_item = warehouse.query("SELECT item_id, COUNT(*) AS n FROM split_ratings GROUP BY item_id")
strings = tf.strings.join(["item", tf.strings.as_string(of_item["item_id"].to_numpy())])
served = tf.strings.to_hash_bucket_fast(strings, 1000).numpy()
in_tensorflow = np.bincount(served, weights=of_item["n"].to_numpy(), minlength=1000)

# %%
ids = warehouse.read("user_vocabulary", ["user_id", "fingerprint"], "user_id <= 1000000")
fingerprint = ids.sort_by("user_id")["fingerprint"].to_numpy()
by_sql = np.zeros(1000)
by_sql[in_sql["item_bucket"].to_numpy()] = in_sql["n"].to_numpy()
hashes_agree = np.array_equal(by_sql, in_tensorflow)
print(f"ratings in 1,000 buckets, SQL and TensorFlow: {'equal' if hashes_agree else 'DIFFERENT'};")
print(
    f"{np.mean(fingerprint < 0):.0%} of the fingerprints are negative in SQL, and a plain MOD puts them elsewhere"
)

# %% [markdown]
# What does a hash cost? Two ids in one row are one and the same to the model. With m ids in n rows, a given id has
# its row to itself with probability $(1 - 1/n)^{m-1}$: a table of as many rows as there are ids leaves 37% of them
# alone. Below, measured on the users of this table (those up to id 1,000,000); what collisions do to the quality of a
# model is measured in chapter 7.

# %%
m, sizes = len(ids), {}
for factor in (0.5, 1, 2, 10, 100):
    n = int(m * factor)
    row = fingerprint.astype(np.uint64) % np.uint64(n)
    shared = (np.bincount(row.astype(np.int64), minlength=n)[row] > 1).mean()
    sizes[f"hash, {factor:g} rows an id"] = [
        shared,
        1 - (1 - 1 / n) ** (m - 1),
        factor * 100e6 * 64 * 4 / 1e9,
    ]
sizes["vocabulary"] = [0.0, 0.0, 100e6 * (64 * 4 + 8) / 1e9]
columns = ["ids that share a row", "expected", "GB for 100 M ids of 64 floats"]
pd.DataFrame(sizes, index=columns).T.round(dict(zip(columns, (2, 2, 1), strict=True)))

# %% [markdown]
# The vocabulary's row has 8 bytes more for each id: the id itself, which must be stored, loaded and searched wherever
# the model is served. It needs a pass over the training rows before the first step, and it does not know tomorrow's
# ids; the hash needs nothing and knows every id. Memory is what the hash pays with.
#
# **Histories** for the sequence models of chapter 9: with every row, the items that its user took before. The window
# frame ends one row before the current one, in the same order that decides which item leave-one-out holds out, so
# no history contains its own answer. `length` is a query parameter even here.

# %%
num_files = max(SAMPLE_FILES, num_rows // ROWS_PER_FILE)
warehouse.run("histories.sql", length=HISTORY, shards=num_files)
one = """
SELECT timestamp, item_index, ARRAY_LENGTH(history) AS seen, history FROM histories
WHERE user_index = @user AND split = 'train' AND shard < 4 ORDER BY timestamp, item_index LIMIT 4"""
warehouse.query(one, user=OOV_BUCKETS).to_pandas()

# %% [markdown]
# **Frequencies** for the log-Q correction of chapter 1, one for each row of the item table, the shared rows included.

# %%
warehouse.run("item_frequencies.sql")
frequency = warehouse.read("item_frequencies").sort_by("item_index")["frequency"].to_numpy()
print(
    f"{len(frequency):,} rows; the shared ones: {frequency[:OOV_BUCKETS]}, then {frequency[OOV_BUCKETS:][:5]} ..."
)

# %% [markdown]
# **A shard number for every row.** A warehouse hands rows out in whatever order it stores them: by user, by day.
# Files made from that are not random samples, and no shuffle buffer mends it. So each row gets its file from the
# fingerprints of its two ids: the same file in every export, and each file a sample of everything.

# %%
warehouse.run("export_rows.sql", shards=num_files)
by_shard = warehouse.query("""
SELECT shard, COUNT(*) AS ratings, COUNT(DISTINCT user_id) AS users, ROUND(AVG(rating), 2) AS mean_rating
FROM export_rows WHERE shard < 4 GROUP BY shard ORDER BY shard""")
by_shard.to_pandas()

# %% [markdown]
# All of this is in `recsys_common/sql/`, in files that are written in BigQuery's dialect and run here on the embedded
# service. Values go in as query parameters, and table names are checked before they come near a statement.
#
# ## Six routes
#
# The comparison runs on the first shards only: on fifty billion rows nobody should wait for the slow ones. Two int64
# ids, a float32, an int64: 28 bytes a row.

# %%
warehouse.run("route_rows.sql", files=SAMPLE_FILES)
columns = {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
folder = f"{warehouse.storage}/chapter-2"
made, read = {}, {}

# %% [markdown]
# **1. CSV**, the export that everyone tries first. One `EXPORT DATA` for each shard, and `decode_csv` on a whole
# batch of lines, which is how to do it if it must be done.

# %%
for name in ("csv.gz", "csv"):
    made[name] = routes.export_csv(
        warehouse, "route_rows", f"{folder}/{name}", columns, gzip=name == "csv.gz"
    )
    read[name] = routes.read_csv(made[name], columns, BATCH_SIZE)
with tf.io.gfile.GFile(made["csv"][0]) as stream:
    print(stream.readline(), stream.readline(), sep="", end="")

# %% [markdown]
# **2. TFRecord, one `tf.train.Example` a row**: what Google's Dataflow template writes and most tutorials read. Every
# row carries the names of its columns, as text, and they are parsed again for every row of every epoch.

# %%
made["tfrecord row"] = routes.export_rows(warehouse, "route_rows", f"{folder}/rows", columns)
read["tfrecord row"] = routes.read_rows(made["tfrecord row"], columns, BATCH_SIZE)
first = next(iter(tf.data.TFRecordDataset(made["tfrecord row"][0]).take(1))).numpy()
print(len(first), "bytes for one row:", first[:60], "...")

# %% [markdown]
# **3. Parquet, converted once to record batches.** Parquet is what BigQuery writes best, and TensorFlow cannot read it by
# itself: a Python generator over pyarrow can, and its speed is measured below. Here the columns are rewritten once, as
# TensorFlow wants them. Each Parquet file is converted by itself, on all cores.

# %%
made["parquet"] = routes.export_parquet(warehouse, "route_rows", f"{folder}/parquet", columns)
source = conversion.ParquetFiles(made["parquet"], about=warehouse.provenance("route_rows"))
from_parquet = conversion.convert(
    warehouse.local(f"{folder}/from-parquet"), source, columns, seed=SEED
)
read["parquet"] = record_batches.read(from_parquet)
print(source.schema.to_string(show_field_metadata=False))

# %% [markdown]
# **4. Storage Read streams, straight to record batches.** The Storage Read API hands out a table's columns in Arrow,
# in parallel streams, without a query job. No intermediate files, nothing is ever text.

# %%
source = conversion.TableShards(warehouse, "route_rows")
target = warehouse.local(f"{folder}/record-batches")
manifest = conversion.convert(target, source, columns, seed=SEED)
read["storage read"] = record_batches.read(manifest)
made["storage read"] = manifest.paths
print(
    "files equal to those of route 3:",
    [f.sha256 for f in manifest.files] == [f.sha256 for f in from_parquet.files],
)

# %% [markdown]
# Where each shard became one Parquet file, as here, the two routes end in the same bytes: the order of rows within a
# file is made from the rows and the seed, since the order in which a warehouse hands them out is different each time.
# (Google's `EXPORT DATA` may write several files a shard; the rows are the same then, the files are not.) An export
# that is repeated can be compared by hash.
#
# **5. Training from the table itself.** The streams go into `tf.data` block by block, with nothing between. Python
# runs, but once for each block of thousands of rows. Several hosts share a session: each takes every so many-th
# stream. A session of Google's ends after some hours, so a pass that takes longer needs files.

# %%
read["table stream"] = routes.table_stream(warehouse, "route_rows", columns, BATCH_SIZE)
session = warehouse.open("route_rows", list(columns), streams=4)
print(len(session.streams), "streams:", *[stream.rsplit("/")[-1] for stream in session.streams])

# %% [markdown]
# **6. BigQuery packs the batches itself.** SQL turns the integers of thousands of rows into their bytes and a column
# of them into one base64 string; its own CSV export then carries record batches, and TensorFlow has `decode_base64`.
# No converter at all. What SQL cannot do is look at the bits of a float: the rating travels as a whole number of
# 65536ths, and a NULL stops the export.

# %%
made["packed"] = routes.export_packed(warehouse, "route_rows", f"{folder}/packed")
read["packed"] = routes.read_packed(made["packed"])
lines = tf.data.TextLineDataset(made["packed"][0], "GZIP").as_numpy_iterator()
line = max(lines, key=lambda each: (len(each), each))
print(f"{len(line):,} characters for one batch:", line[:70].decode(), "...")

# %% [markdown]
# Do they all deliver the same? Every route's rows, all of them, sorted and compared bit for bit with the table's own.

# %%
order = ["user_id", "item_id", "timestamp", "rating"]
truth = warehouse.read("route_rows", order)
truth = np.rec.fromarrays([truth[name].to_numpy().astype(columns[name]) for name in order])
truth.sort()
equal = {}
for name, dataset in read.items():
    parts = [[batch[column].numpy() for column in order] for batch in dataset]
    rows = np.rec.fromarrays([np.concatenate(column) for column in zip(*parts, strict=True)])
    rows.sort()
    equal[name] = rows.tobytes() == truth.tobytes()
print(f"{len(truth):,} rows;", equal)

# %%
size = {name: sum(tf.io.gfile.stat(p).length for p in paths) for name, paths in made.items()}
pd.Series(size, name="bytes a row").div(len(truth)).round(1).to_frame().T

# %% [markdown]
# ## How fast, how large
#
# Small tables on a shared laptop measure the laptop. The figures below are from `benchmarks/data_export.json`, which
# `make bench` makes anew on your machine: the routes in turns within one run, the median of several rounds.

# %%
benchmark = json.loads(Path("../benchmarks/data_export.json").read_text())
of = pd.DataFrame(benchmark["rows"]).set_index("case")
value = of["value"]
print(benchmark["machine"], benchmark["date"][:10])

# %% tags=["main-result"]
names = ["csv.gz", "csv", "tfrecord row", "packed", "table stream", "parquet"]
names += ["record batches ZLIB", "record batches, shuffled", "record batches"]
speed = of.loc[names, ["value", "min", "max"]].set_axis(["M rows/s", "from", "to"], axis=1)
width = value.filter(like="bytes/row ").rename(lambda case: case.removeprefix("bytes/row "))
speed["bytes a row"] = width.reindex(names)
speed["hours, 50 billion rows"] = 50e9 / speed["M rows/s"] / 3.6e9
speed["TB, 50 billion rows"] = 50e9 * speed["bytes a row"] / 1e12
speed.round(2).astype(object).fillna("")

# %% [markdown]
# CSV, TFRecords by row and the table stream are cut into batches here; so are the shuffled record batches, which is what
# training reads (chapter 3). The others arrive as they lie in the files, and Parquet comes through pyarrow and a Python
# generator, without its conversion. The picture has both axes at once: right is fast, low is small. Once rows are no
# longer parsed, shuffling them is what takes the time; chapter 3 sees to that.

# %%
figure, (axis, bars) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
stored = speed.dropna()
axis.scatter(stored["M rows/s"], stored["bytes a row"], s=40)
for name, row in stored.iterrows():
    place = (row["M rows/s"], row["bytes a row"])
    axis.annotate(name, place, (5, 4), textcoords="offset points", fontsize=8)
axis.set(xscale="log", yscale="log", xlabel="M rows/s", ylabel="bytes a row")
axis.set_title("To the right: faster. Down: smaller")
axis.set_xlim(right=20 * stored["M rows/s"].max())
axis.margins(y=0.15)
shown = bars.barh(names[::-1], speed["hours, 50 billion rows"][::-1])
bars.bar_label(shown, fmt="%.1f", padding=3, fontsize=8)
bars.set(title="Hours for 50 billion rows, here")
bars.margins(x=0.15)

# %%
ratios = {
    "record batches / csv.gz": value["record batches / csv.gz"],
    "csv / tfrecord row": value["csv"] / value["tfrecord row"],
    "csv.gz / csv": value["csv.gz"] / value["csv"],
    "csv.gz / csv, bytes": width["csv.gz"] / width["csv"],
    "csv.gz / csv, making the files": value["export csv.gz"] / value["export csv"],
    "record batches ZLIB / plain": value["record batches ZLIB"] / value["record batches"],
    "record batches ZLIB / plain, bytes": width["record batches ZLIB"] / width["record batches"],
    "record batches ZLIB / parquet": value["record batches ZLIB"] / value["parquet"],
}
pd.Series(ratios, name="ratio").round(2).to_frame()

# %% [markdown]
# The table answers two of the book's open questions, and one that it should have asked.
#
# - **Does TFRecord beat CSV?** Not with one `Example` a row: it is several times as large and not faster to read,
#   since the names of the columns are parsed again for every row. What beats CSV is to stop treating rows one by one.
# - **Is gzip worth it?** For CSV it saves most of the bytes and costs little when reading, where parsing is the slow
#   part anyway; what it costs, it costs when the files are made. Compressed record batches are the smallest files
#   here and are read at a fraction of the speed of plain ones: right where files lie for months or cross a slow
#   network.
# - **Why not Parquet as it is?** It is small, and its columns arrive in whole blocks, so it is several times as fast
#   as text. But it needs Python between file and tensor: the pipeline cannot be serialized and run elsewhere, one
#   process feeds all, and shuffling and sharding are yours to write. Compressed record batches are smaller, and
#   faster too.
#
# How near are the record batches to the limit? The same files, read by the same interleave, first without decoding,
# then with the features copied out of each record but not yet made into tensors, then in full:

# %%
steps = ["raw read", "raw read, parsed", "record batches"]
limit = of.loc[steps, ["value", "min", "max"]].set_axis(["M rows/s", "from", "to"], axis=1)
limit["of raw read"] = limit["M rows/s"] / limit["M rows/s"].iloc[0]
share = of.loc["record batches / raw read"]
print(
    f"in the median round {share['value']:.0%} of raw read, {share['min']:.0%} to {share['max']:.0%}"
)
limit.round(2)

# %% [markdown]
# Most of what is missing goes into copying the features out of each record; making tensors of them costs less.
#
# Making the files, once, in M rows/s, the warehouse's work and the writing together. The warehouse here is the
# embedded one: Google's part of this work is done by Google's machines, and was not measured.

# %%
making = ["csv.gz", "csv", "tfrecord row", "packed", "parquet", "storage read"]
made_at = pd.Series({name: value[f"export {name}"] for name in making}, name="M rows/s")
made_at["parquet to record batches"] = value["write record batches"]
made_at["parquet to record batches ZLIB"] = value["write record batches ZLIB"]
made_at.round(2).to_frame()

# %% [markdown]
# Memory holds the rows of one file for each core, however large the table. The peaks below are of whole processes,
# Python and TensorFlow included; a process that starts cold is slower on a short table than on a long one.

# %%
for rows in ("2M rows", "50M rows"):
    writing = value[f"write record batches, {rows}"]
    peak = value[f"write record batches, {rows}: peak memory"]
    print(f"{rows} of Parquet to record batches: {writing:.1f} M rows/s, {peak:,.0f} MB")

# %%
arrived, checks = (
    value["storage read, 50M rows: rows"],
    value["storage read, 50M rows: checks equal"],
)
print(
    f"{arrived:,.0f} rows through route 4, {value['storage read, 50M rows']:.1f} M rows/s in all;"
)
print(
    f"{checks:.0f} checks (rows, sums, sums of cubes of every column) equal to the warehouse's own"
)

# %% [markdown]
# ## What gets lost on the way
#
# Speed is half of it. One row with one awkward value goes down each route, and what arrives is compared with what was
# sent, bit for bit.

# %%
survival = pd.DataFrame(route_checks.survival(warehouse))
outcomes = survival.pivot(index="case", columns="route", values="outcome")
outcomes = outcomes.loc[list(route_checks.CASES), list(route_checks.ROUTES)]
outcomes.map(lambda outcome: "refused" if outcome.startswith("error") else outcome[:21])

# %% [markdown]
# *becomes* is silent: nobody is told, and the model learns from it. *refused* is loud, and stops an export at the row
# that nobody had thought of; then it matters what the message says. One of each route:

# %%
said = {"csv": "string with line break", "tfrecord row": "2^31 read as int32"}
said |= {"storage read": "NaN", "table stream": "ARRAY [1, 2, 3]"}
messages = survival.set_index(["route", "case"])["outcome"]
for route, case in said.items():
    print(f"{route}, {case}: {messages[route, case].removeprefix('error: ')}")

# %% [markdown]
# Record batches refuse a NULL unless the column says what stands for it, `Column("rating", "float32", null=0.0)`; the
# manifest then records that. Structs are flattened in SQL, where they can be.
#
# ## The format on one page
#
# A format that one library can read is a hostage. This one needs a page, and a reader of it fits into twenty lines of
# plain TensorFlow (a test holds one that was written from the page alone).

# %%
page = record_batches.__doc__
Markdown(page[page.index("The format") : page.index("Needs:")])

# %%
kept_in_manifest = ("version", "rows", "rows_per_record", "compression", "seed")
{name: getattr(manifest, name) for name in kept_in_manifest}

# %% [markdown]
# The manifest also says where the rows came from: the table and the moment, and every SQL file that was run, with its
# parameters. A year later somebody will ask.

# %%
made_from = [(step["file"], step["parameters"]) for step in manifest.source["sql"]]
pd.DataFrame(made_from, columns=["SQL", "parameters"])

# %% [markdown]
# ## What can go wrong with files
#
# Files get lost, truncated, copied from two exports into one folder. `Manifest.load` compares names and sizes in a
# second, `verify` reads every byte again. Here is a file that lost its last hundred bytes, and one with a single bit
# flipped.

# %%
scratch = scale.run_folder(RUNS_DIR, SCALE, "chapter-2") / "damaged"
table = warehouse.read("route_rows", where="shard = 0")
written = record_batches.write(scratch, [table], columns)
path = Path(written.paths[0])
whole = path.read_bytes()
flipped = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]

# %%
for damage, content in {"truncated": whole[:-100], "flipped": flipped}.items():
    path.write_bytes(content)
    try:
        record_batches.verify(record_batches.Manifest.load(scratch))
    except ValueError as error:
        print(f"{damage}: {str(error).replace(str(scratch), '...')}")

# %% [markdown]
# And a conversion that is killed? Every shard that is done leaves a receipt beside its files, and the manifest comes
# last. The cell begins a conversion, stops after three shards, and makes the same call again.

# %%
broken_off = warehouse.local(f"{folder}/broken-off")
source = conversion.TableShards(warehouse, "route_rows")
begun = conversion.begin(broken_off, source, columns, seed=SEED)
for number in begun.pending[:3]:
    begun.unit(number)
print("left to do:", conversion.begin(broken_off, source, columns, seed=SEED).pending)
finished = conversion.convert(broken_off, source, columns, seed=SEED)
print("equal to the undisturbed one:", finished.files == manifest.files)

# %% [markdown]
# A real `kill -9` also leaves half a file, whose name says so. The benchmark kills a conversion of the large table at
# random moments, again and again, and compares what is there at the end with a conversion that nobody disturbed:

# %%
kills = "kills, then equal to an undisturbed conversion"
last = of.loc["units finished at the last kill"]
print(
    f"{value[kills]:.0f} kills; {last['value']:.0f} {last['unit']} were done by the last; files and hashes equal"
)

# %% [markdown]
# ## Past one machine
#
# Shards are independent, so the same function runs on as many machines as you pay for. `recsys_common` does not
# contain an engine for that: Apache Beam is one, and Dataflow runs it. The receipts are the same, so a pipeline that
# was killed continues, and two workers that got the same shard write the same file.
#
#     python -m recsys_common.beam_conversion --table export_rows --project P --bucket B --to gs://B/train \
#         --columns user_id:int64,item_id:int64,rating:float32,timestamp:int64 \
#         --runner DataflowRunner --region R --temp_location gs://B/tmp --sdk_container_image IMAGE
#
# `IMAGE` holds this package and TensorFlow for the workers. `--runner DirectRunner` in place of the last line runs
# the same pipeline on this machine, which `make test` does; Dataflow itself was not run.
#
# ## What it costs, before it costs anything
#
# `make plan SCALE=full CHAPTER=2` prints bytes, files, hours and money for each route, at the size of your table and
# at fifty billion rows. Prices stand in one file, `recsys_common/prices.json`, with the page and the day they were
# read; those that nobody has read are marked so, and the plan prints amounts instead of money. With your table's name
# and credentials the first bytes come from a dry run; otherwise from columns times rows, and the plan says which.
# Every query carries `maximum_bytes_billed`: a mistake is refused instead of paid for.

# %%
plan = costs.routes_plan(50e9, costs.load_prices(), costs.load_benchmark())
table, bills = plan[plan.index("AT 50") :].split("\n\n")[:2]
print(table, bills, sep="\n\n")

# %% [markdown]
# ## What to do
#
# - **More than one epoch: route 4.** Storage Read streams into record batches. It is the fastest to read, before the
#   shuffle that every route needs; nothing is text on the way, a value that does not fit its dtype is refused by
#   name, and there is one set of files to look after.
# - **Exports that exist already, or a team that may not use the Storage Read API: route 3.** The same rows in the end,
#   one more copy of the data in between.
# - **One pass over fresh data: route 5**, straight from the table. No files, no shuffle; read twice, pay twice.
# - **CSV** for people to look at. **One Example a row** where somebody else's pipeline insists.
# - **Packing in SQL** works where no machine of yours may run a converter and all columns are integers.
# - **Compression** on what is stored or sent far, not on what is read in every epoch.
# - **Hash** the ids where new ones come every day, and pay for it in rows: the table above says how many share at
#   which size. Otherwise take the **vocabulary**, with its rare ids in shared rows. Chapter 7 measures what sharing
#   costs in quality.
#
# ## Summary
#
# - SQL splits, numbers, hashes, gathers histories and shards; then there is nothing left for Python to parse.
# - A row-by-row format pays for each row in every epoch. Columns of thousands of rows are copied, not parsed.
# - An export is a folder with a manifest, written last. What the manifest does not name is not data.
# - A killed export is continued by the same call; a damaged one is found by name; an unwanted value is refused with
#   its column and row.
# - The plan prints bytes, hours and money before a query runs.
#
# ## Exercises
#
# 1. Give the rating the dtype `int8` in `columns`, then `float16`. Which rows are refused, and what do the others
#    lose? What are the bytes a row?
# 2. Read only `item_id`: `record_batches.read(manifest, ["item_id"])`. How much faster is it than all four columns,
#    and why not four times as fast?
# 3. Export the same rows in the table's own order (`SELECT 0 AS shard, ...`). How large are the Parquet files now,
#    and why? What would a model see that reads them in order?
# 4. Add a column of strings, the film's title, and read it back. What does a title cost in rows/s against an id?
# 5. Make a route 7 and put it into the benchmark: ORC, Avro, or whatever your team uses. Does it change the
#    recommendation?

# %% [markdown]
# The comparison leaves files that `make clean-cloud` would not find, because no manifest names them. They go now.

# %%
for name in ("csv", "csv.gz", "rows", "parquet", "from-parquet", "packed", "broken-off"):
    tf.io.gfile.rmtree(warehouse.local(f"{folder}/{name}"))

# %%
values = {f"rows {name}": (len(truth) if same else -1, "rows") for name, same in equal.items()}
values |= {f"bytes/row {name}": (total / len(truth), "bytes") for name, total in size.items()}
values |= {f"ids that share a row, {name}": (share, "") for name, (share, *_) in sizes.items()}
values |= {
    "hash equal to TensorFlow": (hashes_agree, ""),
    "rows": (num_rows, "rows"),
}
kept = survival.groupby("route")["outcome"].agg(lambda outcomes: (outcomes == "kept").sum())
values |= {f"cases kept, {route}": (count, f"of {len(outcomes)}") for route, count in kept.items()}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-2", values, dataset=DATASET)
warehouse.close()
