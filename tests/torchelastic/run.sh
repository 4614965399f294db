#!/usr/bin/env bash
# Stock PyTorch against reknit: the conformance of the store, then torchrun with agents that are killed and join, in the newest
# release and in one that is two years older.
#
#     tests/torchelastic/run.sh [DIRECTORY_OF_PROGRAMS]
#
# Each release gets a virtual environment below REKNIT_VENVS (by default in the user's cache), which is kept for the next time: 5 GB each.
set -euo pipefail
cd "$(dirname "$0")"
programs=$(cd "${1:-../../target/release}" && pwd)
venvs=${REKNIT_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/reknit}

for release in ${REKNIT_TORCH:-2.15.0 2.5.1}; do
    venv=$venvs/torch-$release
    if [ ! -e "$venv/complete" ]; then
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir "torch==$release" numpy
        touch "$venv/complete"
    fi
    "$venv/bin/python" conformance.py --reknit "$programs/reknit"
    "$venv/bin/python" torchrun.py --reknit "$programs/reknit"
done
