#!/usr/bin/env bash
# First process of the container: `VERB arguments` runs a recipe, anything else is run as it is. Always by exec, so that
# signals reach python itself. Runs from any checkout too: PYTHON=.venv/bin/python docker/entrypoint.sh plan ...
set -euo pipefail

root=${NEMO_VOPD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
python=${PYTHON:-python}

usage() {
  cat <<'END'
usage: VERB [options] | COMMAND [arguments]
  train               train; with several GPUs one process for each, or NPROC=N processes
  plan                will a run fit, and how long will it take; needs no GPU
  prepare_data        turn images with questions and boxes into an Energon data set
  generate            answer a question about an image                         (NPROC=N)
  evaluate            accuracy on full images and crops, and on benchmarks     (NPROC=N)
  report              one HTML page about a run, or about two
  convert_checkpoint  between a checkpoint and a Hugging Face directory        (NPROC=N)
  benchmark           measure this machine                                     (NPROC=N)
  quickstart          the whole method on two CPU cores
  check               is everything installed that a run needs
The options of a verb are those of its recipe: train --config-name tiny; plan --config-name train_72b gpu=h200
END
}

writable() { # writable NAME FOLDER: NAME stays where its folder can be written, and becomes FOLDER otherwise
  local name=$1 folder=$2 given=${!1:-}
  if [ -n "$given" ] && mkdir -p "$given" 2>/dev/null && [ -w "$given" ]; then folder=$given; fi
  mkdir -p "$folder"
  export "$name=$folder"
}

# any user id may run this: it may have no name and no home here, and must not share caches with another one
make_places() {
  local place
  place=${TMPDIR:-/tmp}/nemo_vopd-$(id -u)
  (umask 077 && mkdir -p "$place" 2>/dev/null) || true
  # compiled code is loaded from there: a folder that somebody else made, or may write to, is not used
  if [ -L "$place" ] || [ ! -O "$place" ] || [ -n "$(find "$place" -maxdepth 0 -perm /022)" ]; then place=$(mktemp -d); fi
  USER=${USER:-$(id -un 2>/dev/null)} || true # where there is no name, id prints the number, or nothing
  export USER=${USER:-$(id -u)}
  writable HOME "$place/home"
  writable XDG_CACHE_HOME "$place/cache"
  writable HF_HOME "$XDG_CACHE_HOME/huggingface"
  writable MPLCONFIGDIR "$XDG_CACHE_HOME/matplotlib"
  writable TRITON_CACHE_DIR "$place/triton"
  writable TORCHINDUCTOR_CACHE_DIR "$place/inductor"
}

num_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+given}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

is_rank() { # torchrun or srun has started this as one of several processes
  [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ] && return
  [ -n "${SLURM_PROCID:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]
}

run() { # run RECIPE NUM_PROCESSES ARGUMENTS...
  local recipe=$root/recipes/$1.py processes=$2 meeting=(--standalone)
  shift 2
  [ -f "$recipe" ] || { echo "error: NEMO_VOPD_ROOT=$root: has no recipes/$(basename "$recipe")" >&2; exit 2; }
  [[ $processes =~ ^[0-9]+$ ]] || { echo "error: NPROC=$processes: must be a number; set NPROC=8" >&2; exit 2; }
  if is_rank || { [ "$processes" -le 1 ] && [ "${PET_NNODES:-1}" = 1 ]; }; then
    exec "$python" -W ignore "$recipe" "$@"
  fi
  [ "${PET_NNODES:-1}" = 1 ] || meeting=() # several nodes: torchrun reads PET_MASTER_ADDR and the like itself
  [ "$processes" -ge 1 ] || processes=1
  exec "$python" -W ignore -m torch.distributed.run ${meeting[@]+"${meeting[@]}"} --nproc-per-node "$processes" \
    "$recipe" "$@"
}

# shellcheck source=/dev/null
if [ -f "$root/slurm/environment.sh" ]; then . "$root/slurm/environment.sh"; fi
make_places
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout, also where another one is installed
# for torchrun, whoever starts it: hand SIGUSR1 on as well, and let the ranks finish a step and a save after a signal
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

verb=${1:-help}
case $verb in
  help | -h | --help) usage ;;
  train) run train_vopd "${NPROC:-$(num_gpus)}" "${@:2}" ;;
  generate | evaluate | convert_checkpoint | benchmark) run "$verb" "${NPROC:-1}" "${@:2}" ;;
  plan | prepare_data | report | quickstart) run "$verb" 1 "${@:2}" ;;
  check)
    base=()
    [ ! -f /opt/nemo_vopd_base/base.json ] || base=(--base /opt/nemo_vopd_base/base.json)
    exec "$python" "$root/docker/check_image.py" ${base[@]+"${base[@]}"} "${@:2}"
    ;;
  *)
    command -v -- "$verb" >/dev/null || { echo "error: $verb: is no verb and no program; see help" >&2; exit 127; }
    exec "$@"
    ;;
esac
