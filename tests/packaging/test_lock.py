"""The lock files of `make install` and `make test-adapters`: complete, hashed, and what pyproject.toml and
constraints.txt say.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.test_packages import EXTRAS, PYPROJECT, ROOT, pins

FILES = {path.name: path.read_text() for path in sorted((ROOT / ".ci" / "requirements").iterdir())}
ADAPTERS = ("dev", "megatron", "deepspeed", "huggingface", "test-s3", "test-kubernetes", "wandb", "mlflow")
COMPARED = {"fla-core", "flash-linear-attention"}
"""Pinned for the extra `compare`, which no target of `make` installs."""
AGAIN = "make lock"


def locked(*files: str) -> dict[str, str]:
    """Version by name of what these files list."""
    entries = [entry for file in files for entry in re.findall(r"^([\w.-]+)==(\S+)", FILES[file], re.MULTILINE)]
    assert len(entries) == len(dict(entries)), "a package is listed twice"
    return dict(entries)


def dependencies(*extras: str) -> list[Requirement]:
    wanted = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in wanted]


def test_there_is_a_file_for_each_step_of_the_installation() -> None:
    assert set(FILES) == {"dev.txt", "cuda.txt", "adapters.txt"}


@pytest.mark.parametrize("file", FILES)
def test_every_package_has_its_version_and_hashes(file: str) -> None:
    """And nothing else is in the file: no options, so that no file chooses where packages come from."""
    lines = [line for line in FILES[file].splitlines() if not line.startswith("#")]
    package = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9.]*(b[0-9]+|post[0-9]+)?( ; [^\\;#]+)? \\")
    hash_ = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert [line for line in lines if not package.fullmatch(line) and not hash_.fullmatch(line)] == []
    for line, after in zip(lines, [*lines[1:], "x==0 \\"], strict=True):
        assert line.endswith("\\") == bool(hash_.fullmatch(after)), line


def test_versions_are_those_of_the_constraints() -> None:
    """Those of CUDA's libraries are torch's own choice."""
    assert locked("dev.txt", "adapters.txt") == {k: v for k, v in pins().items() if k not in COMPARED}, AGAIN
    assert pins().keys() >= COMPARED
    assert all(name.startswith(("nvidia-", "cuda-")) for name in locked("cuda.txt"))


@pytest.mark.parametrize(("files", "extras"), [(("dev.txt",), ("dev",)), (("dev.txt", "adapters.txt"), ADAPTERS)])
def test_every_dependency_is_locked_within_its_range(files: tuple[str, ...], extras: tuple[str, ...]) -> None:
    versions = locked(*files)
    for requirement in dependencies(*extras):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), f"{requirement}: {AGAIN}"


def needed_by(requirement: Requirement) -> list[Requirement]:
    """The dependencies of an installed package, with those of the extras that are asked for, on this system."""
    needed = []
    for line in distribution(requirement.name).requires or []:
        other = Requirement(line)
        if other.marker is None or any(other.marker.evaluate({"extra": x}) for x in ("", *requirement.extras)):
            needed.append(other)
    return needed


def closure(requirements: list[Requirement]) -> dict[str, set[str]]:
    """What these need, by name, as the installed packages say, with the ranges that are asked of each."""
    ranges: dict[str, set[str]] = {}
    seen = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        ranges.setdefault(name, set()).add(str(requirement.specifier))
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            waiting += needed_by(requirement)
    return ranges


def check_completeness(files: tuple[str, ...], extras: tuple[str, ...]) -> None:
    """pip installs the files without looking up dependencies: what a package needs and no file lists would be missing.

    `make test-adapters` calls this for the adapters, which `make test` does not install.
    """
    needed, versions = closure(dependencies(*extras)), locked(*files, "cuda.txt")
    assert sorted(needed.keys() - versions.keys()) == [], AGAIN
    asked = {Requirement(f"{name}{range_}") for name, ranges in needed.items() for range_ in ranges}
    assert [str(each) for each in asked if not each.specifier.contains(versions[each.name])] == []
    always = re.findall(r"^([\w.-]+)==\S+ \\$", "".join(FILES[file] for file in files), re.MULTILINE)
    assert set(always) <= needed.keys(), f"nothing needs these: remove them from constraints.txt, and {AGAIN}"


def test_the_file_of_the_base_and_the_tools_is_complete() -> None:
    check_completeness(("dev.txt",), ("dev",))


def test_no_file_names_an_index() -> None:
    texts = [*FILES.values(), *(Path(ROOT, name).read_text() for name in ("Makefile", "constraints.txt"))]
    assert [text for text in texts if "://" in text or "index-url" in text] == []
