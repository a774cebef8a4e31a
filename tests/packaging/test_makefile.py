"""The Makefile explains itself, and says what is missing before it installs anything."""

import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = {"tree"}


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make install` reads, and no .venv; the space in the path is meant."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".ci" / "requirements", folder / ".ci" / "requirements")
    return folder


@dataclass(frozen=True)
class Index:
    """A folder of wheels without content, the only place where pip looks for packages."""

    folder: Path

    def wheel(self, name: str, requires: str = "") -> str:
        """Write the wheel of `name` 1.0, and return the line of a lock file that lists it."""
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        files = {
            "METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        path = self.folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in files.items():
                archive.writestr(f"{name.replace('-', '_')}-1.0.dist-info/{file}", content)
        return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"

    @property
    def environment(self) -> dict[str, str]:
        """What makes pip look here."""
        return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder), "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    return Index(folder)


def damaged(line: str) -> str:
    """The line with another last digit of its hash."""
    return f"{line[:-2]}{'1' if line[-2] == '0' else '0'}\n"


def installed(clone: Path) -> set[str]:
    """The packages of 1.0 in the clone's .venv."""
    return {
        path.name.removesuffix("-1.0.dist-info") for path in clone.glob(".venv/lib/*/site-packages/*-1.0.dist-info")
    }


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


def test_a_file_whose_hash_is_not_listed_is_not_installed(clone: Path, index: Index) -> None:
    locks = clone / ".ci" / "requirements"
    (locks / "dev.txt").write_text(index.wheel("intact") + damaged(index.wheel("torch")))
    result = make(clone, "install", **index.environment)
    assert result.returncode != 0
    assert "DO NOT MATCH THE HASHES" in result.stderr
    assert "torch==1.0" in result.stderr
    assert "intact==1.0" not in result.stderr
    assert installed(clone) == set()

    # With the environment complete, the same of the adapters.
    (clone / ".venv/installed").touch()
    (locks / "adapters.txt").write_text(damaged(index.wheel("transformers")))
    result = make(clone, ".venv/adapters", **index.environment)
    assert "DO NOT MATCH THE HASHES" in result.stderr
    assert "transformers==1.0" in result.stderr
    assert installed(clone) == set()
    (locks / "adapters.txt").write_text(index.wheel("transformers"))
    assert make(clone, ".venv/adapters", **index.environment).returncode == 0
    assert installed(clone) == {"transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("requires", ["nvidia-nccl", "filelock"])
def test_cuda_libraries_are_installed_for_the_build_of_torch_that_needs_them(
    clone: Path, index: Index, requires: str
) -> None:
    (clone / ".ci/requirements/dev.txt").write_text(index.wheel("torch", requires))
    (clone / ".ci/requirements/cuda.txt").write_text(index.wheel("nvidia-nccl"))
    make(clone, "install", **index.environment)  # which ends at longctx itself, without setuptools
    assert installed(clone) == {"torch", "nvidia_nccl"} - ({"nvidia_nccl"} if requires == "filelock" else set())
