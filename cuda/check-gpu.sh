#!/usr/bin/env bash
# The GPU part on a machine with a GPU: sums over the real NCCL by every GPU that there is, worlds formed again in one process, one
# that is given up, and the kernels against the host's arithmetic. Where there is no GPU it says so and ends with 3.
#
#     cuda/check-gpu.sh [--release]
#
# libcuda comes with the GPU's driver. libnccl and NVRTC are taken from where NCCL_LIB_PATH and NVRTC_LIB_PATH say, from the loader's
# path, or out of the Python environment that is active: `pip install nvidia-nccl-cu13 nvidia-cuda-nvrtc`.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && [ ! -e /dev/dxg ]; then
    echo "there is no GPU here (no /dev/nvidia*): nothing was run" >&2
    exit 3
fi
cargo test --locked "$@" -p reknit-cuda --test hardware --test real -- --nocapture --test-threads 1
