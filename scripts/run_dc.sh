#!/usr/bin/env bash
# The requirement's eight DC commands: for every setting the set as it starts, then the run.
#   bash scripts/run_dc.sh DATA_DIR [PROCESSES] [_frozen|_channel] [more options or overrides]
# DATA_DIR holds cifar-10-batches-py and cifar-100-python.
set -euo pipefail

data=${1:?folder that holds cifar-10-batches-py and cifar-100-python}
processes=${2:-1}
variant=${3:-}
shift $(($# < 3 ? $# : 3))
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
for setting in cifar10_ipc9 cifar10_ipc48 cifar100_ipc9 cifar100_ipc48; do
    for stage in --generate_pretrained --no_generate_pretrained; do
        torchrun --nproc_per_node="$processes" distill_feat/dc.py \
            --config_path "config/distill_feat/dc/$setting$variant.yaml" --data_path "$data" "$stage" "$@"
    done
done
