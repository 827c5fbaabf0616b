# shellcheck shell=bash
# Sourced by the other scripts. `gradwire_venv run` (server and examples) or `gradwire_venv dev` (tests and checks as well)
# makes .venv in the repository's root, installs the pinned versions of constraints.txt into it, and sets $python. When
# nothing has changed since, it does nothing and needs no network.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1
# pip compiles what it installs, but for this repository's own modules, which every process would compile again.
unset PYTHONDONTWRITEBYTECODE

gradwire_say() { printf '%s\n' "$*" >&2; }

gradwire_die() {
    gradwire_say "$*"
    exit 1
}

# Runs a command; on a terminal a line with the seconds passed stands meanwhile. Usage: gradwire_step "what" command …
gradwire_step() {
    local what=$1 ticker='' start=$SECONDS code=0
    shift
    if [ -t 2 ]; then
        (
            trap 'exit 0' TERM
            while :; do
                printf '\r%s … %d s ' "$what" $((SECONDS - start)) >&2
                sleep 1
            done
        ) &
        ticker=$!
        trap 'kill $ticker 2>/dev/null || :' EXIT
    else
        gradwire_say "$what …"
    fi
    "$@" || code=$?
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null || :
        wait "$ticker" 2>/dev/null || :
        trap - EXIT
        printf '\r\033[K%s: %s%d s\n' "$what" "$([ "$code" -eq 0 ] || printf 'failed after ')" $((SECONDS - start)) >&2
    fi
    return "$code"
}

# The first Python that is new enough, unless $PYTHON names one.
gradwire_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    gradwire_die "Gradwire needs Python 3.11 or newer, and none was found as ${PYTHON:+$PYTHON, }python3, python3.13, \
python3.12 or python3.11. Install one, or say where it is: PYTHON=/path/to/python3 $0"
}

gradwire_pip() { "$python" -m pip install -qq --constraint constraints.txt "$@"; }

# On Linux PyPI's torch brings CUDA's libraries along. Without an NVIDIA GPU they would be gigabytes for nothing, so
# PyTorch's own CPU index is asked as well where it answers.
gradwire_install_torch() {
    local torch cpu_index=https://download.pytorch.org/whl/cpu
    torch=$(grep -m1 '^torch==' constraints.txt)
    set --
    if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] &&
        "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4)' \
            "$cpu_index/torch/" 2>/dev/null; then
        set -- --extra-index-url "$cpu_index"
    fi
    gradwire_step "Installing $torch" gradwire_pip "$@" "$torch"
}

gradwire_install() {
    local extras=$1
    # Chained, as the shell's -e does not hold inside a function whose failure is handled.
    gradwire_install_torch &&
        gradwire_step "Installing the build backend" gradwire_pip hatchling editables &&
        gradwire_step "Installing gradwire[$extras]" gradwire_pip --no-build-isolation --editable ".[$extras]"
}

gradwire_venv() {
    local level=$1 extras=server,examples found inputs
    [ "$level" = dev ] && extras=server,gateway,examples,docs,dev
    cd -- "$root" || exit 1
    if [ ! -x "$python" ]; then
        found=$(gradwire_find_python) || exit 1
        gradwire_say "Making .venv with $("$found" --version)."
        "$found" -m venv .venv || {
            rm -rf .venv
            gradwire_die "Python's venv module could not make .venv; its message is above. (On Debian and Ubuntu: \
apt install python3-venv.)"
        }
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        gradwire_die ".venv holds $("$python" --version 2>&1), but Gradwire needs 3.11 or newer; remove .venv and run again."
    # The folder is part of it, as a virtual environment does not survive being moved.
    inputs=$({ printf '%s\n' "$root"; cat pyproject.toml constraints.txt; } | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if grep -qsx -e "$inputs $level" -e "$inputs dev" .venv/gradwire-installed; then
        return
    fi
    gradwire_install "$extras" ||
        gradwire_die "The installation failed; pip's messages are above. Run the same command again to go on."
    printf '%s\n' "$inputs $level" >.venv/gradwire-installed
}
