#!/usr/bin/env bash
# What runs in a cluster, against a real API server: yours where KUBECONFIG is set (for example kind's; a namespace of its own
# is made there and removed, as are the kinds of JobSet and Kubeflow if it lacks them), else one that is built once out of
# Debian's packages, see scripts/kubernetes; where neither can be had, what needs no API server runs, and the rest is skipped
# in a sentence. Arguments go to pytest:
#   ./scripts/test_kubernetes.sh -k refused
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

gradwire_venv dev
if ! helm=$("$python" scripts/kubernetes/helm.py); then
    exit 1
fi
PATH=$(dirname -- "$helm"):$root/.venv/bin:$PATH
export PATH PYTHON=$python
# All of them take turns on two processes.
[ "$#" -gt 0 ] || set -- --numprocesses 2 --dist loadgroup
[ "${1#-}" = "$1" ] || set -- tests/kubernetes "$@"
exec scripts/kubernetes/with_control_plane.sh "$python" -m pytest "$@"
