#!/bin/bash
# Stands in for the interpreter of the ranks where a test looks at what the scripts do, not at what training does: says
# how it was called, in one file for each task under RECORD, and behaves as TRAIN tells.
case "$*" in
  *plan.py*) echo "8 x H100"; echo fits; exit ;;
  *--cfg\ job*) printf 'trainer:\n  max_steps: 4\n'; exit ;;
  *health_check.py*)
    # one node cannot be reached by the others: its network interface is not there
    [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ] && [ "$SLURMD_NODENAME" = "${UNREACHABLE:-}" ] && export GLOO_SOCKET_IFNAME=gone0
    exec "$REAL_PYTHON" "$@" ;;
esac
{ printf '%s\n' "$@"; } >"$RECORD/arguments-$SLURM_PROCID"
env >"$RECORD/environment-$SLURM_PROCID"
case "$TRAIN" in
  finish) [ "$SLURM_PROCID" != 0 ] || echo '{"finished": true, "reason": "max_steps", "step": 4}' >"$RESULTS/status.json" ;;
  crash) exit 1 ;;
  progress) # the first start reaches a checkpoint, no other gets further
    [ "$SLURM_PROCID" != 0 ] || mkdir -p "$RESULTS/checkpoints/step-00000008"
    exit 1 ;;
  sleep) exec sleep 100 ;;
esac
