#!/usr/bin/env bash
# Every distillation method on one data set; the numbers go to kd/results.jsonl and from there to the table of kd/RESULTS.md,
# if all methods run as they are listed: with --only or overrides (but DATASET.ROOT) they are shown and not kept.
#   bash scripts/compare_kd.sh --seeds 0,1,2 [options of scripts/sweep.py, overrides]                     digits, no download
#   DATA=cifar100_small bash scripts/compare_kd.sh --seeds 0,1,2 DATASET.ROOT=FOLDER                    CIFAR-100, 15 epochs
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
data="${DATA:-digits}" file="config/kd/manifests/compare_${DATA:-digits}.txt"
if [ ! -f "$file" ]; then
    echo "DATA=$data: no $file; take one of $(cd config/kd/manifests && printf '%s ' compare_*.txt | sed 's/compare_//g; s/\.txt//g')" >&2
    exit 2
fi
collect=(--collect kd/results.jsonl) # unless it is a trial: part of the runs, or other ones
for word in "$@"; do
    case "$word" in DATASET.ROOT=*) ;; --only* | --quick | [A-Z]*) collect=() ;; esac
done
sweep() { "${PYTHON:-python}" -m scripts.sweep "$file" ${collect[@]+"${collect[@]}"} --logs "logs/compare_kd/$data$1" "${@:2}"; }
sweep "" "$@"
if [ "$data" = cifar100_small ]; then # seconds an epoch, one run at a time
    sweep _seconds "$@" --seeds 0 --slots 1 --group_size 9 SOLVER.EPOCHS=1 EXPERIMENT.PROJECT=cifar100_seconds
fi
