"""Lay the checkout out as it installs, in symbolic links: TREE/longctx/{config.py, …, kernels, parallel, …}.

mypy and import-linter find modules by their place on disk and do not read the mapping in pyproject.toml.

    python .ci/tree.py TREE
"""

import os
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out(root: Path, tree: Path) -> None:
    """Make `tree/longctx` anew, every entry of it a relative link into `root`; the rest of `tree` stays."""
    folders: dict[str, str] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    package = tree / "longctx"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    targets = {path.name: path for path in (root / folders.pop("longctx")).iterdir() if path.name != "__pycache__"}
    targets |= {name.removeprefix("longctx."): root / folder for name, folder in folders.items()}
    for name, target in targets.items():
        (package / name).symlink_to(os.path.relpath(target.resolve(), package.resolve()))


if __name__ == "__main__":
    lay_out(ROOT, Path(sys.argv[1]))
