"""The jobs of some shipped recipes by every executor, as `longctx launch --dry-run` prints them.

`python -m tests.launch.cluster.golden_jobs` writes them anew; read what changed.
"""

from pathlib import Path

from typer.testing import CliRunner

from longctx.launch.main import app

FOLDER = Path(__file__).parent / "golden"
PROFILES = FOLDER / "clusters.toml"
SUFFIXES = {
    "slurm": "sbatch",
    "container": "sbatch",
    "ssh": "sh",
    "trainjob": "yaml",
    "jobset": "yaml",
    "skypilot": "yaml",
}
RECIPES = ("bam-seed", "bam-upcycle", "million", "quickstart", "routed")
"""Without and with stages, for as many ranks as the two nodes have, and for fewer."""
OVERRIDES = ["train.sequences_per_step=16"]
"""As many sequences as the two nodes' ranks split between them, by any recipe's axes."""


def golden_file(profile: str, recipe: str) -> Path:
    return FOLDER / f"{recipe}-{profile}.{SUFFIXES[profile]}"


def printed(profile: str, recipe: str) -> str:
    """What is printed of a recipe's job."""
    command = ["launch", recipe, *OVERRIDES, "--profile", profile, "--profiles", str(PROFILES), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    return result.stdout


if __name__ == "__main__":
    for name in SUFFIXES:
        for recipe in RECIPES:
            golden_file(name, recipe).write_text(printed(name, recipe), encoding="utf-8")
