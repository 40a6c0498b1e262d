"""How does a published file get here whole, and is the one that lies here whole?

    ml_1m = download.Zip("https://files.grouplens.org/datasets/movielens/ml-1m.zip", 5917549, "a6898adb...")
    folder = download.fetch_and_unpack(ml_1m, Path("data"), "ml-1m")

The zip is downloaded and unpacked in a hidden temporary folder, and the result is renamed into place: what
lies there under its name is whole. A zip that a reader put into the folder by hand is used instead of the
network. Either way its size and SHA-256 must be the registered ones.

Needs: nothing else.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Zip:
    """A published zip: where it is, its size in bytes, its SHA-256 in hex."""

    url: str
    size: int
    sha256: str


def fetch_and_unpack(
    published: Zip, into: Path, folder: str, terms: str = "", pauses: Sequence[float] = (1, 5, 20)
) -> Path:
    """Download a zip, check it, and unpack the folder in it to `into / folder`.

    Args:
      published: the zip.
      into: an existing folder.
      folder: the name of the top folder in the zip.
      terms: printed to stderr before the download.
      pauses: seconds before each further attempt after a fault that may pass (no connection, cut off, 5xx).

    Returns:
      `into / folder`.

    Raises:
      OSError: the server cannot be reached or says no, or the disk is full; the message says what to do.
      ValueError: the zip is not the registered one, or has no such folder.
    """
    name = published.url.rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory(dir=into, prefix=f".{folder}-") as temporary:
        zip_path = into / name
        by_hand = zip_path.is_file()
        if not by_hand:
            if terms:
                print(terms, file=sys.stderr)
            zip_path = Path(temporary) / name
            _download(published, zip_path, into, pauses)
        _check(published, zip_path, "Delete it" if by_hand else "Nothing was kept")
        unpacked = Path(temporary) / "unpacked"
        try:
            with zipfile.ZipFile(zip_path) as archive:  # checks the CRC of every file that it unpacks
                archive.extractall(unpacked)
        except OSError as error:
            raise OSError(error.errno, f"could not unpack {name}: {error.strerror}", str(into)) from error
        if not (unpacked / folder).is_dir():
            found = ", ".join(sorted(path.name for path in unpacked.iterdir())) or "nothing"
            raise ValueError(f"{published.url} has no folder {folder!r} in it; it holds {found}.")
        if not (into / folder).exists():  # another process may have been faster
            (unpacked / folder).rename(into / folder)
    return into / folder


def _download(published: Zip, path: Path, into: Path, pauses: Sequence[float]) -> None:
    """Stream the zip to `path`, with a progress bar on stderr. What came is for `_check` to judge."""
    import pooch  # slow to import, and not needed by those who bring the files
    import requests

    url = published.url
    by_hand = f"Or fetch {url} in another way and put it into {into}: it is checked there before it is used."
    # Pooch's own retries would also repeat what does not get better: a 404, or a wrong hash after 250 MB.
    stream = pooch.HTTPDownloader(progressbar=True, chunk_size=2**20, timeout=30)
    for pause in (*pauses, None):
        try:
            return stream(url, str(path), None)
        except requests.exceptions.SSLError as error:
            fault = f"no secure connection ({error}); GroupLens has let its certificate lapse before"
            raise OSError(f"could not download {url}: {fault}. {by_hand}") from error
        except requests.exceptions.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            if pause is None or (status is not None and status < 500 and status != 429):
                fault = f"the connection failed: {error}" if status is None else f"the server said {status}"
                raise OSError(
                    f"could not download {url}: {fault}. Nothing was kept. Check the network and try again. {by_hand}"
                ) from error
        except OSError as error:
            what = f"could not write the {published.size:,} bytes of {url}: {error.strerror}"
            raise OSError(error.errno, what, str(into)) from error
        time.sleep(pause)


def _check(published: Zip, path: Path, first_step: str) -> None:
    """Raise ValueError unless the file is byte for byte the registered one."""
    source = f"{path.name} from {published.url}"
    what_to_do = (
        f"{first_step}; try again. If it stays so, the publisher has changed it: unzip it yourself where the "
        "folder should be, and it is read with a warning."
    )
    size = path.stat().st_size
    if size != published.size:
        raise ValueError(
            f"{source} is {size:,} bytes, expected {published.size:,}: half-downloaded, or another file (a "
            f"network's login page?). {what_to_do}"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != published.sha256:
        raise ValueError(f"{source} has the SHA-256 {sha256}, expected {published.sha256}. {what_to_do}")


def check_local(path: Path, versions: Sequence[tuple[int, str | None]]) -> None:
    """Compare a file that lies here with the published ones.

    A reader may have edited it on purpose, so a difference alone is a warning. A file of another size whose
    last line has no end was cut, and is refused.

    Args:
      path: the file.
      versions: (bytes, SHA-256 in hex, or None where it is not known) of each published form of the file.

    Raises:
      ValueError: the file looks half-downloaded.
    """
    size = path.stat().st_size
    sizes = " or ".join(f"{known:,}" for known, _ in versions)
    hashes = [sha256 for known, sha256 in versions if known == size]
    with path.open("rb") as file:
        if None in hashes or (hashes and hashlib.file_digest(file, "sha256").hexdigest() in hashes):
            return
        file.seek(max(size - 1, 0))
        if not hashes and size and file.read(1) != b"\n":
            raise ValueError(
                f"{path} is {size:,} bytes, expected {sizes}, and its last line has no end: it looks "
                "half-downloaded. Delete it and download it again (if you edited it: end the last line)."
            )
    warnings.warn(
        f"{path} is not the published file ({size:,} bytes, published {sizes}). It is read as it is; if you "
        "did not change it yourself, download it again. Scores on it do not compare with published ones.",
        stacklevel=2,
    )
