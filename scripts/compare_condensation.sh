#!/usr/bin/env bash
# Random, herding, k-center, NCFM, DC, MTT and DATM, with and without feature labels, on one data set: one table.
#   bash scripts/compare_condensation.sh [--quick] [options, overrides]                       digits, no download
#   DATA=cifar10_small bash scripts/compare_condensation.sh --data_path FOLDER                 CIFAR-10 at a CPU's budget
# JOBS=2 programs stand side by side; what is finished is skipped, so the same command goes on where it was stopped.
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
words=(-m scripts.compare_condensation --config_path "config/compare/${DATA:-digits}.yaml" "$@")
if ((${JOBS:-2} > 1)); then
    words=(-m torch.distributed.run --nproc_per_node="${JOBS:-2}" "${words[@]}")
fi
exec "${PYTHON:-python}" "${words[@]}"
