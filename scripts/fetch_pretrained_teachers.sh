#!/usr/bin/env bash
# Fetches and converts the public CIFAR-100 teachers, resnet32x4 and wrn_40_2 unless others are named.
#   bash scripts/fetch_pretrained_teachers.sh [NAME ...] [--url ARCHIVE] [--single]
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -gt 0 ]] || set -- resnet32x4 wrn_40_2
exec "${PYTHON:-python}" -m scripts.fetch_teachers "$@"
