"""How does a published zip get here whole?

    folder = download.fetch_and_unpack(url, size=5917549, sha256="a6898adb...", into=Path("data"), folder="ml-1m")

The zip is downloaded and unpacked in a hidden temporary folder and the result is renamed into place: what lies
there under its name is whole. A zip that a reader put into the folder by hand is used instead of the network.
Either way its size and SHA-256 must be the registered ones.

Needs: nothing else.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path


def fetch_and_unpack(
    url: str,
    size: int,
    sha256: str,
    into: Path,
    folder: str,
    terms: str = "",
    pauses: Sequence[float] = (1, 5, 20),
) -> Path:
    """Download a zip, check it, unpack the folder in it to `into / folder`, and return that path.

    `size` is in bytes and `sha256` in hex; `folder` is the top folder in the zip; `terms` are printed to stderr before
    a download. A fault that may pass (no connection, cut off, 5xx) is tried again after each of `pauses`, in seconds.

    Raises:
      OSError: the server cannot be reached or says no, or the disk is full; the message says what to do.
      ValueError: the zip is not the registered one, or has no such folder.
    """
    by_hand = into / url.rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory(dir=into, prefix=f".{folder}-") as temporary:
        path = by_hand if by_hand.is_file() else Path(temporary) / by_hand.name
        unpacked = Path(temporary) / "unpacked"
        try:
            if path != by_hand:
                print(terms, end="\n" if terms else "", file=sys.stderr)
                _download(url, path, pauses, f"Or fetch {url} in another way and put it into {into}.")
            _check(path, url, size, sha256, "Delete it" if path == by_hand else "Nothing was kept")
            with zipfile.ZipFile(path) as archive:  # checks the CRC of every file that it unpacks
                archive.extractall(unpacked)
        except OSError as error:
            if error.errno is None:  # the network, which `_download` speaks of
                raise
            what = f"could not write {path.name} ({size:,} bytes) and what is in it: {error.strerror}"
            raise OSError(error.errno, what, str(into)) from error
        if not (unpacked / folder).is_dir():
            found = ", ".join(sorted(path.name for path in unpacked.iterdir())) or "nothing"
            raise ValueError(f"{url} has no folder {folder!r} in it; it holds {found}.")
        if not (into / folder).exists():  # another process may have been faster
            (unpacked / folder).rename(into / folder)
    return into / folder


def _download(url: str, path: Path, pauses: Sequence[float], otherwise: str) -> None:
    """Stream the zip to `path`, with a progress bar on stderr. What came is for `_check` to judge."""
    import pooch  # slow to import, and not needed by those who bring the files
    import requests

    # Pooch's own retries would also repeat what does not get better: a 404, or a wrong hash after 250 MB.
    stream = pooch.HTTPDownloader(progressbar=True, chunk_size=2**20, timeout=30)
    for pause in (*pauses, None):
        try:
            return stream(url, str(path), None)
        except requests.exceptions.RequestException as error:
            said = f"the server said {error.response.status_code}" if error.response is not None else str(error)
            lasting = isinstance(error, requests.exceptions.SSLError)  # GroupLens has let its certificate lapse before
            lasting |= error.response is not None and error.response.status_code < 500
            if lasting or pause is None:
                advice = f"Nothing was kept. Check the network and try again. {otherwise}"
                raise OSError(f"could not download {url}: {said}. {advice}") from error
        time.sleep(pause)


def _check(path: Path, url: str, size: int, sha256: str, first_step: str) -> None:
    """Raise ValueError unless the file is byte for byte the registered one."""
    with path.open("rb") as file:
        found = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    if found != (size, sha256):
        raise ValueError(
            f"{path.name} from {url} is {found[0]:,} bytes with the SHA-256 {found[1]}, expected {size:,} bytes with "
            f"{sha256}: half-downloaded, or another file (a network's login page?). {first_step}; try again. If it "
            "stays so, the publisher has changed it: unzip it yourself where the folder should be."
        )
