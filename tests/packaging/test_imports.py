"""A plain checkout, an editable install and a wheel must import the same modules, with the same contents."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.combinations import mostly_slow

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
CLONED = [*FOLDERS.values(), "docs", "tests", "pyproject.toml", "README.md", "LICENSE"]

# Finds each module as the import system would, and runs none but `longctx` itself: torch need not load three times.
LOOK = """
import hashlib, json, pathlib, sys
before = set(sys.modules)
import longctx
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)

def find(name):
    parent = name.rpartition(".")[0]
    path = longctx.__path__ if parent == "longctx" else find(parent).submodule_search_locations
    return next(filter(None, (finder.find_spec(name, path) for finder in sys.meta_path)), None)

specs = {name: find(name) for name in json.load(sys.stdin)}
origins = {name: spec.origin for name, spec in specs.items() if spec is not None}
contents = {name: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for name, path in origins.items()}
stray = [name for name in ("longctx.torch", "longctx.numpy", "longctx.pip") if find(name)]
json.dump({"loaded": loaded, "contents": contents, "origins": origins, "stray": stray}, sys.stdout)
"""


def files() -> dict[str, Path]:
    """What installs, by its place below site-packages."""
    return {
        f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder)}": path
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def modules() -> dict[str, Path]:
    """Every module below `longctx`, by name."""
    paths = {place.removesuffix(".py").removesuffix("/__init__"): path for place, path in files().items()}
    return {place.replace("/", "."): path for place, path in paths.items() if path.suffix == ".py" and "/" in place}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: str | Path, cwd: Path, text: str = "", **environment: str) -> str:
    """Run `command` to its end and return its output; the caller's PYTHONPATH does not reach it."""
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, input=text, env=outer | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Installed:
    """One way to have longctx: an interpreter that finds it, and where its modules must come from."""

    python: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)


def copy_checkout(to: Path) -> Path:
    """What a clone holds, so that the installs leave nothing behind in the checkout."""
    to.mkdir()
    for name in CLONED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def environment_beside(path: Path) -> Path:
    """A new environment that sees the packages of this one, though not what this one has installed as editable."""
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    site = path / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "tested.pth").write_text("\n".join(sorted(places)) + "\n")
    return path


def pip_install(environment: Path, *what: str | Path) -> None:
    """Install into `environment` from the disk alone, with the setuptools of this environment."""
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what, cwd=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as a release would be."""
    source = copy_checkout(tmp_path_factory.mktemp("source") / "longctx")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "../dist", cwd=source)
    (path,) = (source.parent / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = environment_beside(tmp_path_factory.mktemp("wheel") / "environment")
    pip_install(home, wheel)
    return Installed(home / "bin/python", home)


@pytest.fixture(scope="module")
def installed_editable(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("editable")
    checkout = copy_checkout(home / "checkout")
    pip_install(environment_beside(home / "environment"), "-e", checkout)
    return Installed(home / "environment/bin/python", home)


@pytest.fixture(scope="module")
def plain_checkout(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("plain")
    checkout = copy_checkout(home / "checkout")
    return Installed(Path(sys.executable), home, {"PYTHONPATH": str(checkout)})


# `make test` itself runs in an editable install.
@pytest.fixture(
    params=mostly_slow(["plain_checkout", "installed_editable", "installed_wheel"], "plain_checkout", "installed_wheel")
)
def installed(request: pytest.FixtureRequest) -> Installed:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Installed)
    return found


def test_each_way_imports_the_same(installed: Installed) -> None:
    wanted = {name: digest(path) for name, path in modules().items()}
    names = json.dumps(sorted(wanted))
    seen = json.loads(run(installed.python, "-c", LOOK, cwd=installed.home, text=names, **installed.environment))
    assert seen["contents"] == wanted
    assert all(Path(origin).is_relative_to(installed.home) for origin in seen["origins"].values()), seen["origins"]
    assert seen["loaded"] == ["longctx"], "`import longctx` loads nothing but the standard library"
    assert seen["stray"] == [], "what lies beside longctx in site-packages is no part of it"


def test_the_wheel_holds_longctx_alone_and_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    assert {name: value for name, value in held.items() if name not in metadata} == {
        place: digest(path) for place, path in files().items()
    }
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_console_script_runs(installed_wheel: Installed) -> None:
    assert "Usage: longctx" in run(installed_wheel.home / "bin/longctx", "--help", cwd=installed_wheel.home)
