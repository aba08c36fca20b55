#!/bin/bash
# Qwen2.5-VL-72B on 8 nodes of 8 H100 80GB. From the root of the checkout:
#   DRY_RUN=1 bash slurm/train_72b.sh && sbatch slurm/train_72b.sh [Hydra overrides]
# Every variable can also be given in the environment; bash slurm/train_72b.sh --help explains them.
#SBATCH --job-name=vopd_72b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
##SBATCH --account=NAME
##SBATCH --partition=NAME

CONFIG=${CONFIG:-train_72b}
IMAGE=${IMAGE:-}
MOUNTS=${MOUNTS:-}
MODEL=${MODEL:-models/Qwen2.5-VL-72B-Instruct}
DATA=${DATA:-datasets/vision_opd_6k}
RESULTS=${RESULTS:-runs/train_72b}

# Slurm runs a copy of this file from its own folder, so the checkout is where the job was submitted
folder=$(dirname "$0")
[ -f "$folder/common.sh" ] || folder=${REPO:-${SLURM_SUBMIT_DIR:-.}}/slurm
[ -f "$folder/common.sh" ] || { echo "error: REPO=$folder/..: has no slurm/common.sh; submit from the checkout's root, or set REPO" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"
