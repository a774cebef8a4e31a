"""The command line: what each command calls, what it says, and its exit status."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import longctx
from longctx.errors import UserError
from longctx.launch import main as commands
from longctx.launch import train as training
from tests.train.runs import RECIPE


def run(*arguments):
    """Exit status and stderr, and stdout where it is alone."""
    result = CliRunner().invoke(commands.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr or result.stdout


# The command itself


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from longctx.launch.main import app; import contextlib\n"
        "with contextlib.suppress(SystemExit): app(['--help'])\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'pydantic'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def examples():
    """The commands at the end of the pages of --help."""
    pages = (commands._EXAMPLES, commands._TRAIN_EXAMPLES)
    lines = [line.strip().removeprefix("srun ") for page in pages for line in page.splitlines()]
    return [re.split(r"\s{2,}", line)[0] for line in lines if line.startswith("longctx ")]


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_are_commands(line):
    status, text = run(*shlex.split(line)[1:], "--help")
    assert (status, "Usage: " in text) == (0, True), text


def test_help_ends_with_examples():
    assert len(examples()) == 9
    assert all(line in run("--help")[1] for line in examples()[:5])
    assert all(line in run("train", "--help")[1] for line in examples()[5:])


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "longctx", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"longctx {longctx.__version__}\n")


@pytest.mark.parametrize("arguments", [["fly"], ["train"], ["train", "r.toml", "--nproc", "0"], ["data", "prepare"]])
def test_wrong_usage_is_status_2(arguments):
    assert run(*arguments)[0] == 2


def test_a_user_error_is_its_text_alone_and_status_2(monkeypatch):
    def fail(*arguments, **options):
        raise UserError("a.toml:3: [train] " + "x" * 200)

    monkeypatch.setattr(training, "train", fail)
    assert run("train", "a.toml") == (2, f"error: a.toml:3: [train] {'x' * 200}\n")


def test_a_user_error_in_a_job_is_said_once_for_each_machine(monkeypatch):
    def fail(*arguments, **options):
        raise UserError("told")

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("train", "a.toml") == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("train", "a.toml") == (2, "error: told\n")


def test_ctrl_c_is_status_130(monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert run("train", "a.toml")[0] == 130


# data


def test_a_corpus_is_prepared_and_inspected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some text " * 50)
    (folder / "b.md").write_text("left out " * 50)
    arguments = ("data", "prepare", "texts", "--out", "corpus", "--suffix", ".txt", "--heldout", "0")
    status, said = run(*arguments, "--shard-tokens", "1Ki", "--no-progress")
    assert status == 0
    assert "corpus: train 1 documents (501 tokens)" in said
    assert said.endswith("Inspect it with: longctx data inspect corpus\n")
    assert "Skipped" not in said
    (folder / "empty.txt").write_text("")
    status, said = run(*arguments, "--overwrite", "--on-error", "skip", "--no-progress")
    assert status == 0, said
    assert "Skipped: 1 empty; listed in corpus/errors.jsonl.\n" in said
    (folder / "empty.txt").unlink()
    status, shown = run("data", "inspect", "corpus", "--verify")
    assert status == 0
    assert "some text" in shown

    assert run(*arguments)[0] == 2  # it is there already
    assert run(*arguments, "--overwrite", "--no-progress")[0] == 0
    status, stderr = run(*arguments, "--shard-tokens", "many")
    assert status == 2
    assert "error: --shard-tokens: 'many' is not an integer" in stderr
    assert run("data", "inspect", "texts")[0] == 2


def test_a_report_that_is_not_for_a_terminal_does_not_wrap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("a" * 100, "b" * 100)
    folder.mkdir(parents=True)
    (folder / "c.txt").write_text("many words " * 20)
    assert run("data", "prepare", "a" * 100, "--out", "corpus", "--no-progress")[0] == 0
    _, shown = run("data", "inspect", "corpus")
    lines = [line.rstrip() for line in shown.splitlines()]
    assert f"from {tmp_path}/{'a' * 100}: 1 files, 1 documents, 221 tokens" in lines
    assert f"221 {folder}/c.txt" in lines
    assert ("many words " * 20).rstrip() in lines


# Paths

LONG = "x" * 5000
PATHS = {
    "resume": ("train", "{recipe}", "--resume", LONG),
    "out of train": ("train", "{recipe}", "--out", LONG),
    "input": ("data", "prepare", LONG, "--out", "out"),
    "tokenizer": ("data", "prepare", "{recipe}", "--out", "out", "--tokenizer", LONG),
    "out of prepare": ("data", "prepare", "{recipe}", "--out", LONG, "--no-progress"),
    "corpus": ("data", "inspect", LONG),
    "run": ("generate", LONG, "--prompt", "a"),
    "prompt file": ("generate", ".", "--prompt-file", LONG),
    "checkpoint": ("checkpoint", "verify", LONG),
    "dense model": ("convert", "upcycle", LONG, "--to", "{recipe}", "--out", "out"),
    "model of transformers": ("convert", "from-huggingface", LONG, "--out", "out"),
    "model for transformers": ("convert", "to-huggingface", LONG, "--out", "out"),
    "model of Megatron": ("convert", "from-megatron", LONG, "--to", "{recipe}", "--out", "out"),
    "model for Megatron": ("convert", "to-megatron", LONG, "--out", "out"),
    "results": ("bench", "parallel", "--json", LONG, "--gbit", "none"),
}


@pytest.mark.parametrize("arguments", PATHS.values(), ids=PATHS.keys())
def test_a_path_that_is_too_long_is_named(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("cp = 2", "cp = 1"))
    status, stderr = run(*(argument.format(recipe="tiny.toml") for argument in arguments))
    assert status == 2
    assert stderr.startswith("error: ")
    assert "File name too long" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


# Files that somebody else has written


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("manifest.json", ("data", "inspect")),
        ("trainer.json", ("checkpoint", "verify")),
        ("weights.json", ("checkpoint", "verify")),
        ("checksums.json", ("checkpoint", "verify")),
        ("config.json", ("convert", "from-huggingface", "--out", "out")),
    ],
)
def test_a_file_that_is_nested_too_deeply_is_named(tmp_path, file, command):
    (tmp_path / file).write_text("[" * 100_000)
    status, stderr = run(*command, tmp_path)
    assert (status, stderr.count("\n")) == (2, 1)
    assert stderr.startswith(f"error: {tmp_path}")
    assert file in stderr
