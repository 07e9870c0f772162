#!/usr/bin/env bash
# The requirement's DATM commands: flat experts on CIFAR-100 and on Tiny-ImageNet; then sets with feature labels on both.
#   bash scripts/run_datm.sh DATA_DIR [PROCESSES] [options or overrides; or those of experts -- those of sets]
# DATA_DIR holds cifar-100-python and tiny-imagenet-200.
set -euo pipefail

data=${1:?folder that holds cifar-100-python and tiny-imagenet-200}
processes=${2:-1}
shift $(($# < 2 ? $# : 2))
of_experts=("$@") of_sets=("$@")
for ((i = 0; i < $#; i++)); do
    if [[ ${of_experts[i]} == -- ]]; then
        of_sets=("${of_experts[@]:i+1}") of_experts=("${of_experts[@]:0:i}")
        break
    fi
done
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

stage() { # PROGRAM SETTING [options]
    torchrun --nproc_per_node="$processes" "$root/distill_feat/$1.py" \
        --config_path "$root/config/distill_feat/$1/$2.yaml" --data_path "$data" "${@:3}"
}

stage buffer cifar100_ftd "${of_experts[@]}"
stage buffer tiny_ftd "${of_experts[@]}"
stage datm cifar100_ipc9 "${of_sets[@]}"
stage datm cifar100_ipc48 "${of_sets[@]}"
stage datm tiny_ipc10_feature "${of_sets[@]}"
