#!/usr/bin/env bash
# GPU benchmark of the Triton kernels, in under 8 minutes:
#
#     bash benchmarks/gpu.sh
#
# Tests the kernels, tunes their tile sizes, and compares their times with peers and with the memory bandwidth. Runs in
# the checkout without a network; missing packages (pytest, fla) can be put as wheels into wheels/. Writes to $OUT
# (default: gpu-results): tests.log, tuning.json (for LONGCTX_TUNING), table.json.
set -euo pipefail
cd "$(dirname "$0")/.."

export OUT=${OUT:-gpu-results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$OUT"
began=$SECONDS

if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
fi

# Ignores the pytest settings in pyproject.toml, whose plugins may not be installed.
failed=0
if "$python" -c 'import pytest, tests.conftest' 2>"$OUT/tests.log"; then
    timeout 150 "$python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider --import-mode=importlib -q -m gpu \
        -W ignore::pytest.PytestUnknownMarkWarning -k 'all_passes or any_order or from_none_to_all or bfloat16' \
        tests/kernels/linear/additive/test_triton.py 2>&1 | tee "$OUT/tests.log" | tail -15 || failed=$?
else
    echo "pytest or a test dependency is missing ($(tail -1 "$OUT/tests.log")): running a smaller check"
    "$python" benchmarks/gpu_kernels.py --check 2>&1 | tee "$OUT/tests.log" || failed=$?
fi

"$python" benchmarks/gpu_kernels.py --out "$OUT" --seconds $((465 - (SECONDS - began)))
if [ "$failed" != 0 ]; then
    echo "The checks FAILED or timed out (status $failed): see $OUT/tests.log" >&2
fi
exit "$failed"
