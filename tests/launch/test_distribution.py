"""Another project's package of the same import name is noticed."""

import subprocess
import sys
import tomllib
from pathlib import Path

from longctx.launch.distribution import NAME, foreign_distribution

ROOT = Path(__file__).resolve().parents[2]


def install_metadata(folder: Path) -> None:
    """Leave what an installed distribution `longctx` leaves."""
    information = folder / "longctx-0.3.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: longctx\nVersion: 0.3.2\n")


def test_this_distribution_has_a_name_of_its_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME != "longctx"
    assert foreign_distribution() is None


def test_another_distribution_stops_every_command(tmp_path):
    install_metadata(tmp_path)
    command = [sys.executable, "-m", "longctx", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (result.returncode, result.stdout) == (2, "")
    said = " ".join(result.stderr.split())
    assert said.startswith("error: this environment has the distribution longctx 0.3.2")
    assert said.endswith(f"(pip uninstall longctx {NAME}), then install {NAME} again")
