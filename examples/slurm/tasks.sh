#!/usr/bin/env bash
# One training job on two nodes of a Slurm cluster, each task a rank, without torchrun:
#   sbatch tasks.sh ../train.py --epochs 60
#SBATCH --job-name=securerun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --output=%x-%j.out
# srun starts the ranks, and each takes a lease of its own: they are siblings below slurmstepd, and nothing but what a
# launcher starts itself is guarded by it. Who may connect is not written here: the job's nodes are taken from Slurm.
set -euo pipefail

# The first node, by the address at which Slurm reaches it; its name may mean nothing to the other nodes.
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$MASTER" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Jobs that share a node must not share the port.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# torch's env:// in Slurm's words, which are known where srun starts the task, and not yet here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec securerunctl exec -- python "$@"' task "$@"
