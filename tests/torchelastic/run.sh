#!/usr/bin/env bash
# PyTorch against reknit: the conformance of the store, the Python package, then torchrun in all ways with agents that are killed and
# join, in the newest release and in one that is two years older.
#
#     tests/torchelastic/run.sh [DIRECTORY_OF_PROGRAMS]
#
# Each release gets a virtual environment below REKNIT_VENVS (by default in the user's cache), which is kept for the next time: 5 GB each.
set -euo pipefail
programs=$(cd "${1:-$(dirname "$0")/../../target/release}" && pwd)
cd "$(dirname "$0")"
venvs=${REKNIT_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/reknit}

# One wheel is for all releases.
wheel=$venvs/wheel
if [ ! -e "$venvs/build/complete" ]; then
    rm -rf "$venvs/build"
    python3 -m venv "$venvs/build"
    "$venvs/build/bin/pip" install --quiet --disable-pip-version-check "maturin>=1.9,<2"
    touch "$venvs/build/complete"
fi
rm -rf "$wheel"
PATH=$venvs/build/bin:$PATH "$venvs/build/bin/pip" wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$wheel" ../../python

for release in ${REKNIT_TORCH:-2.15.0 2.5.1}; do
    # What an older release may do differently: forming, losing, joining, restarting, ending.
    tests=()
    venv=$venvs/torch-$release
    if [ ! -e "$venv/complete" ]; then
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir "torch==$release" numpy
        touch "$venv/complete"
    fi
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheel"/reknit-*.whl
    "$venv/bin/python" conformance.py --reknit "$programs/reknit"
    # The backend is found by torchrun itself since 2.6.
    if [ "$(printf '%s\n' 2.6 "$release" | sort -V | head -1)" = 2.6 ]; then
        "$venv/bin/pip" install --quiet --disable-pip-version-check pytest mypy
        (cd ../../python && REKNIT=$programs/reknit "$venv/bin/python" -m pytest -q tests && "$venv/bin/python" -m mypy src/reknit tests)
    else
        tests=(trains vanish crashes)
    fi
    "$venv/bin/python" torchrun.py --reknit "$programs/reknit" "${tests[@]}"
done
