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
# # 3. Scaling data
#
# The table is larger than memory, the accelerator waits for its input, and the machine that trains may be taken away
# at any moment. **How do files become shuffled batches, fast, in flat memory, on any number of workers, and how does a
# run that was interrupted go on with the very next row?**
#
# At the end of this page you will have
#
# - a pass over data that is four times larger than the memory it is allowed;
# - a ladder of everything people do to make an input pipeline faster, one change at a time, and the three rungs that
#   matter;
# - each row read exactly once by one, two or seven workers;
# - the quality of a shuffle as a number, and what a bad one does to a model;
# - a run that is stopped in the middle of an epoch and goes on exactly, from a state of a few hundred bytes;
# - a function that says which part of your input is the bottleneck, or that it is none of them.

# %% tags=["parameters"]
SCALE = (
    "small"  # small: a laptop. medium: 100 million simulated rows. full: BigQuery, Cloud Storage
)
DATASET = "simulated"
DATA_DIR = "../data"
SEED = 1
ROWS = 0  # simulated ratings; 0: what the scale says
PROJECT = ""  # Google Cloud project; "" is the embedded BigQuery
BUCKET = ""  # Cloud Storage bucket, without gs://
LOCATION = "US"  # where table and bucket are
ROWS_PER_FILE = 4_000_000
FILES = 16  # at least, so that there is something to share out
BATCH_SIZE = 4096
EPOCHS = 3
ALLOWED_MB = 300  # memory for the demonstration, on top of what TensorFlow takes itself
RUNS_DIR = "../runs"

# %%
import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import tensorflow as tf
from recsys_common import (
    bigquery,
    bottleneck,
    conversion,
    datasets,
    features,
    input_pipeline,
    limited_memory,
    ratings_table,
    record_batches,
    scale,
    training,
)
from recsys_common.input_pipeline import Worker

# %% [markdown]
# ## The whole of it
#
# One function makes the batches, from files that chapter 2 made. The number of steps comes from the manifest; what
# makes the run resumable is a small dictionary.
#
# ```python
# settings = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "seed": SEED}
# dataset = input_pipeline.batches(manifest, **settings)
# steps = input_pipeline.steps_per_epoch(manifest, BATCH_SIZE)
# state = input_pipeline.position(manifest, step=done, **settings)
# again = input_pipeline.batches(manifest, **settings, start=state)
# ```
#
# ## Files
#
# As in chapter 2: rows get a shard number in SQL, so that every file is a random sample of the table, and leave as
# record batches. Simulated ratings are drawn and loaded a part at a time; at the medium scale there are 100 million.

# %%
warehouse = bigquery.connect(PROJECT, BUCKET, location=LOCATION)
simulate = {"rows": ROWS or scale.MANY_SIMULATED_ROWS.get(SCALE, 0), "seed": SEED, "stream": True}
ratings_table.load(warehouse, datasets.load(DATASET, DATA_DIR, **simulate))
num_rows = warehouse.count("ratings")
warehouse.run("export_rows.sql", shards=max(FILES, num_rows // ROWS_PER_FILE))

# %%
folder = warehouse.local(f"{warehouse.storage}/chapter-3/ratings")
columns = {"user_id": "int64", "item_id": "int64", "rating": "float32", "timestamp": "int64"}
source = conversion.TableShards(warehouse, "export_rows")
manifest = conversion.convert(folder, source, columns, seed=SEED)
print(f"{manifest.rows:,} rows in {len(manifest.files)} files, {manifest.bytes / 1e6:,.1f} MB")

# %% [markdown]
# ## More than memory
#
# A manifest is a list of files, and it may name them many times over. Here they are, named so often that the data is
# four times as large as what the next programs may take, or more: as many bytes to read as from a table of that size.

# %%
times = int(np.ceil(4 * ALLOWED_MB * 1e6 / manifest.bytes))
large = dataclasses.replace(manifest, files=manifest.files * times)
times_allowed = large.bytes / 1e6 / ALLOWED_MB
print(f"{times_allowed:.1f} times the {ALLOWED_MB} MB allowed")

# %% [markdown]
# Each of the two programs below runs in a process of its own, whose memory is limited by the operating system
# (`RLIMIT_DATA`) to what TensorFlow takes after its import, and `ALLOWED_MB` more. The first does what the tutorials
# do: the table, then slices of it. The second reads shuffled record batches.


# %%
def whole_table(manifest):
    batches = input_pipeline.batches(manifest, 65_536).as_numpy_iterator()
    table = pd.concat(pd.DataFrame(batch) for batch in batches)
    rows = tf.data.Dataset.from_tensor_slices(dict(table)).batch(8192)
    return sum(1 for _ in rows)


# %%
def windows_of_it(manifest):
    return sum(1 for _ in input_pipeline.batches(manifest, 8192, seed=1))


# %%
programs = (whole_table, windows_of_it)
outcomes = {p.__name__: limited_memory.run(p, large, megabytes=ALLOWED_MB) for p in programs}
{name: "ended by the limit" if run.failure else "finished" for name, run in outcomes.items()}

# %% tags=["nbval-ignore-output"]
for name, run in outcomes.items():
    print(f"{name}: {run.seconds:.1f} s, {run.peak:.0f} MB at most. {run.failure[:80]}")

# %% [markdown]
# The benchmark does the same on the real thing: 220 million rows, 6 GB of files, and 1.5 GB of memory for everything,
# TensorFlow included. It also tries the two other ways that look harmless, `cache()` and a row buffer as large as the
# data.

# %%
benchmark = json.loads(Path("../benchmarks/input_pipeline.json").read_text())
of = pd.DataFrame(benchmark["rows"]).set_index("case")
value = of["value"]
print(benchmark["machine"], benchmark["date"][:10])

# %%
limited = of[of.index.str.startswith("limited: ") & of["series"].notna()]
limited = limited.rename(lambda case: case.removeprefix("limited: "))
ended = limited["failure"].replace("", "finished").str[:45]
shown = pd.DataFrame({"peak, MB": limited["value"].round(), "seconds": limited["seconds"].round(1)})
shown.assign(outcome=ended)

# %%
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for name, series in limited["series"].items():
    seconds, used = np.array(series).T
    axis.plot(seconds, used, label=name, lw=2 if "record" in name else 1)
axis.axhline(value["limited: data"], color="black", ls=":", label="the data")
axis.set(
    xlabel="seconds", ylabel="resident memory, MB", yscale="log", title="220 million rows in 1.5 GB"
)
axis.legend(fontsize=8, ncols=2)

# %% [markdown]
# Memory stays flat because nothing in the pipeline grows with the table: some files are open, a window of their rows is
# held, some batches wait for the model. Measured in whole processes, for shuffled rows of 1, 10 and 100 million. In
# each case 100 million rows are read, in 100, 10 and 1 epochs; below that one pass, in which the allocator of a short
# run has not yet grown to what it will hold back.

# %%
sizes = ("1M", "10M", "100M")
flat = [f"memory {rows}{passes}" for passes in ("", ", one pass") for rows in sizes]
of.loc[flat, ["value", "min", "max"]].set_axis(["peak, MB", "from", "to"], axis=1).round()

# %% [markdown]
# ## The ladder
#
# What do people do to make an input pipeline faster? Everything, at the same time. Here is one change at a time, each
# in a process of its own, on the same ratings: two ids, a rating, batches of 8,192 into a step that adds them up. From
# *CSV* to *parse in the interleave* each rung keeps what those before it did. All figures come from this machine in one
# run.

# %% tags=["main-result"]
rungs = of[of["change"].notna()]
peak = value[[f"{name}: peak memory" for name in rungs.index]].to_numpy()
ladder = rungs[["change", "value", "min", "max"]].set_axis(
    ["change", "M rows/s", "from", "to"], axis=1
)
ladder["MB"] = peak.round()
ladder.round(2)

# %%
figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
colors = ["C2" if "column" in name or name in ladder.index[-3:] else "C7" for name in ladder.index]
bars = axis.barh(ladder.index[::-1], ladder["M rows/s"][::-1], color=colors[::-1])
axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
axis.set(
    xscale="log",
    xlabel="M rows/s",
    title="Rows a second, one change a rung; green: columns instead of rows",
)
axis.margins(x=0.12)

# %% [markdown]
# Three steps carry the whole ladder. The others are worth a line each, not an afternoon.

# %%
speed = ladder["M rows/s"]
steps_that_matter = {
    "parse a batch instead of a line": speed["batch, then parse"] / speed["CSV"],
    "columns instead of text": speed["columns: record batches"] / speed["parse in the interleave"],
    "shuffle columns instead of rows": speed["column shuffle"] / speed["shuffle by row"],
    "prefetch": speed["prefetch"] / speed["interleave"],
    "parallel map": speed["parallel map"] / speed["prefetch"],
    "private thread pools": speed["private thread pools"] / speed["column shuffle"],
    "direct device feed (to a CPU)": speed["direct device feed"] / speed["column shuffle"],
}
pd.Series(steps_that_matter, name="times as fast").round(2).to_frame()

# %% [markdown]
# Interleaving *lines* of many files is a trap of its own: every line then passes through the interleave by itself. The
# book's pipeline is taken at its best below, with batching and parsing inside the interleave.
#
# What the promise is about, all cases in turns within one run. Ids that are dense already cost nothing here; hashing
# integers costs little, hashing them as strings much (*Features*, below).

# %%
cases = ["row shuffle", "book pipeline", "shuffled, fingerprint hash", "shuffled, integer hash"]
cases += ["shuffled, raw ids", "shuffled by gather", "shuffled record batches", "record batches"]
promise = of.loc[cases, ["value", "min", "max"]].set_axis(["M rows/s", "from", "to"], axis=1)
promise["hours, 50 billion rows"] = 50e9 / promise["M rows/s"] / 3.6e9
promise.round(2)

# %%
ratios = of[of.index.str.contains(" / ")][["value", "min", "max"]]
ratios.set_axis(["ratio", "from", "to"], axis=1).round(1)

# %% [markdown]
# And on the host of a TPU? Rows a second and core, times the cores that Google lists for the machine type. That is an
# extrapolation along a straight line, which no pipeline follows to the end: read it as a lower bound of the hours.

# %%
cores = {"this machine": benchmark["machine"]["cores"], "ct5lp-hightpu-1t (v5e)": 24}
cores |= {
    "ct5lp-hightpu-4t (v5e)": 112,
    "ct6e-standard-4t (v6e)": 180,
    "ct5lp-hightpu-8t (v5e)": 224,
}
per_core = value["shuffled record batches"] / cores["this machine"]
hosts = pd.DataFrame({"cores": cores})
hosts["hours, 50 billion rows"] = 50e9 / (per_core * 1e6 * hosts["cores"]) / 3600
hosts.round(3)

# %% [markdown]
# Your machine, now: the same rows shuffled one by one and column by column.

# %% tags=["nbval-ignore-output"]
by_row = record_batches.read(manifest).unbatch().shuffle(10_000).batch(BATCH_SIZE)
by_column = input_pipeline.batches(manifest, BATCH_SIZE, seed=SEED)
for name, each in {"row by row": by_row, "by columns": by_column}.items():
    rate = training.rows_per_second(each, BATCH_SIZE, seconds=1)
    print(f"{name}: {rate / 1e6:.2f} M rows/s")

# %% [markdown]
# ## Each row once, whoever reads
#
# The rows are cut into one share for each worker *before* anything random happens. Shuffle first and shard after, and
# each worker shuffles differently: some rows are read twice, some never, and no error tells. A share is a range of
# rows; it begins and ends in the middle of a file where it must, so shares differ by a row at most, whether there are
# fewer files than workers or more. A worker is a number and a count; a `tf.distribute.InputContext` does as well.

# %%
rows_of_a_few, counted = {"limit": 70_000, "seed": SEED, "remainder": "pad"}, {}
for count in (1, 2, 7):
    pairs = []
    for index in range(count):
        share = {"worker": Worker(index, count), "columns": ["user_id", "item_id"]}
        for batch in input_pipeline.batches(manifest, 1000, **rows_of_a_few, **share):
            both = np.stack([batch["user_id"], batch["item_id"]], 1)
            pairs.append(both[batch["weight"] > 0])
    counted[count] = [len(np.concatenate(pairs)), len(np.unique(np.concatenate(pairs), axis=0))]

# %%
counted = pd.DataFrame(counted, index=["rows read", "different rows"]).T
once = bool((counted == min(70_000, manifest.rows)).all(axis=None))
counted.rename_axis("workers")

# %% [markdown]
# Every worker has the same number of steps, so that in synchronous training none waits for one that has finished. The
# number comes from the manifest, before a file is opened, and so do the complaints.

# %%
for count in (1, 2, 7):
    worker, size = Worker(0, count), min(BATCH_SIZE, manifest.rows // 7)
    dropped = input_pipeline.steps_per_epoch(manifest, size, worker=worker)
    padded = input_pipeline.steps_per_epoch(manifest, size, worker=worker, remainder="pad")
    print(f"{count} workers: {dropped} steps each, {padded} with the remainder padded")

# %%
for size, count in ((manifest.rows, 2), (1, manifest.rows + 1)):
    try:
        input_pipeline.batches(manifest, size, worker=Worker(0, count))
    except ValueError as error:
        print(str(error).replace(manifest.folder, "..."))

# %% [markdown]
# A last batch that is not full is left out (`remainder="drop"`, and other rows in each epoch), or filled with zeros
# that have weight 0 (`"pad"`). Both have static shapes, without which a TPU compiles anew for every odd batch, and
# Keras never ends with *ran out of data*: the dataset knows its length.

# %%
padded = input_pipeline.batches(manifest, BATCH_SIZE, remainder="pad")
print("batches:", int(padded.cardinality()))
padded.element_spec

# %% [markdown]
# ## How good is the shuffle?
#
# The order of the files, the record batches of eight files in turns, and all rows of a window permuted: is that a
# shuffle? Take a table sorted by time, see where its rows come, and compare with a uniform permutation.
#
# - *displacement*: how far a row is from its place, on average. 1 is uniform.
# - *spread of a batch*: how much of the table a batch reaches. 1 is uniform.
# - *rows of the same user in a batch*, times as many as in a uniform order.
# - *label autocorrelation*: how much a rating tells about the next row's. 0 is uniform.

# %%
orders = ["none", "row buffer of 10,000", "windowed", "windowed, sharded files"]
quality = of[of.index.str.startswith("order ")]["value"]
quality.index = pd.MultiIndex.from_tuples(
    case.removeprefix("order ").rsplit(": ", 1) for case in quality.index
)
quality = quality.unstack().loc[orders].drop(columns="places")
quality[[*quality.columns.drop("NDCG@10"), "NDCG@10"]].round(3)

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True, layout="constrained")
for axis, name in zip(axes, orders, strict=True):
    places = np.array(of.loc[f"order {name}: places", "series"])
    axis.scatter(np.arange(len(places)) / len(places), places / places.max(), s=1)
    axis.set(title=name, xlabel="when it is read", xticks=[0, 1], yticks=[0, 1])
axes[0].set_ylabel("where it is in the table")

# %% [markdown]
# A buffer of rows moves each row by about its own size: the model still walks through the years, and forgets. Windows
# over files *in the table's order* move rows across the whole table, but a batch holds a few moments of it only. On
# files that are random samples (the shard number from SQL) the order cannot be told from a uniform one.
#
# The last column is what it is all about: matrix factorization, trained on the oldest nine tenths and asked for the
# rest. The median of three seeds, and how far they lie apart:

# %%
trained = of.loc[[f"order {name}: NDCG@10" for name in orders], ["value", "min", "max"]]
trained.set_axis(["NDCG@10", "from", "to"], axis=1).set_axis(orders).round(4)

# %% [markdown]
# Both good orders beat both bad ones by more than the seeds differ. Whether files are sharded or not made less of a
# difference to this model than to the measures above.
#
# Where do the three shuffles happen? In one map over windows. Row `i` of a column is written to place `order[i]`, all
# columns by the same order: `dynamic_stitch`, which does this in half the time that `gather` takes to read them.

# %%
ids = tf.constant([10, 11, 12, 13, 14, 15])
order = tf.random.experimental.stateless_shuffle(tf.range(6), [SEED, 0])
print(order.numpy(), tf.dynamic_stitch([order], [ids]).numpy())

# %% [markdown]
# `stateless_shuffle` is a function of its seed alone; the seed is made from (`SEED`, epoch, number of the window). That
# is what the next section lives on.
#
# ## Interrupted
#
# Preemptible machines are taken away, processes are killed. `tf.data` can save an iterator, with everything in its
# buffers. Here there is nothing to save: which rows come next follows from the seed, the epoch and the step. Train
# for a while, and stop in the middle of the second epoch:

# %%
settings = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "seed": SEED, "limit": 40 * BATCH_SIZE}
dataset = input_pipeline.batches(manifest, **settings)
steps = input_pipeline.steps_per_epoch(manifest, BATCH_SIZE, limit=40 * BATCH_SIZE)
done = steps + steps // 3
uninterrupted = [batch["timestamp"].numpy() for batch in dataset]
print(steps, "steps an epoch, stopped after", done)

# %%
state = json.dumps(input_pipeline.position(manifest, step=done, **settings))
print(f"{len(state)} bytes:", state[:60], "...")

# %% [markdown]
# The new process makes the same call, with the state. It opens the files of the window that the step lies in, at the
# records that it needs, and leaves out what was seen.

# %%
again = input_pipeline.batches(manifest, **settings, start=json.loads(state))
resumed = [batch["timestamp"].numpy() for batch in again]
exact = all(np.array_equal(*pair) for pair in zip(resumed, uninterrupted[done:], strict=True))
print(f"{len(resumed)} batches, equal to the rest of the uninterrupted run: {exact}")

# %% [markdown]
# The state names what the order depends on, so that a changed seed, batch or file is not taken for the old one. The
# fast mode, which hands out whatever comes first, says that it has no order.

# %%
for change in ({"seed": SEED + 1}, {"deterministic": False}):
    try:
        input_pipeline.batches(manifest, **settings | change, start=json.loads(state))
    except ValueError as error:
        print(str(error).replace(manifest.folder, "...")[:170])

# %% [markdown]
# Measured in the middle of 100 million rows, at random steps, each compared with the uninterrupted run; beside it what
# `tf.data`'s own checkpoint of the iterator takes after 20 batches.

# %%
resume, case = of.loc["resume"], "iterator checkpoint, "
kinds = {"row buffer of 100,000": "tf.data, row buffer of 100,000"}
kinds |= {"shuffled record batches": "tf.data, these windows"}
compared = {
    shown: [
        value[f"{case}{kind}: {part}"] for part in ("size", "save", "restore", "goes on exactly")
    ]
    for kind, shown in kinds.items()
}
compared["position, these windows"] = [value["resume state"], 0, resume["value"], 1]
names = ["bytes", "s to save", "s to go on", "exactly"]
pd.DataFrame(compared, index=names).T.round(2)

# %% [markdown]
# Both go on exactly. The iterator's checkpoint holds the rows in its buffers, so its size and time grow with the
# buffer; it must be saved with every checkpoint of the model, whether it is needed or not, and it is lost when
# TensorFlow or the pipeline changes. The position is one number that the optimizer counts anyway.
#
# ## Features
#
# What is left to do for a batch is given as a function of the batch, in TensorFlow's own ops, so that it runs on the
# host of a TPU or in another process. It also gets a key, another for every batch: randomness that can be resumed.

# %%
frequency = np.bincount(
    np.concatenate([b["item_id"] for b in record_batches.read(manifest).take(4)])
)
negatives = features.negative_sampler(frequency)
of_batch = input_pipeline.batches(
    manifest,
    BATCH_SIZE,
    seed=SEED,
    features=lambda batch, key: {
        "user": features.hash_bucket(batch["user_id"], 2**20, "user"),
        "item": features.fingerprint_bucket(batch["item_id"], 2**20, "item"),
        "negatives": negatives(key, [BATCH_SIZE, 4])[0],
        "negatives_log_q": negatives(key, [BATCH_SIZE, 4])[1],
    },
)
{name: column[:1].numpy().round(2).tolist() for name, column in next(iter(of_batch)).items()}

# %% [markdown]
# Which of them for the ids? In the table above: rows of the table from SQL are free. `hash_bucket`, over the bytes of
# the number, costs a few nanoseconds a row. `fingerprint_bucket` gives the bucket of the *string*, which is what
# chapter 2's SQL and a served model use; nearly all of its time goes into writing numbers as text. So hash strings in
# SQL, once, or integers here. A `vocabulary` in the pipeline is for ids that no SQL has seen:

# %%
known = pd.Series(frequency).nlargest(100).index.to_numpy()
rows_of = features.vocabulary(known, np.arange(10, 110), oov_buckets=10, name="item")
print(
    "the most frequent:", rows_of(known[:3]).numpy(), "unknown ids:", rows_of([10**9, -1]).numpy()
)

# %% [markdown]
# Histories are ragged: as many items as a user happened to take. `lengths` makes them rectangles. The last values are
# kept, since the next item depends on them most; padding goes to the left, so that the latest is always at the end;
# and the true length comes along, because 0 may also be an item.

# %%
ragged = pa.table({"user": [0, 1, 2], "history": [[5, 6, 7, 8, 9], [], [3]]})
scratch = scale.run_folder(RUNS_DIR, SCALE, "chapter-3") / "histories"
written = record_batches.write(scratch, [ragged], {"user": "int32", "history": "int32"})
batch = next(iter(input_pipeline.batches(written, 3, lengths={"history": 4})))
print(batch["history"].numpy(), batch["history_length"].numpy())

# %% [markdown]
# Several sources at once, such as ratings and clicks, in fixed shares of every batch; the shorter one starts over:

# %%
mix = input_pipeline.mixed([(manifest, 3), (manifest, 1)], 1000, steps=5, seed=SEED)
rows_a_batch = [len(batch["user_id"]) for batch in mix]
rows_a_batch

# %% [markdown]
# ## Where does the time go?
#
# Before anybody turns knobs: is it the input at all, and which part of it? `explain` reads the same rows again and
# again, each time one part of the pipeline further, then runs the model on a batch that it already has. Three
# pipelines, each with something wrong on purpose.

# %%
weights = tf.random.stateless_normal([1024, 1024], [SEED, 0])
heavy = tf.function(lambda batch: tf.reduce_sum(weights @ weights @ weights @ weights))
light = tf.function(lambda batch: tf.reduce_sum(batch["rating"]))
as_text = lambda batch, key: batch | {"day": tf.strings.as_string(batch["rating"], precision=9)}  # noqa: E731
planted = {
    "strings": bottleneck.explain(manifest, 4096, light, seconds=0.3, seed=SEED, features=as_text),
    "small batches": bottleneck.explain(manifest, 32, light, seconds=0.3, seed=SEED),
    "heavy model": bottleneck.explain(manifest, 4096, heavy, seconds=0.3, seed=SEED),
}
{name: explanation.bottleneck for name, explanation in planted.items()}

# %% tags=["nbval-ignore-output"]
for name, explanation in planted.items():
    print(f"{name}\n{explanation}\n")

# %% [markdown]
# ## Past one machine
#
# When the cores beside the accelerator cannot feed it whatever you do, `tf.data` service lets others run the same
# pipeline: a dispatcher that hands out work, workers that send batches.
#
#     python -m recsys_common.data_service dispatcher --port 5050 --work-dir gs://bucket/dispatcher
#     python -m recsys_common.data_service worker --port 5051 --dispatcher 10.0.0.2:5050 --address 10.0.0.3:5051
#
# What does it promise about each row being read once? A dispatcher and three workers, all processes of their own, read
# files whose rows are numbered; in the middle of the epoch the busiest worker is killed. Seen, per mode:

# %%
service = json.loads(Path("../benchmarks/data_service.json").read_text())
seen = pd.DataFrame(service["rows"]).set_index("case")
lost = seen[seen["unit"] == "rows lost"]
modes = lost[["value", "more", "seconds"]].astype(int)
modes.columns = ["rows lost", "rows read twice or more", "seconds"]
modes["how it ended"] = np.where(lost["end"].str.contains("Error"), "error", lost["end"])
modes

# %% [markdown]
# Undisturbed, every mode but `OFF` reads each row once; `OFF` has every worker read everything. When a worker is killed
# and started again at its address, `DYNAMIC` loses the files that it was working on, and the modes with fixed shares
# read them again: rows are lost or doubled, and nothing says so. A worker that does not come back *at the same
# address* is worse: the epoch waits for it, without an error, and without an end. A dispatcher with a journal
# (`--work-dir`) may be killed, one without takes the epoch with it.
#
# So the service is for training where some rows more or less do not matter. `batches` itself is its pipeline, one
# epoch at a time and without a length, since each worker has a part of the batches:
#
#     part = batches(manifest, 8192, seed=1, epochs=n + 1, start=n * steps, counted=False)
#     part = part.apply(tf.data.experimental.service.distribute("distributed_epoch", "10.0.0.2:5050"))
#
# Where each row must come exactly once, no service is needed: every trainer reads its own share, `worker=context`.

# %%
through = seen[seen["unit"] == "M rows/s"][["value", "min", "max"]]
through = through.set_axis(["M rows/s", "from", "to"], axis=1)
busy = seen["value"].filter(like="CPU").rename(lambda case: case.rsplit(":", 1)[0])
through["CPU seconds of the trainer, a M rows"] = busy
through.round(3)

# %% [markdown]
# Not shuffled, two cores for everything: here the service is slower than no service, and to receive a batch costs the
# trainer more of its own processor than to read it from a file. It pays where features cost the trainer much more than
# that, and its cores are what is short. With dense ids and record batches that is rare: look at the hours above first.
#
# ## What goes wrong
#
# A file that is damaged, is gone, or has other rows than the manifest says, found in the middle of an epoch:

# %%
few = warehouse.read("export_rows", list(columns), where="shard < 2")
halves = [few.slice(0, 500), few.slice(500, 500)]
small = record_batches.write(f"{scratch}/../damaged", halves, columns, rows_per_record=100)
path = Path(small.paths[1])
whole = path.read_bytes()
flipped = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]

# %%
for damage, content in {
    "flipped bit": flipped,
    "cut": whole[: len(whole) // 5 * 2],
    "gone": None,
}.items():
    path.unlink() if content is None else path.write_bytes(content)
    try:
        sum(1 for _ in input_pipeline.batches(small, 100))
    except tf.errors.OpError as error:
        print(f"{damage}: {type(error).__name__}: {error.message.split('}} ')[-1][-95:]}")

# %% [markdown]
# TensorFlow names the file that is gone, and says of a damaged record only where it begins. `Manifest.load` and `verify`
# (chapter 2) name it, with what was expected:

# %%
for content in (flipped, whole[: len(whole) // 5 * 2]):
    path.write_bytes(content)
    try:
        record_batches.verify(record_batches.Manifest.load(small.folder))
    except ValueError as error:
        print(str(error).replace(small.folder, "...").split(": ", 1)[1][:90])

# %% [markdown]
# ## Summary
#
# - Memory stays flat when nothing in the pipeline grows with the table: no `cache()`, no table in memory, no buffer
#   sized to the data.
# - Three steps of the ladder matter: parse batches instead of lines, read columns instead of text, shuffle columns
#   instead of rows. Ids that are dense from SQL come for free.
# - Shard before anything random, by ranges of rows: each row once, equal steps for all workers, complaints before the
#   first file is opened.
# - A shuffle is as good as the files are random: let SQL assign rows to files, then windows suffice.
# - An order that is a function of (seed, epoch, position) makes a resume exact, fast and free of saved buffers.
# - Ask which part is the bottleneck before turning knobs.
#
# ## Exercises
#
# 1. Set `window=1000` in `input_pipeline.batches`, then the whole table. What do `bottleneck.explain` and the shuffle
#    quality say? Where would you stop?
# 2. Give `ALLOWED_MB` smaller and smaller values. At which does `windows_of_it` fail, and what takes the memory?
# 3. Resume with a batch size twice as large. Why is it refused, and what would you have to change so that it is exact?
# 4. Write the files in the order of time (`SELECT ... ORDER BY timestamp`, one file after the other) and measure the
#    order of rows that `batches` makes of them with windows of 1, 4 and 16 record batches.
# 5. Move the hashing of both ids into SQL (`hashed_ids.sql`). How many hours does that save at 50 billion rows and ten
#    epochs, and what does it cost once?

# %%
values = {
    f"rows read by {count} workers": (rows, "rows") for count, rows in counted["rows read"].items()
}
values |= {
    "each row once": (once, ""),
    "resumed exactly": (exact, ""),
    "resume state": (len(state), "bytes"),
    "data, times the memory allowed": (times_allowed, ""),
    "naive way ended by the limit": (bool(outcomes["whole_table"].failure), ""),
    "windows finished": (not outcomes["windows_of_it"].failure, ""),
    "bottlenecks named": (
        sum(
            planted[n].bottleneck == b
            for n, b in (
                ("strings", "features"),
                ("small batches", "hand-over"),
                ("heavy model", "model"),
            )
        ),
        "of 3",
    ),
    "rows": (num_rows, "rows"),
}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-3", values, dataset=DATASET)
warehouse.close()
