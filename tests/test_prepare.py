"""Prepared data: every file against an independent computation, made once, found again, refused before it is made."""

import hashlib
import json
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_common import bigquery, datasets, input_pipeline, splits
from recsys_common import prepare as preparing
from recsys_common.config import Config
from recsys_common.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
ROWS, LENGTH, USERS = 3000, 4, 8
FEATURES = {
    "user": {"kind": "index", "column": "user_index"},
    "item": {"kind": "index", "column": "item_index"},
    "history": {"kind": "history", "column": "history", "length": LENGTH, "table": "item"},
}
DATA = {"rows": ROWS, "table": "histories", "shards": 2, "oov_buckets": 2, "minimum_frequency": 2}
CONFIG = Config(data=DATA, features=FEATURES, evaluation={"users": USERS})


class Connected(Exception):
    """Something would have been made."""


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise Connected

    monkeypatch.setattr(bigquery, "connect", refuse)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_PROGRESS", "0")
        yield


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made(runs_dir):
    return prepare(CONFIG, runs_dir=runs_dir)


@pytest.fixture(scope="module")
def parts(made):
    """Part -> (user, item, time, rating) of the ratings as they are: the first in time, those that follow, the rest."""
    ratings = datasets.load("simulated", rows=ROWS).ratings.sort_by("timestamp").to_pydict()
    rows = list(zip(*(ratings[name] for name in ("user_id", "item_id", "timestamp", "rating")), strict=True))
    first, second, last = (made.about["counts"][part] for part in ("train", "validation", "test"))
    assert first + second + last == ROWS == len(rows)
    assert abs(first - 0.8 * ROWS) < 0.01 * ROWS and abs(second - 0.1 * ROWS) < 0.01 * ROWS
    cut, late = rows[first][2], rows[first + second][2]
    assert rows[first - 1][2] < cut and rows[first + second - 1][2] < late  # no moment is in two parts
    return {"train": rows[:first], "validation": rows[first : first + second], "test": rows[first + second :]}


def rows_of(parts, made, side):
    """id -> row of the table, from the vocabulary."""
    return {id_: row for row, id_ in enumerate(made.vocabulary(side).tolist(), CONFIG.data.oov_buckets)}


def test_ids_are_numbered_by_their_rows_in_training(made, parts):
    for side, column in (("user", 0), ("item", 1)):
        counts = Counter(row[column] for row in parts["train"])
        known = sorted((id_ for id_ in counts if counts[id_] >= 2), key=lambda id_: (-counts[id_], id_))
        assert made.vocabulary(side).tolist() == known and made.about["rows"][side] == 2 + len(known)
        assert made.config.features[side].rows == 2 + len(known)
        every = {row[column] for rows in parts.values() for row in rows}
        table = pq.read_table(f"{made.folder}/{side}_vocabulary.parquet")
        assert set(table[f"{side}_id"].to_pylist()) == every and table.num_rows == len(every)
    counts = Counter(row[1] for row in parts["train"])
    frequency = made.frequency()
    assert frequency[2:].tolist() == [counts[id_] for id_ in made.vocabulary("item").tolist()]
    assert frequency.sum() == len(parts["train"]) and frequency[:2].sum() == sum(n for n in counts.values() if n < 2)


@pytest.mark.parametrize(("part", "before"), [("validation", ["train"]), ("test", ["train", "validation"])])
def test_who_is_asked_for_what_and_what_they_had_seen(made, parts, part, before):
    users, items = rows_of(parts, made, "user"), rows_of(parts, made, "item")
    asked = [(users.get(u, 0), items.get(i, 0)) for u, i, *_ in parts[part]]
    stride = made.about["stride"]
    assert stride == -(-len(users) // USERS) > 1
    chosen = {user for user, _ in asked if user >= 2 and user % stride == 0}
    assert 0 < len(chosen) <= USERS
    seen = [(users.get(u, 0), items.get(i, 0)) for name in before for u, i, *_ in parts[name]]
    found_users, found_items, seen_users, seen_items = made.pairs(part)
    # of items out of the vocabulary it is known that they are in one of the two rows
    flat = lambda pairs: Counter((user, item if item >= 2 else 0) for user, item in pairs)  # noqa: E731
    expected = flat(pair for pair in asked if pair[0] in chosen)
    assert flat(zip(found_users.tolist(), found_items.tolist(), strict=True)) == expected
    expected = flat(pair for pair in seen if pair[0] in chosen)
    assert flat(zip(seen_users.tolist(), seen_items.tolist(), strict=True)) == expected

    taken = defaultdict(list)
    for name in before:
        for user, item, when, rating in parts[name]:
            if users.get(user, 0) in chosen:
                taken[users[user]].append((when, item, rating))
    histories = {user: [max(items.get(row[1], 0), 0) for row in sorted(rows)][-LENGTH:] for user, rows in taken.items()}
    found = {user: [item if item >= 2 else 0 for item in row] for user, row in made.histories(part).items()}
    assert found == histories and max(map(len, found.values())) == LENGTH


def test_splits_take_the_same_rows_with_ratings_and_times(made, parts, runs_dir, monkeypatch):
    columns = {
        "stars": {"kind": "label", "column": "rating"},
        "time": {"kind": "hash", "column": "timestamp", "rows": 1},
    }
    data = prepare(Config(data=DATA, features=FEATURES | columns, evaluation={"users": USERS}), runs_dir=runs_dir)
    found = splits.prepared(data)
    # Row 0 is for both of the rows of unknown ids: the first known id is in row 1.
    users, items = ({id_: row - 1 for id_, row in rows_of(parts, made, side).items()} for side in ("user", "item"))
    train = found["test"].train
    rows = zip(train.users.tolist(), train.items.tolist(), train.times.tolist(), train.values.tolist(), strict=True)
    expected = Counter((users.get(u, 0), items[i], t, r) for u, i, t, r in parts["train"] if i in items)
    assert Counter(rows) == expected and 0 < expected.total() < len(parts["train"])
    for row in range(train.num_users):
        its = slice(train.offsets[row], train.offsets[row + 1])
        assert (np.diff(train.times[its]) >= 0).all(), f"user {row} is not in order of time"
    for part, before in (("validation", ["train"]), ("test", ["train", "validation"])):
        split = found[part]
        assert split.train is train and (split.user_ids[0], split.item_ids[0]) == (-1, -1)
        assert split.item_ids[1:].tolist() == made.vocabulary("item").tolist()
        chosen = set(split.test.users.tolist())
        asked = Counter((users[u], items.get(i, 0)) for u, i, *_ in parts[part] if users.get(u, 0) in chosen)
        assert Counter(zip(split.test.users.tolist(), split.test.items.tolist(), strict=True)) == asked
        taken = [row for name in before for row in parts[name]]
        seen = Counter((users[u], items[i]) for u, i, *_ in taken if users.get(u, 0) in chosen and i in items)
        assert Counter(zip(split.seen.users.tolist(), split.seen.items.tolist(), strict=True)) == seen
    with monkeypatch.context() as small:
        small.setattr(splits, "BYTES_A_ROW", 2**30)
        with pytest.raises(ValueError, match=r"training rows take .* GB while they are sorted.*data\.limit"):
            splits.prepared(data)
    limited = prepare(data.config.override("data.limit=100"), runs_dir=runs_dir)
    assert splits.prepared(limited)["test"].train.lengths.sum() <= 100


def test_the_training_files_hold_the_training_rows(made, parts):
    users, items = rows_of(parts, made, "user"), rows_of(parts, made, "item")
    expected = Counter((users.get(u, 0), items.get(i, 0)) for u, i, *_ in parts["train"])
    read = input_pipeline.batches(made.train, 100, seed=None, lengths=made.config.lengths(), remainder="pad")
    found = Counter()
    for batch in read.as_numpy_iterator():
        real = batch["weight"] > 0
        pairs = zip(batch["user_index"][real].tolist(), batch["item_index"][real].tolist(), strict=True)
        found += Counter((user if user >= 2 else 0, item if item >= 2 else 0) for user, item in pairs)
    assert found == expected


def test_data_json_has_the_hash_of_every_file(made):
    files = [path for path in Path(made.folder).rglob("*") if path.is_file()]
    names = {str(path.relative_to(made.folder)) for path in files} - {"data.json", "train/manifest.json"}
    assert names == set(made.about["files"])
    for name, sha256 in (made.about["files"] | {"train/manifest.json": made.about["manifest"]}).items():
        assert hashlib.sha256((Path(made.folder) / name).read_bytes()).hexdigest() == sha256, name
    assert Path(made.folder).name == made.about["key"][:12]


def test_it_is_found_again_whatever_the_model_and_made_anew_where_data_differs(made, runs_dir, offline):
    for same in ("seed=7", "model.embedding_dim=8", "training.epochs=1", "features.item.rows=5000"):
        again = prepare(CONFIG.override(same), runs_dir=runs_dir)
        assert again.about == made.about and again.folder == made.folder
    assert again.config.features["item"].rows == 5000
    for other in ("data.rows=3001", "data.shards=3", "data.minimum_frequency=1", "features.history.length=5"):
        with pytest.raises(Connected):
            prepare(CONFIG.override(other), runs_dir=runs_dir)
        with pytest.raises(ValueError, match=r"holds other data:\n  \w+: .*, now .*\nName another folder"):
            prepare(CONFIG.override(other), made.folder)
    with pytest.raises(FileNotFoundError, match=r"nothing: no data\.json, so its data is gone"):
        preparing.found(runs_dir / "nothing", CONFIG)


def test_made_twice_it_has_the_same_content_and_what_was_half_made_is_not_taken_for_whole(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "half")
    (tmp_path / "half" / "data.json").unlink()
    (tmp_path / "half" / "test.parquet").write_bytes(b"cut sho")
    again = prepare(CONFIG, tmp_path / "half")
    assert again.about["content"] == made.about["content"]
    assert json.loads((tmp_path / "half" / "data.json").read_text()) == again.about
    for one, other in zip(again.pairs("test"), made.pairs("test"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tables_that_somebody_else_replaces_meanwhile_are_noticed(tmp_path, monkeypatch):
    convert = preparing.conversion.convert

    def meanwhile(folder, source, columns):
        time.sleep(0.01)  # times of tables have milliseconds
        source.warehouse.query("CREATE OR REPLACE TABLE item_vocabulary AS SELECT * FROM item_vocabulary")
        return convert(folder, source, columns)

    monkeypatch.setattr(preparing.conversion, "convert", meanwhile)
    with pytest.raises(RuntimeError, match="item_vocabulary was replaced meanwhile"):
        prepare(CONFIG, tmp_path)
    assert not (tmp_path / "data.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data.table=examples"], r"1 of the features cannot be had\n  features\.history: the table examples has no "
         r"column 'history', only user_index, .*; set data\.table=histories"),
        (["features.user.column=user_id", "features.item.column=title"], r"(?s)2 of the features.*features\.item: .* "
         r"no column 'title'.*features\.user: the table histories has no column 'user_id'"),
        (["features.user.column=history"], r"features\.user: the column 'history' holds lists"),
        (["data.table=mine"], r"data\.table: found 'mine'; prepare makes examples and histories"),
        (["data.split="], r"data\.split: found None, expected 'train'"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_refused_by_name_before_anything_is_read(change, said, offline, tmp_path):
    if change == ["features.user.column=history"]:
        change = [*change, "features.history.column=user_index"]
    with pytest.raises(ValueError, match=said):
        prepare(CONFIG.override(*change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_data_set_decide_by_what_is_in_them(tmp_path, offline):
    def key(dataset: str = "sample") -> dict:
        with pytest.raises(Connected):
            prepare(CONFIG.override(f"data.dataset={dataset}"), runs_dir=tmp_path, data_dir=tmp_path)
        return {path.name for path in (tmp_path / "data").iterdir()}

    shutil.copytree(ROOT / "data" / "sample", tmp_path / "sample")
    first = key()
    for file in (tmp_path / "sample").iterdir():
        file.touch()
    assert len(first) == 1 and key() == first
    ratings = tmp_path / "sample" / "ratings.csv"
    ratings.write_text("".join(ratings.read_text().splitlines(keepends=True)[:-1]))
    assert len(key()) == 2
    with pytest.raises(ValueError, match="'nonsense' is not a data set; expected simulated, sample"):
        prepare(CONFIG.override("data.dataset=nonsense"), runs_dir=tmp_path)
