#!/usr/bin/env bash
# The topology of compose.yaml as plain processes of this machine: three etcd, three coordinators over them, four workers,
# with TLS and tokens. Waits until all four train, kills a coordinator and then a worker, shows that training goes on, and
# stops everything. Exit code 0 only if it held.
#
#     docker/topology.sh [DIRECTORY OF THE PROGRAMS]        default: target/release
#
# REKNIT_TOPOLOGY_PORT is the first of the 13 ports that it takes on 127.0.0.1; etcd (3.4 or newer) and jq are those in PATH.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:-$root/target/release}" && pwd)
first_port=${REKNIT_TOPOLOGY_PORT:-27070}
job=digits

talk() { printf '%4d s  %s\n' "$SECONDS" "$*" >&2; }
die() { talk "FAILED: $*"; exit 1; }

for program in "$bin/reknit" "$bin/reknit-digits" etcd jq; do
    command -v "$program" >/dev/null || die "there is no $program"
done

dir=$(mktemp -d)
declare -A pid=() # of each process, by its name

# Whatever happens, nothing stays behind; of a failure, the ends of the logs are shown. etcd's data is thrown away, so etcd
# is not asked to stop: it goes last, when no coordinator needs it to stop in order.
stop() {
    local code=$? name asked=() left
    trap - EXIT INT TERM
    for name in "${!pid[@]}"; do
        [[ $name == etcd-* ]] || asked+=("${pid[$name]}")
    done
    kill -TERM "${asked[@]}" 2>/dev/null || true
    for ((left = 50; left > 0; left--)); do
        kill -0 "${asked[@]}" 2>/dev/null || break
        sleep 0.1
    done
    disown -a
    kill -KILL "${pid[@]}" 2>/dev/null || true
    for ((left = 50; left > 0; left--)); do
        kill -0 "${pid[@]}" 2>/dev/null || break
        sleep 0.1
    done
    if [ "$code" -ne 0 ]; then
        for name in "$dir"/*.log; do
            [ -e "$name" ] || continue
            printf '\n--- %s\n' "${name##*/}" >&2
            tail -n 15 "$name" >&2
        done
    fi
    rm -rf "$dir"
    exit "$code"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$dir/$name.log" 2>&1 </dev/null &
    pid[$name]=$!
}

kill_hard() { # NAME
    talk "SIGKILL for $1"
    # Or the shell would report it, too.
    disown "${pid[$1]}"
    kill -KILL "${pid[$1]}"
    unset "pid[$1]"
}

all_live() {
    local name
    for name in "${!pid[@]}"; do
        kill -0 "${pid[$name]}" 2>/dev/null || die "$name has ended by itself"
    done
}

status_json() { "$bin/reknit" status --json "$job"; }

within() { # SECONDS WHAT COMMAND...: tries again until the command succeeds
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        all_live
        [ "$SECONDS" -lt "$until" ] || die "waited in vain for $what; \`reknit status\` says: $(status_json 2>&1 || true)"
        sleep 0.1
    done
    talk "$what"
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port() { echo $((first_port + $1)); }
for ((n = 0; n < 13; n++)); do
    ! listens "$(port "$n")" || die "port $(port "$n") is taken; set REKNIT_TOPOLOGY_PORT to another first port"
done

talk "certificates and tokens"
REKNIT=$bin/reknit "$root/docker/setup.sh" "$dir/secrets" "$job" localhost 127.0.0.1
coordinator=$dir/secrets/coordinator
worker=$dir/secrets/worker

# 0 to 5 are etcd's, for clients and for each other; 6 to 8 the coordinators'; 9 to 12 the workers'.
stores='' cluster='' coordinators=''
for n in 1 2 3; do
    stores+=${stores:+,}127.0.0.1:$(port $((n - 1)))
    cluster+=${cluster:+,}etcd-$n=http://127.0.0.1:$(port $((n + 2)))
    coordinators+=${coordinators:+,}https://127.0.0.1:$(port $((n + 5)))
done

for n in 1 2 3; do
    client=http://127.0.0.1:$(port $((n - 1))) peer=http://127.0.0.1:$(port $((n + 2)))
    start "etcd-$n" etcd --name "etcd-$n" --data-dir "$dir/etcd-$n" \
        --listen-client-urls "$client" --advertise-client-urls "$client" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
        --initial-cluster "$cluster" --initial-cluster-state new --initial-cluster-token topology
done
etcd_serves() { listens "$(port 0)" && listens "$(port 1)" && listens "$(port 2)"; }
within 30 "three etcd serve" etcd_serves

# The first one that is there leads, so it is the first one that is killed later.
for n in 1 2 3; do
    address=127.0.0.1:$(port $((n + 5)))
    start "coordinator-$n" "$bin/reknit" serve --listen "$address" --advertise "https://$address" \
        --store "etcd://$stores/reknit" --announce \
        --tls-cert "$coordinator/coordinator.pem" --tls-key "$coordinator/coordinator.key" \
        --tls-client-ca "$coordinator/ca.pem" --tokens "$coordinator/tokens"
    within 30 "coordinator-$n listens" listens "$(port $((n + 5)))"
done

export REKNIT_COORDINATOR=$coordinators
for n in 1 2 3 4; do
    address=127.0.0.1:$(port $((n + 8)))
    start "worker-$n" env REKNIT_CA="$worker/ca.pem" REKNIT_CERT="$worker/client.pem" \
        REKNIT_KEY="$worker/client.key" REKNIT_TOKEN_FILE="$worker/token" \
        "$bin/reknit-digits" --job "$job" --name "worker-$n" --min 2 --max 4 --listen "$address" \
        --advertise "$address" --steps 1000000 --step-ms 20
done

# From here on this is the operator.
export REKNIT_CA=$coordinator/ca.pem REKNIT_CERT=$coordinator/client.pem
export REKNIT_KEY=$coordinator/client.key REKNIT_TOKEN_FILE=$coordinator/token
read_status() {
    local text
    text=$(status_json 2>/dev/null) || return 1
    read -r phase ranks generation step < <(
        jq -r '[.phase, .ranks, .generation, .step] | @tsv' <<<"$text"
    )
}
runs_with() { read_status && [ "$phase" = running ] && [ "$ranks" -eq "$1" ]; }
has_passed() { read_status && [ "$phase" = running ] && [ "$step" -gt "$1" ]; }
show() { "$bin/reknit" status "$job"; }

within 60 "four workers train" runs_with 4
within 30 "they have done 50 steps" has_passed 50
show
before=$generation

kill_hard coordinator-1
within 60 "another coordinator answers, and training has gone on" has_passed $((step + 100))
[ "$generation" -eq "$before" ] ||
    die "the coordinator's death cost $((generation - before)) generations; it must cost none"

kill_hard worker-4
within 60 "three workers train" runs_with 3
[ "$generation" -eq $((before + 1)) ] ||
    die "the worker's death cost $((generation - before)) generations; it must cost one"
within 30 "they go on" has_passed $((step + 50))
show
"$bin/reknit" history "$job"

talk "it held: a coordinator's death cost no generation, a worker's one"
