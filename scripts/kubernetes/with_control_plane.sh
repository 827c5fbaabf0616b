#!/usr/bin/env bash
# Runs a command with an API server: GRADWIRE_TEST_KUBECONFIG names its kubeconfig. Where KUBECONFIG is set, that cluster is
# taken; else etcd, kube-apiserver and kube-controller-manager are started on loopback, on free ports, with an empty store,
# and stopped when the command ends. There are no nodes and no kubelet. Where neither can be had, the command runs without.
#   ./scripts/kubernetes/with_control_plane.sh command …
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

if [ -n "${KUBECONFIG:-}" ]; then
    GRADWIRE_TEST_KUBECONFIG=$KUBECONFIG exec "$@"
fi

if ! binaries=$("$here/build_control_plane.sh"); then
    # Its reason was told; what needs no API server runs all the same.
    exec "$@"
fi
run=$(mktemp -d "${TMPDIR:-/tmp}/gradwire-kubernetes.XXXXXX")
chmod 700 "$run"
pids=()
stop() {
    local pid
    # What they hold is thrown away; asked kindly, an API server waits for its watchers.
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || :; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || :; done
    rm -rf "$run"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # name command …
    local name=$1
    shift
    setsid "$@" >"$run/$name.log" 2>&1 </dev/null &
    pids=("$!" "${pids[@]}")
}

await() { # what seconds command …
    local what=$1 seconds=$2 pid
    shift 2
    for ((i = 0; i < seconds * 5; i++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2>/dev/null || break 2
        done
        sleep 0.2
    done
    echo "$what did not start; what was logged last:" >&2
    tail -n 15 "$run"/*.log >&2
    exit 1
}

# Three ports that were free a moment ago; the listeners are open until all are known, so that they differ.
read -r etcd_port peer_port api_port < <("${PYTHON:-python3}" -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in held))')
token=$("${PYTHON:-python3}" -c 'import secrets; print(secrets.token_urlsafe(24))')
umask 077
openssl genrsa -out "$run/sa.key" 2048 2>/dev/null
openssl rsa -in "$run/sa.key" -pubout -out "$run/sa.pub" 2>/dev/null
printf '%s,admin,admin,"system:masters"\n' "$token" >"$run/tokens.csv"

etcd=http://127.0.0.1:$etcd_port peers=http://127.0.0.1:$peer_port
# Nothing outlives the run, so nothing needs to be on the platter.
start etcd "$binaries/etcd" --data-dir "$run/etcd" --unsafe-no-fsync \
    --listen-client-urls "$etcd" --advertise-client-urls "$etcd" \
    --listen-peer-urls "$peers" --initial-advertise-peer-urls "$peers" --initial-cluster "default=$peers"
start apiserver "$binaries/kube-apiserver" --etcd-servers "$etcd" --cert-dir "$run/certs" \
    --bind-address 127.0.0.1 --advertise-address 127.0.0.1 --secure-port "$api_port" \
    --service-cluster-ip-range 10.0.0.0/16 --authorization-mode RBAC --token-auth-file "$run/tokens.csv" \
    --service-account-key-file "$run/sa.pub" --service-account-signing-key-file "$run/sa.key" \
    --service-account-issuer https://kubernetes.default.svc --profiling=false
await "The API server" 90 curl --silent --fail --noproxy '*' --cacert "$run/certs/apiserver.crt" \
    -H "authorization: Bearer $token" "https://127.0.0.1:$api_port/readyz"

cat >"$run/kubeconfig" <<CONFIG
apiVersion: v1
kind: Config
clusters: [{name: tests, cluster: {server: "https://127.0.0.1:$api_port", certificate-authority: $run/certs/apiserver.crt}}]
users: [{name: admin, user: {token: $token}}]
contexts: [{name: tests, context: {cluster: tests, user: admin}}]
current-context: tests
CONFIG
start controllers "$binaries/kube-controller-manager" --kubeconfig "$run/kubeconfig" --leader-elect=false \
    --port 0 --secure-port 0 --service-account-private-key-file "$run/sa.key" --profiling=false \
    --controllers 'statefulset,deployment,replicaset,endpoint,garbagecollector,namespace,serviceaccount,serviceaccount-token,resourcequota,persistentvolume-binder,pvc-protection,disruption'

GRADWIRE_TEST_KUBECONFIG=$run/kubeconfig "$@"
