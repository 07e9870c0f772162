#!/usr/bin/env bash
# From nothing to a report, on a CPU, without data or weights: train teachers on the built-in corpus,
# condense it with two distances, judge both sets.
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh condense.ipc=10 seed=3       arguments go to every stage
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup_env.sh"
SECONDS=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun would set the same, with a warning at every stage

# stage HEADLINE PROGRAM [OVERRIDE ...]: one program on two processes.
stage() {
    local program="$2"
    printf '\n== %s\n' "$1"
    shift 2
    "$root/.venv/bin/python" -m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2 \
        "$root/condense/$program" --config_path "$root/config/ipc5/docstrings.yaml" "$@"
}

stage "1/4 train teachers on the real documents" pretrain_script_text.py "$@"
stage "2/4 condense: match characteristic functions (NCFM)" condense_script_text.py "$@"
stage "3/4 condense: match means (MMD), for comparison" condense_script_text.py condense.dis_metrics=MMD "$@"

output="$(mktemp)"
trap 'rm -f -- "$output"' EXIT
stage "4/4 judge the sets" evaluate_script_text.py "$@" 2>&1 | tee -i "$output"

report="$(grep -o '/.*report\.html' "$output" | tail -n 1)" || report="named above"
printf '\n== done in %d s after the install\nreport: %s\n' "$SECONDS" "$report"
