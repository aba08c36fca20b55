# shellcheck shell=bash
# What slurm/train_*.sh share: check, run, save before the time limit, requeue, resume. Sourced with CONFIG, IMAGE,
# MOUNTS, MODEL, DATA and RESULTS set and the user's Hydra overrides as arguments; main, at the end, is the story.
set -uo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SCRIPT=$(realpath "$0")
# paths mean what they mean in the folder where they were typed
[ -d "$MODEL" ] && MODEL=$(realpath "$MODEL")
[ -e "$DATA" ] && DATA=$(realpath "$DATA")
RESULTS=$(realpath -m "$RESULTS")
cd "$REPO" || exit 2
if [ -n "$IMAGE" ]; then PYTHON=${PYTHON:-python}; else PYTHON=${PYTHON:-$REPO/.venv/bin/python}; fi
GPU=${GPU:-h100}
MAX_RESTARTS=${MAX_RESTARTS:-3}
MIN_FREE_GIB=${MIN_FREE_GIB:-5}
PLAN=${PLAN:-1}
HEALTH_CHECK=${HEALTH_CHECK:-1}
HEALTH_SECONDS=${HEALTH_SECONDS:-300}
OVERRIDES=(${OVERRIDES[@]+"${OVERRIDES[@]}"} "$@")

. "$REPO/slurm/health.sh"

usage() {
  cat <<END
$(sed -n '2,/^#SBATCH/p' "$SCRIPT" | sed -n 's/^# \{0,1\}//p' | sed '/^SBATCH/d')

Variables, from the environment or edited on top of the script:
  IMAGE          container image for pyxis: a .sqsh file or registry#name:tag; empty: the bare environment PYTHON [$IMAGE]
  MOUNTS         further mounts of the container, SRC:DST,...; the checkout, MODEL, DATA and RESULTS are mounted [$MOUNTS]
  MODEL          Hugging Face directory (model.hf_path) [$MODEL]
  DATA           Energon data set or blend.yaml that prepare_data.py wrote (data.path) [$DATA]
  RESULTS        folder of the run (exp_manager.exp_dir), on a file system that all nodes share [$RESULTS]
  CONFIG         conf/CONFIG.yaml is trained [$CONFIG]
  PYTHON         interpreter of the ranks [$PYTHON]
  GPU            h100, h200 or a100: what the plan counts with [$GPU]
  MAX_RESTARTS   restarts in a row that may bring no new checkpoint; then the job ends non-zero [$MAX_RESTARTS]
  PLAN           0 leaves the plan (memory, divisibility) out [$PLAN]
  HEALTH_CHECK   0 leaves the check of the nodes out [$HEALTH_CHECK]
  HEALTH_SECONDS how long the check may take [$HEALTH_SECONDS]
  MIN_FREE_GIB   free space that the check wants in RESULTS and in each node's /tmp [$MIN_FREE_GIB]
  MASTER_PORT    port where ranks meet [20000 + job id modulo 10000]
  DRY_RUN        1 prints the plan, the resolved configuration and the srun line, and runs nothing
Slurm's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_QOS ..., or options of sbatch before the script.
END
}

say() { echo "$(date '+%F %T') $*"; }

refuse() { # option=value: rule; remedy
  echo "error: $*" >&2
  exit 2
}

sbatch_option() { # the script's own #SBATCH line, where there is no job to ask
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$SCRIPT" | head -1
}

read_allocation() {
  NODES=${SLURM_JOB_NUM_NODES:-$(sbatch_option nodes)}
  TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$(sbatch_option ntasks-per-node)}
  GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-$(sbatch_option gpus-per-node)}
  GPUS_PER_NODE=${GPUS_PER_NODE##*:} # h100:8 too
  CPUS_PER_NODE=${SLURM_CPUS_ON_NODE:-$TASKS_PER_NODE}
  TASKS=$((NODES * TASKS_PER_NODE))
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${MASTER_ADDR:-${HOSTS[0]}}
  fi
  # below the ports that Linux hands out by itself, and another one for each job that shares a node
  export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
}

check_arithmetic() { # before anything touches a GPU; what the parallel sizes must divide is asked of plan.py
  [ "${SLURM_NTASKS:-$TASKS}" = "$TASKS" ] ||
    refuse "--ntasks=$SLURM_NTASKS: must be --nodes=$NODES times --ntasks-per-node=$TASKS_PER_NODE; leave --ntasks out"
  [ "${GPUS_PER_NODE:-$TASKS_PER_NODE}" = "$TASKS_PER_NODE" ] ||
    refuse "--ntasks-per-node=$TASKS_PER_NODE: one task drives one GPU; set it and --gpus-per-node=$GPUS_PER_NODE alike"
  [ -f "conf/$CONFIG.yaml" ] || refuse "CONFIG=$CONFIG: there is no conf/$CONFIG.yaml; name one of the files there"
  local word
  for word in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    case $word in
      exp_manager.exp_dir=*) refuse "$word: this script reads the run's folder; give RESULTS=${word#*=} instead" ;;
      num_nodes=*) refuse "$word: follows from the job; give sbatch --nodes=${word#*=} instead" ;;
      exp_manager.resume_if_exists=[Ff]alse)
        refuse "$word: a requeued job would begin anew each time; give another RESULTS instead" ;;
    esac
  done
  for word in "MODEL=$MODEL" "DATA=$DATA" "RESULTS=$RESULTS" "REPO=$REPO"; do
    case ${word#*=} in
      *[!A-Za-z0-9._/+@%-]*) refuse "$word: holds a character that Hydra or pyxis reads as its own; rename the folder" ;;
    esac
  done
  if [ "$DRY" = 1 ]; then # nodes may see what this machine does not
    [ -z "$MODEL" ] || [ -d "$MODEL" ] || say "note: MODEL=$MODEL is not a directory on $(hostname -s)"
    [ -z "$DATA" ] || [ -e "$DATA" ] || say "note: DATA=$DATA does not exist on $(hostname -s)"
    return
  fi
  [ -z "$MODEL" ] || [ -d "$MODEL" ] ||
    refuse "MODEL=$MODEL: is not a directory on $(hostname -s); give the Hugging Face directory of the model"
  [ -z "$DATA" ] || [ -d "$DATA" ] || [[ $DATA = *.yaml && -f $DATA ]] ||
    refuse "DATA=$DATA: is not a directory on $(hostname -s); give a data set that recipes/prepare_data.py wrote"
}

training_arguments() { # what recipes/train_vopd.py and recipes/plan.py are called with
  ARGUMENTS=(--config-name "$CONFIG" "num_nodes=$NODES" "exp_manager.exp_dir=$RESULTS")
  [ -z "$MODEL" ] || ARGUMENTS+=("model.hf_path=$MODEL")
  [ -z "$DATA" ] || ARGUMENTS+=("data.path=$DATA")
  ARGUMENTS+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

step_options() { # step_options NODES TASKS_PER_NODE: srun's options for a step
  # cpus-per-task: since Slurm 22.05 srun does not take it from the job, and one core for a rank and its loader is slow
  STEP=(srun --nodes="$1" --ntasks=$(($1 * $2)) --ntasks-per-node="$2" --cpus-per-task=$((CPUS_PER_NODE / $2))
    --mpi=none --export=ALL --kill-on-bad-exit=1 --wait=300)
  if [ -n "$IMAGE" ]; then
    local paths=$REPO:$REPO,$RESULTS:$RESULTS path
    for path in "$MODEL" "$DATA"; do
      [ ! -f "$path" ] || path=$(dirname "$path") # a blend names the data sets beside it
      [ -z "$path" ] || paths+=,$path:$path
    done
    STEP+=(--container-image="$IMAGE" --container-mounts="$paths${MOUNTS:+,$MOUNTS}" --container-workdir="$REPO"
      --no-container-mount-home)
  fi
}

# USR1 reaches every process of a step: bash must not die of it, nor python before it listens, so it is ignored here and
# exec leaves no shell between Slurm and python
# shellcheck disable=SC2016
rank_command() { # rank_command PROGRAM ARGUMENTS...
  RANK=(bash -c 'trap "" USR1; . "$0" && exec "$@"' "$CODE/slurm/environment.sh" "$@")
}

dry_run() {
  CODE=$REPO
  training_arguments
  rank_command "$PYTHON" "$CODE/recipes/train_vopd.py" "${ARGUMENTS[@]}"
  step_options "$NODES" "$TASKS_PER_NODE"
  if "$PYTHON" -c 'import hydra, megatron.core' 2>/dev/null; then
    echo "# plan"
    plan || exit 2
    echo "# configuration"
    resolved_configuration || exit 2
  else
    echo "# plan and configuration left out: PYTHON=$PYTHON on $(hostname -s) has no megatron-core (make setup)"
  fi
  echo "# srun"
  printf '%q ' "${STEP[@]}" "${RANK[@]}"
  echo
}

plan() { "$@" "$PYTHON" "$CODE/recipes/plan.py" "${ARGUMENTS[@]}" gpus_per_node="$TASKS_PER_NODE" gpu="$GPU"; }

resolved_configuration() { "$@" "$PYTHON" "$CODE/recipes/train_vopd.py" "${ARGUMENTS[@]}" --cfg job --resolve; }

prepare_folder() { # one folder for each start of the job; the code is copied at the first start and used by all
  JOB=$RESULTS/slurm/$SLURM_JOB_ID
  LOG=$JOB-${SLURM_RESTART_COUNT:-0}
  CODE=$JOB/code
  mkdir -p "$LOG" "$JOB" || refuse "RESULTS=$RESULTS: cannot be written on $(hostname -s); name another folder"
  ln -sfn "$(basename "$LOG")" "$RESULTS/slurm/latest"
  rm -f "$JOB/refused"
  if [ ! -d "$CODE" ]; then
    rm -rf "$CODE.partial"
    mkdir "$CODE.partial" && tar --exclude=__pycache__ -cf - recipes nemo_vopd conf slurm | tar -xf - -C "$CODE.partial"
    git rev-parse HEAD >"$CODE.partial/revision.txt" 2>/dev/null && git diff HEAD >>"$CODE.partial/revision.txt"
    mv "$CODE.partial" "$CODE"
  fi
  export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
  export NEMO_VOPD_REFUSED=$JOB/refused
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$LOG/nccl-trace-rank- # the rank is appended
}

checkpoint_step() { # step of the newest checkpoint, which is a folder's name once it is complete
  local newest
  newest=$(cd "$RESULTS/checkpoints" 2>/dev/null && printf '%s\n' step-* | sort | tail -1)
  newest=${newest##*-}
  [[ $newest =~ ^[0-9]+$ ]] && echo $((10#$newest)) || echo 0
}

restarts_in_vain() { # how often in a row the job has started from the newest checkpoint again
  tac "$JOB/starts" | awk -v step="$(checkpoint_step)" '$1 != step {exit} {n++} END {print (n ? n - 1 : 0)}'
}

status() { sed -n "s/.*\"$1\": \"\{0,1\}\([a-zA-Z0-9_]*\).*/\1/p" "$RESULTS/status.json" 2>/dev/null; }

finished() { # status.json says so, and this job does not ask for more steps than it did
  [ "$(status finished)" = true ] || return
  [ "$(status reason)" = early_stop ] && return
  [ "$(status step)" -ge "$(sed -n 's/^  max_steps: //p' "$LOG/config.yaml")" ]
}

check_configuration() { # one task in the environment of the ranks: exit code 2 costs seconds, not 64 loads of a model
  step_options 1 1
  if ! resolved_configuration "${STEP[@]}" >"$LOG/config.yaml" 2>"$LOG/plan.txt" ||
    { [ "$PLAN" = 1 ] && ! finished && ! plan "${STEP[@]}" >"$LOG/plan.txt" 2>&1; }; then
    grep -v '^srun:\|^slurmstepd' "$LOG/plan.txt" >&2
    say "refused before a GPU was touched; mend it and submit again"
    exit 2
  fi
}

train() {
  rank_command "$PYTHON" "$CODE/recipes/train_vopd.py" "${ARGUMENTS[@]}"
  step_options "$NODES" "$TASKS_PER_NODE"
  printf '%q ' "${STEP[@]}" "${RANK[@]}" >"$LOG/srun.txt"
  say "$TASKS ranks on ${HOSTS[*]}; rank 0 writes $LOG/rank-000.log"
  "${STEP[@]}" --output="$LOG/rank-%3t.log" "${RANK[@]}" &
  SRUN=$!
  [ -z "$STOPPING" ] || forward
  while true; do # wait returns early when a trap has run
    wait "$SRUN"
    CODE_OF_STEP=$?
    kill -0 "$SRUN" 2>/dev/null || break
  done
  wait "$SRUN" # its own code, should a signal have come with its end
  CODE_OF_STEP=$?
  SRUN=''
}

# shellcheck disable=SC2317
stop() { # the time limit is near, or another job takes the nodes: all ranks save after this step
  [ -z "$STOPPING" ] || return
  STOPPING=$1
  say "$1: asking all ranks to save after this step and end"
  [ -z "$SRUN" ] || forward
}

forward() { # again and again: a task whose container is still being made does not listen yet
  { while kill -USR1 "$SRUN" 2>/dev/null; do sleep 10; done; } &
}

tell_failure() {
  local log
  log=$(grep -lE 'Traceback|^error|Error:' "$LOG"/rank-*.log 2>/dev/null | head -1)
  log=${log:-$LOG/rank-000.log}
  say "step ended with code $CODE_OF_STEP after checkpoint $(checkpoint_step); end of $log:"
  tail -n 20 "$log"
}

restart() { # the same job again, without the nodes in BAD
  local state
  state=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'JobState=[A-Z]*')
  [ "$state" = JobState=RUNNING ] || { say "$state: not restarted"; exit 1; } # scancel, or the time limit
  if [ "$(restarts_in_vain)" -ge "$MAX_RESTARTS" ]; then
    say "MAX_RESTARTS=$MAX_RESTARTS restarts in a row brought no checkpoint after step $(checkpoint_step): not restarted"
    exit 1
  fi
  say "restarting from step $(checkpoint_step)${BAD:+ without $BAD}"
  trap '' TERM # requeuing ends this script; it has a word to say before that
  scontrol requeue "$SLURM_JOB_ID" || { say "Slurm refuses to requeue: submit again, it resumes"; exit 1; }
  if [ -n "$BAD" ]; then # only a pending job takes a list of excluded nodes
    local excluded
    excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$excluded" = "(null)" ] && excluded=
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$BAD" || say "could not exclude $BAD"
  fi
  sleep 600
  exit 1
}

main() {
  DRY=${DRY_RUN:-0} STOPPING='' SRUN='' BAD=''
  case ${OVERRIDES[*]-} in *--help* | -h) usage && exit ;; esac
  read_allocation
  [ "$DRY" = 1 ] || [ -n "${SLURM_JOB_ID:-}" ] || refuse "$SCRIPT: is not running in a job; submit it: sbatch $SCRIPT"
  check_arithmetic
  [ "$DRY" = 1 ] && { dry_run; exit; }
  trap 'stop USR1' USR1
  trap 'stop TERM' TERM
  prepare_folder
  training_arguments
  checkpoint_step >>"$JOB/starts"
  [ "$(restarts_in_vain)" -le "$MAX_RESTARTS" ] || { say "MAX_RESTARTS=$MAX_RESTARTS reached"; exit 1; }
  check_configuration
  finished && { say "the run is finished: $RESULTS/status.json; give another RESULTS for a new one"; exit 0; }
  if [ "$HEALTH_CHECK" = 1 ] && ! check_health; then restart; fi
  [ -z "$STOPPING" ] || restart
  train
  finished && { say "finished after step $(status step): $(status reason)"; exit 0; }
  [ -s "$JOB/refused" ] && { say "refused: $(cat "$JOB/refused")"; exit 2; }
  if [ "$CODE_OF_STEP" = 0 ]; then
    say "ended after step $(status step): $(status reason)"
  elif [ -z "$STOPPING" ]; then
    tell_failure
  fi
  restart
}

main
