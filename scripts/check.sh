#!/usr/bin/env bash
# Everything CI checks, in the order of how fast it says no: format, lint, types, protos, stubs, tests. Arguments go to pytest;
# --static leaves the tests out.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

gradwire_venv dev
"$python" -m ruff format --check --quiet
"$python" -m ruff check --quiet
"$root/.venv/bin/shellcheck" --external-sources scripts/*.sh scripts/kubernetes/*.sh .ci/run
"$python" -m pyright
"$python" scripts/gen_protos.py --lint --check
if [ "${1:-}" != --static ]; then
    exec scripts/test.sh "$@"
fi
