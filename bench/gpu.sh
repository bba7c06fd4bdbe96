#!/bin/bash
# What a GPU does with this repository, in one command and 8 minutes: bash bench/gpu.sh OUT_DIR (docs/gpu.md).
# Takes .venv if there is one, else the machine's python3, which must have PyTorch, Triton and transformers.
set -eu
out=$(realpath -m "${1:?usage: bash bench/gpu.sh OUT_DIR [flags of bench/gpu.py]}")
shift
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x $python ] || python=python3
exec $python bench/gpu.py "$out" "$@"
