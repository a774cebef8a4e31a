"""Checkpoints are read whole, or refused with what is wrong and the others that there are."""

import os
import shutil
from pathlib import Path

import pytest

from longctx.checkpoint.checksums import seal, unseal
from longctx.checkpoint.read import check_same_model, list_checkpoints, load_tensors, read_state
from longctx.errors import UserError
from tests.checkpoint.saving import MODEL, save, sharded, state


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(save, folder, 1, 2, size=2)
    return folder


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    """A copy to damage, with another one beside it."""
    return shutil.copytree(saved, tmp_path / "checkpoints") / "step-00000002"


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "trainer.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_file_that_is_missing_or_cut_short_is_reported_with_what_to_do(damaged, name, damage):
    file = damaged / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 10)
    else:
        file.unlink()
    with pytest.raises(UserError) as caught:
        read_state(damaged)
    assert f"{damaged}" in str(caught.value)
    assert name in str(caught.value)
    assert f"--resume PATH (available: {damaged.with_name('step-00000001')})" in str(caught.value)
    assert list_checkpoints(damaged.parent)[-1] == damaged  # or an older one would silently take its place


def test_a_pipe_in_place_of_the_listing_is_not_waited_for(damaged):
    (damaged / "trainer.json").unlink()
    os.mkfifo(damaged / "trainer.json")
    with pytest.raises(UserError, match=r"trainer.json cannot be read \(it is not a file\)"):
        read_state(damaged)


def test_a_key_of_a_newer_version_is_not_called_damage(damaged):
    listing = unseal((damaged / "trainer.json").read_text())
    listing["state"] |= {"lookahead": 3, "curriculum": {}}
    (damaged / "trainer.json").write_text(seal(listing))
    with pytest.raises(UserError) as caught:
        read_state(damaged)
    assert "written by a newer version of longctx: this one does not know curriculum, lookahead" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_checkpoint_of_an_earlier_version_has_no_spikes_held_out_loss_or_stages(damaged):
    listing = unseal((damaged / "trainer.json").read_text())
    for key in ("spikes", "heldout_loss", "stages"):
        del listing["state"][key]
    (damaged / "trainer.json").write_text(seal(listing))
    assert read_state(damaged) == state(2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("spikes", value) for value in (None, {"losses": [2.0]}, [])),
        *(("heldout_loss", value) for value in ({"loss": "low"}, 2.0, {"loss": 2, "sequences": 8, "stage": 3})),
        *(("stages", value) for value in (["a"], {"a": -1}, {"a": "0"}, {"a": True})),
    ],
)
def test_spikes_held_out_losses_and_stages_that_are_none_are_damage(damaged, key, value):
    listing = unseal((damaged / "trainer.json").read_text())
    listing["state"][key] = value
    (damaged / "trainer.json").write_text(seal(listing))
    with pytest.raises(UserError, match=r"or it is damaged: trainer\.json cannot be read"):
        read_state(damaged)


def test_a_folder_above_is_no_checkpoint_and_those_in_it_are_named(saved):
    with pytest.raises(
        UserError, match=f"is not a checkpoint.*available: {saved}/step-00000001, {saved}/step-00000002"
    ):
        read_state(saved)


def test_there_is_none_where_there_is_no_folder(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_bytes_that_changed_are_an_error_on_every_rank(ranks, damaged):
    size = (damaged / ".metadata").stat().st_size
    (damaged / ".metadata").write_bytes(b"\0" * size)
    read_state(damaged)
    messages = ranks.run(unreadable, damaged, size=2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"checkpoint {damaged} cannot be read: ")
    assert "--resume PATH (available: " in messages[0]


def unreadable(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tensors(path, sharded(0.0))
    return str(caught.value)


def test_another_model_is_reported_by_every_difference(tmp_path):
    check_same_model(tmp_path, state(1), dict(MODEL))
    with pytest.raises(UserError, match=r"dim: 16, expected 32; heads: None, expected 2\. Train this model in"):
        check_same_model(tmp_path, state(1), {"dim": 32, "vocab_size": 320, "heads": 2})
