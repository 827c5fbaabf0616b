#!/usr/bin/env bash
# Runs recipes of tinker's cookbook, unmodified, through the gateway (tests/gateway/test_recipes.py). What they need beside
# this project's own packages goes into a folder that is kept from run to run.
#
#   scripts/recipes.sh [FOLDER] [pytest options]
#
# The cookbook's newest release wants a tml-renderers that the registry lacks; without dependencies, and with the newest
# there is, all recipes but those about audio run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/gradwire/recipes}
shift || true
if [ ! -e "$folder/done" ]; then
    "$python" -m venv --clear "$folder"
    # This project's packages are seen from there, so only what they lack is fetched.
    site=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$python" -c 'import site; print(site.getsitepackages()[0])' > "$site/base.pth"
    "$folder/bin/pip" install --quiet --no-deps tinker-cookbook==0.6.1 tml-renderers==0.2.1
    "$folder/bin/pip" install --quiet blobfile chz cloudpickle datasets math-verify pillow pylatexenc pyrage rich sympy \
        termcolor tiktoken
    touch "$folder/done"
fi
GRADWIRE_RECIPES_PYTHON="$folder/bin/python" "$python" -m pytest tests/gateway/test_recipes.py "$@"
