#!/usr/bin/env bash
# What forming, losing and joining cost with torchrun, stock and with reknit, and what the store's operations cost. Prints the tables.
#
#     tests/torchelastic/bench/run.sh [DIRECTORY_OF_PROGRAMS [OPTIONS_OF_AGENTS.PY …]]
#
# PYTHON names a Python that has torch and the package reknit. On two cores the whole takes about two hours and a half, with
# `--patience 60 --repeat-stock 1` about two; `--repeat 1` shows the shape.
set -euo pipefail
programs=$(cd "${1:-$(dirname "$0")/../../../target/release}" && pwd)
cd "$(dirname "$0")"
python=${PYTHON:-python3}

"$python" agents.py --reknit "$programs/reknit" "${@:2}"
"$python" store.py --reknit "$programs/reknit"
