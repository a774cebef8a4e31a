"""The native kernels compute the same with the instructions and compilers of other machines."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.kernels.native import library

ROOT = Path(__file__).parents[3]
TESTS = (
    "kernels/linear/additive/test_native.py",
    "kernels/linear/delta/test_native.py",
    "kernels/attention/test_native.py",
    "kernels/test_native_convolution.py",
    "kernels/test_native_pointwise.py",
)
PROGRAM = """
import sys
import pytest
from longctx.kernels.native import library

march, *tests = sys.argv[1:]
library.FLAGS = tuple(march if flag == "-march=native" else flag for flag in library.FLAGS)
assert all(library.load(family) for family in library.FAMILIES)
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
"""


def run(march, compiler, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CXX", compiler)
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, march, *tests], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v2"])
def test_kernels_without_avx512_pass_the_same_tests(march, tmp_path, monkeypatch):
    done = run(f"-march={march}", library.find_compiler(), tmp_path, monkeypatch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++")
def test_kernels_built_by_clang_pass_the_same_tests(tmp_path, monkeypatch):
    done = run("-march=native", "clang++", tmp_path, monkeypatch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
