"""Native kernels are built once for a machine, by whichever process needs them first, or torch operators run."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
from unittest.mock import patch

import pytest

from longctx.kernels.native import library

pytestmark = pytest.mark.skipif(not library.is_enabled(), reason="native kernels are turned off")
SOURCE = 'extern "C" int answer() { return NUMBER; }\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Sources of a small family of kernels, and an empty cache."""
    try:
        library.find_compiler()
    except library.NativeUnavailableError as error:
        pytest.skip(str(error))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "number.h").write_text("#define NUMBER 42\n")
    (tmp_path / "sources" / "small.cpp").write_text('#include "number.h"\n' + SOURCE)
    monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def built(place):
    return sorted(path.name for path in (place / "cache").rglob("small-*") if path.suffix != ".lock")


def test_a_family_is_built_once(place):
    path = library.build("small")
    assert ctypes.CDLL(str(path)).answer() == 42
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with patch.object(library, "_compile", side_effect=AssertionError):
        assert library.build("small") == path


@pytest.mark.parametrize("file", ["number.h", "small.cpp"])
def test_a_change_of_any_source_is_built_anew(place, file):
    before = library.build("small")
    changed = place / "sources" / file
    changed.write_text(changed.read_text().replace("42", "43") + "// changed\n")
    after = library.build("small")
    assert after != before
    assert len(built(place)) == 2


def test_another_cpu_or_other_flags_are_built_anew(place):
    names = {library.build("small")}
    with patch.object(library, "_cpu_features", lambda: "flags: fewer"):
        names.add(library.build("small"))
    with patch.object(library, "FLAGS", (*library.FLAGS, "-g")):
        names.add(library.build("small"))
    assert len(names) == 3


def test_processes_that_need_it_at_once_build_it_once(place):
    log = place / "calls"
    compiler = place / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo x >> {log}; sleep 0.5;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    code = f"""
import pathlib
from longctx.kernels.native import library
library.SOURCES = pathlib.Path({str(place / "sources")!r})
print(library.build("small"))
"""
    environment = {**os.environ, "CXX": str(compiler)}
    jobs = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, text=True) for _ in range(3)]
    assert len({job.communicate()[0] for job in jobs}) == 1
    assert log.read_text() == "x\n"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found (no-such-compiler)"),
        ({"CXX": "false"}, "/false failed"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "/proc/nowhere/longctx/native cannot be used"),
    ],
)
def test_without_a_library_one_line_says_why(place, monkeypatch, caplog, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load = library.load.__wrapped__
    with caplog.at_level(logging.WARNING, "longctx"):
        assert load("small") is None
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "torch operators run in their place" in record.getMessage()


def test_what_does_not_compile_is_named(place):
    (place / "sources" / "small.cpp").write_text("int answer( {\n")
    with pytest.raises(library.NativeUnavailableError, match=r"failed: .*small\.cpp.*error"):
        library.build("small")
    assert built(place) == []


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_switch(monkeypatch, value, enabled):
    monkeypatch.delenv(library.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(library.SWITCH, value)
    assert library.is_enabled() is enabled


def test_the_families_in_use_are_named(monkeypatch):
    monkeypatch.setattr(library, "load", lambda family: None if family == "additive" else object())
    assert library.loaded() == ["additive_vector", "attention", "convolution", "delta", "pointwise"]
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.loaded() == []


def test_a_line_describes_what_computes(monkeypatch):
    found = dict.fromkeys(library.FAMILIES, object())
    monkeypatch.setattr(library, "load", found.get)
    monkeypatch.setattr(library, "find_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(library, "_version", lambda compiler: "c++ 12.2.0\nCopyright\n")
    families = ", ".join(library.FAMILIES)
    assert library.describe() == f"C++ kernels ({families}), c++ 12.2.0"

    def fail(family):
        raise library.NativeUnavailableError(f"c++ failed: {family}.cpp")

    monkeypatch.setattr(library, "build", fail)
    del found["additive"]
    assert library.describe() == (
        f"C++ kernels ({', '.join(library.FAMILIES[1:])}), c++ 12.2.0; "
        "torch operators for additive: c++ failed: additive.cpp"
    )
    found.clear()
    assert library.describe() == "torch operators: c++ failed: additive.cpp"
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.describe() == "torch operators: LONGCTX_NATIVE=0 turns the C++ kernels off"


def test_every_family_is_a_file():
    assert sorted(path.stem for path in library.SOURCES.glob("*.cpp")) == sorted(library.FAMILIES)
