#!/usr/bin/env bash
# What of the GPU part can be checked without a GPU, beyond its tests over the stand-ins: the real libnccl is loaded, has what it
# should have, and says why it forms nothing; every kernel is compiled to PTX and for sm_80, sm_90 and sm_100.
#
#     cuda/check.sh [--release]
#
# Both libraries are taken out of the virtual environment of tests/torchelastic/run.sh, if it is there; else they get one of
# their own below REKNIT_VENVS (by default in the user's cache), which is kept for the next time: 0.5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
venvs=${REKNIT_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/reknit}

# The newest of those that have both; in an older PyTorch's they are of older releases, in other places.
venv=
for made in "$venvs"/torch-*; do
    if [ -e "$made/complete" ] && compgen -G "$made/lib/python3*/site-packages/nvidia/cu13/lib/libnvrtc.so.13" >/dev/null; then
        venv=$made
    fi
done
if [ -z "$venv" ]; then
    venv=$venvs/cuda
    if [ ! -e "$venv/complete" ]; then
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
            nvidia-nccl-cu13==2.30.7 nvidia-cuda-nvrtc==13.2.86
        touch "$venv/complete"
    fi
fi

# A variable that names a library makes its absence a failure.
NCCL_LIB_PATH=$(compgen -G "$venv/lib/python3*/site-packages/nvidia/nccl/lib")
NVRTC_LIB_PATH=$(compgen -G "$venv/lib/python3*/site-packages/nvidia/cu13/lib")
export NCCL_LIB_PATH NVRTC_LIB_PATH
cargo test --locked "$@" -p reknit-cuda --test real -- --nocapture

# The NCCL of every other PyTorch that is there: what an older one lacks is known by its release.
for made in "$venvs"/torch-*; do
    older=$(compgen -G "$made/lib/python3*/site-packages/nvidia/nccl/lib" || true)
    if [ -e "$made/complete" ] && [ "$made" != "$venv" ] && [ -n "$older" ]; then
        NCCL_LIB_PATH=$older cargo test --locked "$@" -p reknit-cuda --test real -- --nocapture it_
    fi
done
