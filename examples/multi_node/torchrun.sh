#!/bin/sh
# Run on every machine: NODES=2 HOST=first-machine CARDS=8 sh examples/multi_node/torchrun.sh run.yaml [--set ...]
set -e
config=$1
shift
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${CARDS:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "${HOST:-localhost}:29500" \
    -m lowrank train "$config" --set "training.num_processes=$((${NODES:-1} * ${CARDS:-1}))" "$@"
