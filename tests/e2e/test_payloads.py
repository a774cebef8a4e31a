"""No command that reads a checkpoint runs code that its files name."""

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longctx.checkpoint.checksums import checksum, seal, unseal
from longctx.checkpoint.restricted import METADATA
from longctx.convert.megatron import to_megatron
from longctx.launch.main import app
from tests.checkpoint.payloads import Payload, spoil
from tests.train.runs import mistake, train, write_workplace

SHORT = ("train.steps=2", "parallel.cp=1", "train.sequences_per_step=1")
EXPERTS = ('model.ffn=["moe", "swiglu"]', "model.moe={experts = 2, active = 1, hidden = 64}")
REFUSED = "io.open"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A recipe of only softmax layers, which every format supports."""
    folder = write_workplace(tmp_path_factory.mktemp("workplace"))
    recipe = (folder / "tiny.toml").read_text().replace('"LS"', '"S"').replace("lightning.heads = 2\n", "")
    (folder / "tiny.toml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def run(ranks, workplace) -> Path:
    ranks.run(train, workplace, workplace / "run", list(SHORT), size=1)
    return workplace / "run"


@pytest.fixture(params=["metadata", "entries"])
def spoilt(run, tmp_path, request):
    """A copy of the run whose checkpoint has payloads in its `.metadata`, or in all entries that are not tensors."""
    copy = shutil.copytree(run, tmp_path / "run")
    for checkpoint in (copy / "checkpoints").iterdir():
        spoil_and_list(checkpoint, tmp_path / "mark", request.param)
    return copy


def spoil_and_list(folder, mark, where):
    """`spoil`, with the listing that somebody who writes it would write."""
    spoil(folder, mark, METADATA if where == "metadata" else "")
    for name in ("trainer.json", "weights.json"):
        if (folder / name).is_file():
            content = unseal((folder / name).read_text())
            content["files"] = {f: (folder / f).stat().st_size for f in content["files"]}
            content["checksums"] = {f: checksum(folder / f) for f in content["files"]}
            (folder / name).write_text(seal(content))


def refuse_or_ignore(arguments, mark):
    """The command ends without having run the payload; where it reads it, with an error that names it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not mark.exists()
    return result


def test_resuming_and_starting_from_weights(ranks, workplace, spoilt, tmp_path):
    (said,) = ranks.run(mistake, workplace, spoilt, [*SHORT, "train.steps=4"], size=1)
    assert REFUSED in said
    assert not (tmp_path / "mark").exists()
    if "metadata" in said:
        start = [*SHORT, f"train.init={spoilt}"]
        (said,) = ranks.run(mistake, workplace, tmp_path / "another", start, size=1)
        assert REFUSED in said
        assert not (tmp_path / "mark").exists()


def test_generating_and_converting(workplace, spoilt, tmp_path, request):
    mark, recipe = tmp_path / "mark", workplace / "tiny.toml"
    commands = [
        ["generate", spoilt, f"data.path={workplace / 'corpus'}", "--prompt", "a", "--tokens", "2"],
        ["convert", "to-huggingface", spoilt, "--out", tmp_path / "huggingface"],
        ["convert", "to-megatron", spoilt, "--out", tmp_path / "megatron"],
        ["convert", "upcycle", spoilt, "--to", recipe, "--out", tmp_path / "upcycled", *EXPERTS],
    ]
    for command in commands:
        result = refuse_or_ignore(command, mark)
        # Weights are tensors: what else lies beside them is not read.
        if "metadata" in request.node.name:
            assert result.exit_code != 0
            assert REFUSED in result.output, command


@pytest.mark.parametrize("where", ["metadata", "entries"])
def test_converting_from_megatron(workplace, run, tmp_path, where):
    to_megatron(run, tmp_path / "megatron")
    spoil_and_list(tmp_path / "megatron" / "release", tmp_path / "mark", where)
    torch.save(Payload(tmp_path / "mark"), tmp_path / "megatron" / "release" / "common.pt")
    command = ["convert", "from-megatron", tmp_path / "megatron", "--out", tmp_path / "out", "--to"]
    result = refuse_or_ignore([*command, workplace / "tiny.toml"], tmp_path / "mark")
    assert (where == "entries") or REFUSED in result.output
