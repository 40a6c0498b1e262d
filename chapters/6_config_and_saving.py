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
# # 6. Config and saving
#
# Half a year after a model was trained somebody asks what it was trained on, and nobody knows. A colleague wants to try
# one change and copies the notebook. The team that serves the model writes Go, or C, or JavaScript, and re-implements
# the vocabulary, wrongly. **How does a team share, repeat and ship a model?**
#
# At the end of this page you will have
#
# - a training run that follows from one small file, and two runs that differ in one line of it, compared;
# - the folder that such a run leaves, from which it can be repeated, to the last digit;
# - a model in a folder of its own, with everything that another program needs to know about it;
# - the same recommendations from Python without this project, from a C program and from Node.js, number for number;
# - a service that says which field of a bad request is wrong;
# - a broken model and a config with a hook in it, both refused before they do harm.

# %% tags=["parameters"]
SCALE = "small"  # small: simulated, a laptop. medium: real ratings. full: BigQuery, Cloud Storage
DATASET = "simulated"
DATA_DIR = "../data"
SEED = 1
SPLIT = "auto"  # temporal, leave-one-out; auto: temporal where the ratings have a clock
PROJECT = ""  # Google Cloud project; "" is the embedded BigQuery
BUCKET = ""  # Cloud Storage bucket, without gs://
LOCATION = "US"  # where table and bucket are
OVERRIDES = ""  # of the config, separated by blanks
CHANGED_DIM = 16  # numbers in a row, the one line in which the second run differs
BATCH_SIZE = 1024
K = 10
RUNS_DIR = "../runs"

# %%
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import tensorflow as tf
from recsys_common import artifact, config, masking, prepare, runs, saved_graph, saving, scale

# %%
assert tf.__version__.startswith(("2.20", "2.21")), "not this book's TensorFlow: run `make doctor`"
tf.__version__

# %% [markdown]
# ## The whole of it
#
# ```sh
# python -m recsys_common train run.yaml            # data, training, metrics: a folder
# python -m recsys_common runs                      # what was trained here, and how good it is
# python -m recsys_common export runs/train/<name>  # the model, in a folder that any language can use
# make serving && build/serving/score <model>       # the same numbers from C
# ```
#
# ## A run is a file
#
# The file says what differs from the defaults of chapter 4's typed config. What belongs to a machine, such as where the
# data lies or which project pays, is not in it: those are arguments of the command.

# %%
folder = scale.run_folder(RUNS_DIR, SCALE, "chapter-6")
content = f"""seed: {SEED}
data: {{dataset: {DATASET}, split_by: {SPLIT}}}
evaluation: {{k: {K}, metric: NDCG@{K}}}
"""
_ = (folder / "run.yaml").write_text(content)

# %% [markdown]
# All else has its default, here that of the scale. Every field is checked.

# %%
more = [*config.BY_SCALE[SCALE].split(), f"training.batch_size={BATCH_SIZE}", *OVERRIDES.split()]
settings = config.Config.load(folder / "run.yaml", *more)
print(f"{len(config.leaves(settings.tree()))} fields")

# %% [markdown]
# `runs.train` takes the road of chapter 1 in one call, as `python -m recsys_common train run.yaml` does: load, split,
# number the ids, export to record batches, train, and rank all items for the people held out.

# %%
where = {"runs_dir": folder / "runs", "data_dir": DATA_DIR, "location": LOCATION}
where |= {"project": PROJECT, "bucket": BUCKET}
shutil.rmtree(folder / "runs", ignore_errors=True)  # or it would find what it did before
first = runs.train(settings, **where)
print(first.folder.name)
pd.DataFrame(first.metrics).T.round(3)

# %% [markdown]
# The name of the run follows from its config, the rows of its tables included, which the data said. Epochs and early
# stopping are judged on *validation*. The test was asked once, after the last step, and popularity
# stands beside it.
#
# ## What a run leaves

# %%
left = {path.name for path in first.folder.iterdir()} - {"changes.patch"}
print(*sorted(left))
about = json.loads((first.folder / "run.json").read_text())
data = about["data"]
print("state  ", about["state"], "after", about["steps"], "steps, seed", about["seed"])
print("data   ", data["dataset"], data["counts"], "content", data["content"][:12])
print("metrics", *about["metrics"], sep=" | ")

# %% [markdown]
# `config.yaml` is the config as it was resolved, with the rows that the tables turned out to need. `run.json` has the git
# revision, and `changes.patch` what differed from it; the hash of the data, whose folder has that of each file; versions,
# machine and seed. `metrics.jsonl` has the curves, `log.txt` what happened and when.
#
# The folder of the data is named by a hash of all that decides what is in it: the ratings, the SQL, the fields of the
# config that count. Runs that differ in their model share it.

# %%
prepared = prepare.prepare(settings, **where)
print(*sorted(tf.io.gfile.listdir(prepared.folder)))

# %% [markdown]
# ## Once more
#
# The same call, on a run that has finished, returns what is there. Had it been interrupted, it would go on (chapter 4).

# %%
again = runs.train(settings, **where)
print("found:", again.folder == first.folder and again.metrics == first.metrics)

# %% [markdown]
# Is it *repeatable*? In another folder, with nothing to go on from, the same config and the same data must give the same
# metrics. On one machine they are equal to the last bit; another kind of processor sums in another order.

# %%
elsewhere = folder / "elsewhere"
shutil.rmtree(elsewhere, ignore_errors=True)
repeated = runs.train(settings, **where | {"runs_dir": elsewhere}, data=prepared.folder)
same = repeated.metrics == first.metrics
print("another folder, the same metrics to the last bit:", same)

# %% [markdown]
# ## One line
#
# Now the change that somebody wants to try. It is one line of the file, or one word of the command:
# `python -m recsys_common train run.yaml --set model.embedding_dim=16`.

# %%
second = runs.train(settings.override(f"model.embedding_dim={CHANGED_DIM}"), **where)
compared = pd.DataFrame(runs.compared(first.folder, second.folder), dtype=object).set_index("name")
compared = compared.filter(regex="^[a-z]+[.]|NDCG|coverage", axis=0)
compared.map(lambda value: round(value, 3) if isinstance(value, float) else value)

# %%
runs.curves([first.folder, second.folder])

# %% [markdown]
# On validation the better of the two is the one that goes out. All runs of a folder, with the fields in which they
# differ, as `python -m recsys_common runs` prints them:

# %% tags=["nbval-ignore-output"]
pd.DataFrame(runs.table(folder / "runs" / "train")).round(4)

# %% [markdown]
# A team that wants a server for this sends the same folders there, `python -m recsys_common runs --mlflow URL`; nothing
# here needs one.
#
# ## The model leaves
#
# `export` takes the last checkpoint of a run, with early stopping the best, and writes a folder. Whoever has it needs nothing else: no checkpoint, no
# vocabulary table, no line of this project.

# %% tags=["nbval-ignore-output"]
metric = settings.evaluation.metric
better = max(first, second, key=lambda run: run.metrics["validation"][metric])
model = runs.export(better.folder)
sizes = {str(f.relative_to(model)): f.stat().st_size for f in model.rglob("*") if f.is_file()}
pd.DataFrame({"bytes": sizes}).sort_index()

# %% [markdown]
# The graph is small because tables are variables, and each file can be read without TensorFlow: ids as int64 or as lines
# of text, vectors as raw float32, the tables that ONNX maps into memory beside it. The manifest has the size and SHA-256
# of every file. What a client must know stands in `metadata.json`, whose
# [JSON Schema](../serving/metadata.schema.json) is part of this repository:

# %%
metadata = artifact.verify(model)
print(metadata.model.architecture, metadata.model.dim, f"{metadata.model.parameters:,} parameters")
inputs = [each.model_dump(include={"name", "kind", "dtype", "rows"}) for each in metadata.inputs]
pd.DataFrame(inputs).set_index("name")

# %%
recommend = metadata.signatures["recommend"]
for side, tensors in (("in", recommend.inputs), ("out", recommend.outputs)):
    for name, tensor in tensors.items():
        print(f"{side:4}{name:14}{tensor.dtype:8}{tensor.shape}  {tensor.tensor}")

# %% [markdown]
# And *golden vectors*: inputs with the outputs that the model gave in Python before it was saved. A client in any language
# runs them once and knows whether it looks up ids as we do, hashes as we do, multiplies as we do. One of these people is
# unknown, so has row 0.

# %%
golden = next(each for each in metadata.golden if each.signature == "recommend")
print({name: np.shape(value) for name, value in golden.inputs.items()})
print("user_id", golden.inputs["user_id"][:4], "rows", golden.rows["user"][:4])
print("first   ", *golden.outputs["item_id"][0])

# %% [markdown]
# ## Opened by a stranger
#
# Another Python process, with TensorFlow and without a line of ours, asks for the list of the first of them:

# %%
program = f"""
import sys, tensorflow as tf
recommend = tf.saved_model.load({str(model / "saved_model")!r}).signatures["recommend"]
user = tf.constant([{golden.inputs["user_id"][0]}], tf.int64)
seen = tf.constant([[{", ".join(golden.inputs["seen_item_id"][0])}]], tf.int64)
found = recommend(user_id=user, k=tf.constant({golden.inputs["k"]}), seen_item_id=seen)
assert not any(name.startswith("recsys_common") for name in sys.modules)
print(*found["item_id"].numpy()[0])"""
answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
print(answer.stdout.strip())

# %% [markdown]
# ## From C and from Node.js
#
# `serving/` has two clients that are meant to be copied: [score.c](../serving/score.c), on TensorFlow's C library, which
# the Python package contains, and [score.mjs](../serving/score.mjs), on ONNX Runtime with its own look-up of ids.
# `make serving` builds both, the first with the C compiler of this machine. Each first compares the folder with its manifest, then runs the golden vectors.

# %% tags=["main-result"]
built = subprocess.run(["make", "--silent", "-C", "..", "serving"], capture_output=True, text=True)
clients = {"C": ["../build/serving/score"]}
clients["Node.js"] = ["../build/serving/node", "../build/serving/score.mjs"]
assert Path(clients["C"][0]).exists(), (
    built.stderr
)  # names the C compiler, if that is what is missing
asked = {name: [*client, str(model), "--repeat", "200"] for name, client in clients.items()}
done = {
    name: subprocess.run(each, capture_output=True, text=True, check=True)
    for name, each in asked.items()
}
said = {name: json.loads(each.stdout) for name, each in done.items()}
for name, found in said.items():
    close, ids = found["largest_difference"] < 1e-5, found["wrong_ids"]
    print(f"{name}: {found['golden']} golden vectors, all within 1e-5: {close}, wrong ids: {ids}")

# %% [markdown]
# The same numbers, and the same lists. Milliseconds for a list of ten depend on the machine:

# %% tags=["nbval-ignore-output"]
times = pd.DataFrame({name: found["recommend_ms"] for name, found in said.items()}).T[
    ["p50", "p99"]
]
times.assign(largest_difference=[found["largest_difference"] for found in said.values()])

# %% [markdown]
# ## A million items
#
# With a thousand items a list is a product of a vector and a small matrix. With a million, each answer reads all their
# vectors, 256 MB of them at 64 numbers, and no program is faster than memory. The benchmark trains such a model and
# compares three ways: reading the vectors and doing nothing, the exact first hundred, and an approximate index (HNSW, by
# usearch) that walks a graph of neighbours and misses a few.

# %%
benchmark = json.loads(Path("../benchmarks/serving.json").read_text())
measured = pd.DataFrame(benchmark["rows"]).set_index("case")
print(benchmark["machine"], benchmark["date"][:10])
ways = measured[measured.index.str.match("read vectors|(exact|index) top-100 [^,/]*$")]
ways[["value", "min", "max"]].set_axis(["ms", "from", "to"], axis=1).round(2)

# %% [markdown]
# The index has a dial, `expansion_search`: how many neighbours it keeps in view. It is not in the index's file, so it
# stands in the metadata. Recall is the share of the exact hundred that the index finds, for people of the trained model.

# %%
dial = measured[measured.index.str.contains("expansion_search")]["value"]
dial.index = pd.MultiIndex.from_tuples(dial.index.str.split(", expansion_search ").map(tuple))
dial.unstack(0).sort_index(key=lambda number: number.astype(int)).round(4)

# %% [markdown]
# And ten million users, rows of 32 numbers, 1.28 GB? How many times the table is in memory at most while it is made,
# saved and loaded, on top of the libraries; and the seconds. As an ONNX file with its table beside it, it is mapped, and
# read where it is needed.

# %%
tables = measured[measured.index.str.match("(memory|seconds) to [^:]*$")]
tables[["value", "unit"]].round(2)

# %% [markdown]
# ## A service
#
# `make serve MODEL=folder` answers over HTTP: FastAPI checks each request by its types, ONNX Runtime and the item vectors
# answer, and TensorFlow is not there at all. What is wrong with a request is said with the field that is wrong.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "../serving/service.py", str(model), "--port", str(port)]
client = httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=8))
good = {"user_id": golden.inputs["user_id"][0], "k": 3}
tried = ({}, {"k": 0}, {"user_id": "me"}, {"seen_item_id": "50"}, {"usr": 5})

# %%
service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    answers = [client.post("/recommend", json=good | change) for change in tried]
finally:
    service.terminate()
print("ended with", service.wait())

# %%
print(*[(each["item_id"], round(each["score"], 3)) for each in answers[0].json()["items"]])
for refused in answers[1:]:
    print(refused.status_code, *refused.json()["detail"])

# %% [markdown]
# ## What is not to be trusted
#
# A model that comes from elsewhere may be damaged, and it may mean harm. One bit of the item vectors is flipped:

# %%
broken = folder / "broken"
shutil.rmtree(broken, ignore_errors=True)
shutil.copytree(model, broken)
content = bytearray((broken / "items/vectors.f32").read_bytes())
content[1000] ^= 1
_ = (broken / "items/vectors.f32").write_bytes(content)

# %%
try:
    saving.load(broken)
except ValueError as error:
    print(str(error).replace(str(broken), "broken").partition(" SHA-256")[0], "another SHA-256")
for name, client in clients.items():
    refused = subprocess.run([*client, str(broken)], capture_output=True, text=True)
    print(f"{name}: exit {refused.returncode}, names the file: {'vectors.f32' in refused.stderr}")

# %% [markdown]
# Hashes find damage and mistakes. Whoever can write all of the folder can write a fitting manifest as well, so nothing in
# it may run: there is no pickle in it and no Lambda layer, and `saving.load` refuses a graph with operations that reach
# out of it. A SavedModel that was made to read a file, once loaded, would do so with your rights:

# %%
tf.get_logger().setLevel("ERROR")  # no notes on what is written
module = tf.Module()
module.read = tf.function(lambda: tf.io.read_file("/etc/passwd"), input_signature=[])
tf.saved_model.save(module, str(folder / "hooked" / "saved_model"))
try:
    saved_graph.check(folder / "hooked" / "saved_model")
except ValueError as error:
    print(str(error).replace(str(folder), ".").partition(" (")[0])

# %% [markdown]
# A config is YAML without tags, and the only name in it that becomes code is the model's architecture, which the command
# line takes from this package alone unless `--allow-own-code` is given. And what nobody should read is not written: a
# config with a credential in it is refused, logs and metadata are masked.

# %%
key = "AIza" + "x" * 35
for text in ("seed: !!python/object/apply:os.system [date]", f"data: {{folder: 'gs://{key}/x'}}"):
    try:
        config.Config.parse(text)
    except ValueError as error:
        print(*str(error).splitlines()[:3], sep="\n")
print(masking.masked(f"GET https://example.com/v1?key={key}"))

# %% [markdown]
# ## Every night
#
# [workflows/road.py](../workflows/road.py) is the same road as a Flyte workflow: data, training, approval, publication,
# as tasks that are retried, cached by the content of what they take, and started by the clock. It runs here in one
# process, `pyflyte run workflows/road.py road --help`, and on a cluster. The tables of a night's model begin with those of
# the model that is published, id by id, as in chapter 4; one that is no better than popularity is not published.
#
# ## Summary
#
# - A run is one small file. What belongs to the machine is not in it, what it turned out to need is in the folder.
# - Same config, same data, same metrics, or the folder says what was not the same.
# - Choose on validation, ask the test once, and keep popularity beside it.
# - A model that leaves takes its ids along, and golden vectors, by which a stranger knows that it is understood.
# - Tables are variables, vectors are raw numbers, ids are a file: nothing in the folder needs this project, or Python.
# - What one loads is compared with its manifest first, and nothing in it is run.
#
# ## Exercises
#
# 1. Train with `optimizer.learning_rate` ten times as large, and compare the three runs by `runs.curves`. On which of
#    their metrics would you have chosen wrongly?
# 2. Kill `python -m recsys_common train --set training.epochs=40` half-way, by Ctrl-C and by `kill -9`, and repeat it.
#    What does `log.txt` say each time, and which numbers of `run.json` are not what they would have been?
# 3. Take one id out of a copy of `vocabulary/` and mend the manifest (`artifact.write_manifest`). Who notices, and by what?
# 4. Score the golden users in a third language. What do you need besides the folder?
# 5. `python benchmarks/serving.py --only model` leaves a model of a million items in `build/serving_benchmark`, in 20
#    minutes. Search its index (`item_index.load`) with an `expansion_search` of 16 and of 1,000: what becomes of recall
#    and time? From where on is the exact list the cheaper one?
# 6. Write the rule for approval that your own team would want into `workflows/road.py`.

# %%
values = {f"{part} {metric}": (of[metric], "") for part, of in better.metrics.items()}
values |= {"metrics repeated to the last bit": (same, "")}
values |= {f"golden {name}": (said[name]["largest_difference"], "") for name in said}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-6", values, dataset=DATASET)
