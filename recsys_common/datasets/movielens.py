"""Where do MovieLens ratings come from, in each of their formats?

    tables = movielens.load("ml-latest-small", "data")       # reads data/ml-latest-small, or downloads it
    tables = movielens.read_csv_folder("data/mine", "mine")  # your own ratings.csv and movies.csv

data/README.md lists names, files, sources and terms. A local folder is read as it is: other numbers of ratings or
items than were published give a warning, a cut or malformed file an error.

Needs: __init__.py checks.py download.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import RATINGS_SCHEMA, RatingTables, checks, download
from .checks import ANY_TEXT, FLAG, HALF_STARS, ID, SECONDS, STARS, TEXT, Layout

BASE_URL = "https://files.grouplens.org/datasets/movielens"
TERMS = """\
{name} comes from GroupLens, University of Minnesota, for research. No commercial use without their leave, no
passing on unless its README allows it, and no hint that they endorse your work; the README in its folder has all
the terms. In publications, cite F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context,
ACM Transactions on Interactive Intelligent Systems 5(4), 2015, https://doi.org/10.1145/2827872"""
MISSING = f"Put it there; a MovieLens dataset is downloaded from {BASE_URL} once its folder is out of the way."
RATING = {"user": ID, "item": ID, "rating": STARS, "timestamp": SECONDS}
MOVIE = {"item": ID, "title": TEXT, "genres": ANY_TEXT}


def load(name: str, data_dir: str | Path, *, duplicates: str = "error") -> RatingTables:
    """Read one of `NAMES` from its folder in `data_dir`, downloading it first if it is not there.

    Items that nobody rated are kept. In ml-1m's SASRec form the ids are SASRec's, every rating is 1, and the timestamp
    is the position in the user's history, from 0. With duplicates="last" the later of two ratings of an item by the
    same user is kept.

    Raises:
      ValueError: an unknown name, or a malformed or half-downloaded file (the message names the line).
      FileNotFoundError: no `data_dir`, or the dataset's folder lacks a file.
      OSError: the download failed.
    """
    if name not in NAMES:
        raise ValueError(f"there is no MovieLens dataset {name!r}; there are {', '.join(NAMES)}.")
    read, folder, ratings, items = NAMES[name]
    folder = Path(data_dir, folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder. Create it, or name the one that holds {folder.name}/.")
    if not folder.is_dir():
        name_of_zip = name.removesuffix("-ratings") + ".zip"
        size, sha256 = ZIPS[name_of_zip]
        download.fetch_and_unpack(f"{BASE_URL}/{name_of_zip}", size, sha256, folder, TERMS.format(name=name))
    tables = read(folder, name, duplicates)
    if tables.time == "order":
        ratings, items = SASREC_COUNTS
    checks.compare_with_published(tables, folder, ratings, items)
    return tables


def read_csv_folder(folder: str | Path, name: str, duplicates: str = "error") -> RatingTables:
    """Read your own ratings.csv (userId,movieId,rating,timestamp) and movies.csv (movieId,title,genres).

    Ratings run from 0.5 to 5, times are seconds since 1970, genres have | between them. `name` is the name of the
    result; `duplicates` and what is raised are as in `load`.
    """
    ratings_path, movies_path = checks.files(Path(folder), ["ratings.csv", "movies.csv"], MISSING)
    columns = {"userId": ID, "movieId": ID, "rating": HALF_STARS, "timestamp": SECONDS}
    ratings, place = Layout(columns, header=True).read(ratings_path)
    columns = {"movieId": ID, "title": TEXT, "genres": ANY_TEXT}
    movies, line = Layout(columns, header=True, quotes=True).read(movies_path)
    return checks.rating_tables(name, "seconds", ratings.columns, place, _split_genres(movies), line, duplicates)


def _read_100k(folder: Path, name: str, duplicates: str) -> RatingTables:
    ratings_path, movies_path, genres_path = checks.files(folder, ["u.data", "u.item", "u.genre"], MISSING)
    ratings, place = Layout(RATING, "\t").read(ratings_path)
    genres = Layout({"genre": TEXT, "number": ID}, "|").read(genres_path)[0]["genre"].to_pylist()
    columns = {"item": ID, "title": TEXT, "release date": ANY_TEXT, "video date": ANY_TEXT, "IMDb URL": ANY_TEXT}
    movies, line = Layout(columns | dict.fromkeys(genres, FLAG), "|", "latin-1").read(movies_path)
    genres.remove("unknown")  # a flag that says: no genre
    flags = movies.select(genres).to_pylist()
    lists = pa.array([[genre for genre in genres if row[genre]] for row in flags], pa.list_(pa.string()))
    items = [movies["item"], movies["title"], lists]
    return checks.rating_tables(name, "seconds", ratings.columns, place, items, line, duplicates)


def _read_dat(folder: Path, name: str, duplicates: str) -> RatingTables:
    file, time, columns = "ratings.dat", "seconds", dict(RATING)
    if not (folder / file).is_file():
        if name == "ml-1m" and (folder / "sasrec-ml-1m.txt").is_file():
            return _read_sasrec(folder, name, duplicates)
        if name == "ml-1m-ratings" and (folder / "ratings_no_timestamp.dat").is_file():
            file, time = "ratings_no_timestamp.dat", "none"
            del columns["timestamp"]
    ratings_path, movies_path = checks.files(folder, [file, "movies.dat"], MISSING)
    encoding = "latin-1"
    if name == "ml-10m":
        columns["rating"], encoding = HALF_STARS, "utf-8"
    ratings, place = _dat(columns).read(ratings_path)
    movies, line = _dat(MOVIE, encoding).read(movies_path)
    seconds = ratings["timestamp"] if time == "seconds" else np.zeros(ratings.num_rows, np.int64)
    columns = [*ratings.columns[:3], seconds]
    return checks.rating_tables(name, time, columns, place, _split_genres(movies), line, duplicates)


def _read_sasrec(folder: Path, name: str, duplicates: str) -> RatingTables:
    names = ["sasrec-ml-1m.txt", "sas_to_original_items.txt", "movies.dat"]
    ratings_path, map_path, movies_path = checks.files(folder, names, MISSING)
    ratings, place = Layout({"user": ID, "item": ID}, " ").read(ratings_path)
    numbers, line = Layout({"item": ID, "movie": ID}, " ").read(map_path)
    movies, movie_line = _dat(MOVIE, "latin-1").read(movies_path)
    checks.check_unique(movie_line, item=movies["item"].to_numpy())
    row = pc.index_in(numbers["movie"], value_set=movies["item"].combine_chunks())
    if row.null_count:
        at = pc.index(pc.is_null(row), True).as_py()
        raise ValueError(f"{line(at)}: {movies_path} has no movie {numbers['movie'][at]}. {checks.MEND}")
    items = [numbers["item"], *_split_genres(movies.take(row))[1:]]
    columns = [*ratings.columns, np.ones(ratings.num_rows, np.float32), np.arange(ratings.num_rows)]  # lines: time
    tables = checks.rating_tables(name, "order", columns, place, items, line, duplicates)
    position = pa.array(_position(tables.ratings["user_id"].to_numpy()))
    return dataclasses.replace(tables, ratings=tables.ratings.set_column(3, RATINGS_SCHEMA.field(3), position))


def _dat(columns: dict[str, checks.Kind], encoding: str = "utf-8") -> Layout:
    """Fields with :: between them; Arrow splits at one character only."""
    return Layout(columns, "\x1f", encoding, prepare=lambda text: text.replace(b"::", b"\x1f"))


def _split_genres(movies: pa.Table) -> list:
    """The three columns with `"Action|Comedy"` -> `["Action", "Comedy"]`; no genre -> `[]`."""
    item, title, text = movies.columns
    none = pc.is_in(text, value_set=pa.array(["", "(no genres listed)"]))
    return [item, title, pc.if_else(none, pa.scalar([], pa.list_(pa.string())), pc.split_pattern(text, "|"))]


def _position(user: np.ndarray) -> np.ndarray:
    """The position of each row among the rows of the same user, from 0, int64."""
    order, row = np.argsort(user, kind="stable"), np.arange(len(user))
    is_first = np.diff(user[order], prepend=-1) > 0
    position = np.empty(len(user), np.int64)
    position[order] = row - np.maximum.accumulate(np.where(is_first, row, 0))
    return position


# data/README.md says where these figures were published.
NAMES = {  # reader, folder, ratings, items
    "ml-latest-small": (read_csv_folder, "ml-latest-small", 100_836, 9_742),
    "ml-100k": (_read_100k, "ml-100k", 100_000, 1_682),
    "ml-1m": (_read_dat, "ml-1m", 1_000_209, 3_883),
    "ml-1m-ratings": (_read_dat, "ml-1m", 1_000_209, 3_883),
    "ml-10m": (_read_dat, "ml-10M100K", 10_000_054, 10_681),
    "ml-20m": (read_csv_folder, "ml-20m", 20_000_263, 27_278),
    "ml-25m": (read_csv_folder, "ml-25m", 25_000_095, 62_423),
    "ml-32m": (read_csv_folder, "ml-32m", 32_000_204, 87_585),
}
SASREC_COUNTS = (999_611, 3_416)
ZIPS = {  # bytes and SHA-256
    "ml-latest-small.zip": (978202, "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"),
    "ml-100k.zip": (4924029, "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
    "ml-1m.zip": (5917549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    "ml-10m.zip": (65566137, "813c411ccb6122564edfe752e7f80c4dcc5aa25fa94c93622f6877a7ba252862"),
    "ml-20m.zip": (198702078, "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3"),
    "ml-25m.zip": (261978986, "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa"),
    "ml-32m.zip": (238950008, "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee"),
}
