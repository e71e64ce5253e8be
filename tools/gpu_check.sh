#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, on one GPU, within about ten minutes (each part has a
# time limit):
#     tools/gpu_check.sh OUT_DIR
# It writes OUT_DIR/{gpu.txt,tests.txt,*/ops.json,*/ops.md} and, if mmdet is installed, the table of
# the backbones in OUT_DIR/backbones. It exits with an error if a test failed, but runs the benchmarks
# in any case.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 OUT_DIR" >&2
    exit 2
fi
out_dir=$(realpath -m "$1")
cd "$(dirname "$0")/.."
mkdir -p "$out_dir"
python=${PYTHON:-python}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1

"$python" - > "$out_dir/gpu.txt" <<'PYTHON'
import sys

import torch
import triton

if not torch.cuda.is_available():
    sys.exit('gpu_check.sh needs a GPU')
runtime = torch.version.cuda or torch.version.hip
print(f'{torch.cuda.get_device_name()}, torch {torch.__version__} ({runtime}), triton {triton.__version__}')
PYTHON
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >> "$out_dir/gpu.txt"
fi
cat "$out_dir/gpu.txt"

failed=0
timeout 180 "$python" -m pytest -q -x --durations=5 tests/kernels/test_triton_gpu.py \
    tests/kernels/test_triton_gated.py tests/kernels/test_triton_rank_augmented.py \
    tests/kernels/test_triton_decay.py tests/kernels/test_triton_wkv.py tests/kernels/test_triton_registration.py \
    2>&1 | tee "$out_dir/tests.txt" || failed=1

for op in gated rank_augmented decay wkv; do
    timeout 60 "$python" tools/benchmark_ops.py --op $op --tokens 25600 102400 \
        --out-dir "$out_dir/$op" || failed=1
done
if "$python" -c 'import mmdet' 2> /dev/null; then
    timeout 200 "$python" tools/benchmark.py --models saga_t sola_vision_t ravlt_t pvt_t pvt_t_sdpa \
        --baseline pvt_t --sizes 512 1280 2048 --mode infer train --dtype bf16 --rounds 1 \
        --no-flops --out "$out_dir/backbones" || failed=1
else
    echo 'no mmdet: backbones are not measured'
fi
exit $failed
