#!/usr/bin/env bash
# Runs the tests, a file at a time on every core; arguments go to pytest.
#   bash scripts/test.sh                        all but the markers gpu and slow
#   bash scripts/test.sh -m gpu tests/test_report.py
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup_env.sh"
cd -- "$root"
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
