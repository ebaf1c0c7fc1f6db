#!/usr/bin/env bash
# The whole path from text to report: `tools/run_path.sh quickstart` (make quickstart) or `tools/run_path.sh char` (make char).
# These are the ordinary commands with the ordinary configs of configs/NAME; results go to runs/NAME.
# Every command finds its own finished work, so running this again goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?usage: tools/run_path.sh quickstart or tools/run_path.sh char}
export PATH="$PWD/.venv/bin:$PATH"

step() {
    printf '\n== %dm %02ds  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"
    "$@"
}

step python tools/kjv_text.py "runs/$name/text"
step megaflow prepare "configs/$name/data.yaml"
step megaflow pretrain "configs/$name/flow.yaml"
step megaflow pretrain "configs/$name/autoregressive.yaml"
step megaflow distill "configs/$name/flow_map.yaml"
step megaflow evaluate "runs/$name/flow"
step megaflow evaluate "runs/$name/autoregressive"
step megaflow evaluate "runs/$name/flow_map"
step megaflow report "runs/$name"
printf '\n== %dm %02ds  done: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "runs/$name"
