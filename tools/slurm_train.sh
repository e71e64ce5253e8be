#!/usr/bin/env bash
# Trains as a Slurm job:
#     GPUS=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]
# It also reads GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS from the environment.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [options of train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

# shellcheck disable=SC2086  # SRUN_ARGS may contain several arguments.
exec srun \
    --partition="$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
