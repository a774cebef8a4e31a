"""Commands of schedulers that only write down how they were called."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class FakeTools:
    """Commands on PATH; each call is a line of `calls`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "calls"

    def add(self, name: str, answer: str = "", status: int = 0, body: str = "") -> None:
        """Add a command that prints `answer` (to stderr if it fails) and exits with `status`, or runs `body`."""
        stream = " >&2" if status else ""
        said = f"cat <<'ANSWER'{stream}\n{answer}\nANSWER\n" if answer else ""
        script = f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {self._log}\n{body or said}\nexit {status}\n'
        (self._folder / name).write_text(script)
        (self._folder / name).chmod(0o755)

    def calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTools:
    """Scheduler commands of the test; none of the machine's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "tail", "touch", "rm"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    return FakeTools(folder)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no profiles of the user's."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


@pytest.fixture
def profiles(workplace: Path) -> Callable[[str], Path]:
    """Write clusters.toml."""

    def write(text: str) -> Path:
        (workplace / "clusters.toml").write_text(text)
        return workplace / "clusters.toml"

    return write
