#!/usr/bin/env bash
# The requirement's MTT commands: experts of six ImageNet subsets; then on CIFAR-100 experts, 48 images per class without
# feature labels, with them from those, and 8000 iterations more from these, tested with views. Prints the last set's file.
#   bash scripts/run_mtt.sh DATA_DIR [PROCESSES] [options or overrides; or those of experts -- those of sets]
# DATA_DIR holds cifar-100-python, and imagenet/ with train/ and val/; without it the six are left out.
set -euo pipefail

data=${1:?folder that holds cifar-100-python, and imagenet/ with train/ and val/}
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

experts() { # SETTING DATA_DIR
    torchrun --nproc_per_node="$processes" "$root/distill_feat/buffer.py" \
        --config_path "$root/config/distill_feat/buffer/$1.yaml" --data_path "$2" "${of_experts[@]}"
}

learn() { # SETTING [options]: learn a set, whose file is then in $learned
    local words=("$root/distill_feat/mtt.py" --config_path "$root/config/distill_feat/mtt/$1.yaml" --data_path "$data"
        "${@:2}" "${of_sets[@]}")
    torchrun --nproc_per_node="$processes" "${words[@]}"
    learned=$(python "${words[@]}" --dry_run | sed -n 's/^run folder: //p')/distilled_data/syn_data_best.pth
}

if [[ -d $data/imagenet ]]; then
    for subset in imagefruit imagenette imagewoof imagemeow imagesquawk imageyellow; do
        experts "$subset" "$data/imagenet"
    done
else
    echo "no $data/imagenet: the experts of its six subsets are left out" >&2
fi
experts cifar100 "$data"
learn cifar100_ipc48_pre
learn cifar100_ipc48 --init "$learned"
learn cifar100_ipc48_tta --init "$learned"
echo "$learned"
