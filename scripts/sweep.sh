#!/usr/bin/env bash
# Configurations x samples per class x seeds of a system, side by side; the same command goes on.
#   bash scripts/sweep.sh text --seeds 0,1,2 --slots 2
#   bash scripts/sweep.sh cifar --seeds 0,1,2 dataset.data_dir=FOLDER
#   bash scripts/sweep.sh text --seeds 0,1,2 --sbatch scripts/slurm.sbatch          by SLURM
# Systems are the files of config/sweeps: text reuters images cifar feature_labels cifar_feature_labels toolkit.
set -euo pipefail
system=${1:?a file of config/sweeps without its .txt}
shift
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python}" "$root/scripts/sweep.py" "$root/config/sweeps/$system.txt" "$@"
