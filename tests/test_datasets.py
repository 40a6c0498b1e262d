"""Do real ratings come in whole, in each format, and is every fault named by file and line?"""

import csv
import dataclasses
import hashlib
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from recsys_common.datasets import ITEMS_SCHEMA, RATINGS_SCHEMA, checks, download, movielens, netflix

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("RECSYS_DATA_DIR") or ROOT.parent / "shared" / "data")
EDITED = pytest.mark.filterwarnings("ignore:.*is not the published file")

RATINGS_CSV = """userId,movieId,rating,timestamp
1,10,4.0,964982703
1,30,0.5,964981247
2,10,5,1445714835
"""
MOVIES_CSV = '''movieId,title,genres
10,"American President, The (1995)",Comedy|Drama
20,"""Great Performances"" Cats (1998)",(no genres listed)
30,Amélie (2001),Romance
'''
RATED = [(1, 10, 4.0, 964982703), (1, 30, 0.5, 964981247), (2, 10, 5.0, 1445714835)]


def write(folder, files=()):
    """A folder with the files {name: content}; text is written as UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in dict(files).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def csv_folder(tmp_path, ratings=RATINGS_CSV, movies=MOVIES_CSV):
    return write(tmp_path / "mine", {"ratings.csv": ratings, "movies.csv": movies})


def rows(table):
    return [tuple(row.values()) for row in table.to_pylist()]


def check_schemas(tables):
    assert tables.ratings.schema == RATINGS_SCHEMA
    assert tables.items.schema == ITEMS_SCHEMA
    tables.ratings.validate(full=True)
    tables.items.validate(full=True)


# --- the real files ---------------------------------------------------------------------------------------------


def real(name):
    if not (REAL / movielens.NAMES[name].folder).is_dir():
        pytest.skip(f"no {movielens.NAMES[name].folder} in {REAL}: set RECSYS_DATA_DIR to the folder that has it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the published files give no warning
        return movielens.load(name, REAL)


@pytest.mark.parametrize(
    ("name", "ratings", "users", "rated", "items", "time_is"),
    [
        ("ml-latest-small", 100_836, 610, 9_724, 9_742, "seconds"),
        ("ml-100k", 100_000, 943, 1_682, 1_682, "seconds"),
        ("ml-1m", 999_611, 6_040, 3_416, 3_416, "order"),
        ("ml-1m-ratings", 1_000_209, 6_040, 3_706, 3_883, "none"),
    ],
)
def test_real_counts(name, ratings, users, rated, items, time_is):
    tables = real(name)
    check_schemas(tables)
    assert (tables.name, tables.time, tables.truth) == (name, time_is, None)
    assert tables.ratings.num_rows == ratings
    assert len(tables.ratings["user_id"].unique()) == users
    assert len(tables.ratings["item_id"].unique()) == rated
    assert tables.items.num_rows == items


def test_real_latest_small_equals_a_plain_csv_reader():
    tables = real("ml-latest-small")
    with (REAL / "ml-latest-small" / "ratings.csv").open() as file:
        expected = [(int(u), int(i), float(r), int(t)) for u, i, r, t in list(csv.reader(file))[1:]]
    assert rows(tables.ratings) == expected
    with (REAL / "ml-latest-small" / "movies.csv").open(encoding="utf-8") as file:
        movies = list(csv.reader(file))[1:]
    genres = [[] if text == "(no genres listed)" else text.split("|") for _, _, text in movies]
    assert rows(tables.items) == [(int(m[0]), m[1], g) for m, g in zip(movies, genres, strict=True)]


def test_real_100k_genres_add_up_to_the_flags():
    tables = real("ml-100k")
    lines = (REAL / "ml-100k" / "u.item").read_text(encoding="latin-1").splitlines()
    flags = sum(int(flag) for line in lines for flag in line.split("|")[6:])  # the first of the 19 is "unknown"
    assert sum(len(genres) for genres in tables.items["genres"].to_pylist()) == flags
    first = tables.items.slice(0, 1).to_pylist()[0]
    assert first == {"item_id": 1, "title": "Toy Story (1995)", "genres": ["Animation", "Children's", "Comedy"]}


def test_real_sasrec_items_have_the_popularity_of_their_titles():
    sasrec, whole = real("ml-1m"), real("ml-1m-ratings")

    def counts(tables):  # title -> ratings
        title = dict(zip(tables.items["item_id"].to_pylist(), tables.items["title"].to_pylist(), strict=True))
        values = tables.ratings["item_id"].value_counts().to_pylist()
        return {title[value["values"]]: value["counts"] for value in values}

    mapped, original = counts(sasrec), counts(whole)
    assert mapped == {title: count for title, count in original.items() if count >= 5}
    assert max(mapped, key=mapped.get) == "American Beauty (1999)"


def test_real_sasrec_timestamps_count_from_0_in_every_history():
    ratings = real("ml-1m").ratings
    user, position = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
    lines = np.loadtxt(REAL / "ml-1m" / "sasrec-ml-1m.txt", dtype=np.int64, max_rows=5000)
    seen = {}
    for line, u in enumerate(lines[:, 0].tolist()):
        assert position[line] == seen.get(u, 0)
        seen[u] = seen.get(u, 0) + 1
    assert (np.diff(position)[np.diff(user) == 0] == 1).all()


# --- the formats ------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    tables = movielens.read_csv_folder(csv_folder(tmp_path), "mine")
    check_schemas(tables)
    assert (tables.name, tables.time) == ("mine", "seconds")
    assert rows(tables.ratings) == RATED
    assert rows(tables.items) == [
        (10, "American President, The (1995)", ["Comedy", "Drama"]),
        (20, '"Great Performances" Cats (1998)', []),
        (30, "Amélie (2001)", ["Romance"]),
    ]


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: t[:-1], lambda t: "\ufeff" + t])
def test_csv_with_other_line_ends_no_last_one_or_a_byte_order_mark(tmp_path, change):
    tables = movielens.read_csv_folder(csv_folder(tmp_path, change(RATINGS_CSV), change(MOVIES_CSV)), "mine")
    assert rows(tables.ratings) == RATED
    assert tables.items["title"].to_pylist()[2] == "Amélie (2001)"


@EDITED
def test_100k(tmp_path):
    genres = ["unknown", *"ABCDEFGHIJKLMNOPQR"]
    flags = ["0|1|1" + "|0" * 16, "1" + "|0" * 18, "0" + "|0" * 17 + "|1"]
    titles = ["Première (1994)", "unknown", "Last (1998)"]
    items = "".join(
        f"{i + 1}|{t}|01-Jan-1995||http://x|{f}\n" for i, (t, f) in enumerate(zip(titles, flags, strict=True))
    )
    files = {
        "u.data": "196\t3\t3\t881250949\n186\t1\t5\t891717742\n",
        "u.item": items.encode("latin-1"),
        "u.genre": "".join(f"{genre}|{number}\n" for number, genre in enumerate(genres)) + "\n",
    }
    write(tmp_path / "ml-100k", files)
    tables = movielens.load("ml-100k", tmp_path)
    check_schemas(tables)
    assert rows(tables.ratings) == [(196, 3, 3.0, 881250949), (186, 1, 5.0, 891717742)]
    assert rows(tables.items) == [(1, "Première (1994)", ["A", "B"]), (2, "unknown", []), (3, "Last (1998)", ["R"])]


DAT_MOVIES = "7::Misérables, Les: A Tale (1995)::Drama|Musical\n8::Heat (1995)::Action\n9::Alone (1990)::\n"


@EDITED
@pytest.mark.parametrize("name", ["ml-1m", "ml-1m-ratings"])
def test_1m_as_published(tmp_path, name):
    movies = DAT_MOVIES.encode("latin-1")
    write(tmp_path / "ml-1m", {"ratings.dat": "5::8::4::978300760\n1::7::1::978302109\n", "movies.dat": movies})
    tables = movielens.load(name, tmp_path)
    check_schemas(tables)
    assert tables.time == "seconds"
    assert rows(tables.ratings) == [(5, 8, 4.0, 978300760), (1, 7, 1.0, 978302109)]
    assert tables.items["title"].to_pylist()[0] == "Misérables, Les: A Tale (1995)"
    assert tables.items["genres"].to_pylist() == [["Drama", "Musical"], ["Action"], []]


@EDITED
def test_10m_has_half_stars_and_utf8(tmp_path):
    write(tmp_path / "ml-10M100K", {"ratings.dat": "5::7::3.5::978300760\n", "movies.dat": DAT_MOVIES})
    tables = movielens.load("ml-10m", tmp_path)
    assert rows(tables.ratings) == [(5, 7, 3.5, 978300760)]
    assert tables.items["title"].to_pylist()[0] == "Misérables, Les: A Tale (1995)"


@EDITED
def test_1m_ratings_without_timestamps(tmp_path):
    files = {"ratings_no_timestamp.dat": "5::8::4\n1::7::1\n", "movies.dat": DAT_MOVIES.encode("latin-1")}
    write(tmp_path / "ml-1m", files)
    tables = movielens.load("ml-1m-ratings", tmp_path)
    check_schemas(tables)
    assert tables.time == "none"
    assert rows(tables.ratings) == [(5, 8, 4.0, 0), (1, 7, 1.0, 0)]


def sasrec_folder(tmp_path, lines="1 1\n1 2\n3 2\n1 3\n3 1\n", ids="1 9\n2 7\n3 8\n"):
    movies = DAT_MOVIES.encode("latin-1")
    files = {"sasrec-ml-1m.txt": lines, "sas_to_original_items.txt": ids, "movies.dat": movies}
    return write(tmp_path / "ml-1m", files)


@EDITED
def test_1m_as_sasrec_has_it(tmp_path):
    sasrec_folder(tmp_path)
    tables = movielens.load("ml-1m", tmp_path)
    check_schemas(tables)
    assert tables.time == "order"
    assert rows(tables.ratings) == [(1, 1, 1.0, 0), (1, 2, 1.0, 1), (3, 2, 1.0, 0), (1, 3, 1.0, 2), (3, 1, 1.0, 1)]
    titles = ["Alone (1990)", "Misérables, Les: A Tale (1995)", "Heat (1995)"]
    assert rows(tables.items.select(["item_id", "title"])) == list(zip([1, 2, 3], titles, strict=True))


@EDITED
def test_sasrec_positions_of_users_whose_lines_are_mixed(tmp_path):
    pairs = np.random.default_rng(1).permutation([(user, item) for user in range(60) for item in range(300)])
    lines = "".join(f"{user} {item}\n" for user, item in pairs)
    sasrec_folder(tmp_path, lines, "".join(f"{item} 7\n" for item in range(300)))
    seen = [0] * 60
    for user, item, rating, position in rows(movielens.load("ml-1m", tmp_path).ratings):
        assert (user, item, rating, position) == (*pairs[sum(seen)], 1.0, seen[user])
        seen[user] += 1


@EDITED
def test_sasrec_positions_have_no_gap_where_a_duplicate_was_dropped(tmp_path):
    sasrec_folder(tmp_path, lines="1 1\n1 2\n1 1\n1 3\n")
    with pytest.warns(UserWarning, match=r"dropped 1 of 4 ratings"):
        tables = movielens.load("ml-1m", tmp_path, duplicates="last")
    assert rows(tables.ratings) == [(1, 2, 1.0, 0), (1, 1, 1.0, 1), (1, 3, 1.0, 2)]


@EDITED
def test_sasrec_item_without_a_movie(tmp_path):
    folder = sasrec_folder(tmp_path, ids="1 9\n2 70\n3 8\n")
    expected = f"{folder / 'sas_to_original_items.txt'}, line 2: {folder / 'movies.dat'} has no movie 70."
    with pytest.raises(ValueError, match=re.escape(expected)):
        movielens.load("ml-1m", tmp_path)


def test_the_folder_itself_is_found_too(tmp_path):
    folder = csv_folder(tmp_path).rename(tmp_path / "ml-20m")
    with pytest.warns(UserWarning, match="ratings.csv is not the published file"):
        assert rows(movielens.load("ml-20m", folder).ratings) == RATED


# --- malformed lines --------------------------------------------------------------------------------------------

ID_RANGE = "expected an integer from 0 to 9223372036854775807"
BAD_RATINGS = [
    ("3,10,4.0", "'3,10,4.0' has 3 fields, expected 4 (userId, movieId, rating, timestamp)"),
    ("3,10,4.0,1,1", "'3,10,4.0,1,1' has 5 fields, expected 4"),
    ("3;10;4.0;1", "'3;10;4.0;1' has 1 field, expected 4"),
    ("3::10::4.0::1", "has 1 field, expected 4"),
    (",10,4.0,1", f"userId is '', {ID_RANGE}"),
    ("3,,4.0,1", f"movieId is '', {ID_RANGE}"),
    ("3,10,,1", "rating is '', expected a number from 0.5 to 5"),
    ("3,10,4.0,", "timestamp is '', expected seconds since 1970, an integer from 0"),
    ("3,10,null,1", "rating is 'null', expected a number"),
    ("3,NA,4.0,1", f"movieId is 'NA', {ID_RANGE}"),
    ("3,10,nan,1", "rating is 'nan', expected a number from 0.5 to 5"),
    ("3,10,NaN,1", "rating is 'NaN', expected a number from 0.5 to 5"),
    ("3,10,inf,1", "rating is 'inf', expected a number from 0.5 to 5"),
    ("3,10,-inf,1", "rating is '-inf', expected a number from 0.5 to 5"),
    ("3,10,abc,1", "rating is 'abc', expected a number from 0.5 to 5"),
    ("3,10,5.5,1", "rating is '5.5', expected a number from 0.5 to 5"),
    ("3,10,0,1", "rating is '0', expected a number from 0.5 to 5"),
    ("9223372036854775808,10,4.0,1", f"userId is '9223372036854775808', {ID_RANGE}"),
    ("3,99999999999999999999,4.0,1", f"movieId is '99999999999999999999', {ID_RANGE}"),
    ("-3,10,4.0,1", f"userId is '-3', {ID_RANGE}"),
    ("3,10.5,4.0,1", f"movieId is '10.5', {ID_RANGE}"),
    ("3,10,4.0,-1", "timestamp is '-1', expected seconds since 1970"),
    ("3,10,4.0,1e9", "timestamp is '1e9', expected seconds since 1970"),
    ("3,10,4.0,2005-09-06", "timestamp is '2005-09-06', expected seconds since 1970"),
    ("\0" * 200, "has 1 field, expected 4"),
]


@pytest.mark.parametrize(("line", "message"), BAD_RATINGS)
def test_bad_line_in_ratings_csv(tmp_path, line, message):
    folder = csv_folder(tmp_path, f"{RATINGS_CSV}{line}\n7,10,3.0,5\n")
    with pytest.raises(ValueError) as error:
        movielens.read_csv_folder(folder, "mine")
    assert str(error.value).startswith(f"{folder / 'ratings.csv'}, line 5: ")
    assert message in str(error.value)
    assert str(error.value).endswith("Mend or remove the line, or download the file again.")
    assert len(str(error.value)) < len(str(folder)) + 300


def test_the_first_of_several_bad_lines_is_named(tmp_path):
    folder = csv_folder(tmp_path, f"{RATINGS_CSV}7,10,3.0,5\n8,10,9.0,1\n-9,10,nan\nx\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 6: rating is '9.0'"):
        movielens.read_csv_folder(folder, "mine")


def test_a_bad_line_far_down(tmp_path):
    """The scan for it skips the good lines in blocks of 16 MB."""
    good = "".join(f"{user},10,4.5,964982703\n" for user in range(1_000_000, 1_700_000))  # 17 MB
    folder = csv_folder(tmp_path, f"{RATINGS_CSV}{good}\n5,10,x,1\n6,10,4.0,1\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 700006: rating is 'x'"):
        movielens.read_csv_folder(folder, "mine")


def test_line_numbers_count_blank_lines(tmp_path):
    folder = csv_folder(tmp_path, RATINGS_CSV.replace("2,10,5,", "\n\r\n2,10,6,"))
    with pytest.raises(ValueError, match=r"ratings.csv, line 6: rating is '6'"):
        movielens.read_csv_folder(folder, "mine")


@pytest.mark.parametrize("at", range(len(RATINGS_CSV) - 17, len(RATINGS_CSV) - 10))
def test_a_file_cut_within_its_last_line(tmp_path, at):
    folder = csv_folder(tmp_path, RATINGS_CSV[:at])
    with pytest.raises(ValueError, match=r"line 4: .* The file ends in this line: it looks half-downloaded\."):
        movielens.read_csv_folder(folder, "mine")


def test_ratings_that_are_not_text(tmp_path):
    folder = csv_folder(tmp_path, RATINGS_CSV.encode() + b"3,1\xff0,4.0,1\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 5: b'3,1\\xff0,4\.0,1\\n' is not utf-8"):
        movielens.read_csv_folder(folder, "mine")


@pytest.mark.parametrize("text", ["1,10,4.0,964982703\n", "user,item,rating,timestamp\n1,10,4.0,9\n", "userId\n1\n"])
def test_wrong_header(tmp_path, text):
    message = f"ratings.csv, line 1: the header is {text.splitlines()[0]!r}, expected 'userId,movieId,rating,timestamp'"
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.read_csv_folder(csv_folder(tmp_path, text), "mine")


def test_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"ratings\.csv is empty \(0 bytes\)"):
        movielens.read_csv_folder(csv_folder(tmp_path, ""), "mine")
    with pytest.raises(ValueError, match=r"ratings\.csv has no rows"):
        movielens.read_csv_folder(csv_folder(tmp_path, RATINGS_CSV.splitlines()[0] + "\n"), "mine")
    with pytest.raises(ValueError, match=r"movies\.csv has no rows"):
        movielens.read_csv_folder(csv_folder(tmp_path, movies="movieId,title,genres\n"), "mine")


BAD_MOVIES = [
    ("40,,Drama", "line 5: title is '', expected a text that is not empty"),
    (
        "40,Heat, The (1995),Drama",
        "line 5: '40,Heat, The (1995),Drama' has 4 fields, expected 3 (movieId, title, genres)",
    ),
    ("x,Heat (1995),Drama", "line 5: movieId is 'x'"),
    ("10,Heat (1995),Drama", "line 2 and line 5: item 10 is there twice."),
]


@pytest.mark.parametrize(("line", "message"), BAD_MOVIES)
def test_bad_line_in_movies_csv(tmp_path, line, message):
    folder = csv_folder(tmp_path, movies=f"{MOVIES_CSV}{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'movies.csv'}, {message}")):
        movielens.read_csv_folder(folder, "mine")


def test_movies_in_another_encoding(tmp_path):
    folder = csv_folder(tmp_path, movies=MOVIES_CSV.encode("latin-1"))
    with pytest.raises(ValueError, match=r"movies\.csv, line 4: .*Am\\xe9lie.* is not utf-8"):
        movielens.read_csv_folder(folder, "mine")


def test_a_rated_item_that_is_not_in_the_movies(tmp_path):
    folder = csv_folder(tmp_path, RATINGS_CSV + "3,77,4.0,1\n4,77,4.0,1\n5,78,4.0,1\n")
    with pytest.raises(ValueError) as error:
        movielens.read_csv_folder(folder, "mine")
    assert f"{folder / 'ratings.csv'}, line 5: item 77 is rated but is not in {folder / 'movies.csv'}" in str(
        error.value
    )
    assert "(2 such items in all)" in str(error.value)


@EDITED
@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("ml-1m", "ratings.dat", "5::8::4::97\n1::7::1:97\n", "line 2: '1::7::1:97' has 3 fields, expected 4"),
        ("ml-1m", "ratings.dat", "5::8::4::97\n1::7::3.5:\n", "line 2: '1::7::3.5:' has 3 fields, expected 4"),
        ("ml-1m", "ratings.dat", "5\t8\t4\t97\n", "line 1: '5\\t8\\t4\\t97' has 1 field, expected 4"),
        ("ml-1m", "ratings.dat", "5::8::0.5::97\n", "line 1: rating is '0.5', expected a number from 1 to 5"),
        ("ml-1m", "ratings.dat", "5::8::4::97\n5::8::3::98\n", "line 2: user 5 rated item 8 twice"),
        ("ml-10m", "ratings.dat", "5::8::0.4::97\n", "line 1: rating is '0.4', expected a number from 0.5 to 5"),
        ("ml-1m", "movies.dat", "8::Heat (1995)\n", "line 1: '8::Heat (1995)' has 2 fields, expected 3"),
    ],
)
def test_bad_dat_files(tmp_path, name, file, content, message):
    folder = tmp_path / movielens.NAMES[name].folder
    write(folder, {"ratings.dat": "5::8::4::978300760\n", "movies.dat": DAT_MOVIES.encode("latin-1"), file: content})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        movielens.load(name, tmp_path)
    assert str(folder / file) in str(error.value)


@EDITED
def test_bad_sasrec_line(tmp_path):
    folder = sasrec_folder(tmp_path, lines="1 1\n1 2 5\n")
    message = f"{folder / 'sasrec-ml-1m.txt'}, line 2: '1 2 5' has 3 fields, expected 2 (user, item)"
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.load("ml-1m", tmp_path)


# --- duplicates -------------------------------------------------------------------------------------------------


def test_duplicates_are_refused_by_line(tmp_path):
    folder = csv_folder(tmp_path, RATINGS_CSV + "\n1,10,2.0,964982704\n2,10,1.0,5\n")
    ratings = folder / "ratings.csv"
    message = f"{ratings}, line 2 and {ratings}, line 6: user 1 rated item 10 twice (2 such rows in all)."
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.read_csv_folder(folder, "mine")


def test_the_last_duplicate_stays_by_time_then_by_line(tmp_path):
    more = "1,10,2.0,964982702\n2,10,1.0,1445714835\n3,20,3.0,7\n2,10,2.0,1445714835\n"
    folder = csv_folder(tmp_path, RATINGS_CSV + more)
    with pytest.warns(UserWarning, match="dropped 3 of 7 ratings"):
        tables = movielens.read_csv_folder(folder, "mine", duplicates="last")
    assert rows(tables.ratings) == [RATED[0], RATED[1], (3, 20, 3.0, 7), (2, 10, 2.0, 1445714835)]


def test_unsorted_rows_without_duplicates_keep_their_order(tmp_path):
    lines = RATINGS_CSV.splitlines()
    folder = csv_folder(tmp_path, "\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for duplicates in ("error", "last"):
            assert rows(movielens.read_csv_folder(folder, "mine", duplicates).ratings) == RATED[::-1]


def test_unknown_way_with_duplicates(tmp_path):
    with pytest.raises(ValueError, match="duplicates is 'first', expected 'error' or 'last'"):
        movielens.read_csv_folder(csv_folder(tmp_path), "mine", duplicates="first")


BIG = st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63 - 1])  # products of these do not fit into an int64


@hypothesis.given(st.lists(st.tuples(BIG, BIG, st.integers(0, 3)), min_size=1, max_size=30))
def test_duplicates_against_a_dictionary(events):
    user, item, moment = zip(*events, strict=True)
    columns = [pa.array(x, pa.int64()) for x in (user, item)]
    columns += [pa.array(range(len(events)), pa.float32()), pa.array(moment, pa.int64())]
    table = pa.Table.from_arrays(columns, schema=RATINGS_SCHEMA)
    last = {}
    for row, (u, i, t) in enumerate(events):
        if (u, i) not in last or t >= last[u, i][0]:
            last[u, i] = (t, row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = checks.without_duplicates(table, "last", str)
    assert kept["rating"].to_pylist() == sorted(row for _, row in last.values())
    if len(last) < len(events):
        seen, pair = {}, None
        for row, event in enumerate(events):
            if event[:2] in seen:
                pair = f"{seen[event[:2]]} and {row}: user {event[0]} rated item {event[1]} twice"
                break
            seen[event[:2]] = row
        count = len(events) - len(last)
        with pytest.raises(ValueError, match=rf"^{pair} \({count} such rows in all\)"):
            checks.without_duplicates(table, "error", str)
    else:
        assert checks.without_duplicates(table, "error", str) is table


# --- what is missing, cut, or edited ----------------------------------------------------------------------------


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"no MovieLens dataset 'ml-2m'; there are ml-latest-small, ml-100k, ml-1m"):
        movielens.load("ml-2m", tmp_path)


def test_missing_data_dir_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dta is not a folder\. Create it, or name the one that holds ml-1m/"):
        movielens.load("ml-1m", tmp_path / "dta")
    assert not (tmp_path / "dta").exists()


def test_missing_file_says_what_is_there(tmp_path):
    write(tmp_path / "ml-1m", {"users.dat": "", "movies.dat": DAT_MOVIES.encode("latin-1")})
    with pytest.raises(FileNotFoundError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        movielens.load("ml-1m", tmp_path)
    assert f"{tmp_path / 'ml-1m'} lacks ratings.dat (needed: ratings.dat, movies.dat; " in str(error.value)
    assert "there: movies.dat, users.dat)" in str(error.value)
    assert movielens.BASE_URL in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"mine is not a folder\. It should hold ratings\.csv, movies\.csv"):
        movielens.read_csv_folder(tmp_path / "mine", "mine")


def test_half_downloaded_file_that_is_well_formed(tmp_path):
    write(tmp_path / "ml-latest-small", {"ratings.csv": RATINGS_CSV[:-2], "movies.csv": MOVIES_CSV})
    size = len(RATINGS_CSV) - 2
    message = f"ratings.csv is {size} bytes, expected 2,483,723 or 2,382,886, and its last line has no end"
    with pytest.raises(ValueError, match=f"{message}: it looks half-downloaded"):
        movielens.load("ml-latest-small", tmp_path)


@EDITED
def test_edited_file_is_read_with_a_warning(tmp_path):
    write(tmp_path / "ml-latest-small", {"ratings.csv": RATINGS_CSV, "movies.csv": MOVIES_CSV})
    with pytest.warns(UserWarning, match=r"ratings\.csv is not the published file \(88 bytes, published 2,483,723"):
        tables = movielens.load("ml-latest-small", tmp_path)
    assert rows(tables.ratings) == RATED


def test_the_same_size_with_other_bytes_is_noticed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1,2\n")
    good, other = (hashlib.sha256(data).hexdigest() for data in (b"1,2\n", b"1,3\n"))
    with pytest.warns(UserWarning, match="is not the published file"):
        download.check_local(path, [(4, other)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        download.check_local(path, [(9, other), (4, good)])
        download.check_local(path, [(4, None)])


# --- downloads, from a real server ------------------------------------------------------------------------------


def make_zip(folder="ml-tiny", **files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in (files or {"ratings.csv": RATINGS_CSV, "movies.csv": MOVIES_CSV}).items():
            archive.writestr(f"{folder}/{name}", content)
    return data.getvalue()


ZIP = make_zip()


class Server(http.server.ThreadingHTTPServer):
    """Answers the n-th request by the n-th step of `script` (the last one is repeated) and lists what was asked."""

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Answer)
        self.script, self.asked = script, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.released = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        step = server.script[min(len(server.asked), len(server.script) - 1)]
        server.asked.append(self.path)
        if isinstance(step, int):
            return self.send_error(step)
        data, sent = step if isinstance(step, tuple) else (step, len(step))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:sent])
        self.wfile.flush()
        if sent == 1:  # a server that stalls
            server.released.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def published(url, data=ZIP, name="ml-tiny.zip"):
    return download.Zip(f"{url}/{name}", len(data), hashlib.sha256(data).hexdigest())


def fetch(server_url, into, **options):
    return download.fetch_and_unpack(published(server_url), into, "ml-tiny", pauses=(0.01, 0.02), **options)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_through_load(tmp_path, monkeypatch, capfd):
    spec = dataclasses.replace(
        movielens.NAMES["ml-32m"],
        zip="ml-tiny.zip",
        size=len(ZIP),
        sha256=hashlib.sha256(ZIP).hexdigest(),
        folder="ml-tiny",
    )
    monkeypatch.setitem(movielens.NAMES, "ml-tiny", spec)
    with Server(ZIP) as server:
        for _ in range(2):
            tables = movielens.load("ml-tiny", tmp_path, base_url=server.url)
            assert rows(tables.ratings) == RATED
        assert server.asked == ["/ml-tiny.zip"]
    assert left(tmp_path) == ["ml-tiny"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("GroupLens") == 1
    assert "No commercial use" in err and "passing on under the same terms only" in err
    assert "https://doi.org/10.1145/2827872" in err
    assert "100%" in err  # the progress bar


def test_every_registered_zip_is_asked_for_under_its_own_name(tmp_path):
    names = {"ml-1m-ratings": "ml-1m.zip"}
    with Server(404) as server:
        for name in movielens.NAMES:
            with pytest.raises(OSError, match="the server said 404"):
                movielens.load(name, tmp_path, base_url=server.url)
        assert server.asked == [f"/{names.get(name, name + '.zip')}" for name in movielens.NAMES]
    for spec in movielens.NAMES.values():
        assert re.fullmatch("[0-9a-f]{64}", spec.sha256) and spec.size > 900_000
    assert left(tmp_path) == []


def test_503_twice_and_then_the_file(tmp_path):
    with Server(503, 503, ZIP) as server:
        folder = fetch(server.url, tmp_path)
        assert len(server.asked) == 3
    assert (folder / "ratings.csv").read_text() == RATINGS_CSV


def test_cut_off_once_and_then_the_file(tmp_path):
    with Server((ZIP, 100), ZIP) as server:
        assert left(fetch(server.url, tmp_path)) == ["movies.csv", "ratings.csv"]
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("step", "said"), [((ZIP, 100), f"100 bytes read, {len(ZIP) - 100} more expected"), (503, "the server said 503")]
)
def test_a_fault_that_does_not_pass(tmp_path, step, said):
    with Server(step) as server:
        with pytest.raises(OSError) as error:
            fetch(server.url, tmp_path)
        assert len(server.asked) == 3
    assert f"could not download {server.url}/ml-tiny.zip" in str(error.value)
    assert said in str(error.value)
    assert f"put it into {tmp_path}" in str(error.value)
    assert left(tmp_path) == []


def test_404_is_not_repeated(tmp_path):
    with Server(404) as server, pytest.raises(OSError, match="the server said 404"):
        fetch(server.url, tmp_path)
    assert len(server.asked) == 1
    assert left(tmp_path) == []


def test_wrong_bytes(tmp_path):
    wrong = ZIP[:-1] + b"x"
    with Server(wrong) as server, pytest.raises(ValueError) as error:
        fetch(server.url, tmp_path)
    assert len(server.asked) == 1
    message = f"ml-tiny.zip from {server.url}/ml-tiny.zip has the SHA-256 {hashlib.sha256(wrong).hexdigest()}, "
    assert str(error.value).startswith(message + f"expected {hashlib.sha256(ZIP).hexdigest()}. Nothing was kept")
    assert left(tmp_path) == []


def test_a_login_page_instead_of_the_file(tmp_path):
    with Server(b"<html>Please log in</html>") as server, pytest.raises(ValueError) as error:
        fetch(server.url, tmp_path)
    assert f"is 26 bytes, expected {len(ZIP)}" in str(error.value)
    assert left(tmp_path) == []


def test_nobody_answers(tmp_path):
    with Server(ZIP) as server:
        url = server.url
    with pytest.raises(OSError, match="the connection failed") as error:
        fetch(url, tmp_path)
    assert f"{url}/ml-tiny.zip" in str(error.value)
    assert left(tmp_path) == []


def test_no_secure_connection(tmp_path):
    with Server(ZIP) as server, pytest.raises(OSError, match=r"no secure connection .* certificate lapse") as error:
        fetch(server.url.replace("http:", "https:"), tmp_path)
    assert f"put it into {tmp_path}" in str(error.value)
    assert left(tmp_path) == []


def test_a_zip_put_there_by_hand_is_used_and_checked(tmp_path, capfd):
    (tmp_path / "ml-tiny.zip").write_bytes(ZIP)
    with Server(500) as server:
        assert left(fetch(server.url, tmp_path, terms="the terms")) == ["movies.csv", "ratings.csv"]
        assert server.asked == []
    assert "the terms" not in capfd.readouterr().err
    assert left(tmp_path) == ["ml-tiny", "ml-tiny.zip"]
    other = tmp_path / "other"
    write(other)
    (other / "ml-tiny.zip").write_bytes(ZIP[:-9])
    with pytest.raises(ValueError, match=rf"is {len(ZIP) - 9} bytes, expected {len(ZIP)}: half-downloaded.* Delete it"):
        fetch("http://127.0.0.1:9", other)
    assert left(other) == ["ml-tiny.zip"]


def test_a_zip_with_another_folder(tmp_path):
    data = make_zip(folder="ml-huge")
    with Server(data) as server, pytest.raises(ValueError, match="no folder 'ml-tiny' in it; it holds ml-huge"):
        download.fetch_and_unpack(published(server.url, data), tmp_path, "ml-tiny")
    assert left(tmp_path) == []


SCRIPT = """
import resource, sys
from pathlib import Path
from recsys_common.datasets import download
url, size, sha256, into, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
download.fetch_and_unpack(download.Zip(url, int(size), sha256), Path(into), "ml-tiny")
"""


def start(zip_, into, limit=0):
    arguments = [sys.executable, "-c", SCRIPT, zip_.url, str(zip_.size), zip_.sha256, str(into), str(limit)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_fills(tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:  # 250 bytes that unpack to more
        archive.writestr("ml-tiny/ratings.csv", "0" * 100_000)
    data = data.getvalue()
    with Server(ZIP, data) as server:
        for zip_, what in (
            (published(server.url), f"could not write the {len(ZIP)} bytes of {server.url}/ml-tiny.zip"),
            (published(server.url, data), "could not unpack ml-tiny.zip"),
        ):
            process = start(zip_, tmp_path, limit=400)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            line = [line for line in err.splitlines() if line.startswith("OSError: [Errno 27]")][-1]
            assert what in line
            assert str(tmp_path) in line
            assert left(tmp_path) == []


def test_a_killed_download_is_not_taken_for_whole(tmp_path):
    with Server((ZIP, 1), ZIP) as server:
        process = start(published(server.url), tmp_path)
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".ml-tiny-*/ml-tiny.zip")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert list(tmp_path.glob(".ml-tiny-*/ml-tiny.zip"))
        assert not (tmp_path / "ml-tiny").exists() and not (tmp_path / "ml-tiny.zip").exists()
        assert left(fetch(server.url, tmp_path)) == ["movies.csv", "ratings.csv"]


# --- Netflix ----------------------------------------------------------------------------------------------------

FILMS = ["1:\n1488844,3,2005-09-06\n822109,5,1999-11-11\n", "2:\n", "3:\n822109,1,2005-12-31\n"]
FILMS.append("17:\n6,4,1970-01-01\n2649429,2,2004-02-29\n885013,4,2005-10-19\n")
TITLES = "1,2003,Dinosaur Planet\n2,NULL,Sans Année\n3,1997,Character, The\n17,1901,Seventeen\n18,2000,Not Rated\n"
NETFLIX = [
    (1488844, 1, 3.0, 1125964800),
    (822109, 1, 5.0, 942278400),
    (822109, 3, 1.0, 1135987200),
    (6, 17, 4.0, 0),
    (2649429, 17, 2.0, 1078012800),
    (885013, 17, 4.0, 1129680000),
]


def combined(tmp_path, films=FILMS):
    folder = write(tmp_path / "netflix")
    (folder / "movie_titles.csv").write_bytes(TITLES.encode("latin-1"))
    for number, film in enumerate(films, 1):
        (folder / f"combined_data_{number}.txt").write_text(film)
    return folder


def training_set(tmp_path):
    folder = write(tmp_path / "netflix" / "training_set").parent
    (folder / "movie_titles.txt").write_bytes(TITLES.encode("latin-1"))
    for number in range(1, 18):
        film = next((film for film in FILMS if film.startswith(f"{number}:")), f"{number}:\n")
        (folder / "training_set" / f"mv_{number:07}.txt").write_text(film)
    (folder / "training_set" / "README.txt").write_text("not a film")
    return folder


@pytest.mark.parametrize("make", [combined, training_set])
@pytest.mark.parametrize("block", [1, 7, 25, 60, 2**20])
def test_netflix(tmp_path, monkeypatch, make, block):
    make(tmp_path)
    monkeypatch.setattr(netflix, "BLOCK", block)  # lines and headers fall across every kind of border
    tables = netflix.load(tmp_path)
    check_schemas(tables)
    assert (tables.name, tables.time) == ("netflix", "seconds")
    assert rows(tables.ratings) == NETFLIX
    assert rows(tables.items) == [
        (1, "Dinosaur Planet (2003)", []),
        (2, "Sans Année", []),
        (3, "Character, The (1997)", []),
        (17, "Seventeen (1901)", []),
        (18, "Not Rated (2000)", []),
    ]


def test_netflix_files_with_several_films_and_other_line_ends(tmp_path):
    folder = combined(tmp_path, ["".join(FILMS[:3]).replace("\n", "\r\n"), FILMS[3][:-1], "18:\n", "2:\n"])
    assert rows(netflix.load(folder).ratings) == NETFLIX


BAD_NETFLIX = [
    ("17:\n5,3,2005-09-06\n6,3\n", "line 3: '6,3' has 2 fields, expected 3 (user, rating, date)"),
    ("17:\n5,3,2005-09-06\n\n", "line 3: '' has 1 field, expected 3"),
    ("17:\n5,6,2005-09-06\n", "line 2: rating is '6', expected a number from 1 to 5"),
    ("17:\n5,nan,2005-09-06\n", "line 2: rating is 'nan', expected a number from 1 to 5"),
    ("17:\n5,,2005-09-06\n", "line 2: rating is '', expected a number"),
    ("17:\n5,3,2005-13-06\n", "line 2: date is '2005-13-06', expected a date such as 2005-09-06"),
    ("17:\n5,3,06.09.2005\n", "line 2: date is '06.09.2005', expected a date"),
    ("17:\n-5,3,2005-09-06\n", f"line 2: user is '-5', {ID_RANGE}"),
    ("17:\n9223372036854775808,3,2005-09-06\n", f"line 2: user is '9223372036854775808', {ID_RANGE}"),
    ("17:\n5,3,2005-09-06\n9223372036854775808:\n", "line 3: '9223372036854775808:' has 1 field"),
    ("17:\n5,3,2005-09-06\n1:2:\n", "line 3: '1:2:' has 1 field"),
    ("5,3,2005-09-06\n", "line 1: '5,3,2005-09-06' is there, expected an item and a colon, such as '17:'"),
    ("x:\n5,3,2005-09-06\n", "line 1: 'x:' is there, expected an item and a colon"),
    ("17:\n5,3,2005-09-06\n6,3,2005-0", "line 3: date is '2005-0', expected a date such as 2005-09-06. The file ends"),
    ("17:\n5,3,2005-09-06\n6", "line 3: '6' has 1 field, expected 3 (user, rating, date). The file ends in this"),
    ("17:\n5,3,2005-09-06\n99:\n6,3,2005-09-06\n", "line 4: item 99 is rated but is not in"),
    ("", "combined_data_2.txt is empty (0 bytes)"),
]


@pytest.mark.parametrize("block", [9, 2**20])
@pytest.mark.parametrize(("text", "message"), BAD_NETFLIX)
def test_bad_netflix_line(tmp_path, monkeypatch, text, message, block):
    folder = combined(tmp_path, [FILMS[0], text, FILMS[2], "18:\n"])
    monkeypatch.setattr(netflix, "BLOCK", block)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        netflix.load(tmp_path)
    assert str(error.value).startswith(str(folder / "combined_data_2.txt"))


@pytest.mark.parametrize("block", [20, 2**20])
def test_netflix_duplicates(tmp_path, monkeypatch, block):
    again = "17:\n6,1,1999-01-01\n2:\n6,5,2000-01-01\n17:\n6,5,1971-01-01\n"
    monkeypatch.setattr(netflix, "BLOCK", block)
    folder = combined(tmp_path, [*FILMS[:2], again, FILMS[3]])
    path, other = folder / "combined_data_3.txt", folder / "combined_data_4.txt"
    message = f"{path}, line 2 and {path}, line 6: user 6 rated item 17 twice (2 such rows in all)"
    with pytest.raises(ValueError, match=re.escape(message)):
        netflix.load(tmp_path)
    with pytest.warns(UserWarning, match="dropped 2 of 8 ratings"):
        kept = rows(netflix.load(tmp_path, duplicates="last").ratings)
    assert [row for row in kept if row[0] == 6] == [(6, 17, 1.0, 915148800), (6, 2, 5.0, 946684800)]
    path.write_text("3:\n7,1,2000-01-01\n")
    other.write_text("3:\n8,1,2000-01-01\n1:\n822109,5,1999-11-11\n")
    message = f"{folder / 'combined_data_1.txt'}, line 3 and {other}, line 4: user 822109 rated item 1 twice"
    with pytest.raises(ValueError, match=re.escape(message)):
        netflix.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("19,2000", "line 6: '19,2000' has 2 fields, expected 3 (item, year, title)"),
        ("19,20,Heat", "line 6: year is '20', expected a year such as 2005, or NULL"),
        ("19,2000,", "line 6: title is '', expected a text that is not empty"),
        ("x,2000,Heat", f"line 6: item is 'x', {ID_RANGE}"),
        ("3,2000,Heat", "line 3 and line 6: item 3 is there twice"),
    ],
)
def test_bad_netflix_titles(tmp_path, line, message):
    path = combined(tmp_path) / "movie_titles.csv"
    path.write_bytes(f"{TITLES}{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        netflix.load(tmp_path)


def test_netflix_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no movie_titles.txt or .csv in .*withdrew these data in 2010"):
        netflix.load(tmp_path)
    folder = combined(tmp_path)
    (folder / "combined_data_3.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"netflix lacks combined_data_3\.txt\. Netflix withdrew"):
        netflix.load(tmp_path)
    folder = training_set(tmp_path / "other")
    for number in range(5, 10):
        (folder / "training_set" / f"mv_{number:07}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"training_set lacks mv_0000005\.txt, .*mv_0000008\.txt and 1 more"):
        netflix.load(folder)


def test_netflix_that_lost_whole_lines_gives_a_warning(tmp_path):
    folder = combined(tmp_path)
    titles = "".join(f"{number},2000,Film\n" for number in range(1, 17_771))
    (folder / "movie_titles.csv").write_text(titles)
    with pytest.warns(UserWarning, match="netflix holds 6 ratings, Netflix published 100,480,507"):
        assert rows(netflix.load(tmp_path).ratings) == NETFLIX
