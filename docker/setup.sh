#!/bin/sh
# Makes the certificates and the tokens of one installation:
#
#     setup.sh DIR JOB HOST...
#
#     DIR/coordinator/  ca.pem coordinator.pem coordinator.key  tokens        what a coordinator proves and asks for
#                       client.pem client.key  token                an operator's, for its health check
#     DIR/worker/       ca.pem client.pem client.key  token         what a worker of JOB needs
#
# HOST is every name by which a coordinator is reached. What is there already stays: to renew it, delete DIR. The CA's own
# key is thrown away. REKNIT names the program; it runs in the image as well as on a machine.
set -eu
umask 077

reknit=${REKNIT:-reknit}
[ $# -ge 3 ] || { echo "usage: $0 DIR JOB HOST..." >&2; exit 2; }
dir=$1 job=$2
shift 2

if [ -e "$dir/coordinator/tokens" ]; then
    echo "$dir has its secrets already" >&2
    exit 0
fi
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

hosts=
for host in "$@"; do hosts="$hosts --host $host"; done
# shellcheck disable=SC2086 # a host's name has no spaces
"$reknit" certs "$made" $hosts >&2

# `reknit token` prints the token itself, and, apart from it, the line by which a coordinator knows it.
token() { # FILE ARGUMENT
    "$reknit" token "$2" >"$made/$1" 2>"$made/line" || { cat "$made/line" >&2; exit 1; }
    grep -E '^[^ ]+ [0-9a-f]{64}$' "$made/line" >>"$made/tokens" ||
        { echo "$reknit token $2 printed no line for the tokens' file:" >&2; cat "$made/line" >&2; exit 1; }
}
token worker-token "$job"
token operator-token --operator

mkdir -p "$dir/coordinator" "$dir/worker"
for to in coordinator worker; do
    cp "$made/ca.pem" "$made/client.pem" "$made/client.key" "$dir/$to/"
done
cp "$made/worker-token" "$dir/worker/token"
cp "$made/coordinator.pem" "$made/coordinator.key" "$dir/coordinator/"
cp "$made/operator-token" "$dir/coordinator/token"
# Last: it is what says that all is there.
cp "$made/tokens" "$dir/coordinator/tokens"
echo "made the secrets in $dir" >&2
