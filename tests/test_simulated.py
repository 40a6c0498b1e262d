"""Is the simulated truth the truth, does it look like ml-100k, and does it come out the same everywhere?"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import make_sample
import numpy as np
import pyarrow as pa
import pytest

from recsys_common.datasets import ITEMS_SCHEMA, RATINGS_SCHEMA, load, simulated

ROOT = Path(__file__).resolve().parents[1]
ML_100K = Path(os.environ.get("RECSYS_DATA_DIR") or ROOT.parent / "shared" / "data") / "ml-100k" / "u.data"

# ml-100k, counted; test_ml_100k_is_what_this_file_says counts again where the data is there.
GINI = 0.629
PERCENTILES = [5, 10, 25, 50, 75, 90, 95]
ROWS_A_USER = [21, 23, 33, 65, 148, 244, 311]
# NDCG@10 of EASE over that of popularity. EASE needs no training run; what matrix factorization gains is measured
# by the chapter, on both.
GAIN = 1.77


@pytest.fixture(scope="module")
def tables():
    return simulated.load(rows=100_000, seed=1)


@pytest.fixture(scope="module")
def columns(tables):
    return [tables.ratings[name].to_numpy() for name in ("user_id", "item_id", "timestamp")]


def digest(table: pa.Table) -> str:
    return hashlib.sha256("".join(map(str, table.to_pydict().values())).encode()).hexdigest()[:16]


def gini(items):
    counts = np.unique(items, return_counts=True)[1].astype(float)
    return np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())


def ndcg_at_10(scores, users, items, held_out):
    """Mean over users of NDCG@10 over all items but those with a row that is not held out; users and items from 0."""
    scores = scores.astype(np.float64)
    scores[users[~held_out], items[~held_out]] = -np.inf
    relevant = np.zeros(scores.shape, bool)
    relevant[users[held_out], items[held_out]] = True
    hits = np.take_along_axis(relevant, np.argsort(-scores, axis=1, kind="stable")[:, :10], axis=1)
    gain = 1 / np.log2(np.arange(2, 12))
    ideal = np.array([gain[:n].sum() for n in relevant.sum(1)])
    return np.mean((hits @ gain)[ideal > 0] / ideal[ideal > 0])


def last_rows(users, k):
    """The last k rows of each user, in rows sorted by user and time."""
    ends = np.append(users[1:] != users[:-1], True)
    end = np.flatnonzero(ends)[np.cumsum(np.append(False, ends[:-1]))]
    return end - np.arange(len(users)) < k


def popularity_and_ease(users, items, held_out):
    """Scores [users, items] of both, from the rows that are not held out."""
    x = np.zeros((users.max() + 1, items.max() + 1))
    x[users[~held_out], items[~held_out]] = 1
    inverse = np.linalg.inv(x.T @ x + 300 * np.eye(x.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return np.tile(x.sum(0), (len(x), 1)), x @ weights


def test_tables_have_the_schema_and_every_row_makes_sense(tables, columns):
    user, item, time = columns
    assert tables.ratings.schema == RATINGS_SCHEMA and tables.items.schema == ITEMS_SCHEMA
    assert (tables.name, tables.time, tables.ratings.num_rows) == ("simulated", "seconds", 100_000)
    assert all(c.null_count == 0 for c in (*tables.ratings.columns, *tables.items.columns))
    assert len(np.unique(user * 10_000 + item)) == 100_000, "a (user, item) pair comes twice"
    assert np.all((np.diff(user) == 1) | ((np.diff(user) == 0) & (np.diff(time) > 0)))
    assert user[0] == 1 and np.array_equal(np.unique(user), np.arange(1, 944))
    assert tables.items["item_id"].to_pylist() == tables.truth.item_ids.tolist() == list(range(1, 1701))
    assert set(item) <= set(range(1, 1701))
    assert time.min() >= simulated.START and time.max() < simulated.START + simulated.SECONDS
    stars = tables.ratings["rating"].to_numpy()
    assert set(stars) == {1, 2, 3, 4, 5}
    assert abs(stars.mean() - 3.53) < 0.1 and abs(stars.std() - 1.13) < 0.15  # ml-100k's


def test_titles_are_all_different_and_sequels_come_later(tables):
    titles = tables.items["title"].to_pylist()
    assert len(set(titles)) == len(titles)
    parts = [re.fullmatch(r"(.+?)( II| III| IV| V)? \((\d{4})\)", title).groups() for title in titles]
    year = {(story, numeral or ""): int(year) for story, numeral, year in parts}
    assert min(year.values()) >= 1950 and max(year.values()) < 2020  # the first rating is of 2020
    before = {" II": "", " III": " II", " IV": " III", " V": " IV"}
    sequels = [key for key in year if key[1]]
    assert len(sequels) > 300
    assert all(year[story, before[numeral]] < year[story, numeral] for story, numeral in sequels)
    assert all(1 <= len(set(g)) == len(g) <= 2 for g in tables.items["genres"].to_pylist())


def test_a_stream_brings_the_same_ratings_a_part_at_a_time(tables):
    streamed = load("simulated", rows=600_000, seed=1, stream=True)
    assert streamed.ratings.num_rows == 0 and streamed.items.schema == ITEMS_SCHEMA
    parts = list(streamed.stream())
    assert len(parts) > 1 and pa.concat_tables(parts).equals(simulated.load(600_000, seed=1).ratings)
    assert load("simulated", rows=100_000, seed=1, stream=True).items.equals(tables.items)


def test_the_same_seed_gives_the_same_rows(tables):
    again = simulated.load(rows=100_000, seed=1)
    assert again.ratings.equals(tables.ratings) and again.items.equals(tables.items)
    other = simulated.load(rows=100_000, seed=2)
    assert not other.ratings.equals(tables.ratings) and not other.items.equals(tables.items)
    # On another machine, too. A new hash means that every committed output must be made again.
    assert (digest(tables.ratings), digest(tables.items)) == ("fbd06fc25e4331e3", "113edcde8638b514")


def test_a_chunk_alone_is_the_chunk_in_the_stream():
    rows = 436_000
    chunks = list(simulated.stream(rows, seed=3))
    assert len(chunks) == simulated.chunk_count(rows) == 2
    assert next(simulated.stream(rows, seed=3, chunks=[1])).equals(chunks[1])
    assert sum(chunk.num_rows for chunk in chunks) == rows
    first, second = (chunk["user_id"].to_numpy() for chunk in chunks)
    assert first.max() + 1 == second.min() and second.max() == round(rows / 106)


def test_a_chunk_does_not_grow_with_the_rows():
    chunk = next(simulated.stream(rows=20_000_000))
    assert chunk["user_id"].to_numpy().max() == simulated.CHUNK_USERS
    assert chunk.num_rows == pytest.approx(simulated.CHUNK_USERS * 106, rel=0.001)


def test_too_few_rows_and_unknown_ids_are_refused(tables):
    with pytest.raises(ValueError, match=r"rows is 999, expected 1,000 or more"):
        simulated.load(rows=999)
    with pytest.raises(ValueError, match=r"user_ids run from 1 to 944, expected 1 to 943"):
        tables.truth.scores([1, 944], [0, 0], [0, 0])
    with pytest.raises(ValueError, match=r"last_item_ids run from 0 to 1701, expected 0 to 1700"):
        tables.truth.scores([1, 2], [0, 1701], [0, 0])


def test_popularity_activity_and_gain_are_those_of_ml_100k(tables, columns, tell):
    users, items = columns[0] - 1, columns[1] - 1
    rows_a_user = np.percentile(np.bincount(users), PERCENTILES)
    held_out = last_rows(users, 10)
    popular, ease = (ndcg_at_10(s, users, items, held_out) for s in popularity_and_ease(users, items, held_out))
    tell(
        f"simulated against ml-100k: Gini {gini(items):.3f} / {GINI}, EASE over popularity {ease / popular:.2f} / "
        f"{GAIN}, rows a user at {PERCENTILES}% {rows_a_user.astype(int).tolist()} / {ROWS_A_USER}"
    )
    assert gini(items) == pytest.approx(GINI, rel=0.1)
    assert rows_a_user == pytest.approx(np.array(ROWS_A_USER), rel=0.15)
    assert ease / popular == pytest.approx(GAIN, rel=0.3)


@pytest.mark.skipif(not ML_100K.exists(), reason=f"no real ratings at {ML_100K}; set RECSYS_DATA_DIR")
def test_ml_100k_is_what_this_file_says():
    users, items, _, time = np.loadtxt(ML_100K, np.int64).T
    order = np.lexsort((items, time, users))
    users, items = users[order] - 1, items[order] - 1
    held_out = last_rows(users, 10)
    popular, ease = (ndcg_at_10(s, users, items, held_out) for s in popularity_and_ease(users, items, held_out))
    assert gini(items) == pytest.approx(GINI, abs=0.001)
    assert np.percentile(np.bincount(users), PERCENTILES) == pytest.approx(np.array(ROWS_A_USER), abs=1)
    assert ease / popular == pytest.approx(GAIN, abs=0.02)


def test_most_users_stand_on_both_sides_of_a_cut_in_time(columns):
    user, _, time = columns
    for share, least in ((0.8, 0.9), (0.9, 0.95)):
        after = time >= np.quantile(time, share)
        known = np.isin(np.unique(user[after]), user[~after])
        assert least < known.mean() < 1  # some are new, as in life
        assert len(known) > 400


def misfit(truth, user_ids, columns, users=lambda u: u, last=lambda x: x, times=lambda t: t):
    """Chi-square, 19 degrees of freedom, of where the items taken lie in the probabilities that truth gives.

    For each row: the probability of all items that are more probable than the one taken, with a random part of its
    own. That is uniform between 0 and 1 if, and as far as only chance shows, only if the probabilities are right.
    """
    rng, places = np.random.default_rng(0), []
    for user in user_ids:
        item, time = (c[columns[0] == user] for c in columns[1:])
        p = truth.scores(np.full(len(item), users(user)), last(np.append(0, item[:-1])), times(time))
        p = p.astype(np.float64)
        p[:, item - 1] *= 1 - np.tri(len(item), k=-1)  # the column of an item is 0 in the rows after it was taken
        own = p[np.arange(len(item)), item - 1][:, None]
        above = np.where(p > own, p, 0).sum(1)
        places.append((above + rng.random(len(item)) * own[:, 0]) / p.sum(1))
    counts = np.histogram(np.concatenate(places), 20, (0, 1))[0]
    return np.sum((counts - counts.mean()) ** 2 / counts.mean())


def test_the_truth_is_what_the_rows_were_drawn_from(tables, columns):
    user_ids = range(1, 944, 7)
    assert misfit(tables.truth, user_ids, columns) < 43.8  # 1 in 1,000 by chance
    # The same measure notices each part of the model that is missing.
    assert misfit(tables.truth, user_ids, columns, users=lambda u: u % 943 + 1) > 1000
    assert misfit(tables.truth, user_ids, columns, last=lambda x: 0 * x) > 1000
    assert misfit(tables.truth, user_ids, columns, times=lambda t: 2 * simulated.START + simulated.SECONDS - t) > 100


def test_expected_counts_are_what_many_walks_count(tables):
    """Walk the chain of `scores` many times, without leaving out items, from a user and an item."""
    truth, user, last, steps = tables.truth, 5, 77, 3
    start, end = simulated.START + 10_000_000, simulated.START + 90_000_000
    expected = truth.expected_counts([user], [last], start, end, steps)[0]
    assert expected.sum() == pytest.approx(steps, rel=1e-5)
    # Exactly: p1 = P(. | last), p2 = p1 T, p3 = p2 T, where T[j] = P(. | j), each a mean over the window.
    moments = np.linspace(start, end, 201)[:-1] + (end - start) / 400
    items = truth.item_ids
    rest = truth.scores(np.full(200, user), np.zeros(200, int), moments).mean(0) * (1 - simulated.ORDER)
    follows = truth.scores(np.full(len(items), user), items, np.full(len(items), start))
    follows -= truth.scores([user], [0], [start]) * (1 - simulated.ORDER)  # ORDER follows(i | j), the same at any time
    p, counts = np.eye(len(items))[last - 1], 0
    for _ in range(steps):
        p = p @ (follows + rest)
        counts += p
    assert np.abs(expected - counts).max() < 1e-5
    # Nothing taken yet; and 50 steps are 49 steps and one more of the settled chain.
    assert truth.expected_counts([user], [0], start, end, 1)[0] == pytest.approx(rest / (1 - simulated.ORDER), abs=1e-6)
    more = truth.expected_counts([user], [last], start, end, 50) - truth.expected_counts([user], [last], start, end, 49)
    assert np.abs(more @ follows + rest - more).max() < 1e-5  # a difference of float32


def test_best_reachable_is_far_above_popularity_and_a_shuffled_truth_is_chance(tables, columns):
    users, items, time = columns[0] - 1, columns[1] - 1, columns[2]
    asked = last_rows(users, 1)
    previous = np.append(0, columns[1][:-1])[asked]
    best = tables.truth.scores(np.unique(columns[0]), previous, time[asked])
    popular = np.tile(np.bincount(items[~asked], minlength=1700), (943, 1))
    shuffled = best[:, np.random.default_rng(0).permutation(1700)]
    best, popular, shuffled = (ndcg_at_10(s, users, items, asked) for s in (best, popular, shuffled))
    assert best > 4 * popular > 0.05
    assert shuffled < 0.01  # chance is sum(1 / log2(rank + 1)) / 1700 items = 0.003

    asked = last_rows(users, 10)
    start, end = time[last_rows(users, 11) & ~asked], time[last_rows(users, 1)]
    best = tables.truth.expected_counts(np.unique(columns[0]), columns[1][last_rows(users, 11) & ~asked], start, end)
    popular, ease = (ndcg_at_10(s, users, items, asked) for s in popularity_and_ease(users, items, asked))
    best = ndcg_at_10(best, users, items, asked)
    assert popular < 0.6 * best and popular < 0.75 * ease and 0.5 * best < ease < 0.9 * best


def test_people_take_the_sequel_next(tables, columns):
    user, item, _ = columns
    titles = [title.rsplit(" (", 1)[0] for title in tables.items["title"].to_pylist()]
    number = {title: item_id for item_id, title in enumerate(titles, 1)}
    sequel = np.array([0] + [number.get(title + " II", 0) for title in titles])
    pairs = user[1:] == user[:-1]
    previous, following = item[:-1][pairs], item[1:][pairs]
    has_one = sequel[previous] > 0
    taken_next = np.mean(sequel[previous[has_one]] == following[has_one])
    by_chance = np.mean(np.bincount(item, minlength=1701)[sequel[previous[has_one]]]) / len(item)
    # ORDER x 0.6 for the first rows of a user, more once other items of weight are taken.
    assert taken_next > simulated.ORDER * simulated.FOLLOWERS[0] and taken_next > 20 * by_chance


def test_new_items_rise_and_old_ones_fall(tables, columns):
    year = np.array([0] + [int(title[-5:-1]) for title in tables.items["title"].to_pylist()])[columns[1]]
    early, late = (
        columns[2] < simulated.START + 0.3 * simulated.SECONDS,
        columns[2] > simulated.START + 0.7 * simulated.SECONDS,
    )
    newest, oldest = year > 2005, year < 1975
    assert newest[late].mean() > 1.2 * newest[early].mean()
    assert oldest[late].mean() < 0.8 * oldest[early].mean()


def test_the_committed_sample_is_what_the_command_writes(tmp_path):
    command = [sys.executable, make_sample.__file__, "--rows", "16000", "--out", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["movies.csv", "ratings.csv"]
    for name in ("movies.csv", "ratings.csv"):
        assert (ROOT / "data/sample" / name).read_text() == (tmp_path / name).read_text(), f"run: {command}"
    assert sum((ROOT / "data/sample" / name).stat().st_size for name in ("movies.csv", "ratings.csv")) < 1_000_000
    ratings = np.loadtxt(tmp_path / "ratings.csv", delimiter=",", skiprows=1)
    expected = simulated.load(rows=16_000).ratings
    assert np.array_equal(ratings, np.column_stack([c.to_numpy() for c in expected.columns]))


def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path):
    make_sample.write_csv(tmp_path, rows=1000)
    before = (tmp_path / "ratings.csv").read_bytes()
    (tmp_path / "ratings.csv.partial").mkdir()  # nothing can be written there
    with pytest.raises(IsADirectoryError, match=r"ratings\.csv\.partial"):
        make_sample.write_csv(tmp_path, rows=2000)
    assert (tmp_path / "ratings.csv").read_bytes() == before
