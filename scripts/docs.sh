#!/usr/bin/env bash
# Builds the documentation into build/docs; any warning is an error. With --serve it is served on 127.0.0.1:8000 and follows
# what you write.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

gradwire_venv dev
# The theme advertises a project of its makers at each start.
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
if [ "${1:-}" = --serve ]; then
    exec "$python" -m mkdocs serve --strict --dev-addr 127.0.0.1:8000
fi
"$python" -m mkdocs build --strict --clean --quiet
printf 'Documentation: build/docs/index.html\n'
