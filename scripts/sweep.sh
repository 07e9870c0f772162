#!/usr/bin/env bash
# Configurations x samples per class x seeds of a system, side by side; the same command goes on.
#   bash scripts/sweep.sh text --seeds 0,1,2 --slots 2
#   bash scripts/sweep.sh cifar --seeds 0,1,2 dataset.data_dir=FOLDER
#   bash scripts/sweep.sh text --seeds 0,1,2 --sbatch scripts/slurm.sbatch          by SLURM
# Systems are the files of config/sweeps: text reuters images cifar feature_labels cifar_feature_labels toolkit.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
system="${1:-}"
if [ ! -f "$root/config/sweeps/$system.txt" ]; then
    names="$(cd -- "$root/config/sweeps" && printf '%s ' *.txt | sed 's/\.txt//g')"
    echo "'$system': no such system; take one of $names" >&2
    exit 2
fi
shift
exec "${PYTHON:-python}" "$root/scripts/sweep.py" "$root/config/sweeps/$system.txt" "$@"
