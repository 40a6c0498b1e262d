"""Where do MovieLens ratings come from, in each of their formats?

    tables = movielens.load("ml-latest-small", "data")       # reads data/ml-latest-small, or downloads it
    tables = movielens.read_csv_folder("data/mine", "mine")  # your own ratings.csv and movies.csv

    name                                     files read                                         time
    ml-latest-small, ml-20m, ml-25m, ml-32m  ratings.csv, movies.csv                            seconds
    ml-100k                                  u.data, u.item, u.genre                            seconds
    ml-1m, ml-10m                            ratings.dat, movies.dat                            seconds
    ml-1m without ratings.dat                sasrec-ml-1m.txt, sas_to_original_items.txt,
                                             movies.dat                                         order
    ml-1m-ratings without ratings.dat        ratings_no_timestamp.dat, movies.dat               none

A local folder is read as it is: a file that differs from the published one gives a warning, a cut or
malformed one an error. A download must match its registered size and hash. Sources and terms: data/README.md.

Needs: __init__.py checks.py download.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import ITEMS_SCHEMA, RATINGS_SCHEMA, RatingTables, checks, download

BASE_URL = "https://files.grouplens.org/datasets/movielens"
TERMS = """\
{name} comes from GroupLens, University of Minnesota, for research. No commercial use without their leave,
{passing_on}, and no hint that they endorse your work; the README in its folder has all the terms.
In publications, cite F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context,
ACM Transactions on Interactive Intelligent Systems 5(4), 2015, https://doi.org/10.1145/2827872"""


@dataclass(frozen=True)
class Spec:
    """One dataset: its zip in `BASE_URL`, the folder in that, how to read it, and what the terms allow."""

    zip: str
    size: int
    sha256: str
    folder: str
    read: Callable[[Path, str, str], RatingTables]
    may_pass_on: bool = False


def load(name: str, data_dir: str | Path, *, duplicates: str = "error", base_url: str = BASE_URL) -> RatingTables:
    """Read a MovieLens dataset from `data_dir`, downloading it first if it is not there.

    Args:
      name: one of `NAMES`.
      data_dir: an existing folder that holds the dataset's folder, or is it.
      duplicates: "error", or "last" to keep the later of two ratings of an item by the same user.
      base_url: where the zips are.

    Returns:
      The tables. Items that nobody rated are kept. In ml-1m's SASRec form the ids are SASRec's, every rating
      is 1, and the timestamp is the position in the user's history, from 0.

    Raises:
      ValueError: an unknown name, or a malformed or half-downloaded file (the message names the line).
      FileNotFoundError: no `data_dir`, or the dataset's folder lacks a file.
      OSError: the download failed.
    """
    if name not in NAMES:
        raise ValueError(f"there is no MovieLens dataset {name!r}; there are {', '.join(NAMES)}.")
    spec = NAMES[name]
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder. Create it, or name the one that holds {spec.folder}/.")
    folder = data_dir / spec.folder
    if not folder.is_dir() and data_dir.resolve().name == spec.folder:
        folder = data_dir
    if not folder.is_dir():
        archive = download.Zip(f"{base_url}/{spec.zip}", spec.size, spec.sha256)
        passing_on = "passing on under the same terms only" if spec.may_pass_on else "no passing on"
        terms = TERMS.format(name=name, passing_on=passing_on)
        folder = download.fetch_and_unpack(archive, data_dir, spec.folder, terms)
    for file, versions in PUBLISHED.get(spec.folder, {}).items():
        if (folder / file).is_file():
            download.check_local(folder / file, versions)
    return spec.read(folder, name, duplicates)


def read_csv_folder(folder: str | Path, name: str, duplicates: str = "error") -> RatingTables:
    """Read a folder's ratings.csv (userId,movieId,rating,timestamp) and movies.csv (movieId,title,genres).

    Args:
      folder: holds the two files: ratings from 0.5 to 5, seconds since 1970, genres with | between them.
      name: the name of the result.
      duplicates: as in `load`.

    Raises:
      ValueError, FileNotFoundError: as in `load`.
    """
    ratings_path, movies_path = _files(Path(folder), "ratings.csv", "movies.csv")
    columns = _rating_columns(0.5, "userId", "movieId")
    ratings = _ratings(*checks.read_table(ratings_path, columns, header=True).columns)
    columns = {"movieId": checks.ID, "title": checks.TEXT, "genres": checks.ANY_TEXT}
    movies = checks.read_table(movies_path, columns, header=True, quotes=True)
    items = _items(movies["movieId"], movies["title"], _split_genres(movies["genres"]))
    return _tables(name, ratings, items, "seconds", duplicates, ratings_path, movies_path, header=True)


def _read_100k(folder: Path, name: str, duplicates: str) -> RatingTables:
    ratings_path, movies_path, genres_path = _files(folder, "u.data", "u.item", "u.genre")
    ratings = _ratings(*checks.read_table(ratings_path, _rating_columns(1), separator="\t").columns)
    genres = checks.read_table(genres_path, {"genre": checks.TEXT, "number": checks.ID}, separator="|")
    words = genres["genre"].to_pylist()
    dates = ("release date", "video release date", "IMDb URL")
    columns = {"item": checks.ID, "title": checks.TEXT, **dict.fromkeys(dates, checks.ANY_TEXT)}
    columns |= {f"genre {word}": checks.FLAG for word in words}
    movies = checks.read_table(movies_path, columns, separator="|", encoding="latin-1")
    words.remove("unknown")  # a flag that says: no genre
    flags = np.stack([pc.equal(movies[f"genre {word}"], "1").to_numpy() for word in words], axis=1)
    offsets = np.append(0, flags.sum(axis=1).cumsum()).astype(np.int32)
    lists = pa.ListArray.from_arrays(offsets, pa.array(words).take(pa.array(np.nonzero(flags)[1])))
    items = _items(movies["item"], movies["title"], lists)
    return _tables(name, ratings, items, "seconds", duplicates, ratings_path, movies_path)


def _read_1m(folder: Path, name: str, duplicates: str) -> RatingTables:
    if (folder / "ratings.dat").is_file() or not (folder / "sasrec-ml-1m.txt").is_file():
        return _read_dat(folder, name, duplicates)
    names = ("sasrec-ml-1m.txt", "sas_to_original_items.txt", "movies.dat")
    ratings_path, map_path, movies_path = _files(folder, *names)
    lines = checks.read_table(ratings_path, {"user": checks.ID, "item": checks.ID}, separator=" ")
    original = checks.read_table(map_path, {"item": checks.ID, "movie": checks.ID}, separator=" ")
    movies = _dat_items(movies_path, "latin-1")
    row = pc.index_in(original["movie"], value_set=movies["item_id"].combine_chunks())
    if row.null_count:
        at = pc.index(pc.is_null(row), True).as_py()
        place = f"{map_path}, line {checks.line_of_row(map_path, at, header=False)}"
        raise ValueError(f"{place}: {movies_path} has no movie {original['movie'][at]}. {checks.MEND}")
    items = movies.take(row).set_column(0, ITEMS_SCHEMA.field(0), original["item"])
    rating, line = np.ones(lines.num_rows, np.float32), np.arange(lines.num_rows)  # line order is time
    ratings = _ratings(*lines.columns, rating, line)
    ratings = _tables(name, ratings, items, "order", duplicates, ratings_path, map_path).ratings
    position = pa.array(_position(ratings["user_id"].to_numpy()))
    return RatingTables(name, ratings.set_column(3, RATINGS_SCHEMA.field(3), position), items, "order")


def _read_1m_ratings(folder: Path, name: str, duplicates: str) -> RatingTables:
    if (folder / "ratings.dat").is_file() or not (folder / "ratings_no_timestamp.dat").is_file():
        return _read_dat(folder, name, duplicates)
    ratings_path, movies_path = _files(folder, "ratings_no_timestamp.dat", "movies.dat")
    columns = _rating_columns(1)
    del columns["timestamp"]
    table = checks.read_table(ratings_path, columns, separator="::")
    ratings = _ratings(*table.columns, np.zeros(table.num_rows, np.int64))
    items = _dat_items(movies_path, "latin-1")
    return _tables(name, ratings, items, "none", duplicates, ratings_path, movies_path)


def _read_dat(folder: Path, name: str, duplicates: str) -> RatingTables:
    lowest, encoding = (0.5, "utf-8") if name == "ml-10m" else (1, "latin-1")
    ratings_path, movies_path = _files(folder, "ratings.dat", "movies.dat")
    ratings = _ratings(*checks.read_table(ratings_path, _rating_columns(lowest), separator="::").columns)
    items = _dat_items(movies_path, encoding)
    return _tables(name, ratings, items, "seconds", duplicates, ratings_path, movies_path)


def _dat_items(path: Path, encoding: str) -> pa.Table:
    columns = {"item": checks.ID, "title": checks.TEXT, "genres": checks.ANY_TEXT}
    movies = checks.read_table(path, columns, separator="::", encoding=encoding)
    checks.check_unique(movies["item"].to_numpy(), path, header=False)
    return _items(movies["item"], movies["title"], _split_genres(movies["genres"]))


def _files(folder: Path, *names: str) -> list[Path]:
    """The paths of files that must all be there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. It should hold {', '.join(names)}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)} (needed: {', '.join(names)}; there: {there}). Put it "
            f"there; a MovieLens dataset is downloaded from {BASE_URL} once its folder is out of the way."
        )
    return [folder / name for name in names]


def _rating_columns(lowest: float, user: str = "user", item: str = "item") -> dict[str, checks.Kind]:
    kinds = (checks.ID, checks.ID, checks.rating(lowest, 5), checks.SECONDS)
    return dict(zip((user, item, "rating", "timestamp"), kinds, strict=True))


def _ratings(user, item, rating, timestamp) -> pa.Table:
    return pa.Table.from_arrays([user, item, rating, timestamp], schema=RATINGS_SCHEMA)


def _items(item, title, genres) -> pa.Table:
    return pa.Table.from_arrays([item, title, genres], schema=ITEMS_SCHEMA)


def _split_genres(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """`"Action|Comedy"` -> `["Action", "Comedy"]`; no genre -> `[]`."""
    none = pc.is_in(text, value_set=pa.array(["", "(no genres listed)"]))
    return pc.if_else(none, pa.scalar([], pa.list_(pa.string())), pc.split_pattern(text, "|"))


def _position(user: np.ndarray) -> np.ndarray:
    """The position of each row among the rows of the same user, from 0, int64."""
    order = np.argsort(user, kind="stable")
    starts = np.flatnonzero(np.diff(user[order], prepend=-1))
    lengths = np.diff(np.append(starts, len(user)))
    position = np.empty(len(user), np.int64)
    position[order] = np.arange(len(user)) - np.repeat(starts, lengths)
    return position


def _tables(name, ratings, items, time, duplicates, ratings_path, items_path, header=False) -> RatingTables:
    """The result, after the checks that need more than one column."""

    def where(row: int) -> str:
        return f"{ratings_path}, line {checks.line_of_row(ratings_path, row, header)}"

    checks.check_unique(items["item_id"].to_numpy(), items_path, header)
    checks.check_items(ratings, items, where, items_path)
    return RatingTables(name, checks.without_duplicates(ratings, duplicates, where), items, time)


def _ml(size: int, sha256: str, folder: str, read, may_pass_on: bool = False) -> Spec:
    return Spec(f"{folder.replace('10M100K', '10m')}.zip", size, sha256, folder, read, may_pass_on)


# data/README.md says where these sizes and hashes were published.
_1M = (5917549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "ml-1m")
_SMALL = (978202, "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436", "ml-latest-small")
_100K = (4924029, "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229", "ml-100k")
_10M = (65566137, "813c411ccb6122564edfe752e7f80c4dcc5aa25fa94c93622f6877a7ba252862", "ml-10M100K")
_20M = (198702078, "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3", "ml-20m")
_25M = (261978986, "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa", "ml-25m")
_32M = (238950008, "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee", "ml-32m")
NAMES: dict[str, Spec] = {
    "ml-latest-small": _ml(*_SMALL, read_csv_folder, may_pass_on=True),
    "ml-100k": _ml(*_100K, _read_100k),
    "ml-1m": _ml(*_1M, _read_1m),
    "ml-1m-ratings": _ml(*_1M, _read_1m_ratings),
    "ml-10m": _ml(*_10M, _read_dat),
    "ml-20m": _ml(*_20M, read_csv_folder),
    "ml-25m": _ml(*_25M, read_csv_folder),
    "ml-32m": _ml(*_32M, read_csv_folder, may_pass_on=True),
}

# (bytes, SHA-256 where known) of the files in those folders; a second form is the same with other line ends.
PUBLISHED: dict[str, dict[str, tuple[tuple[int, str | None], ...]]] = {
    "ml-latest-small": {
        "ratings.csv": (
            (2483723, "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646"),
            (2382886, "80da8b3393dae325bbba5a31f291a6ba55d8d4f4396de3c456f2c1635b1b70e8"),
        ),
        "movies.csv": (
            (494431, "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07"),
            (484688, "c47b783f23eb304413307e1bb05335e427737da20ec8d3c0e96335567dd5f3dc"),
        ),
    },
    "ml-100k": {
        "u.data": ((1979173, "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"),),
        "u.item": ((236344, "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701"),),
    },
    "ml-1m": {
        "ratings.dat": ((24594131, None),),
        "movies.dat": ((171308, "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9"),),
        "ratings_no_timestamp.dat": ((13553874, "2dad134c8b493373beed8d2a42e18ec2a93606fd957bd76c0bfbdef5c514b985"),),
        "sasrec-ml-1m.txt": ((9053831, "b725f3acb3986fe3130bffd1e77a74d182a1f51799567a236dbd60270f95b0a2"),),
        "sas_to_original_items.txt": ((32109, "9ae42c23af0b0fe2f189b9d5acc6cf3936bffe1a9568390cf5d100c0c1b1fca1"),),
    },
    "ml-10M100K": {"ratings.dat": ((265105635, None),), "movies.dat": ((522197, None),)},
    "ml-20m": {"ratings.csv": ((533444411, None),)},
    "ml-25m": {"ratings.csv": ((678260987, None),), "movies.csv": ((3038099, None),)},
    "ml-32m": {
        "ratings.csv": ((877076222, "91159850e41ee59c86231165a688709647e2726cab2e7ba9faf04001bd5261ee"),),
        "movies.csv": ((4242926, "b37ca1abc7798de741138ed252b62f69f7e37c84b8a8fab1b82d409b4c6c5cc2"),),
    },
}
