#!/usr/bin/env bash
# The requirement's CIFAR-100 suite, 23 runs (config/kd/manifests/cifar100.txt says which 3 are ours).
#   bash scripts/start_sdd_lskd_training_cifar.sh [--seeds 0,1,2] [--gpu 0] [options of kd/train.py or overrides]
# The teachers resnet32x4 and wrn_40_2 must be there: scripts/fetch_pretrained_teachers.sh, or config/kd/cifar100/vanilla.
set -euo pipefail
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python}" -m scripts.sweep config/kd/manifests/cifar100.txt --logs logs/sdd_kd_lskd_full/cifar100 "$@"
