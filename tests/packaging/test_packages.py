"""pyproject.toml against the disk: packages are listed by hand, so a forgotten one must be noticed here."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def packages_on_disk() -> list[str]:
    """Every folder below the mapped ones that holds Python files, by the name under which it is imported."""
    names = set()
    for name, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            names.add(".".join((name, *path.parent.relative_to(ROOT / folder).parts)))
    return sorted(names)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }


def test_the_packages_listed_are_those_on_disk() -> None:
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_package_on_disk_is_a_regular_one() -> None:
    for name in packages_on_disk():
        top = max((mapped for mapped in FOLDERS if f"{name}.".startswith(f"{mapped}.")), key=len)
        folder = ROOT.joinpath(FOLDERS[top], *name.removeprefix(top).split("."))
        assert (folder / "__init__.py").is_file(), f"{folder} holds modules and has no __init__.py"


def test_every_folder_at_the_root_that_is_a_package_is_mapped() -> None:
    # benchmarks runs in a checkout only; why it is a package is said there.
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*FOLDERS.values(), "benchmarks"}


@pytest.mark.parametrize("group", ["base", *EXTRAS])
def test_every_dependency_is_pinned_within_its_range(group: str) -> None:
    wanted = PYPROJECT["project"]["dependencies"] if group == "base" else EXTRAS[group]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_pins_are_exact_and_name_no_build() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)*(b[0-9]+|\.post[0-9]+)?", version), f"{name}=={version}"
