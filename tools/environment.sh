#!/bin/sh
# Makes .venv hold what requirements.txt locks, and this repository in editable form. Called by make, which calls
# it only where .venv/installed is missing or older than the lock; safe to interrupt, since that file comes last.
#     sh tools/environment.sh [PYTHON]
set -eu

suits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
version='import sys; print(sys.version.split()[0])'

# 1. A Python that TensorFlow has a build for.
python=
for candidate in ${1:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c "$suits" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "No suitable Python: wanted 3.11, 3.12 or 3.13; TensorFlow 2.21 has no build for any other." >&2
    for candidate in ${1:-python3 python3.13 python3.12 python3.11}; do
        echo "  $candidate: $("$candidate" -c "$version" 2>/dev/null || echo "not there, or does not start")" >&2
    done
    echo "Install one of the three, or name yours: make book PYTHON=/path/to/python3.12" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$python ($("$python" -c "$version")) cannot make environments: its venv module is missing." >&2
    echo "On Debian and Ubuntu: apt install python3-venv; or name another: make book PYTHON=..." >&2
    exit 1
fi

# 2. Where an install was cut short, half a package may look whole to pip: start over. Only what this script
#    began is ever removed. A finished environment with an older lock is brought up to date in place.
if [ -L .venv ] || { [ -e .venv ] && [ ! -e .venv/installed ] && [ ! -e .venv/unfinished ]; }; then
    echo ".venv is there, but make did not make it: move it away, or remove it, and try again." >&2
    exit 1
fi
if [ ! -e .venv/installed ]; then
    echo "making .venv with $python ($("$python" -c "$version"))"
    rm -rf .venv
    mkdir .venv
    touch .venv/unfinished
    "$python" -m venv .venv
fi
touch .venv/unfinished
rm -f .venv/installed

# 3. The lock is complete, so pip need not ask packages what they want: TFRS asks for a package that no longer
#    exists on a Mac.
pip="env PIP_USER=0 .venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps"
echo "installing $(grep -c '^[A-Za-z0-9]' requirements.txt) locked packages into .venv (1 to 4 minutes)"
$pip --require-hashes -r requirements.txt
echo "installing recsys_common into .venv, editable"
$pip --no-build-isolation --editable .
mv .venv/unfinished .venv/installed
