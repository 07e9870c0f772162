#!/usr/bin/env bash
# Seconds of every method on digits, with the teacher that they need: nothing is downloaded.
#   bash scripts/test_sdd_lskd.sh [options of kd/train.py or overrides]
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python}" -m scripts.sweep config/kd/manifests/digits_methods.txt --logs logs/sdd_kd_lskd_test "$@"
