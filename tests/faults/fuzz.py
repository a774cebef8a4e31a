"""Mutated recipes and command lines: accepted, or refused with a plain error."""

import shlex
from contextlib import chdir
from pathlib import Path
from random import Random
from unittest.mock import patch

from typer.testing import CliRunner

from longctx.errors import UserError
from longctx.launch import train
from longctx.launch.main import app
from longctx.recipe import check, load
from tests.faults.faults import Kind, Trial, TrialError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
VALUES = (
    "-1", "0", "1", "2.5", "1e308", "-1e-320", "inf", "nan", "9" * 40, "true", '""', '"none"', '"a/../../b"', "[]",
    "{}", "[1, 2, 3]", "{a = 1}", "[[[[[[]]]]]]", "[" * 3000 + "]" * 3000, "{a=" * 2000 + "1" + "}" * 2000,
    '"\\u0000"', '"\\u001b[2J"', '"' + "x" * 5000 + '"', '"64Ki"', '"1e400"', "1979-05-27", "'''\nline\n'''",
    '"L" # comment', "0x7fffffffffffffff",
)  # fmt: skip
COMMANDS = (
    "train tiny.toml train.steps=2 --nproc 1 --out out",
    "train tiny.toml --resume never parallel.cp=1",
    "generate whole --prompt abc --tokens 3",
    "generate whole/checkpoints/step-00000012 --prompt-file tiny.toml --tokens 2 --temperature 0.5 --top-p 0.9",
    "data prepare corpus-texts --out prepared --heldout 0.1 --suffix .txt",
    "data inspect corpus",
    "checkpoint verify whole",
    "convert to-huggingface whole converted",
    "convert to-megatron whole converted",
    "convert upcycle whole tiny.toml upcycled",
)
WORDS = (
    "", "-", "--", "--out", "--nproc", "-1", "0", "1e9", "nan", "none", "auto", "x" * 5000, "/", "/dev/null", ".",
    "..", "/proc/self/mem", "corpus", "tiny.toml", "whole", "a=b", "=", "model.dim=", "model..dim=1", "model=1",
    "[model]", "train.steps=" + "9" * 400, "data.path=" + "a/" * 2500, "model.dim=" + "[" * 3000, "\x1b[2J", "a\nb",
    "\udcff", "é∞",
)  # fmt: skip


def _mutate_text(random: Random, text: str) -> str:
    """Replace a value, or drop, repeat, swap, misspell or garble lines."""
    lines = text.splitlines()
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        lines[at : at + 1] = _mutate_line(random, lines[at], random.choice(lines))
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def _mutate_line(random: Random, line: str, other: str) -> list[str]:
    key, equals, _ = line.partition("=")
    replaced = [f"{key}= {random.choice(VALUES)}"] if equals else [_garble(random, line)]
    misspelt = [_garble(random, key) + line[len(key) :]]
    return random.choice([[], [line, line], [other], [_garble(random, line)], misspelt, *4 * [replaced]])


def _garble(random: Random, text: str) -> str:
    at = random.randint(0, len(text))
    return text[:at] + chr(random.choice([0, 9, 27, 34, 46, 61, 91, 93, 123, 160, 0x2028, 0x1F600])) + text[at + 1 :]


def _fuzz_a_recipe(trial: Trial) -> None:
    """Read and check a mutated recipe, as a start on a random number of ranks does."""
    source = trial.random.choice([trial.shared.folder / "tiny.toml", *sorted(RECIPES.glob("*.toml"))])
    path = trial.folder / "mutated.toml"
    text = _mutate_text(trial.random, source.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        check(load(path), trial.random.choice([1, 2, 3, 8, 64]))
    except UserError:
        return
    except Exception as error:
        raise TrialError(f"{type(error).__name__}: {str(error)[:300]} for the recipe\n{text[:3000]}") from error


def _fuzz_a_command_line(trial: Trial) -> None:
    """Run a mutated command line, in a copy of a workplace with a run; only the ranks are not started."""
    random = trial.random
    words = shlex.split(random.choice(COMMANDS))
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(words))
        new = random.choice([random.choice(WORDS), _garble(random, words[at])])
        words = random.choice(
            [[*words[:at], *words[at + 1 :]], [*words[:at], new, *words[at + 1 :]], [*words[:at], new, *words[at:]]]
        ) or [""]
    with chdir(trial.shared.folder), patch.object(train, "run_ranks", lambda *arguments, **options: 0):
        result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise TrialError(f"{result.exception!r:.300} of longctx {shlex.join(words)[:2000]}") from result.exception
    if "Traceback" in result.stderr + result.stdout:
        raise TrialError(f"a traceback of longctx {shlex.join(words)[:2000]}")


KINDS = (
    Kind("recipe", "a mutated recipe; accepted, or refused with a plain error", 500, _fuzz_a_recipe),
    Kind("command-line", "a mutated command line; accepted, or refused with a plain error", 700, _fuzz_a_command_line),
)
