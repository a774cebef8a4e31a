"""Checksums: every bit of every file counts, and ranks share the work."""

import json
import random
import re
import shutil
import zlib
from itertools import chain

import pytest
import torch

from longctx.checkpoint import checksums as module
from longctx.checkpoint.checksums import (
    CHECKSUMS,
    checksum,
    find_changed,
    seal,
    stored_checksums,
    unseal,
    verify_checksums,
    write_checksums,
    written_by,
)
from longctx.checkpoint.read import TRAINER, list_checkpoints, read_checksums, read_state, verify_content
from longctx.errors import UserError
from tests.checkpoint.test_save import save


def flip(file, bit):
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 30])
def test_a_checksum_is_the_crc_of_the_content_whatever_the_buffer(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "_BUFFER", 8)
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_each_file_is_of_the_rank_that_wrote_it():
    names = [".metadata", "__0_0.distcp", "__1_0.distcp", "__10_1.distcp", "common.pt"]
    assert written_by(names, 0, 4) == [".metadata", "__0_0.distcp", "common.pt"]
    assert written_by(names, 1, 4) == ["__1_0.distcp"]
    assert written_by(names, 2, 4) == ["__10_1.distcp"]
    assert sorted(chain.from_iterable(written_by(names, rank, 3) for rank in range(3))) == sorted(names)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Two checkpoints of two ranks, of equal sizes."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(save, folder, 3, 4, size=2)
    return folder


def test_every_file_of_a_checkpoint_has_a_checksum(saved):
    for path in list_checkpoints(saved):
        names = {file.name for file in path.iterdir()} - {TRAINER}
        assert read_checksums(path) == {name: checksum(path / name) for name in names}
        assert verify_content(path) is True


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_bit_that_flipped_is_noticed_and_the_file_named(saved, tmp_path, name):
    path = shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")
    size = (path / name).stat().st_size
    for bit in random.Random(0).sample(range(8 * size), 20):
        flip(path / name, bit)
        assert read_state(path).step == 4
        with pytest.raises(UserError, match=rf"step-00000004 is damaged: {name} has the checksum .* has changed since"):
            verify_content(path)
        flip(path / name, bit)
    assert verify_content(path)


def test_a_shard_of_another_step_is_noticed(saved, tmp_path):
    path = shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")
    shutil.copy(saved / "step-00000003" / "__1_0.distcp", path)
    assert read_state(path).step == 4  # its size is the same
    with pytest.raises(UserError, match=r"__1_0\.distcp has the checksum"):
        verify_content(path)


def on_rank(path):
    try:
        return str(verify_content(path))
    except UserError as error:
        return str(error)


def test_ranks_share_the_files_and_all_of_them_hear(ranks, saved, tmp_path):
    path = shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")
    assert ranks.run(on_rank, path, size=4) == ["True"] * 4
    flip(path / "__1_0.distcp", 999)
    said = ranks.run(on_rank, path, size=3)
    assert len(set(said)) == 1
    assert "__1_0.distcp has the checksum" in said[0]


def test_a_checkpoint_of_an_earlier_version_has_none(saved, tmp_path):
    path = shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")
    listing = unseal((path / TRAINER).read_text())
    del listing["checksums"]
    (path / TRAINER).write_text(json.dumps(listing))
    assert verify_content(path) is False


def test_any_bit_of_a_listing_that_flips_is_noticed():
    """Also where the result is JSON still: in a number, a name of a key, the checksum itself."""
    text = seal({"state": {"step": 40, "lr": 1e-05, "name": "é"}, "files": {"a": 1}, "checksums": {"a": "00000000"}})
    assert unseal(text)["state"] == {"step": 40, "lr": 1e-05, "name": "é"}
    for at in range(len(text)):
        for bit in range(7):
            flipped = text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]
            with pytest.raises(ValueError):  # noqa: PT011 - of JSON, or of the checksum
                unseal(flipped)


def test_a_changed_state_is_called_damage(saved, tmp_path):
    path = shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")
    listing = (path / TRAINER).read_text()
    (path / TRAINER).write_text(re.sub(r'"sequences": \d+', '"sequences": 123', listing))
    with pytest.raises(UserError, match=r"trainer\.json cannot be read \(its content has changed since it was written"):
        read_state(path)


@pytest.mark.parametrize("stored", [["a"], {"a": 1}, {"../a": "00000000"}, {"/etc/passwd": "00000000"}])
def test_what_is_no_list_of_checksums_is_refused(stored):
    with pytest.raises(UserError, match="its checksums are"):
        stored_checksums({"checksums": stored})


def test_a_folder_of_another_format_has_them_in_a_file_of_their_own(tmp_path):
    assert verify_checksums(tmp_path) is False
    (tmp_path / "model.safetensors").write_bytes(torch.arange(9).numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    write_checksums(tmp_path, "*.safetensors")
    (tmp_path / "config.json").write_text("{ }")
    assert verify_checksums(tmp_path) is True
    flip(tmp_path / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors has the checksum"):
        verify_checksums(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors cannot be read"):
        verify_checksums(tmp_path)
    (tmp_path / CHECKSUMS).write_text("nothing")
    with pytest.raises(UserError, match=r"checksums\.json cannot be read"):
        verify_checksums(tmp_path)


def test_a_file_that_cannot_be_read_has_changed(tmp_path):
    assert find_changed(tmp_path, {}) is None
    assert "a cannot be read" in find_changed(tmp_path, {"a": "00000000"})
