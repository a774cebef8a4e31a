"""The Makefile explains itself, and says what is missing before it installs anything."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = {"tree"}


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make install` reads, and no .venv; the space in the path is meant."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_make_alone_lists_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([a-z-]+) +\S", make(ROOT).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(set(phony.split()) - INTERNAL)


def test_a_missing_python_is_named(clone: Path) -> None:
    result = make(clone, "test", "PYTHON=python3.99")
    assert result.returncode != 0
    assert "There is no command python3.99" in result.stderr
    assert "make test PYTHON=" in result.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("fails_at", "message"),
    [("version_info", "needs Python 3.11 or later, and {} is Python 3.9.0"), ("ensurepip", "apt install python3-venv")],
)
def test_an_unfit_python_is_named(clone: Path, fails_at: str, message: str) -> None:
    python = clone / "some python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{fails_at}*) exit 1;; -V) echo Python 3.9.0;; esac\n')
    python.chmod(0o755)
    result = make(clone, "install", f"PYTHON={python}")
    assert result.returncode != 0
    assert message.format(python) in result.stderr
    assert not (clone / ".venv").exists()
