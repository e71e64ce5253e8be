#!/usr/bin/env bash
# Runs the tests or the benchmarks that need a GPU, on one GPU, each within nine minutes:
#     tools/gpu_check.sh tests OUT_DIR
#     tools/gpu_check.sh bench OUT_DIR
# `tests` needs torch, Triton and pytest, and runs in several processes if pytest-xdist is installed,
# and the tests of the backbones as well if mmcv is.
# It writes OUT_DIR/tests.txt, and exits with an error if a test failed.
# `bench` needs the packages that saga_mm needs as well. It writes OUT_DIR/bench.tar.gz, with a table
# for each op and for the backbones. Each row is saved when it is complete, the most wanted ones come
# first, and what does not fit into the time is left out.
# PYTHON names the interpreter, and WORKERS the number of test processes (default: 12).
set -uo pipefail

usage() {
    echo "usage: $0 tests|bench OUT_DIR" >&2
    exit 2
}

[ $# -eq 2 ] || usage
mode=$1
out_dir=$(realpath -m "$2")
cd "$(dirname "$0")/.."
mkdir -p "$out_dir" || exit
python=${PYTHON:-python}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1

describe() {
    "$python" - <<'PYTHON' || return
import sys

import torch
import triton

if not torch.cuda.is_available():
    sys.exit('gpu_check.sh needs a GPU')
runtime = torch.version.cuda or torch.version.hip
print(f'{torch.cuda.get_device_name()}, torch {torch.__version__} ({runtime}), triton {triton.__version__}')
PYTHON
    ! command -v nvidia-smi > /dev/null ||
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
}

run_tests() {
    local workers=() backbones=()
    "$python" -c 'import mmcv' 2> /dev/null && backbones=(tests/backbones/test_gpu.py tests/inference/test_fused.py)
    # Most of the time goes into compiling some 800 kernels, on the CPU.
    "$python" -c 'import xdist' 2> /dev/null && workers=(-n "${WORKERS:-12}" --dist worksteal)
    timeout -s INT 520 "$python" -m pytest -q "${workers[@]}" --durations=5 \
        tests/kernels/test_triton_gpu.py tests/kernels/test_triton_gated.py \
        tests/kernels/test_triton_rank_augmented.py tests/kernels/test_triton_decay.py \
        tests/kernels/test_triton_wkv.py tests/kernels/test_triton_registration.py \
        tests/kernels/test_layers_gpu.py tests/kernels/test_triton_depthwise.py \
        tests/kernels/test_triton_layer_norm.py tests/kernels/test_triton_ffn.py \
        tests/kernels/test_triton_gated_attention.py \
        tests/kernels/test_triton_layers.py "${backbones[@]}"
}

run_benchmarks() {
    local end=$((SECONDS + 520)) folder=$1 failed=0 op shapes
    left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }
    # A benchmark that its time limit ends (124) has saved its rows, and is no failure.
    within() { timeout -s INT "$@" || [ $? -eq 124 ] || failed=1; }
    # Stage 1 of 1280 x 1280 pixels comes first. Each op gets at most 50 seconds.
    for op in gated ffn gated_attention wkv rank_augmented decay depthwise layer_norm; do
        case $op in
            ffn | gated_attention) shapes='1,1,64 1,2,64' ;;
            *) shapes='1,1,64 1,8,64 32,8,32' ;;
        esac
        within $(($(left) < 50 ? $(left) : 50)) "$python" tools/benchmark_ops.py --op $op \
            --tokens 102400 25600 3136 --shapes $shapes --out-dir "$folder/$op"
    done
    if "$python" -c 'import mmdet' 2> /dev/null; then
        within "$(left)" "$python" tools/benchmark.py --models saga_t pvt_t_sdpa pvt_t sola_vision_t ravlt_t \
            --baseline pvt_t --sizes 1280 512 2048 --mode graph infer train --dtype bf16 --rounds 1 \
            --no-flops --out "$folder/backbones"
    else
        echo 'no mmdet: backbones are not measured'
    fi
    return $failed
}

case $mode in
    tests)
        { describe && run_tests; } 2>&1 | tee "$out_dir/tests.txt"
        ;;
    bench)
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        { describe && run_benchmarks "$scratch"; } 2>&1 | tee "$scratch/log.txt"
        failed=$?
        tar -czf "$out_dir/bench.tar.gz" -C "$scratch" . || failed=1
        exit $failed
        ;;
    *) usage ;;
esac
