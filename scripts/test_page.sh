#!/usr/bin/env bash
# The live page in a real Chromium. Gets the browser (Debian's, where this is root) and axe-core (npm), then runs tests/page;
# arguments go to pytest. --prepare only gets them, for a run of all tests. Where there is no browser its tests are skipped.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

axe_version=4.14.1
axe_sha512=FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==

gradwire_venv dev
if [ -z "${GRADWIRE_CHROMIUM:-}" ] && ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        gradwire_step "Installing Debian's chromium" bash -c 'apt-get install -qq -y --no-install-recommends chromium \
            >/dev/null 2>&1 || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } \
            >/dev/null 2>&1' || gradwire_say "Chromium could not be installed; the page is not tested in a browser."
    else
        gradwire_say "There is no Chromium, and only root can install one; the page is not tested in a browser."
    fi
fi

axe=$root/.venv/share/axe.min.js
if [ ! -f "$axe" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    if command -v npm >/dev/null && (cd "$folder" && npm pack --silent "axe-core@$axe_version" >/dev/null 2>&1); then
        got=$(openssl dgst -sha512 -binary "$folder/axe-core-$axe_version.tgz" | openssl base64 -A)
        [ "$got" = "$axe_sha512" ] || gradwire_die "axe-core $axe_version is not what it was; its SHA-512 is $got."
        tar -xzf "$folder/axe-core-$axe_version.tgz" -C "$folder"
        mkdir -p "$root/.venv/share"
        mv "$folder/package/axe.min.js" "$axe"
    else
        gradwire_say "axe-core could not be fetched with npm; the page's accessibility is not tested."
    fi
fi
if [ "${1:-}" != --prepare ]; then
    "$python" -m pytest tests/page "$@"
fi
