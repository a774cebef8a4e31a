#!/usr/bin/env bash
# GPU benchmark, at most 9 minutes and 30 seconds a part; docs/gpu.md says what it gives and where the results go:
#
#     bash benchmarks/gpu.sh                    # first: compile, check, time, train, compare with fla
#     bash benchmarks/gpu.sh --tune             # then: tile sizes
#     bash benchmarks/gpu.sh --nccl             # all GPUs of the machine; --verify: every test that runs on a GPU
#     bash benchmarks/gpu.sh --rehearse         # any part on a CPU, at small sizes
#
# Runs in the checkout without a network; missing packages (benchmarks/gpu-wheels.txt) are installed from wheels/. Writes
# first.jsonl and first.log to $OUT (default: gpu-results), each result as it comes; the other parts write files of
# their names, and --tune tuning.json, for LONGCTX_TUNING.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    timeout 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl ||
        echo "The wheels could not be installed: steps that need them will be skipped or fail" >&2
    export PYTHONPATH=$PYTHONPATH:$site
fi

status=0
"$python" -m benchmarks.gpu_plan --spent "$SECONDS" "$@" || status=$?
exit "$status"
