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
# # 4. Training large tables
#
# With a thousand films the embedding layer is the cheap part of a model. With a hundred million users a step takes
# seconds, the memory is gone before the first of them, and a machine that is taken away in the night takes the run with
# it. **Why does the embedding layer slow down as its table grows, and how does a training run survive?**
#
# At the end of this page you will have
#
# - seen the step time climb with the vocabulary, and the line that makes it climb;
# - an Adam whose step costs what it touches, built line by line and compared with the one we ship;
# - the memory of a hundred million rows, and a guard that says which setting would spoil it all;
# - one typed config from which SQL columns, files, tables and the serving signature follow;
# - a training run that is killed without warning and ends with the same losses as one that was not;
# - an error that hides its cause, decoded, and a check that finds such things before the run.

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
OVERRIDES = ""  # of the config, separated by blanks
DIM = 16
BATCH_SIZE = 1024
EPOCHS = 4
LEARNING_RATE = 0.02
LONGEST_TABLE = 1_000_000  # rows, in the comparison of step times
ROWS_PER_FILE = 5_000_000  # a file's rows are in memory once, when it is written
K = 10
EVALUATED_USERS = 10_000
RUNS_DIR = "../runs"

# %%
import functools
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from recsys_common import (
    bigquery,
    checkpoints,
    config,
    conversion,
    datasets,
    embeddings,
    errors,
    evaluation,
    input_pipeline,
    optimizers,
    ratings_table,
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
# ## The whole of it
#
# A config says what the run is, `train` does it, and the same call goes on where the run was interrupted.
#
# ```python
# settings = config.Config.default(SCALE).override(*overrides)
# settings = settings.with_rows({"user": num_users, "item": num_items})
# train_files = conversion.convert(folder, source, settings.record_columns(), seed=SEED)
# make_model = functools.partial(settings.build, frequency)
# run = training.train(settings, make_model, files, folder=run_folder, evaluate=rank)
# ```
#
# ## One config
#
# In most projects the batch size stands in three files and the vocabulary size in five. Here a run is one tree of typed
# fields. It is made from the defaults of a scale, or from a YAML file, and from overrides, which come from a command
# line or, as here, from the parameters of a notebook.

# %%
overrides = [
    f"seed={SEED}",
    f"model.embedding_dim={DIM}",
    f"optimizer.learning_rate={LEARNING_RATE}",
]
overrides += [f"training.batch_size={BATCH_SIZE}", f"training.epochs={EPOCHS}"]
overrides += [f"evaluation.k={K}", f"evaluation.metric=NDCG@{K}"]
overrides += [f"evaluation.users={EVALUATED_USERS}"]
often = ["training.checkpoint_every=50", "training.log_every=5"]  # for a run of a few seconds
overrides += [*(often if SCALE == "small" else []), *OVERRIDES.split()]
settings = config.Config.default(SCALE).override(*overrides)
SEED, DIM, BATCH_SIZE = settings.seed, settings.model.embedding_dim, settings.training.batch_size
LEARNING_RATE, K = settings.optimizer.learning_rate, settings.evaluation.k
print(settings.dump())

# %% [markdown]
# Nothing in it can be changed, every field has a description with its unit, and `python -m recsys_common.config show`
# prints them all. A misspelt key is refused with the nearest one that exists, a wrong value with the path of the field,
# before anything has run:

# %%
for mistake in ("trainig.batch_size=512", "training.batchsize=512", "optimizer.learning_rate=fast"):
    try:
        settings.override(mistake)
    except ValueError as error:
        print(error)

# %% [markdown]
# Two runs are compared field by field. The name of a run ends with a hash of all its fields, and `train` refuses a
# folder with checkpoints of another config:

# %%
other = settings.override("optimizer.clip_norm=1.0", "training.batch_size=512")
print(settings.name, other.name, sep="\n")
pd.DataFrame(
    config.differences(settings, other), columns=["field", "this run", "the other"], dtype=object
)

# %% [markdown]
# The section `features` is the part that saves most work. A feature is declared once, and five things follow from the
# declaration: the columns to select, the columns of the files, what the input pipeline makes of them, the tables, and
# what a served model takes.

# %%
print("SQL:      ", settings.sql_columns())
print("files:    ", settings.record_columns())
print("serving:  ", settings.signature())

# %% [markdown]
# ## Files, as in chapter 1
#
# From the warehouse to record batches, with the ids numbered and split by time. What is exported is the config's
# business.

# %%
warehouse = bigquery.connect(PROJECT, BUCKET, location=LOCATION)
tables = datasets.load(DATASET, DATA_DIR, rows=scale.SIMULATED_ROWS.get(SCALE, 0), seed=SEED)
ratings_table.load(warehouse, tables, ITEMS_TABLE)
made_by = splits.split(warehouse, SPLIT, tables.time)
loaded = warehouse.count("ratings")

# %%
pieces = 1 + loaded // 100_000_000  # one worker should not number hundreds of millions of ids
warehouse.run(
    "vocabularies.sql",
    oov_buckets=1,
    minimum_frequency=settings.data.minimum_frequency,
    pieces=pieces,
)
settings = settings.override(f"data.shards={max(8, loaded // ROWS_PER_FILE)}")
warehouse.run("examples.sql", shards=settings.data.shards)
items = warehouse.read("item_vocabulary").sort_by("item_index").to_pandas()
users = warehouse.read("user_vocabulary").sort_by("user_index").to_pandas()

# %%
folder = warehouse.local(f"{warehouse.storage}/chapter-4/train")
source = conversion.TableShards(warehouse, settings.data.table, {"split": settings.data.split})
train_files = conversion.convert(folder, source, settings.record_columns(), seed=SEED)
print(f"{train_files.rows:,} rows in {len(train_files.files)} files")

# %% [markdown]
# Only now it is known how many rows the tables need. `with_rows` writes that into the config as well: a run that cannot
# say how large its tables were cannot be repeated.

# %%
items = items[items["item_index"] > 0].reset_index(drop=True)
users = users[users["user_index"] > 0].reset_index(drop=True)
num_users, num_items = int(users["user_index"].max()) + 1, len(items) + 1  # 0: unknown
frequency = np.concatenate([[0], items["frequency"]])
settings = settings.with_rows({"user": num_users, "item": num_items})
settings.tables()

# %%
batches = input_pipeline.batches(train_files, BATCH_SIZE, seed=SEED, features=settings.transform())
batches.element_spec

# %% [markdown]
# ## The table that slows down
#
# Chapter 1 reproduced this pain; now we look inside. The same batches, which touch the rows of known ids and no others,
# meet user tables of ever more rows. tf-keras' Adam, the default of every tutorial, stands beside two optimizers of
# `recsys_common`.

# %%
slow = []
for table_rows in (LONGEST_TABLE // 100, LONGEST_TABLE // 10, LONGEST_TABLE):
    for make in (tf.keras.optimizers.Adam, optimizers.LazyAdam, optimizers.RowWiseAdagrad):
        model = MatrixFactorization(table_rows, num_items, DIM, user="user", item="item")
        model.compile(optimizer=make(LEARNING_RATE))
        milliseconds = 1000 * training.seconds_per_step(model, batches, steps=8)
        slow.append({"optimizer": make.__name__, "rows": table_rows, "ms a step": milliseconds})

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
# ## Why
#
# Adam keeps two running means for each number of the table: of the gradient, $m$, and of its square, $v$. At every step
# each of them shrinks a little, also in rows that nobody looked at, and what is left of $m$ moves the row once more. Let
# a table of three rows see its last row once and then never again:


# %%
def last_row_after(optimizer, row, table):
    gradient = tf.IndexedSlices(tf.ones([1, 2]), [row], [3, 2])
    optimizer.apply_gradients([(gradient, table)])
    return table[2, 0].numpy()


# %%
seen_once = {}
for make in (tf.keras.optimizers.Adam, optimizers.LazyAdam):
    table, optimizer = tf.Variable(tf.zeros([3, 2])), make(0.01)
    seen_once[make.__name__] = [last_row_after(optimizer, row, table) for row in (2, 0, 0, 0, 0)]
pd.DataFrame(seen_once, index=pd.RangeIndex(1, 6, name="step")).round(4)

# %% [markdown]
# Adam goes on moving that row on the strength of an old gradient. To do so it reads and writes the table and both
# moments, every row, at every step. How many rows would have been enough?

# %%
touched = [len(np.unique(batch["user"])) for batch in batches.take(20).as_numpy_iterator()]
gigabytes = 100e6 * DIM * 4 * 2 * 3 / 1e9  # read and written: table, m, v
print(f"a batch of {BATCH_SIZE} touches {np.mean(touched):.0f} rows")
print(f"with 100 million rows Adam moves {gigabytes:.0f} GB of memory in every step")

# %% [markdown]
# ## The cure, line by line
#
# *Lazy* Adam updates the rows that a batch touches and leaves the others alone, moments and all. Here is one step of it,
# on a table of six rows and a batch that looks up row 4 twice.

# %%
table = tf.Variable(tf.fill([6, 2], 0.5))
moments = tf.Variable(tf.zeros([6, 4]))  # of each row m and then v, side by side
looked_up = tf.constant([4, 1, 4])
gradient = tf.constant([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])

# %% [markdown]
# A row's gradient is the *sum* over its look-ups. Whoever forgets this squares each of them apart, and popular rows get
# steps that are too long.

# %%
rows, place = tf.unique(looked_up)
summed = tf.math.unsorted_segment_sum(gradient, place, tf.size(rows))
print(rows.numpy(), summed.numpy().tolist())

# %% [markdown]
# The moments of these rows are read with one gather, since they lie side by side, and moved towards the new gradient
# and its square:
#
# $$m \leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow v + (1 - \beta_2)(g^2 - v)$$

# %%
beta_1, beta_2, epsilon, rate, step = 0.9, 0.999, 1e-7, 0.01, 1
keep = tf.constant([beta_1, beta_1, beta_2, beta_2])
old = tf.gather(moments, rows)
new = old + (tf.concat([summed, summed**2], 1) - old) * (1 - keep)
m, v = tf.split(new, 2, 1)

# %% [markdown]
# Both means start at zero and are too small at first. Adam corrects for that with a factor that depends on the step
# alone, so one number does for all rows. What was read is written back with one scatter each:

# %%
corrected = rate * (1 - beta_2**step) ** 0.5 / (1 - beta_1**step)
change = corrected * m / (tf.sqrt(v) + epsilon)
moments.scatter_update(tf.IndexedSlices(new, rows))
_ = table.scatter_update(tf.IndexedSlices(tf.gather(table, rows) - change, rows))

# %% [markdown]
# `optimizers.LazyAdam` does these five things, and what a real table needs beside them. It must come to the same:

# %%
ours = tf.Variable(tf.fill([6, 2], 0.5))
slices = tf.IndexedSlices(gradient, looked_up, [6, 2])
optimizers.LazyAdam(rate).apply_gradients([(slices, ours)])
np.testing.assert_allclose(ours.numpy(), table.numpy(), rtol=1e-6)
ours.numpy().round(3).T

# %% [markdown]
# ## The curve again
#
# On this page the longest table has a million rows. The benchmark has the whole curve, up to a hundred million, beside
# the optimizers that one finds elsewhere: batches of 8,192, rows of 16 numbers, ids drawn from a Zipf law.

# %%
benchmark = json.loads(Path("../benchmarks/embeddings.json").read_text())
of = pd.DataFrame(benchmark["rows"]).set_index("case")
value = of["value"]
print(benchmark["machine"], benchmark["date"][:10])

# %% tags=["main-result"]
steps = of[(of["unit"] == "ms/step") & ~of.index.str.contains("uniform|dimension")]["value"]
steps.index = pd.MultiIndex.from_tuples(map(tuple, steps.index.str.rsplit(" ", n=1)))
curve = steps.unstack()[["10k", "100k", "1M", "10M", "100M"]].sort_values("10M")
curve.rename_axis("ms a step").round(1).astype(object).fillna("")

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for name, row in curve.iterrows():
    line = {"lw": 2.5} if name.startswith(("lazy", "row-wise")) else {"ls": "--"}
    axis.plot([1e4, 1e5, 1e6, 1e7, 1e8], row.astype(float), marker="o", label=name, **line)
axis.set(xscale="log", yscale="log", xlabel="rows in the user table", ylabel="ms a step")
axis.set(title="Batches of 8,192 (solid: ours)", ylim=(1, 10_000))
axis.grid(alpha=0.3)
_ = axis.legend(fontsize=8, ncols=2)

# %% [markdown]
# The solid lines are flat. Rounds were taken in turns, so the ratios mean more than the milliseconds; *from* and *to*
# are the lowest and the highest of them. Uniform ids are the worst case, where hardly two look-ups share a row or a
# cache line.

# %%
ratios = [case for case in of.index if "/ 100k" in case or case.endswith("/ lazy adam, 10M")]
of.loc[ratios, ["value", "min", "max"]].set_axis(["ratio", "from", "to"], axis=1).round(2)

# %% [markdown]
# ## What a hundred million rows take
#
# A large table has costs besides its steps. The memory of the optimizer: Adam has two more numbers for each number of
# the table. One second moment *for a row* (`second_moment="row"`) instead of one for each number saves almost a third,
# row-wise Adagrad has one number a row and nothing else. The memory to make it: an ordinary initializer holds the table
# twice, so ours fills it slice by slice. And the memory to save it: after a sparse update TensorFlow copies a variable
# that is read whole, so our checkpoints read slices too. Sizes are of the process after every row has been touched;
# before that the zeros of the moments are pages that do not exist yet.

# %%
large = [
    case.removeprefix("memory 100M, ") for case in of.index if case.startswith("memory 100M, ")
]
parts = {"GB, every row touched": "memory 100M, {}", "s to make": "create 100M, {}"}
parts["peak / final"] = "create 100M, {}: peak"
sizes = {name: [value[case.format(way)] for way in large] for name, case in parts.items()}
pd.DataFrame(sizes, index=large).round(2)

# %% [markdown]
# A checkpoint of the first of them, written and read back three times. *Plain* are as many bytes, without tables and
# hashes, in turns with it. Both come near the speed of this disk.

# %%
kept = of[of.index.str.startswith("checkpoint 100M: ")]
kept = kept.rename(lambda case: case.removeprefix("checkpoint 100M: "))
kept[["value", "min", "max", "unit"]].round(2).astype(object).fillna("")

# %% [markdown]
# ## What it costs in quality
#
# Lazy Adam is another algorithm than Adam: a row keeps its moments while nobody looks. Does the model pay for that? On
# a million simulated items, most of which nobody touches, both were trained for four epochs with the same learning
# rate, the best of three for *dense* Adam; the better of the last two epochs counts. The third way,
# `correct_skipped=True`, does to a row, when it is touched again, what dense Adam would have done to it meanwhile: its
# moments shrink, and the moves that it missed are made up for.

# %%
quality = of[of.index.str.startswith("quality: ")].rename(
    lambda case: case.removeprefix("quality: ")
)
ways = ["popularity", "tf-keras adam", "lazy adam", "lazy adam, corrected for skipped steps"]
table = quality.loc[ways, ["value", "epochs"]].set_axis(["NDCG@10", "best epoch by seed"], axis=1)
table.round({"NDCG@10": 4}).astype(object).fillna("")

# %%
for way in ways[2:]:
    change = quality.loc[f"{way} / tf-keras adam - 1"]
    print(f"{way}: {change['value']:+.1%} ({change['min']:+.1%} to {change['max']:+.1%})")

# %% [markdown]
# In brackets is the 95% interval of the mean over the seeds. The price is small and it is there: after a touch dense
# Adam goes on moving a row for some ten steps, LazyAdam moves it once, so that rare rows seem to learn more slowly. Its
# best epoch was always the last of the four, and another one costs a fraction of one of dense Adam's. The correction
# closes part of the gap.
#
# ## The guard
#
# One setting is enough to make a sparse step dense again: weight decay, an average of the weights, another optimizer, a
# sum over all rows in the loss. Nothing fails then, it is just slow. `check_sparse` traces a training step, without
# running it, and looks for operations as long as a large table.

# %%
model = MatrixFactorization(LONGEST_TABLE, num_items, DIM, user="user", item="item")
averaged = tf.keras.optimizers.Adagrad(LEARNING_RATE, use_ema=True)
for optimizer in (tf.keras.optimizers.Adam(), averaged):
    model.compile(optimizer)
    try:
        optimizers.check_sparse(model, batches.element_spec, at_least=LONGEST_TABLE)
    except ValueError as error:
        print(*[textwrap.fill(line, 100) for line in str(error).splitlines()], sep="\n")

# %%
model.compile(optimizers.LazyAdam(LEARNING_RATE, weight_decay=0.01, clip_norm=1.0))
optimizers.check_sparse(model, batches.element_spec, at_least=LONGEST_TABLE)

# %% [markdown]
# Silence: ours decay and clip the rows that are touched.

# %% [markdown]
# ## A run that survives
#
# `training.train` takes a config, a function that makes the model, and the files. Each epoch ends with an exact ranking,
# as in chapter 1, outside of the training step.

# %%
stride = max(1, num_users // settings.evaluation.users)
warehouse.run("evaluation_pairs.sql", stride=stride)
pairs = warehouse.read("evaluation_pairs").to_pandas()
asked = pairs[pairs["asked"]][["user_index", "item_index"]].to_numpy().T
seen = pairs[~pairs["asked"]][["user_index", "item_index"]].to_numpy().T


# %%
def rank(model):
    return evaluation.evaluate(model.scores, *asked, *seen, num_items, K)


# %%
runs = scale.run_folder(RUNS_DIR, SCALE, "chapter-4") / "training"
shutil.rmtree(runs, ignore_errors=True)
run_folder, files = runs / "undisturbed", {"train": train_files}
make_model = functools.partial(settings.build, frequency)
run = training.train(settings, make_model, files, folder=run_folder, evaluate=rank)

# %%
floor = evaluation.evaluate(
    lambda block: np.tile(frequency, (len(block), 1)), *asked, *seen, num_items, K
)[f"NDCG@{K}"]
print(f"popularity {floor:.3f}")
pd.DataFrame(run.evaluations).set_index("epoch")[[f"NDCG@{K}", f"HR@{K}", f"coverage@{K}"]].round(3)

# %% [markdown]
# The folder of the run has all that is needed to know what it was, and to go on with it: the config as it was resolved,
# the log, and checkpoints. A checkpoint is a file for each variable, in NumPy's format, which any language reads, and a
# list of them with sizes and hashes, written last.

# %%
print(*sorted(path.name for path in run.folder.iterdir()))
last = checkpoints.latest(run.folder / "checkpoints")
print(last.name, *sorted(path.name for path in last.iterdir()), sep="\n  ")

# %% [markdown]
# Now the same run in a process of its own, which we kill without warning (`SIGKILL`: no handler runs, nothing is tidied
# up) when it has made a checkpoint and gone on for a while.

# %%
(runs / "settings.yaml").write_text(settings.dump())
np.save(runs / "frequency.npy", frequency)
program = f"""
import functools, numpy as np, tensorflow as tf
from recsys_common import config, record_batches, training
tf.config.experimental.enable_op_determinism()
settings = config.Config.load({str(runs / "settings.yaml")!r})
files = record_batches.Manifest.load({train_files.folder!r})
make_model = functools.partial(settings.build, np.load({str(runs / "frequency.npy")!r}))
training.train(settings, make_model, {{"train": files}}, folder={str(runs / "killed")!r})"""

# %% tags=["nbval-ignore-output"]
child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
log, enough = runs / "killed" / "metrics.jsonl", run.steps // 2 // settings.training.log_every + 5
while child.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < enough):
    time.sleep(0.01)
child.send_signal(signal.SIGKILL)
died_after = pd.read_json(log, lines=True)["step"].max()
print(f"ended by signal {-child.wait()}, after step {died_after} of {run.steps}")

# %% [markdown]
# The same call goes on from the last checkpoint. What the first process did after it is done again, and the log has
# each step once. The losses are those of the run that nobody disturbed.

# %%
again = training.train(settings, make_model, files, folder=runs / "killed")
logs = [pd.read_json(r.folder / "metrics.jsonl", lines=True) for r in (run, again)]
undisturbed, resumed = (log.dropna(subset="loss").set_index("step")["loss"] for log in logs)
assert again.steps == run.steps and resumed.index.is_unique
same_losses = bool((undisturbed == resumed).all())
print(f"{len(resumed)} losses, equal bit for bit: {same_losses}")

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.plot(undisturbed / BATCH_SIZE, lw=5, color="C7", alpha=0.5, label="undisturbed")
axis.plot(resumed / BATCH_SIZE, lw=1, color="C0", label="killed and resumed")
axis.axvline(died_after, color="C3", ls=":", label="SIGKILL")
axis.set(xlabel="step", ylabel="loss a row", title="One run in two processes")
_ = axis.legend()

# %% [markdown]
# A machine that is taken away politely sends SIGTERM first: then `train` writes a checkpoint at once and returns. A
# full disk does not cost the earlier checkpoint, since the new one is written beside it and takes its name when it is
# whole. The benchmark kills a run ten times at random moments:

# %%
kills = of[of.index.str.startswith("kills")].rename(lambda case: case.removeprefix("kills: "))
kills[["value", "unit"]].round(2)

# %% [markdown]
# ## Tomorrow there are new users
#
# Training every day must not begin anew because a table has grown. `warm_start` takes yesterday's checkpoint and the
# ids of both vocabularies: rows and moments follow their ids, wherever these stand now, and new ids keep their fresh
# rows. Here tomorrow's vocabulary is today's in reverse, with a thousand new users in front.

# %%
today = users["user_id"].to_numpy()
tomorrow = np.concatenate([today.max() + 1 + np.arange(1000), today[::-1]])
larger = settings.override(f"features.user.rows={len(tomorrow) + 1}")
model = larger.build(frequency)
latest = checkpoints.latest(again.folder / "checkpoints")
checkpoints.warm_start(latest, {"model": model}, {"user_table": (today, tomorrow)})

# %%
was, now = 8, int(np.flatnonzero(tomorrow == today[7])[0]) + 1
vectors = [known.users(tf.constant([row])) for known, row in ((again.model, was), (model, now))]
np.testing.assert_array_equal(*vectors)
print(f"row {was:,} of yesterday is row {now:,} now, with the same numbers")

# %% [markdown]
# `train(..., initialise=...)` does this before the first step of a run.

# %% [markdown]
# ## The error that hides the error, decoded
#
# Chapter 1 met `'outputs' must be defined before the loop`, which says nothing. `errors.decoding` recognises it, traces
# the step once more without the loop that swallowed the cause, and adds what it finds to the error as a note.

# %%
renamed = batches.map(lambda row: {"user": row["user"], "itm": row["item"]})
model.compile(optimizer=optimizers.LazyAdam(LEARNING_RATE), steps_per_execution=4)
try:
    with errors.decoding(model=model, dataset=renamed):
        model.fit(renamed, steps_per_epoch=4, verbose=0)
except ValueError as error:
    said, notes = str(error).strip().splitlines()[-2:], error.__notes__

# %%
here = str(Path("..").resolve())
print(*said, *[note.replace(here, "..") for note in notes], sep="\n")

# %% [markdown]
# `errors.KNOWN` lists the messages of this kind, each with its true cause and the mend; a test makes happen what can
# happen without a TPU.
#
# ## Before the run
#
# Most of what goes wrong after an hour can be seen before the first step. `preflight` reads one batch and traces one
# step, and lists all faults at once. A few of them, planted:

# %%
model = MatrixFactorization(num_users, num_items // 2, DIM, user="user", item="item")
model.compile(optimizer=optimizers.LazyAdam(), steps_per_execution=4)
try:
    errors.preflight(model, batches, steps=10 * len(batches))
except ValueError as error:
    print(error)

# %% tags=["nbval-ignore-output"]
model = settings.build(frequency)
model.compile(optimizer=optimizers.LazyAdam(LEARNING_RATE))
print(errors.preflight(model, batches, manifest=train_files))

# %% [markdown]
# ## Past one machine's memory
#
# What if a table does not fit? `tf.distribute` has few answers. `MirroredStrategy` holds every table once on *each*
# device. `ParameterServerStrategy` cuts tables into parts that lie in the memory of several machines, and every step
# pays for the way to them. `parameter_server.LocalCluster` starts its processes on one machine, to try what a model
# does there; the benchmark measured what that costs:

# %%
servers = of[of.index.str.startswith("servers: ")].rename(
    lambda case: case.removeprefix("servers: ")
)
servers[["value", "unit"]].round(2)

# %% [markdown]
# The real thing is a TPU's embedding hardware, where tables are cut across chips and look-ups travel on their own
# network. It takes the same description:

# %%
for name, feature in embeddings.tpu_features(settings.tables(), optimizers.LazyAdam()).items():
    table = feature.table
    print(f"{name}: {table.vocabulary_size} x {table.dim}, {type(table.optimizer).__name__}")

# %% [markdown]
# ## Summary
#
# - Dense optimizers pay for the table, row-sparse ones for the batch. In tf-keras only Adagrad is row-sparse, until one
#   setting undoes it; `check_sparse` says which.
# - Lazy Adam is five lines. Sum duplicates before squaring, keep the moments side by side, write rows back by scatter.
# - Memory is the other limit: count table *and* moments, make and save both in slices.
# - A run is a config with a name. Features are declared once.
# - A checkpoint is model, optimizer and the place in the input. With an order that is a function of (seed, epoch,
#   position), a killed run ends as if nothing had happened.
# - Let `preflight` fail before the machine is paid for an hour.
#
# ## Exercises
#
# 1. Set `beta_1=0` in both Adams and repeat the table of row 2. What difference is left, and why?
# 2. Forget the sum of duplicates in the cure: scatter each look-up by itself. On which rows do you see it, and when does
#    a Zipf law make it worse?
# 3. Write an architecture of your own: copy `recsys_common/models/matrix_factorization.py` to `mine/model.py` beside this
#    notebook, give its `Parameters` a field `temperature: float`, divide the user's vector by it, and set
#    `OVERRIDES = "model.architecture=mine.model model.temperature=0.5"` in the cell of parameters. Nothing else may
#    change.
# 4. Make `hashed = settings.override("features.item.kind=hash", "features.item.rows=500")` and print its
#    `record_columns()`, `tables()` and `signature()`: what changed, and what did not? Two arguments of this page still
#    speak of unhashed items, `frequency` and what `rank` expects of `model.scores`. How would you mend them?
# 5. Send the child SIGTERM instead of SIGKILL. How many steps are done twice now?
# 6. Give the run a learning rate of 1e20. At which step does it end, and what does the message say? A rate of 1000 ends
#    in no error: which figure of this page tells?

# %%
best = max(line[f"NDCG@{K}"] for line in run.evaluations)
values = {"lazy adam NDCG@10": (best, ""), "popularity NDCG@10": (floor, "")}
values |= {"losses equal after SIGKILL": (same_losses, ""), "steps": (run.steps, "")}
slowest = step_time.loc[LONGEST_TABLE] / step_time.loc[LONGEST_TABLE // 100]
values |= {f"{name}, longest / shortest table": (ratio, "") for name, ratio in slowest.items()}
values |= {
    f"{name}, {LONGEST_TABLE:,} rows": (t, "ms/step")
    for name, t in step_time.loc[LONGEST_TABLE].items()
}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-4", values, dataset=DATASET)
warehouse.close()
