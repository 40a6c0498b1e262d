"""Do real ratings come in whole, in each format, and is every fault named by file and line?"""

import csv
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
pytestmark = pytest.mark.filterwarnings("ignore:.*published were")  # most folders here hold a few rows

RATINGS_CSV = "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n1,30,0.5,964981247\n2,10,5,1445714835\n"
MOVIES_CSV = '''movieId,title,genres
10,"American President, The (1995)",Comedy|Drama
20,"""Great Performances"" Cats (1998)",(no genres listed)
30,Amélie (2001),Romance
'''
RATED = [(1, 10, 4.0, 964982703), (1, 30, 0.5, 964981247), (2, 10, 5.0, 1445714835)]
LISTED = [
    (10, "American President, The (1995)", ["Comedy", "Drama"]),
    (20, '"Great Performances" Cats (1998)', []),
    (30, "Amélie (2001)", ["Romance"]),
]
DAT_MOVIES = "7::Misérables, Les: A Tale (1995)::Drama|Musical\n8::Heat (1995)::Action\n9::Alone (1990)::\n"
DAT_LISTED = [(7, "Misérables, Les: A Tale (1995)", ["Drama", "Musical"]), (8, "Heat (1995)", ["Action"])]
DAT_LISTED.append((9, "Alone (1990)", []))


def write(folder, files=()):
    """A folder with the files {name: content}; text is written as UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in dict(files).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read_csv(tmp_path, ratings=RATINGS_CSV, movies=MOVIES_CSV, **options):
    return movielens.read_csv_folder(
        write(tmp_path / "mine", {"ratings.csv": ratings, "movies.csv": movies}), "mine", **options
    )


def rows(table):
    assert table.schema in (RATINGS_SCHEMA, ITEMS_SCHEMA)
    table.validate(full=True)
    return [tuple(row.values()) for row in table.to_pylist()]


# --- the real files ---------------------------------------------------------------------------------------------


def real(name):
    folder = movielens.NAMES[name][1]
    if not (REAL / folder).is_dir():
        pytest.skip(f"no {folder} in {REAL}: set RECSYS_DATA_DIR to the folder that has it")
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
    assert (tables.name, tables.time, tables.truth) == (name, time_is, None)
    assert (tables.ratings.schema, tables.items.schema) == (RATINGS_SCHEMA, ITEMS_SCHEMA)
    counts = [len(tables.ratings[column].unique()) for column in ("user_id", "item_id")]
    assert [tables.ratings.num_rows, *counts, tables.items.num_rows] == [ratings, users, rated, items]


def test_real_latest_small_equals_a_plain_csv_reader():
    tables = real("ml-latest-small")
    ratings, movies = (
        list(csv.reader((REAL / "ml-latest-small" / name).read_text(encoding="utf-8").splitlines()))[1:]
        for name in ("ratings.csv", "movies.csv")
    )
    assert rows(tables.ratings) == [(int(u), int(i), float(r), int(t)) for u, i, r, t in ratings]
    genres = [[] if text == "(no genres listed)" else text.split("|") for _, _, text in movies]
    assert rows(tables.items) == [(int(m[0]), m[1], g) for m, g in zip(movies, genres, strict=True)]


def test_real_100k_genres_add_up_to_the_flags():
    items = real("ml-100k").items
    lines = (REAL / "ml-100k" / "u.item").read_text(encoding="latin-1").splitlines()
    flags = sum(int(flag) for line in lines for flag in line.split("|")[6:])  # the first of the 19 is "unknown"
    assert sum(len(genres) for genres in items["genres"].to_pylist()) == flags
    assert rows(items)[0] == (1, "Toy Story (1995)", ["Animation", "Children's", "Comedy"])


def test_real_sasrec_items_have_the_popularity_of_their_titles_and_timestamps_count_from_0():
    def counts(tables):  # title -> ratings
        title = dict(zip(tables.items["item_id"].to_pylist(), tables.items["title"].to_pylist(), strict=True))
        return {title[v["values"]]: v["counts"] for v in tables.ratings["item_id"].value_counts().to_pylist()}

    sasrec = real("ml-1m")
    mapped, original = counts(sasrec), counts(real("ml-1m-ratings"))
    assert mapped == {title: count for title, count in original.items() if count >= 5}
    assert max(mapped, key=mapped.get) == "American Beauty (1999)"
    user, position = (sasrec.ratings[column].to_numpy() for column in ("user_id", "timestamp"))
    new = np.diff(user, prepend=0) != 0
    assert (position[new] == 0).all() and (np.diff(position)[~new[1:]] == 1).all()


# --- the formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [str, lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t])
def test_csv_with_either_line_end_or_a_byte_order_mark(tmp_path, change):
    tables = read_csv(tmp_path, change(RATINGS_CSV), change(MOVIES_CSV))
    assert (tables.name, tables.time, rows(tables.ratings), rows(tables.items)) == ("mine", "seconds", RATED, LISTED)


def test_100k(tmp_path):
    genres = ["unknown", *"ABCDEFGHIJKLMNOPQR"]
    flags = ["0|1|1" + "|0" * 16, "1" + "|0" * 18, "0" + "|0" * 17 + "|1"]
    titles = zip(["Première (1994)", "unknown", "Last (1998)"], flags, strict=True)
    files = {
        "u.data": "196\t3\t3\t881250949\n186\t1\t5\t891717742\n",
        "u.item": "".join(f"{i}|{t}|01-Jan-1995||http://x|{f}\n" for i, (t, f) in enumerate(titles, 1)).encode(
            "latin-1"
        ),
        "u.genre": "".join(f"{genre}|{number}\n" for number, genre in enumerate(genres)) + "\n",
    }
    write(tmp_path / "ml-100k", files)
    tables = movielens.load("ml-100k", tmp_path)
    assert rows(tables.ratings) == [(196, 3, 3.0, 881250949), (186, 1, 5.0, 891717742)]
    assert rows(tables.items) == [(1, "Première (1994)", ["A", "B"]), (2, "unknown", []), (3, "Last (1998)", ["R"])]


@pytest.mark.parametrize(
    ("name", "file", "text", "encoding", "expected"),
    [
        ("ml-1m", "ratings.dat", "5::8::4::978300760\n1::7::1::9\n", "latin-1", [(5, 8, 4, 978300760), (1, 7, 1, 9)]),
        ("ml-1m-ratings", "ratings.dat", "5::8::4::978300760\n", "latin-1", [(5, 8, 4, 978300760)]),
        ("ml-1m-ratings", "ratings_no_timestamp.dat", "5::8::4\n1::7::1\n", "latin-1", [(5, 8, 4, 0), (1, 7, 1, 0)]),
        ("ml-10m", "ratings.dat", "5::7::3.5::978300760\n", "utf-8", [(5, 7, 3.5, 978300760)]),
    ],
)
def test_dat(tmp_path, name, file, text, encoding, expected):
    write(tmp_path / movielens.NAMES[name][1], {file: text, "movies.dat": DAT_MOVIES.encode(encoding)})
    tables = movielens.load(name, tmp_path)
    assert tables.time == ("none" if "no_timestamp" in file else "seconds")
    assert (rows(tables.ratings), rows(tables.items)) == (expected, DAT_LISTED)


def sasrec(tmp_path, lines="1 1\n1 2\n3 2\n1 3\n3 1\n", ids="1 9\n2 7\n3 8\n", movies=DAT_MOVIES, **options):
    files = {"sasrec-ml-1m.txt": lines, "sas_to_original_items.txt": ids, "movies.dat": movies.encode("latin-1")}
    write(tmp_path / "ml-1m", files)
    return movielens.load("ml-1m", tmp_path, **options)


def test_1m_as_sasrec_has_it(tmp_path):
    tables = sasrec(tmp_path)
    assert tables.time == "order"
    assert rows(tables.ratings) == [(1, 1, 1.0, 0), (1, 2, 1.0, 1), (3, 2, 1.0, 0), (1, 3, 1.0, 2), (3, 1, 1.0, 1)]
    expected = [DAT_LISTED[2], DAT_LISTED[0], DAT_LISTED[1]]
    assert rows(tables.items) == [(number, *row[1:]) for number, row in enumerate(expected, 1)]


def test_sasrec_positions_of_mixed_users_and_after_a_duplicate(tmp_path):
    pairs = np.random.default_rng(1).permutation([(user, item) for user in range(60) for item in range(300)])
    text = "".join(f"{user} {item}\n" for user, item in pairs)
    tables = sasrec(tmp_path, text, "".join(f"{item} 7\n" for item in range(300)))
    seen = [0] * 60
    for user, item, rating, position in rows(tables.ratings):
        assert (user, item, rating, position) == (*pairs[sum(seen)], 1.0, seen[user])
        seen[user] += 1
    with pytest.warns(UserWarning, match=r"dropped 1 of 4 ratings"):
        tables = sasrec(tmp_path, "1 1\n1 2\n1 1\n1 3\n", duplicates="last")
    assert rows(tables.ratings) == [(1, 2, 1.0, 0), (1, 1, 1.0, 1), (1, 3, 1.0, 2)]


# --- malformed lines --------------------------------------------------------------------------------------------

ID_RANGE = "expected an integer from 0 to 9223372036854775807"
FOUR = "was found, expected 4 fields: userId, movieId, rating, timestamp"
BAD_FIELDS = [
    ("userId", f"{ID_RANGE}", ["", "9223372036854775808", "-3", "x"]),
    ("movieId", f"{ID_RANGE}", ["", "NA", "null", "99999999999999999999", "10.5"]),
    ("rating", "expected a number from 0.5 to 5", ["", "null", "nan", "NaN", "inf", "-inf", "abc", "5.5", "0"]),
    ("timestamp", "expected seconds since 1970, an integer from 0", ["", "-1", "1e9", "2005-09-06"]),
]
BAD_RATINGS = [(line, f"{line!r} {FOUR}") for line in ("3,10,4.0", "3,10,4.0,1,1", "3;10;4.0;1", "3::10::4.0::1")]
BAD_RATINGS += [("\0" * 200, FOUR), (b"3,1\xff0,4.0,1", r"b'3,1\xff0,4.0,1\n' is not utf-8")]
for column, words, values in BAD_FIELDS:
    for value in values:
        good = {"userId": "3", "movieId": "10", "rating": "4.0", "timestamp": "1"}
        BAD_RATINGS.append((",".join((good | {column: value}).values()), f"{column} is {value!r}, {words}"))


@pytest.mark.parametrize(("line", "message"), BAD_RATINGS)
def test_bad_line_in_ratings_csv(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(ValueError) as error:  # the blank lines count; the first of the bad ones is named
        read_csv(tmp_path, RATINGS_CSV.encode() + b"\n\r\n" + line + b"\n7,10,3.0,5\n8,10,9.0,1\n")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'mine' / 'ratings.csv'}, line 7: ") and message in said
    assert said.endswith("Mend or remove the line, or download the file again.")
    assert len(said) < len(str(tmp_path)) + 300


def test_a_bad_line_far_down(tmp_path):
    good = "".join(f"{user},10,4.5,964982703\n" for user in range(1_000_000, 1_200_000))
    with pytest.raises(ValueError, match=r"ratings\.csv, line 200006: rating is 'x'"):
        read_csv(tmp_path, f"{RATINGS_CSV}{good}\n5,10,x,1\n6,10,4.0,1\n")


@pytest.mark.parametrize("left_out", [1, 5, 11, 12, 13, 16])
def test_a_file_cut_within_its_last_line(tmp_path, left_out):
    with pytest.raises(ValueError, match=r"ratings\.csv(, line 4| ends in b'2,10).* It looks half-downloaded"):
        read_csv(tmp_path, RATINGS_CSV[:-left_out])


HEADER = RATINGS_CSV.splitlines()[0]
EMPTY_OR_HEADLESS = [(text, f"has no rows ({len(text)} bytes)") for text in ("", "\n\n", HEADER + "\n")]
for header in ("1,10,4.0,964982703", "user,item,rating,timestamp", "userId"):
    EMPTY_OR_HEADLESS.append((f"{header}\n1,10,4.0,9\n", f"line 1: the header is {header!r}, expected {HEADER!r}"))


@pytest.mark.parametrize(("text", "message"), EMPTY_OR_HEADLESS)
def test_empty_files_and_wrong_headers(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"ratings\.csv,? {re.escape(message)}"):
        read_csv(tmp_path, ratings=text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("40,,Drama", "line 5: title is '', expected a text that is not empty"),
        ("40,A, B,Drama", "line 5: '40,A, B,Drama' was found, expected 3 fields: movieId, title, genres"),
        ("x,Heat (1995),Drama", "line 5: movieId is 'x'"),
        ("10,Heat (1995),Drama", "line 2 and {}, line 5: item 10 is there twice"),
        (b"40,Am\xe9lie,Drama", r"line 5: b'40,Am\xe9lie,Drama\n' is not utf-8"),
    ],
)
def test_bad_line_in_movies_csv(tmp_path, line, message):
    path = tmp_path / "mine" / "movies.csv"
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message.format(path)}")):
        read_csv(tmp_path, movies=MOVIES_CSV.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")


def test_a_rated_item_that_is_not_in_the_movies(tmp_path):
    message = r"ratings\.csv, line 5: item 77 is rated but has no title \(2 such items in all\)"
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path, RATINGS_CSV + "3,77,4.0,1\n4,77,4.0,1\n5,78,4.0,1\n")


SASREC = {"sasrec-ml-1m.txt": "1 1\n", "sas_to_original_items.txt": "1 9\n2 7\n"}
STARRED = {"ratings.dat": "5::8::4::978300760\n"}
BAD_FILES = [  # name, the good files, the bad one, its content, the message after its path
    ("ml-1m", STARRED, "ratings.dat", "5::8::4::97\n1::7::1:97\n", "line 2: '1::7::1:97' was found, expected 4 fields"),
    ("ml-1m", STARRED, "ratings.dat", "5\t8\t4\t97\n", "line 1: '5\\t8\\t4\\t97' was found, expected 4 fields"),
    ("ml-1m", STARRED, "ratings.dat", "5::8::0.5::97\n", "line 1: rating is '0.5', expected a number from 1 to 5"),
    (
        "ml-1m",
        STARRED,
        "ratings.dat",
        "5::8::4::97\n5::8::3::98\n",
        "line 1 and {}, line 2: user 5, item 8 is there twice",
    ),
    ("ml-10m", STARRED, "ratings.dat", "5::8::0.4::97\n", "line 1: rating is '0.4', expected a number from 0.5 to 5"),
    ("ml-1m", STARRED, "movies.dat", "8::Heat (1995)\n", "line 1: '8::Heat (1995)' was found, expected 3 fields"),
    ("ml-1m", SASREC, "movies.dat", DAT_MOVIES + "8::Cold (1996)::\n", "line 2 and {}, line 4: item 8 is there twice"),
    ("ml-1m", SASREC, "sas_to_original_items.txt", "1 9\n2 70\n", "line 2: {movies} has no movie 70."),
    ("ml-1m", SASREC, "sasrec-ml-1m.txt", "1 1\n1 2 5\n", "line 2: '1 2 5' was found, expected 2 fields: user, item."),
]


@pytest.mark.parametrize(("name", "good", "file", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path, name, good, file, content, message):
    folder = write(tmp_path / movielens.NAMES[name][1], {"movies.dat": DAT_MOVIES.encode("latin-1")} | good)
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        movielens.load(name, tmp_path)
    expected = f"{folder / file}, {message.format(folder / file, movies=folder / 'movies.dat')}"
    assert str(error.value).startswith(expected)


# --- duplicates -------------------------------------------------------------------------------------------------


def test_duplicates_are_refused_by_line(tmp_path):
    path = tmp_path / "mine" / "ratings.csv"
    message = f"{path}, line 2 and {path}, line 6: user 1, item 10 is there twice (2 such rows in all)."
    with pytest.raises(ValueError, match=re.escape(message)):
        read_csv(tmp_path, RATINGS_CSV + "\n1,10,2.0,964982704\n2,10,1.0,5\n")
    with pytest.raises(ValueError, match="duplicates is 'first', expected 'error' or 'last'"):
        read_csv(tmp_path, duplicates="first")


def test_the_last_duplicate_stays_by_time_then_by_line_and_rows_keep_their_order(tmp_path):
    more = "1,10,2.0,964982702\n2,10,1.0,1445714835\n3,20,3.0,7\n2,10,2.0,1445714835\n"
    with pytest.warns(UserWarning, match="dropped 3 of 7 ratings"):
        tables = read_csv(tmp_path, RATINGS_CSV + more, duplicates="last")
    assert rows(tables.ratings) == [RATED[0], RATED[1], (3, 20, 3.0, 7), (2, 10, 2.0, 1445714835)]
    header, *lines = RATINGS_CSV.splitlines(keepends=True)
    for duplicates in ("error", "last"):
        with warnings.catch_warnings(action="error"):
            tables = read_csv(tmp_path, header + "".join(lines[::-1]), duplicates=duplicates)
        assert rows(tables.ratings) == RATED[::-1]


BIG = st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63 - 1])  # products of these do not fit into an int64


@hypothesis.given(st.lists(st.tuples(BIG, BIG, st.integers(0, 3)), min_size=1, max_size=30))
def test_duplicates_against_a_dictionary(events):
    user, item, moment = zip(*events, strict=True)
    table = pa.table([user, item, range(len(events)), moment], schema=RATINGS_SCHEMA)
    last, first, repeats = {}, {}, []
    for row, (u, i, t) in enumerate(events):
        if (u, i) not in last or t >= last[u, i][0]:
            last[u, i] = (t, row)
        if first.setdefault((u, i), row) != row:
            repeats.append(f"{first[u, i]} and {row}: user {u}, item {i} is there twice")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = checks.without_duplicates(table, "last", str)
    assert kept["rating"].to_pylist() == sorted(row for _, row in last.values())
    if repeats:
        with pytest.raises(ValueError, match=rf"^{repeats[0]} \({len(repeats)} such rows in all\)"):
            checks.without_duplicates(table, "error", str)
    else:
        assert checks.without_duplicates(table, "error", str).equals(table)


# --- what is missing or edited ----------------------------------------------------------------------------------


def test_missing_names_folders_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"no MovieLens dataset 'ml-2m'; there are ml-latest-small, ml-100k, ml-1m"):
        movielens.load("ml-2m", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dta is not a folder\. Create it, or name the one that holds ml-1m/"):
        movielens.load("ml-1m", tmp_path / "dta")
    assert not (tmp_path / "dta").exists()
    folder = write(tmp_path / "ml-1m", {"users.dat": "", "movies.dat": DAT_MOVIES.encode("latin-1")})
    message = f"{folder} lacks ratings.dat. Put it there"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(message)}.*{movielens.BASE_URL}"):
        movielens.load("ml-1m", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mine lacks ratings\.csv, movies\.csv\. Put it there"):
        movielens.read_csv_folder(tmp_path / "mine", "mine")


def test_other_counts_than_published_give_a_warning(tmp_path):
    write(tmp_path / "ml-20m", {"ratings.csv": RATINGS_CSV, "movies.csv": MOVIES_CSV})
    with pytest.warns(UserWarning, match="ml-20m holds 3 ratings and 3 items, published were 20,000,263 and 27,278"):
        assert rows(movielens.load("ml-20m", tmp_path).ratings) == RATED


# --- downloads, from a real server ------------------------------------------------------------------------------


def make_zip(folder="ml-tiny", ratings=RATINGS_CSV):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}/ratings.csv", ratings)
        archive.writestr(f"{folder}/movies.csv", MOVIES_CSV)
    return data.getvalue()


ZIP = make_zip()


class Server(http.server.ThreadingHTTPServer):
    """Answers the n-th request by the n-th step of `script` (the last one is repeated) and lists what was asked.

    A step is a status, or bytes, or (bytes, how many of them are sent before the connection is cut).
    """

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


def registered(url, data=ZIP):
    return f"{url}/ml-tiny.zip", len(data), hashlib.sha256(data).hexdigest()


def fetch(server_url, into, **options):
    download.fetch_and_unpack(*registered(server_url), into / "ml-tiny", pauses=(0.01, 0.02), **options)
    return into / "ml-tiny"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_through_load(tmp_path, monkeypatch, capfd):
    reader = movielens.NAMES["ml-32m"][0]
    monkeypatch.setitem(movielens.NAMES, "ml-tiny", (reader, "ml-tiny", 3, 3))
    monkeypatch.setitem(movielens.ZIPS, "ml-tiny.zip", registered("")[1:])
    with Server(ZIP) as server:
        monkeypatch.setattr(movielens, "BASE_URL", server.url)
        for _ in range(2):
            assert rows(movielens.load("ml-tiny", tmp_path).ratings) == RATED
        assert server.asked == ["/ml-tiny.zip"]
    assert left(tmp_path) == ["ml-tiny"]
    out, err = capfd.readouterr()
    assert (out, err.count("GroupLens")) == ("", 1)  # the terms are printed once
    assert "No commercial use" in err and "no\npassing on" in err and "https://doi.org/10.1145/2827872" in err
    assert "100%" in err  # the progress bar


def test_every_registered_zip_is_asked_for_under_its_own_name(tmp_path, monkeypatch):
    with Server(404) as server:
        monkeypatch.setattr(movielens, "BASE_URL", server.url)
        for name in movielens.NAMES:
            with pytest.raises(OSError, match="the server said 404"):
                movielens.load(name, tmp_path)
        assert server.asked == [f"/{name.removesuffix('-ratings')}.zip" for name in movielens.NAMES]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) and size > 900_000 for size, sha256 in movielens.ZIPS.values())
    assert left(tmp_path) == []


@pytest.mark.parametrize("script", [(503, 503, ZIP), ((ZIP, 100), ZIP)])
def test_a_fault_that_passes(tmp_path, script):
    with Server(*script) as server:
        folder = fetch(server.url, tmp_path)
        assert len(server.asked) == len(script)
    assert (folder / "ratings.csv").read_text() == RATINGS_CSV


@pytest.mark.parametrize(
    ("step", "attempts", "said"),
    [
        ((ZIP, 100), 3, f"100 bytes read, {len(ZIP) - 100} more expected"),
        (503, 3, "server said 503"),
        (404, 1, "said 404"),
    ],
)
def test_a_fault_that_does_not_pass(tmp_path, step, attempts, said):
    with Server(step) as server, pytest.raises(OSError) as error:
        fetch(server.url, tmp_path)
    assert len(server.asked) == attempts
    for part in (f"could not download {server.url}/ml-tiny.zip", said, f"unpack it to {tmp_path}/ml-tiny"):
        assert part in str(error.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("scheme", "said"), [("http:", "Connection refused"), ("https:", "SSL")])
def test_nobody_answers_or_not_securely(tmp_path, scheme, said):
    with Server(ZIP) as server:
        url = server.url.replace("http:", scheme)
        if scheme == "http:":
            server.server_close()
        with pytest.raises(OSError, match=rf"could not download {url}/ml-tiny\.zip: .*{said}"):
            fetch(url, tmp_path)
    assert left(tmp_path) == []


def test_wrong_bytes_or_another_folder(tmp_path):
    (_, good, expected), other = registered(""), make_zip(folder="ml-huge")
    for wrong in (ZIP[:-1] + b"x", b"<html>Please log in</html>"):
        with Server(wrong) as server, pytest.raises(ValueError) as error:
            fetch(server.url, tmp_path)
        assert len(server.asked) == 1
        found = f"{len(wrong)} bytes with the SHA-256 {hashlib.sha256(wrong).hexdigest()}"
        assert f"{found}, expected {good} bytes with {expected}" in str(error.value)
    with Server(other) as server, pytest.raises(ValueError, match="no folder 'ml-tiny' in it; it holds ml-huge"):
        download.fetch_and_unpack(*registered(server.url, other), tmp_path / "ml-tiny")
    assert left(tmp_path) == []


SCRIPT = """
import resource, sys
from pathlib import Path
from recsys_common.datasets import download
url, size, sha256, into, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
download.fetch_and_unpack(url, int(size), sha256, Path(into, "ml-tiny"))
"""


def start(zip_, into, limit=0):
    command = [sys.executable, "-c", SCRIPT, *map(str, (*zip_, into, limit))]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("data", [ZIP, make_zip(ratings="0" * 100_000)])  # the second fits until it is unpacked
def test_a_disk_that_fills(tmp_path, data):
    with Server(data) as server:
        process = start(registered(server.url, data), tmp_path, limit=len(data) + (0 if len(data) < len(ZIP) else -9))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    line = [line for line in err.splitlines() if line.startswith("OSError: [Errno 27]")][-1]
    assert f"could not write ml-tiny.zip ({len(data)} bytes) and what is in it" in line and str(tmp_path) in line
    assert left(tmp_path) == []


def test_a_killed_download_is_not_taken_for_whole(tmp_path):
    with Server((ZIP, 1), ZIP) as server:
        process = start(registered(server.url), tmp_path)
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
NAMES = ["Dinosaur Planet (2003)", "Sans Année", "Character, The (1997)", "Seventeen (1901)", "Not Rated (2000)"]


def combined(tmp_path, films=FILMS):
    files = {f"combined_data_{number}.txt": film for number, film in enumerate(films, 1)}
    return write(tmp_path / "netflix", files | {"movie_titles.csv": TITLES.encode("latin-1")})


def training_set(tmp_path):
    films = {int(film.split(":")[0]): film for film in FILMS}
    files = {f"mv_{number:07}.txt": films.get(number, f"{number}:\n") for number in range(1, 18)}
    write(tmp_path / "netflix" / "training_set", files | {"README.txt": "not a film"})
    return write(tmp_path / "netflix", {"movie_titles.txt": TITLES.encode("latin-1")})


def several_films_a_file(tmp_path):
    return combined(tmp_path, ["".join(FILMS[:3]).replace("\n", "\r\n"), FILMS[3][:-1], "18:\n", "2:\n"])


@pytest.mark.parametrize("make", [combined, training_set, several_films_a_file])
@pytest.mark.parametrize("block", [1, 7, 25, 60, 2**20])
def test_netflix(tmp_path, monkeypatch, make, block):
    make(tmp_path)
    monkeypatch.setattr(netflix, "BLOCK", block)  # lines and headers fall across every kind of border
    if make is training_set:
        monkeypatch.setattr(netflix, "FILMS", 17)
    with pytest.warns(UserWarning, match="6 ratings and 5 items, published were 100,480,507 and 17"):
        tables = netflix.load(tmp_path)
    assert (tables.name, tables.time) == ("netflix", "seconds")
    assert rows(tables.ratings) == NETFLIX
    assert rows(tables.items) == [(*row, []) for row in zip([1, 2, 3, 17, 18], NAMES, strict=True)]


COLON = "expected an item and a colon, such as '17:'"
BAD_NETFLIX = [
    ("17:\n5,3,2005-09-06\n6,3\n", "line 3: '6,3' was found, expected 3 fields: user, rating, date"),
    ("17:\n5,6,2005-09-06\n", "line 2: rating is '6', expected a number from 1 to 5"),
    ("17:\n5,nan,2005-09-06\n", "line 2: rating is 'nan', expected a number from 1 to 5"),
    ("17:\n5,,2005-09-06\n", "line 2: rating is '', expected a number"),
    ("17:\n5,3,2005-13-06\n", "line 2: date is '2005-13-06', expected a date such as 2005-09-06"),
    ("17:\n5,3,06.09.2005\n", "line 2: date is '06.09.2005', expected a date"),
    ("17:\n-5,3,2005-09-06\n", f"line 2: user is '-5', {ID_RANGE}"),
    ("17:\n9223372036854775808,3,2005-09-06\n", f"line 2: user is '9223372036854775808', {ID_RANGE}"),
    ("17:\n5,3,2005-09-06\n9223372036854775808:\n", f"line 3: '9223372036854775808:' is there, {COLON}"),
    ("17:\n5,3,2005-09-06\n1:2:\n", f"line 3: '1:2:' is there, {COLON}"),
    ("5,3,2005-09-06\n", f"line 1: '5,3,2005-09-06' is there, {COLON}"),
    ("x:\n5,3,2005-09-06\n", f"line 1: 'x:' is there, {COLON}"),
    ("17:\n5,3,2005-09-06\n6,3,2005-0", "line 3: date is '2005-0', expected a date such as 2005-09-06. The file ends"),
    ("17:\n5,3,2005-09-06\n6", "line 3: '6' was found, expected 3 fields: user, rating, date. The file ends in this"),
    ("17:\n5,3,2005-09-06\n99:\n6,3,2005-09-06\n", "line 4: item 99 is rated but has no title"),
    ("", " is empty (0 bytes)"),
]


@pytest.mark.parametrize("block", [9, 2**20])
@pytest.mark.parametrize(("text", "message"), BAD_NETFLIX)
def test_bad_netflix_line(tmp_path, monkeypatch, text, message, block):
    folder = combined(tmp_path, [FILMS[0], text, FILMS[2], "18:\n"])
    monkeypatch.setattr(netflix, "BLOCK", block)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        netflix.load(tmp_path)
    assert str(error.value).startswith(str(folder / "combined_data_2.txt"))


BAD_TITLES = [
    ("19,2000", "line 6: '19,2000' was found, expected 3 fields: item, year, title"),
    ("19,20,Heat", "line 6: year is '20', expected a year such as 2005, or NULL"),
    ("19,2000,", "line 6: title is '', expected a text that is not empty"),
    ("x,2000,Heat, The", f"line 6: item is 'x', {ID_RANGE}"),
    ("3,2000,Heat", "line 3 and {}, line 6: item 3 is there twice"),
]


@pytest.mark.parametrize(("line", "message"), BAD_TITLES)
def test_bad_netflix_titles(tmp_path, line, message):
    path = write(combined(tmp_path), {"movie_titles.csv": f"{TITLES}{line}\n".encode("latin-1")}) / "movie_titles.csv"
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message.format(path)}")):
        netflix.load(tmp_path)


@pytest.mark.parametrize("block", [20, 2**20])
def test_netflix_duplicates(tmp_path, monkeypatch, block):
    again = "17:\n6,1,1999-01-01\n2:\n6,5,2000-01-01\n17:\n6,5,1971-01-01\n"
    monkeypatch.setattr(netflix, "BLOCK", block)
    folder = combined(tmp_path, [*FILMS[:2], again, "3:\n8,1,2000-01-01\n1:\n822109,5,1999-11-11\n"])
    path = folder / "combined_data_3.txt"
    message = f"{path}, line 2 and {path}, line 6: user 6, item 17 is there twice (2 such rows in all)"
    with pytest.raises(ValueError, match=re.escape(message)):
        netflix.load(tmp_path)
    with pytest.warns(UserWarning, match="dropped 2 of 7 ratings"):
        kept = rows(netflix.load(tmp_path, duplicates="last").ratings)
    assert [row for row in kept if row[0] == 6] == [(6, 17, 1.0, 915148800), (6, 2, 5.0, 946684800)]
    path.write_text("3:\n7,1,2000-01-01\n")
    places = f"{folder / 'combined_data_1.txt'}, line 3 and {folder / 'combined_data_4.txt'}, line 4"
    with pytest.raises(ValueError, match=re.escape(f"{places}: user 822109, item 1 is there twice")):
        netflix.load(tmp_path)


def test_netflix_missing_files_and_ratings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"netflix lacks movie_titles\.csv, combined_.* Netflix withdrew"):
        netflix.load(tmp_path)
    combined(tmp_path, ["1:\n", "2:\n", "3:\n", "17:\n"])
    with pytest.raises(ValueError, match="netflix holds items but no ratings"):
        netflix.load(tmp_path)
    (combined(tmp_path) / "combined_data_3.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"netflix lacks combined_data_3\.txt\. Netflix withdrew"):
        netflix.load(tmp_path)
    training_set(tmp_path)
    missing = r"netflix lacks training_set/mv_0000018\.txt, .*mv_0000021\.txt and 17,749 more"
    with pytest.raises(FileNotFoundError, match=missing):
        netflix.load(tmp_path)
