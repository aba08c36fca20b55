#!/bin/bash
# The tiny run on 2 nodes with 2 tasks each, without GPUs: try a cluster's Slurm with it. From the checkout's root:
#   DRY_RUN=1 bash slurm/train_tiny.sh && sbatch slurm/train_tiny.sh [Hydra overrides]
# Every variable can also be given in the environment; bash slurm/train_tiny.sh --help explains them.
#SBATCH --job-name=vopd_tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
##SBATCH --account=NAME
##SBATCH --partition=NAME

CONFIG=${CONFIG:-tiny}
IMAGE=${IMAGE:-}
MOUNTS=${MOUNTS:-}
MODEL=${MODEL:-}
DATA=${DATA:-}
RESULTS=${RESULTS:-runs/slurm_tiny}
OVERRIDES=(parallel.tensor=2)

# Slurm runs a copy of this file from its own folder, so the checkout is where the job was submitted
folder=$(dirname "$0")
[ -f "$folder/common.sh" ] || folder=${REPO:-${SLURM_SUBMIT_DIR:-.}}/slurm
[ -f "$folder/common.sh" ] || { echo "error: REPO=$folder/..: has no slurm/common.sh; submit from the checkout's root, or set REPO" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"
