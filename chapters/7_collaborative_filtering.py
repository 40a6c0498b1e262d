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
# # 7. Collaborative filtering
#
# Before anything deep is trained, somebody should say what is to be beaten. In papers that somebody is often missing:
# the new model is tuned for a month and the old one runs with its defaults. **What do the simple models reach when
# they are done properly?**
#
# At the end of this page you will have
#
# - an evaluation that you can trust, with intervals, and have seen how a popular shortcut turns a ranking upside down;
# - seven models from popularity to graph convolution, each with the few lines that matter, tuned with the same budget;
# - pictures of what they learnt: a map of items, the neighbours of one, who gets the long tail;
# - answers with numbers to questions that the book left open: hashing or a vocabulary, bias terms, negatives, how much
#   regularisation;
# - one command that does all of it on your own file of `user item` lines.

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
TRIALS = 3  # settings that each model may try, on validation
LIKED = 4.0  # stars from which somebody liked an item, in the test with strangers
HELD_OUT = 0  # people whom that test keeps from training; 0: a tenth
K = 10
RUNS_DIR = "../runs"

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from recsys_common import config, datasets, experiment, metrics, prepare, saving, scale, splits
from recsys_common.models import ease
from recsys_common.models.matrix_factorization import MatrixFactorization
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

# %%
assert tf.__version__.startswith(("2.20", "2.21")), "not this book's TensorFlow: run `make doctor`"
tf.__version__

# %% [markdown]
# ## The whole of it
#
# Ratings are prepared as in chapter 6: loaded, split, numbered, exported to record batches. The simple models see no
# batches; they take all interactions at once, as one array of items with a border after each user. That is 4 bytes an
# interaction, so what stops a simple model is seldom the data.

# %%
columns = ["features.stars={kind: label, column: rating}"]
columns += [
    "features.time={kind: hash, column: timestamp, rows: 1}"
]  # as int64; no model has a table of it
settings = config.Config.default(SCALE).override(
    f"seed={SEED}",
    f"data.dataset={DATASET}",
    f"data.split_by={SPLIT}",
    *columns,
    *OVERRIDES.split(),
)

# %%
where = {"runs_dir": scale.run_folder(RUNS_DIR, SCALE, "chapter-7"), "data_dir": DATA_DIR}
where |= {"project": PROJECT, "bucket": BUCKET, "location": LOCATION}
prepared = prepare.prepare(settings, **where)
parts = splits.prepared(prepared)
train = parts["test"].train
print(
    f"{len(train):,} interactions of {train.num_users - 1:,} people with {train.num_items - 1:,} items"
)

# %% [markdown]
# And now each model: `TRIALS` settings on validation, the best of them once on the test.

# %%
MODELS = ["popularity", "item-knn", "ease", "ials", "bpr"]
tuned = {
    name: experiment.tune(name, parts["validation"], TRIALS, metric=f"NDCG@{K}", seed=SEED)
    for name in MODELS
}

# %%
fitted = {name: experiment.fit(name, parts["test"], tuned[name].settings, SEED) for name in MODELS}
rankings = {name: experiment.rank(model, parts["test"], K) for name, model in fitted.items()}
of_users = {name: metrics.per_user(ranking, (K,)) for name, ranking in rankings.items()}

# %% tags=["main-result"]
board = pd.DataFrame({name: pd.DataFrame(found).mean() for name, found in of_users.items()}).T
board[f"coverage@{K}"] = [metrics.coverage(ranking, K) for ranking in rankings.values()]
board.sort_values(f"NDCG@{K}").round(3)

# %% [markdown]
# That is the table that should stand at the start of every project. The rest of this page takes it apart: first how
# it is judged, then each model, then what decides how good it is.
#
# ## One person, by hand
#
# A ranking is trustworthy when one can follow it for one person. What had they taken, what came next, and where did
# the model put that among all the items that they had not taken?

# %%
asked = parts["test"]
ranking = rankings["ease"]
lengths = np.bincount(ranking.users, minlength=train.num_users)
person = int(np.flatnonzero(lengths == 3)[0])
targets = ranking.users == person
print("had", asked.seen.lengths[person], "items; then took", ranking.items[targets])
print("which stood at places", ranking.ranks[targets].astype(int))

# %% [markdown]
# The same from the scores: cross out what is seen and count what is higher.

# %%
scores = fitted["ease"].scores(asked.seen, [person])[0]
scores[np.append(0, asked.seen.history(person))] = -np.inf  # item 0 is none
by_hand = [1 + int((scores > scores[item]).sum()) for item in ranking.items[targets]]
gains = sum(1 / np.log2(1 + rank) for rank in by_hand if rank <= K)
perfect = sum(1 / np.log2(1 + place) for place in range(1, 1 + min(K, len(by_hand))))
print("places", by_hand, f"NDCG@{K} {gains / perfect:.4f}")

# %% [markdown]
# `evaluation.rank` does this for everyone. What takes the time is the product of people and items; the ranking itself
# reads each score two or three times, on all cores. Scores that are equal are ordered by a fixed shuffle of the
# items: a model that says the same of all items gets chance, where an order by id would have given it the popular
# ones, since vocabularies are numbered by frequency.
#
# There are as many metrics as papers. Recall alone has two definitions: hits divided by what was asked for, or by
# what fits into the list. For somebody who took forty items, ten places can hold a quarter of them at most; the
# second definition, called *capped* here, forgives that.

# %%
pd.DataFrame(of_users["ease"]).mean().round(4)

# %% [markdown]
# ## Is the difference real?
#
# A table without intervals invites stories. These are 95% intervals by bootstrap over people:

# %%
bounds = {name: metrics.interval(found[f"NDCG@{K}"]) for name, found in of_users.items()}
table = pd.DataFrame(bounds, index=["from", "to"]).T.assign(mean=board[f"NDCG@{K}"])
table.sort_values("mean").round(4)

# %% [markdown]
# Some intervals overlap. That says little about the difference of two models, since both were asked about the same
# people, and people differ far more than models do. The paired test looks at the difference person by person: how
# often would flipping its signs at random give as much?

# %%
best, second = board[f"NDCG@{K}"].sort_values().index[[-1, -2]]
found = metrics.paired(*(of_users[name][f"NDCG@{K}"] for name in (best, second)))
print(
    f"{best} less {second}: {found.difference:.4f}, from {found.low:.4f} to {found.high:.4f}, p {found.p:.3f}"
)

# %% [markdown]
# ## A hundred random items
#
# For years papers ranked the true item among a hundred random ones, because ranking all was slow. It is not (6,040
# people and 3,416 items take well under a second), and the shortcut does not only inflate: it answers another
# question. Among a hundred random items nearly all are ones that nobody wants, so the model that is best at *not
# being far off* wins over the one that is often exactly right (Krichene & Rendle, KDD 2020).

# %%
had = np.bincount(asked.seen.users, minlength=train.num_users)
shortcut = {
    name: metrics.per_user(metrics.sampled(each, had), (K,))[f"NDCG@{K}"].mean()
    for name, each in rankings.items()
}
compared = pd.DataFrame({"all items": board[f"NDCG@{K}"], "among 100": shortcut})
compared.assign(
    places=compared["all items"].rank(ascending=False),
    sampled=compared["among 100"].rank(ascending=False),
).round(3)

# %% [markdown]
# Nothing is scored again for this: given the exact place, the number of better ones in a random hundred is
# hypergeometric. The exact figure contains the sampled one, and not the other way round.
#
# ## Popularity
#
# The floor. It knows nobody and takes no training. Half-lives let old interactions count less:

# %%
days = [None, 1000, 300, 100, 30]
for half_life in days:
    value = experiment.run(
        "popularity", parts["validation"], {"half_life": half_life and float(half_life)}, k=(K,)
    )
    print(f"half-life {half_life or 'none':>5}: {value[f'ndcg@{K}']:.4f}")

# %% [markdown]
# ## Item-kNN: what was taken together
#
# Two items are near when the same people took them. With $n_{ij}$ people who took both, cosine with shrinkage is
#
# $$s_{ij} = \frac{n_{ij}}{\sqrt{n_i n_j} + h}, \qquad score(u, i) = \sum_{j \in u} s_{ij}$$
#
# where only the nearest neighbours of an item count. `h` takes weight from pairs that few people vouch for; without
# it two items with one and the same taker would be perfect neighbours. BM25, from text search, is the alternative
# weight.

# %%
titles = datasets.load(DATASET, DATA_DIR).items.to_pandas().set_index("item_id")["title"]
title = titles.reindex(asked.item_ids).fillna("-").to_numpy()
favourite = int(np.argsort(-train.frequency)[5])
near = fitted["item-knn"].similarity[favourite].toarray()[0]
print("near", title[favourite])
for item in np.argsort(-near)[:5]:
    print(f"  {near[item]:.3f}  {title[item]}")

# %% [markdown]
# ## EASE: one matrix in closed form
#
# If item-kNN's similarities are guesses, which would be the best ones? Learn them: let each column of $X$ (people by
# items) be predicted from the others by a linear model with a ridge penalty, and forbid an item to predict itself,
#
# $$\min_B \|X - XB\|^2 + \lambda \|B\|^2, \quad \mathrm{diag}(B) = 0
# \qquad\Longrightarrow\qquad B_{ij} = -P_{ij} / P_{jj}, \quad P = (X'X + \lambda I)^{-1}$$
#
# (Steck, WWW 2019). The whole model, in NumPy:

# %%
X = train.matrix()
l2 = tuned["ease"].settings.get("l2", ease.Parameters().l2)
P = np.linalg.inv((X.T @ X).toarray() + l2 * np.eye(train.num_items))
B = -P / np.diag(P)
np.fill_diagonal(B, 0)
print("the same as models/ease.py:", np.allclose(B, fitted["ease"].weights, atol=1e-4))

# %% [markdown]
# One setting, no passes, no seed. Its weights may be negative, which a count of common takers never is: *whoever took
# this probably does not want that*.

# %%
weights = fitted["ease"].weights[favourite].copy()
order = np.argsort(weights)
for item in [*order[-3:][::-1], *order[:3]]:
    print(f"{weights[item]:+.3f}  {title[item]}")

# %% [markdown]
# Its price is a dense matrix of items by items: .05 GB at 3,416 items, 40 GB at 100,000. `models/ease.py` inverts it
# in place and refuses what does not fit.
#
# ## iALS: everyone's taste, all at once
#
# Matrix factorization for interactions: a vector for each person, one for each item, and *all* pairs in the loss,
# those without an interaction with a small weight $\alpha_0$,
#
# $$\sum_{(u,i) \in S} (\langle p_u, q_i \rangle - 1)^2 + \alpha_0 \sum_u \sum_i \langle p_u, q_i \rangle^2
# + \lambda \sum_u (|S_u| + \alpha_0 |I|)^\nu \|p_u\|^2 + \ldots$$
#
# The second sum has as many terms as people times items, and costs nothing: it is $\mathrm{tr}(P'P\, Q'Q)$. With the
# items fixed each person is a small linear system; then the items, and so on. That is why it scales: Rendle and
# others (2022) found that most published comparisons had simply not tuned it.

# %%
chosen = fitted["ials"].parameters
Q, history = fitted["ials"].items, asked.seen.history(person)
gram = Q[history].T @ Q[history] + chosen.alpha0 * Q.T @ Q
there = np.count_nonzero(Q.any(1))  # items that anybody took
penalty = chosen.l2 * (len(history) + chosen.alpha0 * there) ** chosen.nu
p_u = np.linalg.solve(gram + penalty * np.eye(len(gram)), Q[history].sum(0))
print(
    "the same scores:",
    np.allclose(Q @ p_u, fitted["ials"].scores(asked.seen, [person])[0], atol=1e-3),
)

# %% [markdown]
# These three lines are also how somebody new is served: a history is enough, no training.
#
# What has it learnt? Nobody told it genres. The item vectors, flattened to two dimensions by t-SNE, coloured by the
# first genre of each:

# %% tags=["nbval-ignore-output"]
genres = datasets.load(DATASET, DATA_DIR).items.to_pandas().set_index("item_id")["genres"]
first = genres.reindex(asked.item_ids[1:]).map(lambda names: names[0] if len(names) else "none")
shown = np.argsort(-train.frequency[1:])[:400]  # the most popular, of which most is known
unit = Q[1:][shown] / np.linalg.norm(Q[1:][shown], axis=1, keepdims=True)
with threadpool_limits(1):  # on so few points threads wait for each other
    place = TSNE(init="pca", metric="cosine", random_state=SEED).fit_transform(unit)

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(9, 7))
names, number = np.unique(first.to_numpy()[shown].astype(str), return_inverse=True)
axis.scatter(*place.T, c=number, cmap="tab20", s=12)
for at in range(0, 60, 3):
    axis.annotate(title[1:][shown[at]][:28], place[at], fontsize=7)
_ = axis.set(xticks=[], yticks=[], title="items that the same people take lie together")

# %% [markdown]
# ## BPR: rather this than that
#
# Squared errors ask for a 1 here and a 0 there, though only the order matters. BPR (Rendle and others, UAI 2009)
# learns from pairs: an item that somebody took should score above one that they did not,
#
# $$-\ln \sigma(\langle p_u, q_i - q_j \rangle + b_i - b_j) + \tfrac{\lambda}{2} \|\cdot\|^2$$
#
# with $j$ drawn at random for each step, one step after the other; `models/bpr.py` is that loop, compiled by Numba.
# Which $j$? Uniform ones are mostly items that nobody would take, and are soon beaten; popular ones are hard, and
# some of them are items that the person would take next.
#
# ## Who gets the long tail?
#
# Items sorted by popularity and cut into thirds of all interactions: a few items are the *head*, most are the *tail*.

# %%
sliced = {name: metrics.by_popularity(each, train.frequency, K) for name, each in rankings.items()}
tails = {
    name: {part: values["shown"] for part, values in each.items()} for name, each in sliced.items()
}
tails["what was wanted"] = {part: values["targets"] for part, values in sliced["ease"].items()}
tails["of all items"] = {part: values["items"] for part, values in sliced["ease"].items()}
pd.DataFrame(tails).T.round(3)

# %% tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.loglog(np.sort(train.frequency)[::-1] + 1)
left.set(xlabel="items, the most popular first", ylabel="interactions + 1", title="the long tail")
pd.DataFrame(tails).T.drop("of all items").plot.barh(stacked=True, ax=right, title="places shown")
figure.tight_layout()

# %% [markdown]
# And people by how many items they had taken:

# %%
rows = {
    name: metrics.by_history(each, asked.seen.lengths, (1, 25, 100), K)
    for name, each in rankings.items()
}
groups = [
    f"{a} to {b}" if b else f"{a} or more" for a, b in (row["history"] for row in rows["ease"])
]
few = pd.DataFrame(
    {name: [row[f"NDCG@{K}"] for row in found] for name, found in rows.items()}, index=groups
)
few.assign(people=[row["users"] for row in rows["ease"]]).round(3)

# %% [markdown]
# ## Two more: in-batch softmax and LightGCN
#
# Chapter 1's matrix factorization, trained with the other items of the batch as negatives, is the form that scales
# past one machine: `--model matrix-factorization`. LightGCN (He and others, SIGIR 2020) smooths the vectors of such a
# model over the graph of people and items before each score, $E^{(k+1)} = D^{-1/2} A D^{-1/2} E^{(k)}$, and averages
# the layers. Both are gradient descent by the epoch, so they run in the benchmark and not on this page.
#
# ## Real ratings
#
# The same on MovieLens: ml-1m with each person's last film asked for, all 3,416 films ranked; ml-100k, split in time.
# Each model had the same number of trials. The last two rows are not ours.

# %%
benchmark = json.loads(Path("../benchmarks/collaborative_filtering.json").read_text())
result = pd.DataFrame(benchmark["rows"])
print(benchmark["machine"], benchmark["date"][:10])
found = result[(result.dataset == "ml-1m") & result.metric.isin(["hr@10", "ndcg@10"])]
found = found[(found.protocol == "leave-one-out") & (found.part == "ranking")]

# %%
films = found.pivot(index="model", columns="metric", values="value")
of_one = found[found.metric == "ndcg@10"].set_index("model")
films = films.join(of_one[["low", "high", "seconds", "published"]])
others = pd.DataFrame(benchmark["others"]).set_index("model")[["hr@10", "ndcg@10"]]
pd.concat([films.sort_values("ndcg@10"), others]).round(4).fillna("")

# %% [markdown]
# Two things to take away. The simple models are two to three times as good as popularity, and far closer to each
# other than papers that left them untuned would have it. And SASRec, which knows the *order* of films, is far above
# all of them on this question, since it asks for the very next film: chapter 9 is about that.
#
# On ml-100k and the simulated ratings, split in time, where all later items are asked for:

# %%
in_time = result[
    (result.protocol == "temporal") & (result.metric == "ndcg@10") & (result.part == "ranking")
]
spans = in_time.assign(span=[f"{row.low:.3f} to {row.high:.3f}" for row in in_time.itertuples()])
spans.pivot(index="model", columns="dataset", values=["value", "span"]).round(3)

# %% [markdown]
# ## Hashing or a vocabulary? How much regularisation? Which negatives?
#
# One thing changed on ml-1m, all else as tuned; the same 6,040 people before and after. An interval that holds 0
# means that one cannot tell.

# %%
asked_questions = result[(result.part == "questions") & (result.metric == "ndcg@10")]
answers = asked_questions.assign(change=asked_questions.case.str.removesuffix(", ml-1m"))
answers.set_index("change")[["value", "difference", "low", "high"]].astype(float).round(4)

# %% [markdown]
# With as many buckets as items a third of the items share one, and what that costs stands in the table; four times as
# many rows make it small. Where the ids are known, SQL gives a vocabulary for nothing (chapter 3), and there is no
# question.
#
# ## Stars
#
# The Netflix prize asked another question: how many stars will this person give this film? Biases answer most of it,
# a person's mean and a film's; vectors add the rest, one rating at a time by SGD, or exactly by ALS; SVD++ adds
# *which* films somebody rated at all. RMSE, the root of the mean squared error in stars:

# %%
stars = result[(result.part == "ratings") & (result.metric == "rmse")]
table = stars.pivot(index="model", columns="dataset", values=["value", "published"]).astype(float)
table.sort_values(("value", "ml-1m"), ascending=False).round(4).fillna("")

# %% [markdown]
# Are bias terms worth their place, and how much regularisation do they need? RMSE on ml-1m with no regularisation,
# the tuned one, and ten times as much:

# %%
by_terms = result[(result.part == "questions") & (result.metric == "rmse")]
terms = by_terms.case.str.extract(r"(?P<terms>[a-z ]+), regularisation times (?P<times>\d+)")
terms.assign(rmse=by_terms.value).pivot(index="terms", columns="times", values="rmse")[
    ["0", "1", "10"]
].round(4)

# %% [markdown]
# A good RMSE says little about a good list: the films that one would rate highest are not the ones that one takes
# next, which is why the two kinds of models have a table each.
#
# ## How fast?
#
# Our iALS beside the library `implicit`, with the same factors and threads, on the same loss; seconds until both
# reach the same NDCG@10 on validation. And exact ranking beside the matrix product that it cannot do without:

# %%
speed = result[result.part.isin(["als", "speed"])].set_index("case")
speed[["value", "min", "max", "unit"]].round(2)

# %% [markdown]
# ## Strangers
#
# All tests so far asked about people whom training knew. In *strong generalisation* (Liang and others, WWW 2018) some
# people are kept out altogether; the model is told four fifths of what they liked and asked for the rest. Models with
# a table of users cannot even take part.

# %%
known = parts["test"].train
liked = known.values >= LIKED
strangers = splits.strong_generalisation(
    known.users[liked],
    known.items[liked],
    held_out=HELD_OUT or int((known.lengths > 0).sum()) // 10,
)["test"]
folding = ["popularity", "item-knn", "ease", "ials"]
metrics_of = ["capped-recall@20", "capped-recall@50", "ndcg@100"]
new = {
    name: experiment.run(name, strangers, tuned[name].settings, k=(20, 50, 100)) for name in folding
}
pd.DataFrame(new).T[metrics_of].astype(float).round(3)

# %% [markdown]
# The table that everybody quotes is that of MovieLens-20M. This page prints it for you once you have the data (`make
# chapter-7 SCALE=medium DATASET=ml-20m`, of the ratings before the cut in time); by the letter of the protocol, with
# all ratings, it is
#
# ```sh
# python -m recsys_common evaluate --model ease --dataset ml-20m --protocol strong-generalisation \
#     --minimum-rating 4 --k 20 50 100
# ```
#
# Others' figures, with the same protocol and another draw of people:

# %%
pd.DataFrame(benchmark["ml-20m published"]).set_index("model")

# %% [markdown]
# ## It leaves as any model
#
# A model with vectors is what chapter 6 exports: a SavedModel with ids inside, ONNX, an index, golden vectors.

# %% tags=["nbval-ignore-output"]
exported = saving.export(
    Path(where["runs_dir"]) / "ials",
    MatrixFactorization.of_factors(fitted["ials"].users[1:], fitted["ials"].items),
    {"user_index": asked.user_ids[1:], "item_index": asked.item_ids[1:]},
)
sorted(path.name for path in exported.iterdir())

# %% [markdown]
# ## Your own data
#
# Everything on this page is one command on plain files:
#
# ```sh
# python -m recsys_common evaluate --model ease --train train.txt --test test.txt --k 10 20 --set model.l2=500
# python -m recsys_common evaluate --model ials --sequences all.txt --protocol leave-one-out --tune 20
# python -m recsys_common evaluate --model biased-mf --ratings ratings.dat --protocol 90/10
# ```
#
# ## Summary
#
# - Popularity, item-kNN, EASE and iALS belong in the first table of every project. They take seconds.
# - Rank all items, take out what was seen, break ties by chance, give intervals, compare the same people.
# - A hundred sampled negatives answer another question than the one that you have.
# - Tune every model with the same budget, on validation, or the table says who had more patience.
# - EASE is the best of them where its matrix fits; iALS grows with the interactions alone and takes in strangers.
#
# ## Exercises
#
# 1. Take ties away from `evaluation.py`: order equal scores by id. What does popularity reach on ml-100k then, and
# why? 2. `--model ease` with `--set model.l2=1`, `100`, `10000`: which of head, middle and tail gains, which loses?
# 3. Tune item-kNN with 5 and with 50 trials. Is the second table worth ten times the time? 4. Write `models/slim.py`:
# EASE with weights that are not negative, and few (scikit-learn's `ElasticNet` a column).    Which files had to
# change? 5. Somebody shows you HR@10 of .70 on ml-1m. Find what was sampled.

# %%
values = {f"{name} NDCG@{K}": (row[f"NDCG@{K}"], "") for name, row in board.iterrows()}
values |= {f"strangers, {name} ndcg@100": (row["ndcg@100"], "") for name, row in new.items()}
scale.record_metrics(RUNS_DIR, SCALE, "chapter-7", values, dataset=DATASET)
