#!/usr/bin/env bash
# What to run on a machine with GPUs, in one command: tools/gpu_check.sh [FOLDER]. Everything it prints and measures goes into FOLDER
# (default gpu_check), with the device's name: what is here (megaflow doctor), the tests that need a GPU (flash-attn against the written-out form among them), MFU from
# 145M parameters up with and without flash-attn and torch.compile, scaling over the GPUs of the machine, the step benchmark, and how fast
# text is written beside the baseline with its cache. Shorter:
# SECONDS_EACH=15 SIZES="145m 400m" tools/gpu_check.sh.
# Each part goes on where another fails; the last line says which did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-gpu_check}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=$("$python" -c '
try:
    import torch
except ImportError:
    raise SystemExit("no torch for this python: run make first, or set PYTHON")
import sys; sys.exit("no GPU that torch can use is here; run this where there is one") if not torch.cuda.is_available() else print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)') || exit 2
mkdir -p "$out"
echo "$device" | tee "$out/device.txt"
failed=()
part() {
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}
part doctor "$python" -m megaflow doctor
part tests "$python" -m pytest -q -m cuda tests
# shellcheck disable=SC2086 # several words
part mfu "$python" tools/bench_mfu.py --json "$out/mfu.json" ${SIZES:-}
part scale "$python" tools/bench_scale.py --seconds "${SECONDS_EACH:-60}" --json "$out/scale.json"
part step "$python" tools/bench_step.py --seconds "${SECONDS_EACH:-60}" --json "$out/step.json"
part generate "$python" tools/bench_generate.py --seconds "${SECONDS_EACH:-60}" --json "$out/generate.json"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see $out)"
    exit 1
fi
echo "all parts passed on $(cat "$out/device.txt"); tables are in $out"
