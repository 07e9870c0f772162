#!/usr/bin/env bash
# Every distillation method on one data set: one table of accuracy, agreement and seconds an epoch.
#   bash scripts/compare_kd.sh [--seeds 0,1,2] [options of scripts/sweep.py, overrides]              digits, no download
#   DATA=cifar100_small bash scripts/compare_kd.sh --seeds 0,1,2 DATASET.ROOT=FOLDER                    CIFAR-100, 15 epochs
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
data="${DATA:-digits}"
exec "${PYTHON:-python}" -m scripts.sweep "config/kd/manifests/compare_$data.txt" --logs "logs/compare_kd/$data" "$@"
