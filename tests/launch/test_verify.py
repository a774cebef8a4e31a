"""`longctx verify`: the table, and the exit status that a script can trust."""

from itertools import islice

import pytest

from longctx.launch import verify as command
from longctx.verify import Row
from longctx.verify import run as verification
from longctx.verify.cases import Case
from longctx.verify.equations.step import Equations

RECIPE = """
name = "tiny"
[model]
layers = "LS"
depth = 2
dim = 16
lightning = { heads = 2 }
softmax = { heads = 2 }
[data]
path = "nowhere"
sequence_length = 32
[train]
steps = 1
[checkpoint]
every = 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def test_a_sound_recipe_passes_on_two_ranks(recipe, capsys, monkeypatch):
    every = verification.cases
    monkeypatch.setattr(verification, "DRAWS", 1)
    monkeypatch.setattr(verification, "cases", lambda *arguments: islice(every(*arguments), 3, 6))  # the packed ones
    assert command.run(recipe, (), shrunk=True, ranks=2, timeout=60) == 0
    told = capsys.readouterr().out
    assert "tiny, shrunk: LS, dim 32, 32 tokens, vocabulary 128" in told
    assert "fp64       the equations, one document" in told
    assert "fp64       the equations, packed" in told
    assert "fp64       cp 2, zigzag, packed" in told
    assert "blocks.1.mixer.qkv.weight" in told
    assert told.rstrip().endswith("rows are within bounds.")
    assert "2 virtual ranks on 2 processes, packed" in told
    assert "fp64       cp 2, zigzag, resumed from one rank" in told
    assert "Not looked at: the recipe's own corpus" in told


def test_a_difference_out_of_bounds_is_named_and_gives_status_1(recipe, capsys, monkeypatch):
    row = Row(
        Case(2, "zigzag", True),
        "fp64",
        {"loss": 0.0, "logits": 2e-3, "w": 1e-12},
        dict.fromkeys(("loss", "logits", "w"), 1e-10),
    )
    monkeypatch.setattr(command, "verify", lambda subject, pool: iter([row]))
    for other in ("verify_training", "verify_bits"):
        monkeypatch.setattr(command, other, lambda subject, pool: iter(()))
    assert command.run(recipe, (), shrunk=False, ranks=2, timeout=60) == 1
    told = capsys.readouterr().out
    assert "OUT OF BOUNDS" in told
    assert "fp64, cp 2, zigzag, packed: logits 2.0e-03 (bound 1e-10)" in told
    assert "1 of 1 rows are out of bounds: do not train this recipe on several ranks." in told
    row = Row(Equations(packed=True), "fp64", {"loss": 1e-3, "logits": 2e-3, "w": 0.0}, row.bounds)
    assert command.run(recipe, (), shrunk=False, ranks=2, timeout=60) == 1
    told = capsys.readouterr().out
    assert "fp64, the equations, packed: loss 1.0e-03 (bound 1e-10), logits 2.0e-03 (bound 1e-10)" in told
    assert "1 of 1 rows are out of bounds: do not train this recipe." in told
