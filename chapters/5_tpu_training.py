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
# # 5. TPU training
#
# A TPU is rented by the chip and the hour, the queue for one is long, and a program that does not fit says so when the
# meter is running. **What is a TPU, does my model run on it, and does it pay?**
#
# Nearly all of that can be known without one. The compiler that a TPU uses is a Python package, and it compiles for
# chips that are not there. At the end of this page you will have
#
# - compiled a training step with a table of a hundred million rows for a TPU, on a laptop, in seconds, and learned what
#   it needs of the chip's memory and how fast it can be at best;
# - seen why a row of 16 numbers and a chip of 128 lanes do not like each other, and what the compiler does about it;
# - the rules of static shapes, from programs that break them;
# - two models on the rooflines of a CPU, GPUs and TPUs, what bounds them, and what an hour may cost for a TPU to pay;
# - the run itself, by the same cells, on whatever this machine has.

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
DEVICE = "auto"  # what the run at the end takes: tpu, gpu, cpu, cpus:4, the name of a TPU
TOPOLOGY = "v6e:1x1"  # what the first program is compiled for
USERS = 100_000_000  # rows of the tables that are compiled; the data has its own
ITEMS = 1_000_000
DIM = 16
BATCH_SIZE = 8192
EPOCHS = 2
ROWS_PER_FILE = 5_000_000  # a file's rows are in memory once, when it is written
K = 10
EVALUATED_USERS = 10_000
RUNS_DIR = "../runs"

# %%
import dataclasses
import functools
import json
import shutil
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from recsys_common import tpu

# %% [markdown]
# On a TPU VM, or a TPU runtime of Colab, install TensorFlow 2.20 for TPUs first, in a checkout of this repository, and
# restart Python; there is no 2.21. Without the pins of that file pip takes a libtpu on which it aborts.
#
# ```sh
# pip uninstall -y tensorflow
# pip install --no-deps --require-hashes -r requirements-tpu.txt
# pip install --no-deps .
# ```
#
# The strategy comes before TensorFlow: a TPU's driver reads its environment once, when TensorFlow is imported.
# `get_strategy` sets it, computes 1 + 1 on every device, and does not return one on which that came from elsewhere.

# %% tags=["nbval-ignore-output"]
strategy = tpu.get_strategy(DEVICE)
print(strategy.extended.worker_devices)

# %%
import tensorflow as tf
from recsys_common import (
    bigquery,
    config,
    conversion,
    datasets,
    embeddings,
    evaluation,
    lowering,
    optimizers,
    ratings_table,
    scale,
    splits,
    tpu_pictures,
    training,
    training_costs,
)
from recsys_common.models.matrix_factorization import MatrixFactorization

# %%
assert tf.__version__.startswith(("2.20", "2.21")), "not this book's TensorFlow: run `make doctor`"
tf.keras.utils.set_random_seed(SEED)
tf.__version__

# %% [markdown]
# ## The whole of it
#
# A model with its full tables, the step that trains it, the shapes of a batch, and the compiler's verdict:
#
# ```python
# with lowering.shapes_only():
#     model = MatrixFactorization(USERS, ITEMS, DIM, user="user", item="item")
#     step = lowering.step_of(model, optimizers.LazyAdam(second_moment="row"))
# report = tpu.aot_compile(step, [batch], TOPOLOGY)
# print(report)
# ```

# %%
with lowering.shapes_only():
    model = MatrixFactorization(USERS, ITEMS, DIM, user="user", item="item")
    step = lowering.step_of(model, optimizers.LazyAdam(second_moment="row"))
batch = {name: tf.TensorSpec([BATCH_SIZE], tf.int32) for name in ("user", "item")}

# %% tags=["main-result"]
report = tpu.aot_compile(step, [batch], TOPOLOGY)
print(report)

# %% [markdown]
# No TPU was asked, and no table was made. `shapes_only` gives variables addresses without memory behind them;
# TensorFlow traced the step and lowered it to HLO, the language that XLA compiles; and `libtpu`, the library that
# drives a TPU, compiled that for a chip which it only knows from a description. It is the compiler that would compile
# it there: whether the program runs, what memory it needs and what it moves are its answers, not a model's. (On a TPU
# machine TPUStrategy puts a loop around the step, and with several chips it partitions it in its own way.)
#
# The rest of this page is what stands in the report: why it fits, what the copies are, what the bound is worth.

# %% [markdown]
# ## What a TPU is
#
# A chip, in the numbers that matter here. `usable` is the memory that the compiler lets a program have, `FLOPs a byte`
# what a program must do with each byte from memory for the multipliers to be what it waits for.

# %%
chips = pd.DataFrame({name: chip for name, chip in tpu.CHIPS.items() if isinstance(chip, dict)}).T
numbers = chips[["flops", "usable", "bandwidth", "sparse_cores"]].astype(float)
numbers["FLOPs a byte"] = numbers["flops"] / numbers["bandwidth"]
numbers = numbers / [1e12, 1e9, 1e9, 1, 1]
numbers.set_axis(["TFLOP/s", "usable GB", "GB/s", "SparseCores", "FLOPs a byte"], axis=1).round(0)

# %% [markdown]
# Almost all of those FLOPs are in *matrix units*: squares of multipliers through which a batch flows while the weights
# stand still. A weight matrix that does not fill the square leaves multipliers without work, and the clock does not
# care. What the towers of a recommender have to offer:

# %%
side = int(chips.loc["v6e", "matrix_unit"])
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for axis, (rows, columns) in zip(axes, [(16, 64), (64, 256), (256, 256)], strict=True):
    tpu_pictures.systolic(axis, side, rows, columns)

# %% [markdown]
# Memory is built for that as well. It is read in tiles of 8 rows by 128 lanes. A table whose rows have 16 numbers, laid
# out as rows, is one eighth numbers and seven eighths padding; one number more than 128 doubles what a row takes:

# %%
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
_ = tpu_pictures.lanes(axis, [8, 16, 32, 64, 128, 129])

# %% [markdown]
# Look-ups are what a matrix unit is worst at. For them v5p and v6e (and v4) have *SparseCores*, small processors that
# fetch rows while the matrix units multiply; v5e, the chip that Colab gives away, has none. And chips are wired into
# slices, each to its neighbours, so that what one has to send to all others goes round in a ring:

# %%
figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for axis, side in zip(axes, (2, 4), strict=True):
    tpu_pictures.torus(axis, side, side)

# %% [markdown]
# ## Where the memory goes
#
# The arguments of the program are the tables, their moments, and the batch. The compiler may store an array in any
# order of its dimensions, and takes the one that pads least: a table of 16 numbers a row lies there as 16 long rows,
# one for each column, `{0,1}`, and not as a hundred million short ones.

# %%
names = ["array", "shape", "layout", "GB", "GB as stored"]
arguments = pd.DataFrame(report.parameters, columns=names).set_index("array")
arguments[["GB", "GB as stored"]] /= 1e9
arguments[arguments["GB"] > 0.001].round(3)

# %% [markdown]
# A look-up wants rows, though. So what does the program do at each step? The moves of the report say it. Here they are
# for tables of a million rows, with 16 and with 128 numbers:

# %%
compared_dims = {}
for dim in (16, 128):
    with lowering.shapes_only():
        narrow = MatrixFactorization(1_000_000, 100_000, dim, user="user", item="item")
        step = lowering.step_of(narrow, optimizers.RowWiseAdagrad(0.1))
    compared_dims[dim] = tpu.aot_compile(step, [batch], TOPOLOGY)

# %%
parts = {
    "MB of numbers": [
        sum(array[3] for array in one.parameters) / 1e6 for one in compared_dims.values()
    ],
    "MB of temporaries": [one.temporaries / 1e6 for one in compared_dims.values()],
    "MB moved in a step": [one.bytes / 1e6 for one in compared_dims.values()],
    "ms a step, at least": [one.step_seconds_at_least * 1e3 for one in compared_dims.values()],
}
pd.DataFrame(parts, index=pd.Index(compared_dims, name="numbers in a row")).round(2)

# %%
for count, operation, what, line in compared_dims[16].moves[:3]:
    print(f"{count / 1e6:6.0f} MB  {what}\n           {line or operation or 'for the layout'}")

# %% [markdown]
# At 16 numbers the program first copies *the whole table* into rows of 128 lanes, looks up and updates a few
# thousand of them, and copies the table back. It is the pain of chapter 4 again, a step that costs what the table has,
# and no optimizer is to blame: it is the layout. At 128 numbers a row fills its lanes, the table stays where it is,
# and is changed in place. Nobody would guess this from the Python, and a profile would tell it after the bill.
#
# Three ways out: rows of 128 numbers; several short rows in one long one; or the tables on the SparseCores, which is
# what `TPUEmbedding` does (chapter 4 makes its configs from the same description). The compiler cannot be asked about
# the last here. `sparse_core` is a model, whose assumptions its docstring states:

# %%
tables = [embeddings.Table("user", USERS, DIM), embeddings.Table("item", ITEMS, DIM)]
looked_up = {"user": BATCH_SIZE, "item": BATCH_SIZE}
for topology in ("v5p:1x1x1", "v6e:1x1"):
    model_of = tpu.sparse_core(tables, slots=2, looked_up=looked_up, topology=topology)
    print(topology, {name: f"{value:.3g}" for name, value in model_of.items()})

# %% [markdown]
# ## What does not compile
#
# A TPU program is compiled once, for one set of shapes, and has the operations that XLA has. Programs that break a
# rule, and what they are told. The first three do not get past their arguments:

# %%
told = {}
for name, spec in {
    "a string": tf.TensorSpec([BATCH_SIZE], tf.string),
    "bytes": tf.TensorSpec([BATCH_SIZE], tf.uint8),
    "a last batch of any size": tf.TensorSpec([None], tf.int32),
}.items():
    told[name] = tpu.aot_compile(lambda batch: batch["user"], [{"user": spec}]).error

# %%
for name, error in told.items():
    print(f"{name}: {textwrap.fill(error.splitlines()[-1].strip(), 100)}")

# %% [markdown]
# The fourth turns numbers into text, which XLA cannot:

# %%
refused = tpu.aot_compile(lambda batch: tf.strings.as_string(batch["user"]), [batch])
print(*[textwrap.fill(line, 100) for line in refused.error.splitlines()[1:]], sep="\n")

# %% [markdown]
# Two more compile, and a report has a note for them. What a mask drops nobody knows beforehand: XLA computes with all
# of it and remembers the number that counts, which not every operation does. And of `tf.unique`, by which tf-keras sums
# the gradients of an id that is in a batch twice, XLA makes a loop with one trip for each id. No bound counts that; our
# optimizers sort instead, where XLA compiles them.

# %%
for suspect in (
    lambda batch: tf.reduce_sum(tf.boolean_mask(batch["user"], batch["user"] > 0)),
    lambda batch: tf.reduce_sum(tf.unique(batch["user"]).idx),
):
    notes = tpu.aot_compile(suspect, [batch]).warnings
    print(*[textwrap.fill(note, 100) for note in notes], sep="\n")

# %% [markdown]
# And one that breaks no rule but your budget, the tutorial's optimizer on a large table:

# %%
with lowering.shapes_only():
    model = MatrixFactorization(USERS, ITEMS, DIM, user="user", item="item")
    step = lowering.step_of(model, tf.keras.optimizers.Adam())
dense = tpu.aot_compile(step, [batch], TOPOLOGY)
told = "\n".join(dense.warnings)
print(*[textwrap.fill(line, 100) for line in told.splitlines()], sep="\n")

# %%
print(*str(dense).splitlines()[:4], sep="\n")

# %% [markdown]
# ## Which models, on which chips
#
# The benchmark asked this of two models, matrix factorization and a two-tower network whose user has a history of 50
# items, with a hundred million users and a million items, of each generation.

# %%
benchmark = json.loads(Path("../benchmarks/tpu_rehearsal.json").read_text())
of = pd.DataFrame(benchmark["rows"]).set_index("case")
compiled = of.dropna(subset="topology").astype({"compiles": bool, "fits": bool, "dim": int})
single = compiled[compiled["part"] == "models"]
print(benchmark["compiler"], benchmark["date"][:10])

# %%
state = np.where(single["compiles"] & single["fits"], "", "does not fit")
shown = (single["hbm_bytes"] / 1e9).map("{:.1f} GB, ".format)
shown += (single["step_seconds_at_least"] * 1e3).map("{:.1f} ms".format)
shown = shown.where(state == "", state)
index = [single["model"], single["dim"], single["topology"]]
shown.set_axis(pd.MultiIndex.from_arrays(index)).unstack().rename_axis(columns=None)

# %% [markdown]
# Milliseconds are the least that a step can take. What bounds it? A program stands on the *roofline* of a chip where
# its FLOPs for each byte put it: left of the ridge it waits for memory, right of it for the multipliers.

# %%
machines = {chip["name"]: chip for name, chip in tpu.CHIPS.items() if name in ("v5e", "v5p", "v6e")}
machines |= {chip["name"]: chip for chip in tpu.CHIPS["others"]}
rates = of[of.index.str.startswith("cpu: ") & of["model"].isna()]["value"]
machines["this CPU, measured"] = {
    "flops": rates["cpu: flops"],
    "bandwidth": rates["cpu: bandwidth"],
}

# %%
runs_there = single[single["compiles"] & single["fits"] & single["topology"].ne("v4:1x1x1")]
points = [
    (row["model"], row["flops"] / row["bytes"], tpu.CHIPS[row["topology"].split(":")[0]]["name"])
    for _, row in runs_there.iterrows()
]

# %%
figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
axis = tpu_pictures.roofline(axis, machines, points)
_ = axis.set_title("Training steps on the rooflines of chips")

# %% [markdown]
# All of them stand on the slope, left of every ridge. For every byte these steps do a handful of FLOPs, and a TPU
# would like hundreds: it is memory that is paid for, and the multipliers wait.
#
# ## How far to trust the bound
#
# A bound of FLOPs and bytes is arithmetic, and arithmetic can be checked where there is a machine. The same programs,
# with tables of a million rows, ran on this CPU through XLA. The rates of the CPU were measured by two programs, a
# product and a sum; the prediction is FLOPs and bytes one after the other, since a CPU overlaps little.

# %%
here = of[of.index.str.startswith("cpu: ")][["value", "min", "max"]]
ratio = here[here.index.str.endswith("measured / predicted")]
ratio.index = ratio.index.str.removeprefix("cpu: ").str.removesuffix(": measured / predicted")
ratio.set_axis(["measured / predicted", "from", "to"], axis=1).round(2)

# %% [markdown]
# Within a factor of three, which is what one may read into the bounds of chips: the order of them, and what they are
# bound by, not their second digit.
#
# ## More chips
#
# What one chip has no room for, a slice may have. The batch is split among the chips; tables stand whole on each chip,
# or each chip has a share of the rows and asks the others for what it lacks. The program is XLA's own, by GSPMD.
# Where it does not fit, the GB are those of its arguments alone.

# %%
slices = compiled[compiled["part"] == "slices"]
slices = slices[
    ["compiles", "fits", "hbm_bytes", "bytes", "between_chips", "step_seconds_at_least"]
]
slices[["hbm_bytes", "bytes", "between_chips"]] /= [1e9, 1e6, 1e6]
slices["step_seconds_at_least"] *= 1e3
slices.loc[~slices["fits"], ["bytes", "between_chips", "step_seconds_at_least"]] = np.nan
names = ["compiles", "fits", "GB a chip", "MB moved", "MB between chips", "ms, at least"]
slices.set_axis(names, axis=1).round(1).astype(object).fillna("")

# %% [markdown]
# What fits on a slice waits for memory, not for the other chips: LazyAdam keeps a row's first moments and its one second
# moment side by side, a number more than a multiple of 64, and such a table is copied whole in each step. The last row
# has none of that, with row-wise Adagrad and rows that fill the lanes.

# %% [markdown]
# ## What changes if something changes
#
# One model, one change at a time. The first row is the model as above; where one fits, the least that a step takes:

# %%
variants = compiled[compiled["part"] == "variants"].rename(
    lambda case: case.removeprefix("variant ")
)
base = compiled.loc[["matrix factorization, dimension 16, v6e:1x1"]]
variants = pd.concat([base.rename(lambda case: "as above, dimension 16, v6e:1x1"), variants])
columns = {
    "rows": 1,
    "arguments": 1e9,
    "temporaries": 1e9,
    "bytes": 1e6,
    "step_seconds_at_least": 1e-3,
}
table = variants[list(columns)].astype(float) / list(columns.values())
table["M rows/s"] = table["rows"] / table["step_seconds_at_least"] / 1e3
table.loc[~variants["fits"], ["temporaries", "bytes", "step_seconds_at_least", "M rows/s"]] = np.nan
names = ["rows a step", "GB arguments", "GB temporaries", "MB moved", "ms, at least"]
table = table.set_axis([*names, "M rows/s, at most"], axis=1).round(2)
table.assign(fits=variants["fits"]).astype(object).fillna("")

# %% [markdown]
# With row-wise Adagrad, whose state is one number a row, and 128 numbers a row, nothing is copied but the rows of the
# batch: the step of a table eight times as large is the faster one.

# %% [markdown]
# ## Does it pay?
#
# What a billion examples take, in hours of one chip, which is what is paid for. The bound is divided by a
# *utilisation*, the share of it that a real program reaches. Nobody has measured that here, so it is a curve. The CPU is
# the benchmark's, two cores; the same model and batch ran on it by TensorFlow, with tables of a million rows, which
# LazyAdam does not notice. Its cores feed it as well.

# %%
compared, notes = training_costs.machines()
wanted = [
    one for one in compared if one.rows == BATCH_SIZE and one.model.endswith("n, dimension 16")
]
shares, input_rows = training_costs.UTILISATIONS, wanted[0].input_rows
[cpu, cpu_wide] = [one for one in compared if one.name == "cpu" and one.model[:6] == "matrix"]

# %% [markdown]
# To them comes the last row of the table above: rows of 128 numbers and row-wise Adagrad.

# %%
wide = compiled.loc["variant row-wise Adagrad, dimension 128, v5p:1x1x1"].to_dict()
wide = training_costs.machine(wide, input_rows, model=cpu_wide.model)
wanted += [
    dataclasses.replace(wide, name="v5p, 128"),
    dataclasses.replace(cpu_wide, name="cpu, 128"),
]

# %%
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for one in wanted:
    hours = [training_costs.chip_hours(one, 1e9, share) for share in shares]
    axis.plot(shares, hours, marker="o", label=one.name + (", measured" if one.measured else ""))
axis.set(yscale="log", xlabel="utilisation, an assumption", ylabel="chip-hours for 1e9 examples")
_ = axis.legend(fontsize=8, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.83))

# %% [markdown]
# An hour of a chip replaces so many hours of this CPU. It pays if its price is less than so many times the CPU's; the
# last columns say how many million rows a second the input must deliver for the chip not to wait, and what the chip
# waits for. Prices are yours to look up: `recsys_common/prices.json` has none that nobody has read.

# %%
rows = {}
for one in [one for one in wanted if one.kind != "cpu"]:
    other = cpu_wide if one.model == cpu_wide.model else cpu
    hours = [training_costs.break_even_price(one, other, share) for share in (0.1, 0.5, 1.0)]
    needed = training_costs.input_needed(one, 0.5) / 1e6
    rows[one.name] = [*hours, needed, training_costs.bound_by(one, 0.5)]

# %%
names = [f"CPU hours at {share:.0%}" for share in (0.1, 0.5, 1.0)]
table = pd.DataFrame(rows, index=[*names, "input, M rows/s", "bound by"]).T
table.map(lambda value: value if isinstance(value, str) else round(value, 1))

# %% [markdown]
# So it can pay, by its memory bandwidth alone, and by how much is decided by the program more than by the chip. With
# short rows most of what a chip moves is a table on its way from one layout to another. Written for the chip, with rows
# that fill its lanes and an optimizer of one number a row, the same chip does several times as many rows, though its
# table is eight times as large. The batch is worth a look too: in-batch softmax costs its square, and the chip does
# most rows with the smallest of the three. The input keeps up: chapter 3's pipeline gives more rows on two cores than
# any of these takes.
#
# `python -m recsys_common.costs --chapter 5 --price-tpu-v6e X --price-cpu Y` prints the whole plan with your
# prices of an hour.
#
# ## The run
#
# The same model on real rows, by the loop of chapter 4, on the device of the first cell. With `DEVICE = "tpu"` on a TPU
# VM or a TPU runtime of Colab these are the cells that run there; `requirements-tpu.txt` is what to install. (The
# TensorFlow of TPU machines cannot lower a step for the compiler, so there the reports above say that, and no more.
# Compile before you rent.) No TPU has run them yet.

# %%
warehouse = bigquery.connect(PROJECT, BUCKET, location=LOCATION)
tables = datasets.load(DATASET, DATA_DIR, rows=scale.SIMULATED_ROWS.get(SCALE, 0), seed=SEED)
ratings_table.load(warehouse, tables, ITEMS_TABLE)
splits.split(warehouse, SPLIT, tables.time)
loaded = warehouse.count("ratings")

# %%
overrides = [f"seed={SEED}", f"model.embedding_dim={DIM}", f"training.epochs={EPOCHS}"]
overrides += [f"data.shards={max(8, loaded // ROWS_PER_FILE)}", "optimizer.learning_rate=0.02"]
overrides += [f"training.batch_size={min(BATCH_SIZE, max(1024, loaded // 100))}"]
settings = config.Config.default(SCALE).override(*overrides, *OVERRIDES.split())

# %%
pieces = 1 + loaded // 100_000_000  # one worker should not number hundreds of millions of ids
warehouse.run("vocabularies.sql", oov_buckets=1, minimum_frequency=1, pieces=pieces)
warehouse.run("examples.sql", shards=settings.data.shards)
items = warehouse.read("item_vocabulary").sort_by("item_index").to_pandas()
num_users = int(warehouse.read("user_vocabulary").to_pandas()["user_index"].max()) + 1
frequency = np.concatenate([[0], items[items["item_index"] > 0]["frequency"]])

# %%
folder = warehouse.local(f"{warehouse.storage}/chapter-5/train")
source = conversion.TableShards(warehouse, settings.data.table, {"split": settings.data.split})
train_files = conversion.convert(folder, source, settings.record_columns(), seed=SEED)
settings = settings.with_rows({"user": num_users, "item": len(frequency)})

# %% [markdown]
# Before it starts, a rehearsal: the config that will run, with the rows that it has, for the chip that will run it.

# %%
[rehearsed] = tpu.rehearse(settings, [TOPOLOGY])
print(str(rehearsed).splitlines()[0], f"{rehearsed.hbm_bytes / 1e9:.2f} GB", rehearsed.bound)

# %%
stride = max(1, num_users // EVALUATED_USERS)
warehouse.run("evaluation_pairs.sql", stride=stride)
pairs = warehouse.read("evaluation_pairs").to_pandas()
asked = pairs[pairs["asked"]][["user_index", "item_index"]].to_numpy().T
seen = pairs[~pairs["asked"]][["user_index", "item_index"]].to_numpy().T


# %%
def rank(model):
    return evaluation.evaluate(model.scores, *asked, *seen, len(frequency), K)


# %%
run_folder = scale.run_folder(RUNS_DIR, SCALE, "chapter-5") / "training"
shutil.rmtree(run_folder, ignore_errors=True)
make_model = functools.partial(settings.build, frequency)
run = training.train(
    settings, make_model, {"train": train_files}, strategy, folder=run_folder, evaluate=rank
)

# %%
floor = evaluation.evaluate(
    lambda block: np.tile(frequency, (len(block), 1)), *asked, *seen, len(frequency), K
)[f"NDCG@{K}"]
print(f"popularity {floor:.3f}")
pd.DataFrame(run.evaluations).set_index("epoch")[[f"NDCG@{K}", f"HR@{K}"]].round(3)

# %% [markdown]
# ## Summary
#
# - A TPU is multipliers in squares, memory in tiles of 8 by 128, and on some chips SparseCores for look-ups.
# - Whether a step compiles, fits, and what it costs at least is known before a chip is rented:
#   `tpu.aot_compile(step, [batch], "v6e:1x1")`, or `python -m recsys_common.tpu` for a config.
# - Static shapes, no strings, no bytes; what must be text or ragged stays on the host.
# - Narrow rows cost a copy of their table in each step, unless they fill 128 lanes or lie on SparseCores.
# - Matrix factorization and the two-tower network wait for memory on every chip. What a TPU offers them is its
#   bandwidth, not its FLOPs.
# - How much it pays is decided by the program more than by the chip: rows that fill the lanes, little state, a batch
#   that is not too large for its softmax.
#
# ## Exercises
#
# 1. Compile the first program for `v5e:1x1`. Does it fit? What of it must change so that it has room to spare?
# 2. Put eight rows of 16 numbers into one of 128 (`tf.gather` of `id // 8`, then the part `id % 8`). What do the moves
#    of the report say now, and what did you pay for it in gradients?
# 3. `python -m recsys_common.tpu --rows user=100000000 item=1000000 --set model.embedding_dim=16 --topology v6e:1x1
#    --vary training.batch_size=2048,32768`: which part of the step grows with the batch, and which with its square? How
#    would you make the loss cheaper?
# 4. Take a training step of your own model and compile it. If it does not compile, mend it; if it does, find its
#    largest move.
# 5. Look up three prices, of a TPU, a GPU and a CPU machine, and find who wins at 10, 30 and 100% utilisation.

# %%
best = max(line[f"NDCG@{K}"] for line in run.evaluations)
values = {"lazy adam NDCG@10": (best, ""), "popularity NDCG@10": (floor, "")}
values |= {"HBM of the first program": (report.hbm_bytes / 1e9, "GB")}
values |= {f"{dim} numbers: moved": (one.bytes / 1e6, "MB") for dim, one in compared_dims.items()}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-5", values, dataset=DATASET)
warehouse.close()
