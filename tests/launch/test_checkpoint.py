"""`longctx checkpoint verify`: reports each folder as intact or with its damage; exit status 1 if one is damaged."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from longctx.checkpoint.checksums import CHECKSUMS, unseal, write_checksums
from longctx.checkpoint.weights import CONVERTED, write_weights
from longctx.errors import UserError
from longctx.launch.checkpoint import run_verify
from longctx.launch.main import app
from tests.checkpoint.test_checksums import flip
from tests.checkpoint.test_save import save


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A run's directory with checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("run")
    ranks.run(save, folder / "checkpoints", 3, 4, size=2)
    return folder


def test_all_checkpoints_of_a_run_are_verified(saved, tmp_path, capsys):
    run = shutil.copytree(saved, tmp_path / "run")
    assert run_verify(run) == 0
    steps = [run / "checkpoints" / f"step-0000000{n}" for n in (3, 4)]
    assert capsys.readouterr().out.splitlines() == [f"{path}: intact" for path in steps]
    flip(steps[0] / "__1_0.distcp", 77)
    assert run_verify(run) == 1
    said = capsys.readouterr().out
    assert f"checkpoint {steps[0]} is damaged: __1_0.distcp has the checksum" in said
    assert f"{steps[1]}: intact" in said
    assert run_verify(steps[1]) == 0
    with pytest.raises(UserError, match="is damaged: __1_0"):
        run_verify(steps[0])


def test_weights_and_exports_as_well(tmp_path, capsys):
    weights, export = tmp_path / "weights", tmp_path / "export"
    weights.mkdir()
    write_weights(weights, {}, {}, {})
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"numbers")
    write_checksums(export, "*.safetensors")
    assert [run_verify(weights), run_verify(export)] == [0, 0]
    for folder, name in ((weights, ".metadata"), (export, "model.safetensors")):
        flip(folder / name, 3)
        with pytest.raises(UserError, match=f"is damaged: {name} has the checksum"):
            run_verify(folder)


def test_what_has_no_checksums_is_not_called_intact(tmp_path, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    write_weights(weights, {}, {}, {})
    listing = unseal((weights / CONVERTED).read_text())
    del listing["checksums"]
    (weights / CONVERTED).write_text(json.dumps(listing))
    assert run_verify(weights) == 1
    assert "has no checksums" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"it has no trainer\.json, weights\.json or {CHECKSUMS}"):
        run_verify(tmp_path)


def test_the_command_ends_with_its_status(saved, tmp_path):
    runner = CliRunner()
    assert runner.invoke(app, ["checkpoint", "verify", str(saved)]).exit_code == 0
    result = runner.invoke(app, ["checkpoint", "verify", str(tmp_path)])
    assert result.exit_code != 0
    assert "is not a checkpoint" in result.output


def test_names_are_shown_and_not_obeyed(saved, tmp_path, capsys):
    run_verify(shutil.copytree(saved, tmp_path / "run\x1b[31m\nb: intact"))
    shown = f"{tmp_path}/run\\x1b[31m\\nb: intact/checkpoints/step-0000000"
    assert capsys.readouterr().out.splitlines() == [f"{shown}{n}: intact" for n in (3, 4)]
