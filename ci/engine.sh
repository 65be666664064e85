# Sourced: a container engine for the time of a script.

engine() { # engine DIR: uses the engine that runs, else starts one with its state in DIR; sets engine_pid for the latter; fails when it cannot
  engine_pid=""
  docker info >/dev/null 2>&1 && return 0
  command -v dockerd >/dev/null 2>&1 || install docker.io "provides dockerd, a container engine" || return 1
  export DOCKER_HOST="unix://$1/docker.sock"
  # Without --ip, published ports would be open to the network.
  dockerd --ip 127.0.0.1 --data-root "$1/docker" --exec-root "$1/exec" --pidfile "$1/docker.pid" -H "$DOCKER_HOST" >"$1/docker.log" 2>&1 &
  engine_pid=$!
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && return 0
    kill -0 "$engine_pid" 2>/dev/null || break
    sleep 1
  done
  tail -n 5 "$1/docker.log" >&2
  return 1
}

stop_engine() { # ends what engine started; the engine unmounts on its way out
  [ -z "${engine_pid:-}" ] || { kill "$engine_pid" 2>/dev/null || true; wait "$engine_pid" 2>/dev/null || true; }
  engine_pid=""
}
