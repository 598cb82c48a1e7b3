#!/usr/bin/env bash
# What a GPU says of this repository: its gpu tests, and the papers' shapes against full attention. No network.
#   tools/gpu_report.sh                      everything, each section in a process of its own
#   tools/gpu_report.sh --section 64k        one section, at most ten minutes; a report grows section by section
#   tools/gpu_report.sh --section auto       what auto takes against full attention
#   tools/gpu_report.sh --section flex       options of FlexAttention, and the kernels of flash
#   tools/gpu_report.sh --section tiles      tile sizes of our kernels; prints rows for triton_tiles.MEASURED
#   tools/gpu_report.sh --dry-run            the same on a CPU with tiny shapes
# Needs torch, triton and transformers there. What else is missing (omegaconf, pyyaml, rich, pytest, ...) may lie in
# wheels/ as pure-Python wheels. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
path=$root
shopt -s nullglob
for wheel in "$root"/wheels/*-none-any.whl; do path=$path:$wheel; done
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then export TRITON_INTERPRET=1; fi
done
exec "${PYTHON:-python3}" -m tools.gpu.report "$@"
