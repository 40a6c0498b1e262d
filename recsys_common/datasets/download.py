"""How does a published zip get here whole?

    download.fetch_and_unpack(".../ml-1m.zip", size=5917549, sha256="a6898adb...", folder=Path("data/ml-1m"))

The zip is downloaded and unpacked in a hidden temporary folder, its size and SHA-256 are checked, and the result is
renamed into place: what lies there under its name is whole.

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
    url: str, size: int, sha256: str, folder: Path, terms: str = "", pauses: Sequence[float] = (1, 5, 20)
) -> None:
    """Download a zip of `size` bytes, check it, and put the folder of that name in it at `folder`.

    `terms` are printed to stderr first. A fault that may pass (no connection, cut off, 5xx) is tried again after
    each of `pauses`, in seconds.

    Raises:
      OSError: the server cannot be reached or says no, or the disk is full; the message says what to do.
      ValueError: the zip is not the registered one, or has no such folder.
    """
    print(terms, end="\n" if terms else "", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        path, unpacked = Path(temporary, url.rsplit("/", 1)[-1]), Path(temporary, "unpacked")
        try:
            _download(url, path, pauses, f"Or fetch {url} in another way and unpack it to {folder}.")
            _check(path, url, size, sha256)
            with zipfile.ZipFile(path) as archive:  # checks the CRC of every file that it unpacks
                archive.extractall(unpacked)
        except OSError as error:
            if error.errno is None:  # the network, which `_download` speaks of
                raise
            what = f"could not write {path.name} ({size:,} bytes) and what is in it: {error.strerror}"
            raise OSError(error.errno, what, str(folder.parent)) from error
        if not (unpacked / folder.name).is_dir():
            found = ", ".join(sorted(path.name for path in unpacked.iterdir())) or "nothing"
            raise ValueError(f"{url} has no folder {folder.name!r} in it; it holds {found}.")
        if not folder.exists():  # another process may have been faster
            (unpacked / folder.name).rename(folder)


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
            status = error.response.status_code if error.response is not None else None
            refused = status is not None and status < 500
            if pause is None or refused or isinstance(error, requests.exceptions.SSLError):
                said = f"the server said {status}" if status else str(error)
                advice = f"Nothing was kept. Check the network and try again. {otherwise}"
                raise OSError(f"could not download {url}: {said}. {advice}") from error
        time.sleep(pause)


def _check(path: Path, url: str, size: int, sha256: str) -> None:
    """Raise ValueError unless the file is byte for byte the registered one."""
    with path.open("rb") as file:
        found = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    if found != (size, sha256):
        raise ValueError(
            f"{url} is {found[0]:,} bytes with the SHA-256 {found[1]}, expected {size:,} bytes with {sha256}: "
            "half-downloaded, or another file (a network's login page?). Nothing was kept; try again. If it stays so, "
            "the publisher has changed it: unpack it yourself where the folder should be."
        )
