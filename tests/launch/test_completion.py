"""Completion in shells: what is offered, by the real protocol of bash and zsh, without a heavy import."""

import os
import subprocess
import sys

import pytest

from longctx.launch.completion import complete_override, complete_recipe, complete_shipped
from longctx.recipe import load


def longctx(**environment: str) -> str:
    """What the command prints for a shell."""
    command = [sys.executable, "-m", "longctx"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return result.stdout


def in_bash(*words: str) -> list[str]:
    """The completions of the last word."""
    line = {"COMP_WORDS": " ".join(("longctx", *words)), "COMP_CWORD": str(len(words))}
    return longctx(_LONGCTX_COMPLETE="complete_bash", **line).split()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.toml").touch()


def test_recipes_are_the_shipped_ones_and_those_of_the_directory():
    assert complete_recipe("quick") == ["quick.toml", "quickstart"]
    assert complete_shipped("quick") == ["quickstart"]
    assert complete_recipe("folder/quick") == [], "shells complete the names of files then"
    for name in complete_shipped(""):
        load(name)


def test_keys_are_those_of_a_recipe():
    assert complete_override("optimizer.l") == [
        ("optimizer.lr=", "Peak learning rate, where the schedule's factor is 1.")
    ]
    assert ("schedule.kind=", "cosine or wsd or constant") in complete_override("")
    assert complete_override("train.steps=1") == []


def test_bash_completes_commands_recipes_keys_and_options():
    assert in_bash("recip") == ["recipes"]
    assert in_bash("train", "quick") == ["quick.toml", "quickstart"]
    assert in_bash("verify", "quickstart", "train.st") == ["train.steps="]
    assert in_bash("train", "--ch") == ["--check"]
    assert in_bash("recipes", "copy", "quick") == ["quickstart"]
    assert in_bash("recipes", "show", "quick") == ["quick.toml", "quickstart"]


def test_zsh_shows_explanations():
    shown = longctx(_LONGCTX_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="longctx train quickstart train.st")
    assert '"train.steps=":"Optimizer steps."' in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_of_its_own(shell):
    assert f"_LONGCTX_COMPLETE=complete_{shell}" in longctx(_LONGCTX_COMPLETE=f"source_{shell}")


def test_a_completion_imports_nothing_heavy():
    code = (
        "import sys; from longctx.launch.completion import *; import longctx.launch.main\n"
        "assert complete_recipe('') and complete_override('')\n"
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
