#!/usr/bin/env bash
# From a fresh clone to a trained checkpoint: makes .venv, fetches SmolLM2-135M-Instruct and runs examples/sft_quickstart.py.
# Run again, it needs no network and trains within seconds. Arguments go to the example.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

gradwire_venv run
"$python" scripts/fetch_model.py

# The example is a hosted service's quickstart with only its imports and the model's name changed, so it reads that
# service's variables: an empty base URL starts trainers on this machine, and they take only this key, made up for this run.
export FIREWORKS_BASE_URL=''
FIREWORKS_API_KEY=$("$python" -c 'import secrets; print(secrets.token_hex(16))')
export FIREWORKS_API_KEY
export GRADWIRE_HOME=${GRADWIRE_HOME:-$root/.gradwire}

started=$(mktemp)
trap 'rm -f "$started"' EXIT
"$python" examples/sft_quickstart.py "$@"

checkpoint=$(find "$GRADWIRE_HOME/checkpoints" -name config.json -newer "$started" -print -quit 2>/dev/null || :)
if [ -n "$checkpoint" ]; then
    printf '\nThe checkpoint is a Hugging Face folder:\n  %s\nLoad it with\n  %s\n' "$(dirname "$checkpoint")" \
        "transformers.AutoModelForCausalLM.from_pretrained(\"$(dirname "$checkpoint")\")"
fi
