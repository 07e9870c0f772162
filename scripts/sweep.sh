#!/usr/bin/env bash
# Configurations x samples per class x seeds of a system, side by side: what is finished is skipped, what was begun goes on.
#   bash scripts/sweep.sh text --seeds 0,1,2 --slots 2                     text reuters images cifar feature_labels
#   bash scripts/sweep.sh cifar --seeds 0,1,2 dataset.data_dir=FOLDER      cifar_feature_labels toolkit: config/sweeps
#   bash scripts/sweep.sh text --seeds 0,1,2 --sbatch scripts/slurm.sbatch          the same by SLURM
set -euo pipefail
system=${1:?a file of config/sweeps without its .txt}
shift
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python}" "$root/scripts/sweep.py" "$root/config/sweeps/$system.txt" "$@"
