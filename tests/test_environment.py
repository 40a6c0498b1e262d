"""Is .venv made once, brought up to date, and never taken for whole when it is not? A toy lock, the real Makefile."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A build backend that needs nothing installed: an editable "install" is one file.
BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{folder}/toybook-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toybook.py", "")
        wheel.writestr("toybook-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: toybook\\nVersion: 1\\n")
        wheel.writestr("toybook-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("toybook-1.dist-info/RECORD", "")
    return "toybook-1-py3-none-any.whl"
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "toybook"
version = "1"
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "wheels").mkdir()
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    shutil.copyfile(ROOT / "tools" / "environment.sh", tmp_path / "tools" / "environment.sh")
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "requirements.txt").write_text("")
    return tmp_path


def make(toy, python=sys.executable):
    # Not the flags of the make that may be running these tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(toy / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    command = ["make", "-C", str(toy), ".venv/installed", f"PYTHON={python}"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def build_and_lock(toy, version):
    """A wheel of the package `tiny`, and a lock that asks for it; returns the wheel."""
    wheel = toy / "wheels" / f"tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", f"version = {version!r}\n")
        archive.writestr(
            f"tiny-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"
        )
        archive.writestr(f"tiny-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"tiny-{version}.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (toy / "requirements.txt").write_text(f"tiny=={version} \\\n    --hash=sha256:{digest}\n")
    return wheel


def installed(toy):
    program = "import tiny, toybook; print(tiny.version)"
    return subprocess.run([toy / ".venv/bin/python", "-c", program], capture_output=True, text=True).stdout.strip()


def test_an_install_cut_short_is_begun_anew_and_a_whole_one_is_kept(toy):
    wheel = build_and_lock(toy, "1.0")
    wheel.rename(toy / "away.whl")
    cut_short = make(toy)
    assert cut_short.returncode != 0 and "tiny" in cut_short.stderr
    assert not (toy / ".venv/installed").exists()
    (toy / ".venv/half-a-package").touch()

    (toy / "away.whl").rename(wheel)
    done = make(toy)
    assert done.returncode == 0, done.stderr
    assert "installing 1 locked packages" in done.stdout
    assert installed(toy) == "1.0"
    assert not (toy / ".venv/half-a-package").exists(), "what the cut short install left was kept"

    assert "up to date" in make(toy).stdout

    (toy / ".venv/of-the-first-install").touch()
    build_and_lock(toy, "2.0")
    assert make(toy).returncode == 0
    assert installed(toy) == "2.0"
    assert (toy / ".venv/of-the-first-install").exists(), "a new lock does not need everything anew"

    # A wheel that is not the locked one is refused, and the environment no longer counts as whole.
    build_and_lock(toy, "3.0").write_bytes(wheel.read_bytes())
    assert "HASH" in make(toy).stderr.upper()
    assert not (toy / ".venv/installed").exists()


def test_only_an_environment_that_make_began_is_ever_removed(toy):
    elsewhere = toy / "mine"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (toy / ".venv").symlink_to(elsewhere)
    refused = make(toy)
    assert refused.returncode != 0 and "make did not make it" in refused.stderr
    (toy / ".venv").unlink()
    elsewhere.rename(toy / ".venv")
    refused = make(toy)
    assert refused.returncode != 0 and "make did not make it" in refused.stderr
    assert (toy / ".venv/precious").exists()


def test_an_unsuitable_python_is_named_with_what_is_wanted(toy):
    old = toy / "old-python"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    refused = make(toy, old)
    assert refused.returncode != 0
    assert f"{old}: 3.9.1" in refused.stderr
    assert "wanted 3.11, 3.12 or 3.13" in refused.stderr and "PYTHON=" in refused.stderr
    assert f"{toy}/none: not there" in make(toy, toy / "none").stderr
    assert not (toy / ".venv").exists()


def test_a_python_without_venv_says_what_to_install(toy):
    bare = toy / "bare-python"
    bare.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac\n')
    bare.chmod(0o755)
    refused = make(toy, bare)
    assert refused.returncode != 0 and "apt install python3-venv" in refused.stderr
    assert not (toy / ".venv").exists()
