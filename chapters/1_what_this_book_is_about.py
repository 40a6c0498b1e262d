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
# # 1. What this book is about
#
# Somewhere in a warehouse there is a table: who took what, and when. Every recommender begins there and ends with a
# short list of titles in front of one person. **What is the whole road between the two, and where does it hurt?**
#
# On this page you drive it once, end to end, on a laptop. At the end you will have
#
# - a table in BigQuery (embedded in this notebook, the real client talks to it), split by time in SQL;
# - its rows as files that TensorFlow reads without parsing anything in Python;
# - a trained model, ranked exactly against every item and against the simplest thing that works;
# - ten recommendations for one person, beside what that person liked;
# - a saved model that another process loads without this project;
# - and the three pains that the rest of the book cures, each reproduced and measured.
#
# The same cells run on real ratings (`make chapter-1 SCALE=medium DATASET=ml-latest-small`), and are made to run on
# your own BigQuery table (`SCALE=full`; `make rehearse CHAPTER=1` drives that path against the embedded service). The
# cell below is the only one that changes.

# %% tags=["parameters"]
SCALE = "small"  # small: simulated, a laptop. medium: real ratings. full: BigQuery, Cloud Storage
DATASET = "simulated"
DATA_DIR = "../data"
SEED = 1
SPLIT = "auto"  # temporal, leave-one-out; auto: temporal where the ratings have a clock
PROJECT = ""  # Google Cloud project; "" is the embedded BigQuery
BUCKET = ""  # Cloud Storage bucket, without gs://
LOCATION = "US"  # where table and bucket are
ITEMS_TABLE = ""  # full only: project.dataset.table of item_id, title, genres
DIM = 32
BATCH_SIZE = 1024
EPOCHS = 4
LEARNING_RATE = 0.1
ROWS_PER_FILE = 5_000_000  # a file's rows are in memory once, when it is written
K = 10
EVALUATED_USERS = 10_000
RUNS_DIR = "../runs"

# %% [markdown]
# `recsys_common` is the small module of this book. It is imported before TensorFlow is used, because it settles which
# Keras `tf.keras` is: TensorFlow Recommenders needs Keras 2, and TensorFlow decides only once.

# %%
import functools
import subprocess
import sys
import time
import traceback
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from recsys_common import (
    bigquery,
    conversion,
    datasets,
    evaluation,
    input_pipeline,
    ratings_table,
    saving,
    scale,
    splits,
    training,
)
from recsys_common.models.matrix_factorization import MatrixFactorization

# %%
assert tf.__version__.startswith(("2.20", "2.21")), "not this book's TensorFlow: run `make doctor`"
tf.keras.utils.set_random_seed(SEED)
tf.config.experimental.enable_op_determinism()
tf.__version__

# %% [markdown]
# ## The road in twelve lines
#
# These are the calls. The cells below make their arguments, run them one by one, and look at what each of them made.
#
# ```python
# tables = datasets.load(DATASET, DATA_DIR, rows=rows, seed=SEED)
# ratings_table.load(warehouse, tables, ITEMS_TABLE)
# made_by = splits.split(warehouse, SPLIT, tables.time)
# warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=pieces)
# warehouse.run("examples.sql", shards=num_files)
# source = conversion.TableShards(warehouse, "examples", {"split": "train"})
# train = conversion.convert(folder, source, columns, seed=SEED)
# batches = input_pipeline.batches(train, BATCH_SIZE, epochs=EPOCHS, seed=SEED)
# model = MatrixFactorization(num_users, num_items, DIM, frequency, seed=SEED)
# model.compile(optimizer=tf.keras.optimizers.Adagrad(LEARNING_RATE))
# losses = training.fit(model, batches, EPOCHS, steps, BATCH_SIZE)
# ranking = evaluation.rank(model.scores, *asked, *seen, num_items, K)
# ```
#
# ## Ratings
#
# At the small scale nothing is downloaded: the ratings are drawn from a model whose truth is known, with popular and
# forgotten films, people with a taste that drifts, sequels, and noise. That has a use beyond convenience: there is an
# oracle that knows everyone's taste exactly, and we will print its score next to ours.

# %%
road_started = time.time()
rows = scale.SIMULATED_ROWS.get(SCALE, 0)
tables = datasets.load(DATASET, DATA_DIR, rows=rows, seed=SEED)
tables.ratings.slice(0, 5).to_pandas()

# %% [markdown]
# Whatever the source, MovieLens, Netflix or the simulator, it comes as these four columns, and after this cell
# nothing knows where they came from.
#
# ## Into the warehouse
#
# `connect` starts an embedded BigQuery and stops it with this notebook. Give it a project and a bucket, and it is
# Google's; the client, the SQL and every cell below stay as they are.

# %%
warehouse = bigquery.connect(PROJECT, BUCKET, location=LOCATION)
ratings_table.load(warehouse, tables, ITEMS_TABLE)
loaded = warehouse.count("ratings")
loaded

# %% [markdown]
# A load that loses or doubles a row would poison everything after it, so `load` counts, and refuses nulls, NaN and
# negative ids with a message that says how many there are. Now the table can be asked anything. What do people watch?

# %%
popular = """
SELECT items.title, COUNT(*) AS ratings, ROUND(AVG(rating), 2) AS mean_rating
FROM ratings JOIN items USING (item_id) GROUP BY items.title ORDER BY ratings DESC, title LIMIT 5"""
warehouse.query(popular).to_pandas()

# %% [markdown]
# How unequal is it? The picture shows the counts from the most popular item to the last, on logarithmic axes, and the
# line under it says what the tenth on the left has of all ratings. Most rows of an embedding table belong to items on
# the right, which a batch rarely meets.

# %%
by_item = "SELECT COUNT(*) AS n FROM ratings GROUP BY item_id ORDER BY n DESC LIMIT 100000"
counts = warehouse.query(by_item)["n"].to_numpy()
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.loglog(np.arange(1, len(counts) + 1), counts)
axis.set(xlabel="item, by popularity", ylabel="ratings", title="Ratings of each item")
axis.grid(alpha=0.3)
tenth = counts[: len(counts) // 10].sum() / counts.sum()
print(f"the most popular tenth has {tenth:.0%} of the ratings")

# %% [markdown]
# ## Split by time, in SQL
#
# The model may learn from what happened before a moment and is asked about what happened after it. Where a data set has
# an order but no clock, each person's last item is asked for instead (*leave-one-out*); there the model does see what
# others did later. A data set with neither is refused.

# %%
made_by = splits.split(warehouse, SPLIT, tables.time)
print((bigquery.SQL_FOLDER / made_by).read_text())

# %%
parts = """
SELECT split, COUNT(*) AS ratings, COUNT(DISTINCT user_id) AS users
FROM split_ratings GROUP BY split ORDER BY split DESC"""
warehouse.query(parts).to_pandas()

# %% [markdown]
# ## Ids become rows of a table
#
# An embedding layer is a table, and an id must become a row number. The warehouse does that too: it numbers the ids
# of the training rows by frequency, and keeps row 0 for ids that training never saw. A hundred million ids are a query
# there; in Python they are a dictionary that does not fit.

# %%
pieces = 1 + loaded // 100_000_000  # one worker should not number hundreds of millions of ids
warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=pieces)
num_files = max(8, loaded // ROWS_PER_FILE)
warehouse.run("examples.sql", shards=num_files)
items = warehouse.read("item_vocabulary").sort_by("item_index").to_pandas()
items = items[items["item_index"] > 0].reset_index(drop=True)
items[["item_index", "item_id", "frequency"]].head(3)

# %% [markdown]
# ## Out of the warehouse
#
# The training rows leave as files of *record batches*: thousands of rows to a record, column after column, raw
# integers. They come through the Storage Read API in Arrow; whole columns are cast to 32 bits and put into a random
# order, and no Python loop runs over rows.

# %%
folder = warehouse.local(f"{warehouse.storage}/chapter-1/train")
columns = {"user_index": "int32", "item_index": "int32"}
source = conversion.TableShards(warehouse, "examples", {"split": "train"})
train = conversion.convert(folder, source, columns, seed=SEED)
bytes_a_row = train.bytes / train.rows
print(f"{train.rows:,} rows in {len(train.files)} files, {bytes_a_row:.1f} bytes a row")

# %% [markdown]
# A manifest, written last, names the files with their rows and hashes. The counts must agree at every step of the
# road; this is the place to find out that they do not.

# %%
in_train = warehouse.query("SELECT COUNTIF(split = 'train') AS n FROM split_ratings")
assert [train.rows] == in_train["n"].to_pylist()
assert loaded == warehouse.count("split_ratings")
pd.DataFrame(train.files)[["name", "rows", "bytes"]].head(3)

# %% [markdown]
# ## Tensors
#
# The files become shuffled batches of a fixed size, by native TensorFlow operations only. The number of steps comes
# from the manifest, so training never stumbles over the end of the data.

# %%
batches = input_pipeline.batches(train, BATCH_SIZE, epochs=EPOCHS, seed=SEED)
steps = input_pipeline.steps_per_epoch(train, BATCH_SIZE)
road_to_tensors = time.time() - road_started
batches.element_spec

# %% [markdown]
# ## A model
#
# Matrix factorization: a row of numbers for each user and each item, and the score of a pair is their dot product
# plus a bias for the item. It is trained as retrieval: in each batch the right item must win against the items of
# everyone else in the batch. Since popular items appear more often among these, their frequency is corrected for
# (*log-Q*), with counts that came from SQL a moment ago.

# %%
most = warehouse.query("SELECT MAX(user_index) AS n FROM user_vocabulary")
known_users = most["n"][0].as_py()
num_users, num_items = known_users + 1, len(items) + 1  # row 0 is for the unknown
frequency = np.concatenate([[0], items["frequency"]])
item_ids = np.concatenate([[0], items["item_id"]])
model = MatrixFactorization(num_users, num_items, DIM, frequency, seed=SEED)

# %%
model.compile(optimizer=tf.keras.optimizers.Adagrad(LEARNING_RATE))
fit_started = time.time()
losses = training.fit(model, batches, EPOCHS, steps, BATCH_SIZE)
seconds_to_fit = time.time() - fit_started
print("guessing:", f"{np.log(BATCH_SIZE):.2f}", *[f"{loss / BATCH_SIZE:.2f}" for loss in losses])

# %% [markdown]
# The first number is what guessing among the items of a batch costs, the logarithm of their number; the others are the
# loss per row in the last batch of each epoch. They fall, which says little: a loss is not a recommendation.
#
# ## Does it recommend anything?
#
# For every person who is in both parts, *all* items are ranked, without those already seen, and we look where
# the test items landed. People who appear only after the cut are left out: a model of ids has never met them.

# %%
stride = max(1, known_users // EVALUATED_USERS)
warehouse.run("evaluation_pairs.sql", stride=stride)
pairs = warehouse.read("evaluation_pairs").to_pandas()
asked = pairs[pairs["asked"]][["user_index", "item_index"]].to_numpy().T
seen = pairs[~pairs["asked"]][["user_index", "item_index"]].to_numpy().T
number = len(np.unique(asked[0]))
print(f"{asked.shape[1]:,} test ratings of {number:,} people who were there before the cut")

# %% [markdown]
# Below the model stand chance and popularity, the same list for everyone, which is the floor that a model must beat.
# Above it, where ratings are simulated, stands what is best reachable: an oracle that ranks by the true probabilities.
# It knows tastes that a hundred ratings only hint at, so no model gets all the way there.

# %%
dice = np.random.default_rng(SEED)
rankers = {
    "chance": lambda block: dice.random((len(block), num_items)),
    "popularity": lambda block: np.tile(frequency, (len(block), 1)),
    "matrix factorization": model.scores,
}

# %%
if tables.truth is not None:
    last = warehouse.run("last_seen.sql").to_pandas()
    asked_in = "SELECT MIN(timestamp), MAX(timestamp) FROM split_ratings WHERE split = 'test'"
    window = [column[0].as_py() for column in warehouse.query(asked_in).columns]
    rankers["best reachable"] = tables.truth.ranker(last, item_ids, window)

# %% tags=["main-result"]
results = {}
for name, scores in rankers.items():
    results[name] = evaluation.evaluate(scores, *asked, *seen, num_items, K)
results = pd.DataFrame(results).T
results.drop(columns="users").round(3)

# %% [markdown]
# `HR@10` is the share of people with at least one test item among their ten. `NDCG@10` rewards test items that stand
# high in the list, `recall@10` is the share of them that made it, `MRR` asks how far down the whole ranking the first
# one is, and `coverage@10` is the share of the catalogue that anyone is shown: popularity shows everyone the same few.

# %%
ndcg = results[f"NDCG@{K}"].drop("chance")
figure, axis = plt.subplots(figsize=(6, 0.6 * len(ndcg) + 1), layout="constrained")
bars = axis.barh(ndcg.index[::-1], ndcg[::-1], color=["C2", "C0", "C7"][-len(ndcg) :])
axis.bar_label(bars, fmt="%.3f", padding=3)
axis.set(title=f"NDCG@{K}: floor, model, ceiling")
axis.margins(x=0.15)

# %% [markdown]
# ## Ten recommendations for one person
#
# On the left what this person liked before, best rated first and the latest first among equals; on the right what the
# model puts in front of them, with a mark where they went on to watch it.

# %%
ranking = evaluation.rank(model.scores, *asked, *seen, num_items, K)
people, hits = np.unique(ranking.users[ranking.ranks <= K], return_counts=True)
person = int(people[np.argsort(hits, kind="stable")[len(hits) // 2]])
recommended = ranking.shown[np.searchsorted(np.unique(asked[0]), person)].tolist()
vocabulary = warehouse.read("user_vocabulary", ["user_index", "user_id"]).sort_by("user_index")
user_ids = vocabulary["user_id"].to_numpy()[-known_users:]  # index 1 first: those with index 0 lead
liked = warehouse.run("liked.sql", user_id=int(user_ids[person - 1]), rows=K).to_pandas()

# %%
titles = warehouse.run("titles.sql", item_indices=recommended).to_pandas()
titles = titles.set_index("item_index").loc[recommended].reset_index()
titles["then"] = np.where(np.isin(recommended, asked[1][asked[0] == person]), "watched", "")
side_by_side = pd.concat([liked, titles[["title", "genres", "then"]]], axis=1).fillna("")
side_by_side.set_axis(["liked before", "of genre", "recommended", "genres", "then"], axis=1)

# %% [markdown]
# This is the person in the middle, by number of hits, of those whose list had any. Exercise 1 asks for the others.
#
# ## Out of Python
#
# A model that only this notebook can run is of little use. `export` writes a SavedModel that takes the ids of the
# outside world and finds its own rows, so whoever loads it needs neither the vocabulary nor this project. What else
# stands in the folder, and how C and Node.js use it, is chapter 6.

# %%
saved = scale.run_folder(RUNS_DIR, SCALE, "chapter-1") / "model"
ids = {"user_index": user_ids, "item_index": item_ids[1:]}
about = {"data": {"dataset": DATASET, "rows": train.rows}}
_ = saving.export(saved, model, ids, about=about, onnx=False, index=False)  # chapter 6 has them

# %% [markdown]
# To be sure, another Python process loads it with nothing but TensorFlow, and scores the same person's ten items.

# %%
program = f"""
import sys, tensorflow as tf
score = tf.saved_model.load({str(saved / "saved_model")!r}).signatures["score"]
user_id = tf.fill([{len(recommended)}], tf.constant({user_ids[person - 1]}, tf.int64))
score = score(user_id=user_id, item_id=tf.constant({item_ids[recommended].tolist()}, tf.int64))
assert "recsys_common" not in sys.modules
print(*score["score"].numpy())"""
answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

# %%
there = np.array(answer.stdout.split(), np.float32)
here = model.scores(np.array([person]))[0, recommended]
np.testing.assert_allclose(there, here, rtol=1e-5)
print(f"{len(there)} scores, largest relative difference below 1e-5")

# %% [markdown]
# That was the road. It took one table and one process, and everything on it was easy.
#
# ## Pain 1: the error that hides the error
#
# To keep an accelerator busy one asks Keras to run several steps at a time, `steps_per_execution`. Then someone renames
# a column, and this appears:

# %%
renamed = batches.map(lambda row: {"user_index": row["user_index"], "item": row["item_index"]})
model.compile(optimizer=tf.keras.optimizers.Adagrad(LEARNING_RATE), steps_per_execution=4)
try:
    model.fit(renamed, steps_per_epoch=4, verbose=0)
except ValueError as error:
    masked = str(error).strip().splitlines()
print(*masked[-2:], sep="\n")

# %% [markdown]
# There is no `outputs` in our code, and no loop. The loop is in Keras: with `steps_per_execution` above 1 it runs
# `for _ in tf.range(n): outputs = step(...)`. AutoGraph turns that loop into a graph and traces the body once to learn
# what `outputs` looks like. A `KeyError`, `TypeError`, `ValueError` or `UnboundLocalError` of ours that happens in there
# is swallowed, and what is reported instead is the variable that therefore has no value. The only trace of the truth is
# the last line, without file or number.
#
# To see the cause, run one step at a time and read the error that then comes:

# %%
model.compile(optimizer=tf.keras.optimizers.Adagrad(LEARNING_RATE), steps_per_execution=1)
try:
    model.fit(renamed, steps_per_epoch=4, verbose=0)
except KeyError as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
print(f"KeyError in {Path(place.filename).name}, in {place.name}: {place.line}")

# %% [markdown]
# Remember one rule from this page: **when the message speaks of `outputs` and a loop, set `steps_per_execution=1`
# and run again.** Chapter 4 builds a decoder that does it for you.
#
# ## Pain 2: the table that slows down
#
# Every step of our model touches at most a batch of rows. So it should not matter how long the table is. We give
# the model tables with ever more rows, feed it the *same* batches, which never touch the new rows, and time a step.

# %%
slow = []
for table_rows in (10_000, 100_000, 1_000_000):
    for name in ("Adam", "Adagrad"):
        big = MatrixFactorization(table_rows, num_items, DIM)
        big.compile(optimizer=getattr(tf.keras.optimizers, name)(LEARNING_RATE))
        milliseconds = 1000 * training.seconds_per_step(big, batches, steps=8)
        slow.append({"optimizer": name, "rows": table_rows, "ms a step": milliseconds})

# %% tags=["nbval-ignore-output"]
step_time = pd.DataFrame(slow).pivot(index="rows", columns="optimizer", values="ms a step")
step_time.round(1)

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(step_time.index, step_time, marker="o", label=list(step_time.columns))
axis.set(xlabel="rows in the user table", ylabel="ms a step", title="Same batches, longer table")
axis.set(xscale="log", yscale="log")
axis.grid(alpha=0.3)
_ = axis.legend()

# %% [markdown]
# Adam keeps two running means for each row, and tf-keras computes an update for all rows at every step, even where it
# is zero. Adagrad in tf-keras updates the rows of the batch and no others. And Adam must keep the two means in memory:

# %%
gigabytes = 3 * 100e6 * DIM * 4 / 1e9
print(f"a hundred million rows of {DIM} floats and their two means: {gigabytes:.0f} GB")

# %% [markdown]
# Chapter 4 keeps Adam *and* the flat line.
#
# ## Pain 3: the input that is parsed row by row
#
# BigQuery's usual export is CSV. We export the same two columns so and read them in the ways that one meets in
# projects: a generator that parses in Python, `decode_csv` on each line, and `decode_csv` on a whole batch of lines,
# which is the first thing to mend. Beside them stand the record batches from above, and the rows that training itself
# takes.

# %%
csv = f"{warehouse.storage}/chapter-1/csv/part-*.csv"
select = "SELECT user_index, item_index FROM examples WHERE split = 'train' AND shard < 2"
options = f"uri='{csv}', format='CSV', header=false, overwrite=true"
_ = warehouse.query(f"EXPORT DATA OPTIONS ({options}) AS {select}")
files = tf.data.Dataset.list_files(warehouse.local(csv), shuffle=False)
lines = files.interleave(tf.data.TextLineDataset)

# %%
split_fields = functools.partial(tf.io.decode_csv, record_defaults=[[0], [0]])
by_python = tf.data.Dataset.from_generator(
    lambda: ([int(text) for text in line.split(b",")] for line in lines.as_numpy_iterator()),
    output_signature=tf.TensorSpec([2], tf.int64),
)
ways = {
    "from_generator": by_python.batch(BATCH_SIZE),
    "decode_csv, row by row": lines.map(split_fields).batch(BATCH_SIZE),
    "decode_csv, batch by batch": lines.batch(BATCH_SIZE).map(split_fields),
    "record batches": input_pipeline.batches(train, BATCH_SIZE, seed=SEED),
}

# %%
rate = {name: training.rows_per_second(way, BATCH_SIZE) for name, way in ways.items()}
rate["training takes"] = 1000 * BATCH_SIZE / step_time.loc[10_000, "Adagrad"]

# %% tags=["nbval-ignore-output"]
speed = pd.DataFrame({"rows/s": rate})
speed["hours for 50 billion rows"] = 50e9 / speed["rows/s"] / 3600
speed.round(0).astype(int)

# %%
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
bars = axis.barh(speed.index[::-1], speed["rows/s"][::-1])
axis.bar_label(bars, fmt="{:,.0f}", padding=3)
axis.set(xlabel="rows/s on this machine", title="The same rows, read four ways", xscale="log")
axis.margins(x=0.3)

# %% [markdown]
# An input that delivers fewer rows a second than the model takes decides how long training lasts, and the faster the
# model becomes, the more inputs do. The record batches are shuffled as well, which the others are not. The last column
# is a single pass over the book's fifty billion rows on this machine.
#
# Chapter 2 measures every route out of BigQuery, chapter 3 keeps the input fast when the data is larger than memory.
#
# ## The map
#
# | chapter | the question |
# |---|---|
# | **1 what this book is about** | What is the whole road, and where does it hurt? |
# | 2 data export | How do rows get from a BigQuery table to tensors? *(pain 3)* |
# | 3 scaling data | What if the data is larger than memory, and the workers are many? *(pain 3, for good)* |
# | 4 training large tables | Why does the embedding layer slow down, and how does a run survive? *(pains 1, 2)* |
# | 5 TPU training | What is a TPU, does my model run on it, does it pay? |
# | 6 config and saving | How does a team share, repeat and ship a model? |
# | 7 collaborative filtering | What do the simple models reach? |
# | 8 deep networks | What do dense layers, crosses and convolutions add? |
# | 9 transformers | What does order add? |
# | 10 which one | What should I use? |
#
# ## Summary
#
# - The road is short: load, split, number the ids, export, read, train, rank. SQL does the first four, and nothing
#   on it handles rows in Python.
# - Counts agree at every step, or the road stops there.
# - A model is compared with popularity below and, where it can be known, with an oracle above.
# - An error about `outputs` and a loop hides another one; `steps_per_execution=1` shows it.
# - An optimizer that touches every row makes the step as slow as the table is long.
# - An input that delivers fewer rows a second than training takes decides how long training lasts.
#
# ## Exercises
#
# 1. Print the ten recommendations of someone without a single hit. Would you have shown them?
# 2. Run `make chapter-1 EXTRA="dim=2"`, then 8 and 128. Where does NDCG@10 stop rising, and what happens to the
#    coverage? Why must the `DIM` of a real model not be chosen on these test rows?
# 3. Leave out the log-Q correction (`item_frequency=None`). Who gains, the head or the tail?
# 4. Split at random instead of by time: pass a copy of the SQL with `RAND() < 0.8` to `warehouse.query`. How much better
#    does the same model look, and why is that number worth nothing?
# 5. In pain 1, make another mistake: a wrong shape, a metric that is `None`. Which part of the message changes?

# %%
values = {f"{name} {metric}": (value, "") for (name, metric), value in results.stack().items()}
values |= {"load to tensors": (road_to_tensors, "s"), "fit": (seconds_to_fit, "s")}
values |= {"rows": (loaded, "rows"), "training rows": (train.rows, "rows")}
values |= {f"{name}, 1M rows": (t, "ms/step") for name, t in step_time.loc[1_000_000].items()}
values |= {name: (value, "rows/s") for name, value in speed["rows/s"].items()}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-1", values, dataset=DATASET)
warehouse.close()
