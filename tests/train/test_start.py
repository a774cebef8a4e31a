"""Start of a run: what does not fit, is damaged or differs between ranks is an error on all, before the first step."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
import torch

from longctx.checkpoint.checksums import seal, unseal
from tests.train.runs import interrupted_copy, losses, mistake, train, write_corpus, write_workplace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def uninterrupted(ranks, workplace) -> Path:
    """8 steps on 2 ranks; checkpoints at 2, 4, 6, 8."""
    ranks.run(train, workplace, workplace / "uninterrupted", ["evaluation.every=4"], size=2)
    return workplace / "uninterrupted"


def refusals(ranks, workplace, out, *arguments, size=2) -> str:
    """The message with which all ranks refuse to train; the run's directory is as it was."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    messages = ranks.run(mistake, workplace, out, *arguments, size=size)
    assert messages == [messages[0]] * size
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    return messages[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=/nowhere"], "/nowhere"),
        (["model.vocab_size=100"], "model.vocab_size: 100 is less than the 257 tokens of the corpus's tokenizer"),
        (["data.sequence_length=64Ki"], "less than one sequence of 65536"),
        (["parallel.cp=1", "parallel.dp_shard=1"], "there are 2 ranks; start 1"),
    ],
)
def test_a_recipe_that_does_not_fit_what_is_there(ranks, workplace, tmp_path, overrides, message):
    assert message in refusals(ranks, workplace, tmp_path / "out", overrides)


def test_what_one_rank_lacks_is_reported_on_every_rank(ranks, workplace, tmp_path):
    arguments = (["data.path=/nowhere"], "auto", nothing, 1)
    assert "/nowhere" in refusals(ranks, workplace, tmp_path / "out", *arguments)


def test_another_corpus_on_one_rank(ranks, workplace, tmp_path):
    other = write_corpus(tmp_path / "other", salt=1)
    arguments = ([f"data.path={other}"], "auto", nothing, 1)
    assert "rank 1 sees a different corpus than rank 0" in refusals(ranks, workplace, tmp_path / "out", *arguments)


def test_checkpoints_that_one_rank_alone_sees(ranks, uninterrupted, workplace, tmp_path):
    interrupted_copy(uninterrupted, tmp_path / "out", 2)
    (tmp_path / "elsewhere").mkdir()
    told = ranks.run(mistake_elsewhere_on_rank_1, workplace, tmp_path, size=2)
    assert "rank 0 would resume from step 2 and rank 1 from step 0" in told[0]
    assert "on a file system shared by all machines" in told[1]


def mistake_elsewhere_on_rank_1(workplace: Path, folder: Path) -> str:
    """The same directory by its name, which is another one on the machine of rank 1."""
    with chdir(folder / "elsewhere" if torch.distributed.get_rank() == 1 else folder):
        return mistake(workplace, Path("out"))


def test_nodes_with_different_recipes_do_not_train_together(ranks, workplace, tmp_path):
    arguments = (["optimizer.lr=0.5", "train.clip=none"], "auto", nothing, 1)
    told = refusals(ranks, workplace, tmp_path / "out", *arguments)
    assert 'the ranks of this job were started differently: train.clip: 1.0 on rank 0, "none" on rank 1; ' in told
    assert "optimizer.lr: 0.003 on rank 0, 0.5 on rank 1" in told
    assert not (tmp_path / "out").exists()


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_held_out_documents_that_are_not_there(ranks, workplace, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", heldout=0.0)
    overrides = [f"data.path={corpus}", "evaluation.every=2"]
    assert "the split 'heldout' has no documents" in refusals(ranks, workplace, tmp_path / "out", overrides)


def test_a_shard_cut_short(ranks, workplace, tmp_path):
    corpus = shutil.copytree(workplace / "corpus", tmp_path / "corpus")
    shard = corpus / "train" / "shard-00000.parquet"
    os.truncate(shard, shard.stat().st_size // 2)
    assert f"shard {shard}" in refusals(ranks, workplace, tmp_path / "out", [f"data.path={corpus}"])


@pytest.mark.parametrize(
    ("overrides", "resume", "messages"),
    [
        (["model.dim=32"], "auto", ["of another model: dim: 16, expected 32", "--out"]),
        (
            ["model.layers=SL", "model.vocab_size=512"],
            "auto",
            ["layers: 'LS', expected 'SL'; vocab_size: 320, expected"],
        ),
        (["seed=4"], "auto", ["was trained on other data, or with another mix, seed"]),
        (["data.sequence_length=32"], "auto", ["was trained on other data, or with another mix, seed"]),
        ([], "never", ["contains checkpoints of an earlier run, the latest", "--resume auto", "--out"]),
        (
            [],
            "{workplace}/corpus",
            ["/corpus is not a checkpoint", "trainer.json", "start a new run in another directory"],
        ),
    ],
    ids=["dim", "layers", "seed", "sequence_length", "never", "no checkpoint"],
)
def test_checkpoints_that_do_not_fit_the_run(ranks, uninterrupted, workplace, overrides, resume, messages):
    out = uninterrupted
    if "corpus" in resume:
        out, resume = workplace / "nothing-yet", resume.format(workplace=workplace)
    told = refusals(ranks, workplace, out, overrides, resume)
    for message in messages:
        assert message in told


def test_a_checkpoint_from_before_a_key_of_the_model_resumes(ranks, uninterrupted, workplace, tmp_path):
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    file = out / "checkpoints" / "step-00000006" / "trainer.json"
    content = unseal(file.read_text())
    del content["state"]["model"]["block"], content["state"]["model"]["heads"]
    file.write_text(seal(content))
    ranks.run(train, workplace, out, size=2)
    assert losses(out) == losses(uninterrupted)


@pytest.fixture(scope="module")
def other_heldout(workplace, tmp_path_factory) -> Path:
    """The corpus with the same tokens to train on and another held-out part."""
    folder = tmp_path_factory.mktemp("other")
    other, corpus = write_corpus(folder / "other", salt=1), shutil.copytree(workplace / "corpus", folder / "corpus")
    shutil.rmtree(corpus / "heldout")
    shutil.copytree(other / "heldout", corpus / "heldout")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["heldout"] = json.loads((other / "manifest.json").read_text())["splits"]["heldout"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    return corpus


def test_another_held_out_part_is_noticed(ranks, uninterrupted, workplace, other_heldout, tmp_path):
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    other, evaluated = f"data.path={other_heldout}", "evaluation.every=4"
    told = refusals(ranks, workplace, out, [other, evaluated])
    assert "step-00000006: the run was evaluated on another held-out part than that of" in told
    assert str(other_heldout) in told
    # It is not noticed where it is not used, and not forgotten there either.
    ranks.run(train, workplace, out, [other, "train.steps=7"], size=2)
    assert "another held-out part" in refusals(ranks, workplace, out, [other, evaluated])
    ranks.run(train, workplace, out, [evaluated], size=2)


def test_another_held_out_part_on_one_rank(ranks, workplace, other_heldout, tmp_path):
    (tmp_path / "tiny.toml").write_text((workplace / "tiny.toml").read_text() + "[evaluation]\nevery = 4\n")
    (tmp_path / "corpus").symlink_to(workplace / "corpus")
    arguments = ([f"data.path={other_heldout}"], "auto", nothing, 1)
    assert "rank 1 sees a different corpus than rank 0" in refusals(ranks, tmp_path, tmp_path / "out", *arguments)


def test_a_checkpoint_without_a_held_out_part_takes_any(ranks, uninterrupted, workplace, other_heldout, tmp_path):
    """One of an earlier version of longctx, or of a run without evaluation."""
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    file = out / "checkpoints" / "step-00000006" / "trainer.json"
    content = unseal(file.read_text())
    del content["state"]["heldout"]
    file.write_text(seal(content))
    ranks.run(train, workplace, out, [f"data.path={other_heldout}", "evaluation.every=4"], size=2)
    assert losses(out) == losses(uninterrupted)


def test_a_checkpoint_from_elsewhere_for_a_run_that_has_its_own(ranks, uninterrupted, workplace, tmp_path):
    out = interrupted_copy(uninterrupted, tmp_path / "out", 2)
    told = refusals(ranks, workplace, out, [], str(uninterrupted / "checkpoints" / "step-00000008"))
    assert f"{out} contains checkpoints of its own, the latest {out / 'checkpoints' / 'step-00000002'}" in told


def test_a_damaged_checkpoint_is_refused_and_another_is_named(ranks, uninterrupted, workplace, tmp_path):
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    first, second, third = sorted((out / "checkpoints").iterdir())
    shard = third / "__1_0.distcp"
    os.truncate(shard, 100)
    told = refusals(ranks, workplace, out)
    assert "__1_0.distcp has 100 bytes" in told
    assert f"--resume PATH (available: {first}, {second})" in told
    ranks.run(train, workplace, out, [], str(second), size=2)
    assert losses(out) == losses(uninterrupted)
