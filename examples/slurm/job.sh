#!/usr/bin/env bash
# One training job on two nodes of a Slurm cluster:
#   sbatch job.sh ../train.py --epochs 60
#SBATCH --job-name=securerun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
# One task a node is securerun, which starts the workers, as torchrun would. Who may connect is not written here:
# securerun takes the job's nodes from Slurm.
set -euo pipefail

WORKERS_PER_NODE=${WORKERS_PER_NODE:-2}
# The first node, by the address at which Slurm reaches it; its name may mean nothing to the other nodes.
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$MASTER" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Jobs that share a node must not share the port.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# $SLURM_NODEID is known where srun starts the task, and not yet here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec securerun --node-rank "$SLURM_NODEID" "$@"' securerun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$WORKERS_PER_NODE" \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "$@"
