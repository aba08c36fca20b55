# shellcheck shell=bash
# Are the nodes fit to train? Sourced by common.sh. check_health leaves the names of bad nodes in BAD.

check_health() { # 0: all nodes are fit; else BAD names the ones to leave out, as far as they can be told
  HEALTH=$LOG/health
  mkdir -p "$HEALTH"
  say "checking ${#HOSTS[@]} nodes"
  if health_step all 0 "${HOSTS[@]}"; then
    cat "$HEALTH"/*.ok
    return 0
  fi
  find_bad_nodes
  say "the nodes are not fit: ${BAD:-no single node is to blame}"
  cat "$HEALTH"/*.bad 2>/dev/null
  return 1
}

health_step() { # health_step NAME PORT_OFFSET NODE...: run health_check.py on these nodes, one process for each task
  local name=$1 port=$((MASTER_PORT + $2))
  shift 2
  step_options $# "$TASKS_PER_NODE"
  local nodes
  nodes=$(IFS=, && echo "$*")
  MASTER_ADDR=$1 MASTER_PORT=$port timeout --kill-after=10 "$HEALTH_SECONDS" "${STEP[@]}" --nodelist="$nodes" \
    --output="$HEALTH/$name-%N-%t.log" "$PYTHON" "$CODE/slurm/health_check.py" --folder "$HEALTH" \
    --gpus "${GPUS_PER_NODE:-0}" --min-free-gib "$MIN_FREE_GIB" --paths "$RESULTS:/tmp" --seconds $((HEALTH_SECONDS / 3))
}

find_bad_nodes() {
  local host i parity last=$((${#HOSTS[@]} - 1)) suspects=()
  for host in "${HOSTS[@]}"; do # what a node said of itself, or did not say
    [ -e "$HEALTH/$host.ok" ] || [ -e "$HEALTH/$host.bad" ] || echo "$host: did not answer" >"$HEALTH/$host.bad"
    [ ! -e "$HEALTH/$host.bad" ] || suspects+=("$host")
  done
  if [ ${#suspects[@]} = 0 ] && [ "$last" -ge 2 ]; then
    # every node is fit by itself and they cannot reach each other: one that reaches neither neighbour is to blame
    for parity in 0 1; do
      for i in $(seq "$parity" 2 "$last"); do
        pair "$i" "${HOSTS[i]}" "${HOSTS[(i + 1) % (last + 1)]}" &
      done
      wait
    done
    for host in "${HOSTS[@]}"; do
      [ -e "$HEALTH/$host.reached" ] && continue
      echo "$host: reaches neither neighbour" >"$HEALTH/$host.bad"
      suspects+=("$host")
    done
  fi
  [ ${#suspects[@]} = ${#HOSTS[@]} ] || BAD=$(IFS=, && echo "${suspects[*]-}") # all of them: then it is not the nodes
}

pair() { # pair NUMBER NODE NODE
  health_step "pair-$1" $(($1 + 1)) "$2" "$3" && touch "$HEALTH/$2.reached" "$HEALTH/$3.reached"
}
