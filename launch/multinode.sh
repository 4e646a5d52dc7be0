#!/usr/bin/env bash
# The same job on several machines without a scheduler: run this on each of them, with the same arguments.
#
#   NODES=2 HEAD=node0:29500 PER_NODE=8 ./launch/multinode.sh --config launch/configs/gpt_124m.toml \
#       --data /shared/tokens.bin --out /shared/runs/gpt --replicate 2
#
# --out must be a folder that all machines see. The job started again with another NODES or PER_NODE goes on from the
# latest checkpoint; --max-restarts lets torchrun itself do that after a failure, on the same machines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun \
    --nnodes "${NODES:?number of machines}" \
    --nproc-per-node "${PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:?host:port of one of the machines}" \
    --rdzv-id "${JOB:-shardopt}" \
    --max-restarts "${RESTARTS:-3}" \
    launch/pretrain.py "$@"
