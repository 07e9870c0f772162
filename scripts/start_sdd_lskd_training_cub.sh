#!/usr/bin/env bash
# The requirement's CUB-200-2011 suite, 12 runs, the three with a WRN teacher included (it is trained first).
#   bash scripts/start_sdd_lskd_training_cub.sh [--seeds 0,1,2] [--gpu 0] [options of kd/train.py or overrides]
# The teacher resnet32x4 must lie in save/cub200/resnet32x4_vanilla/resnet32x4_best.pth, or come from
# config/kd/cub200/vanilla/resnet32x4.yaml.
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python}" -m scripts.sweep config/kd/manifests/cub200.txt --logs logs/sdd_kd_lskd_full/cub200 "$@"
