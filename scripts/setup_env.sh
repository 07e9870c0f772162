#!/usr/bin/env bash
# Makes .venv in the repository, and installs the project into it whenever pyproject.toml has changed.
#   bash scripts/setup_env.sh
# An install that was interrupted is repeated: the stamp is written last.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.distill-lab"

fail() {
    echo "setup: $1" >&2
    exit 1
}

# Prints the first interpreter that is new enough and can make environments.
find_python() {
    local name without_venv=""
    for name in python3.13 python3.12 python3.11 python3; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' >/dev/null 2>&1 || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
        without_venv="${without_venv:-$name}"
    done
    [[ -z "$without_venv" ]] || fail "$without_venv has no venv module: install it (Debian, Ubuntu: apt-get install $without_venv-venv), then run this again"
    fail "no Python 3.11.4 or newer on the PATH: install one, then run this again"
}

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' >/dev/null 2>&1; then
    python="$(find_python)"
    echo "setup: making $venv with $python"
    "$python" -m venv --without-pip --clear "$venv"
fi

# The path is in the stamp because an install points to it: a moved repository is installed again.
wanted="$("$venv/bin/python" -c 'import hashlib, pathlib, sys
path = pathlib.Path(sys.argv[1])
print(hashlib.sha256(path.read_bytes()).hexdigest(), path)' "$root/pyproject.toml")"

if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
    echo "setup: installing distill-lab and what it needs into $venv (the first time: minutes, gigabytes)"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    (cd "$root" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check -e '.[dev]') ||
        fail "the install failed for the reason above: put it right, then run this again"
    printf '%s\n' "$wanted" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
fi
