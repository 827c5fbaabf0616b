#!/usr/bin/env bash
# All tests, slow ones included: makes .venv, fetches the model and the conversations, runs pytest. Arguments go to pytest:
#   ./scripts/test.sh -m "not slow"        ./scripts/test.sh tests/wire -k health
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

gradwire_venv dev
"$python" scripts/fetch_model.py >&2
"$python" scripts/fetch_conversations.py >&2
# All of them take turns on as many processes as there are cores, few enough for a laptop's memory. Those that are named
# run in one process, where a debugger reaches them.
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 4 --dist worksteal
exec "$python" -m pytest "$@"
