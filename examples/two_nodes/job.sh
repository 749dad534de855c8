#!/usr/bin/env bash
# One job on two nodes. Start it on each of them; only NODE_RANK differs:
#   NODE_RANK=0 bash job.sh        on the first node of the hostfile
#   NODE_RANK=1 bash job.sh        on the second
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

MASTER_ADDR=${MASTER_ADDR:-10.77.0.1}
MASTER_PORT=${MASTER_PORT:-6000}
NNODES=${NNODES:-2}
NODE_RANK=${NODE_RANK:-0}
WORKERS_PER_NODE=${WORKERS_PER_NODE:-2}
HOSTFILE=${HOSTFILE:-$HERE/hostfile}

# gloo listens where the host name points to, on Debian the loopback, unless told which interface the nodes share.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-eth0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

securerun \
    --nnodes "$NNODES" \
    --node-rank "$NODE_RANK" \
    --nproc-per-node "$WORKERS_PER_NODE" \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    --peers "@$HOSTFILE" \
    "$HERE/../train.py" --groups 3 "$@"
