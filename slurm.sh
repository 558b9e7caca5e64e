#!/usr/bin/env bash
# A whole run on two nodes of four GPUs, from the repository's folder, after `make install`:
#   sbatch slurm.sh configs/qwen2.5-0.5b.yaml [key=value ...]
# The repository, its .venv and the run folder lie on a file system that all nodes share. SIGTERM comes two minutes
# before the time limit; submit the same command again. A preempted job is requeued, and goes on where it stopped.
#SBATCH --job-name=degaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=degaml-%j.log
set -euo pipefail
config=${1:?usage: sbatch slurm.sh configs/<preset>.yaml [key=value ...]}
shift
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # a new store after every restart, the same on all nodes
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_PER_NODE:-4}" --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
  degaml.py stage=all config="$config" "$@"
