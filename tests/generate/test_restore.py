"""The model that a run has trained, in one process."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from longctx.checkpoint.checksums import seal, unseal
from longctx.data.manifest import MANIFEST_FILE
from longctx.data.prepare import prepare
from longctx.errors import UserError
from longctx.generate import Sampling, generate
from longctx.generate.restore import restore
from longctx.parallel.layout import Layout
from tests.data.cases import write_tokenizer
from tests.train.runs import tensors, train, write_corpus, write_workplace

RUN = ("parallel.cp=2", "train.steps=4", "checkpoint.every=2", 'model.layers="LMSH"', "model.depth=4")
TABLES = ("model.mamba2={heads=4, state_dim=8}", "model.hgrn2={heads=2}")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def trained(ranks, workplace) -> Path:
    """A run of 4 steps on 2 ranks, with checkpoints of steps 2 and 4."""
    ranks.run(train, workplace, workplace / "run", (*RUN, *TABLES), size=2)
    return workplace / "run"


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """The run, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


def same(decoder, checkpoint):
    found = {name.removeprefix("model."): x for name, x in tensors(checkpoint).items() if name.startswith("model.")}
    return found.keys() == dict(decoder.named_parameters()).keys() and all(
        torch.equal(x, found[name]) for name, x in decoder.named_parameters()
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `tensors`
def test_parameters_are_those_of_the_newest_checkpoint_or_of_the_one_that_is_named(trained):
    newest, earlier = (trained / f"checkpoints/step-0000000{step}" for step in (4, 2))
    restored = restore(trained)
    assert (restored.checkpoint, restored.state.step, restored.same_corpus) == (newest, 4, True)
    assert same(restored.decoder, newest)
    assert not same(restored.decoder, earlier)
    assert same(restore(trained, (), earlier).decoder, earlier)
    assert not any(x.requires_grad for x in restored.decoder.parameters())


def test_nothing_is_said_by_torch_and_no_process_group_is_made(trained, recwarn):
    restore(trained)
    assert not recwarn.list
    assert not torch.distributed.is_initialized()


def test_a_restored_model_computes(trained):
    restored = restore(trained)
    tokens = torch.from_numpy(restored.tokenizer.encode_batch(["10 20 30"])[0].astype("int64"))
    assert len(list(generate(restored.decoder, tokens, 5, Sampling()))) == 5
    # Buffers too, which no checkpoint holds: a new model's are what they have to be.
    assert bool((restored.decoder.blocks[0].mixer.log_decay < 0).all())
    assert restored.decoder(tokens[None], Layout((0, len(tokens)))).isfinite().all()


def test_in_bf16_decays_stay_exact(trained):
    decoder, exact = (restore(trained, [f"train.precision={p}"]).decoder for p in ("bf16", "fp32"))
    kept = {name for name, x in decoder.named_parameters() if x.dtype == torch.float32}
    assert kept == {"blocks.1.mixer.decay.A_log", "blocks.1.mixer.decay.dt_bias", "blocks.3.mixer.bound.bound"}
    assert all(x.dtype == torch.bfloat16 for name, x in decoder.named_parameters() if name not in kept)
    assert torch.equal(decoder.blocks[0].mixer.log_decay, exact.blocks[0].mixer.log_decay)
    tokens = torch.arange(40)[None]
    low, high = (each.next_logits(tokens, each.new_cache()) for each in (decoder, exact))
    assert 0 < (low - high).norm() < 5e-2 * high.norm()


def test_a_checkpoint_from_before_a_key_was_added_is_the_same_model(copy):
    trainer = copy / "checkpoints/step-00000004/trainer.json"
    content = unseal(trainer.read_text())
    model = content["state"]["model"]
    for table, keys in ((model, ("norm", "residual")), (model["softmax"], ("window", "qk_norm", "output_gate"))):
        for key in keys:
            del table[key]
    trainer.write_text(seal(content))
    assert restore(copy).state.step == 4


# The corpus


def test_shards_are_not_needed(trained, workplace, tmp_path):
    (tmp_path / "corpus").mkdir()
    shutil.copy(workplace / "corpus" / MANIFEST_FILE, tmp_path / "corpus")
    assert restore(trained, [f"data.path={tmp_path / 'corpus'}"]).same_corpus


def test_another_corpus_is_noticed(trained, tmp_path):
    write_corpus(tmp_path / "corpus", salt=1)
    assert not restore(trained, [f"data.path={tmp_path / 'corpus'}"]).same_corpus


def test_a_run_with_a_mix_has_the_tokenizer_of_its_corpora_or_of_another_one(ranks, workplace, tmp_path):
    sources = [f'{{path="{workplace / "corpus"}",weight={weight}}}' for weight in (1, 2)]
    overrides = ("parallel.cp=1", "train.steps=2", f"data.mix=[{','.join(sources)}]")
    ranks.run(train, workplace, tmp_path / "run", overrides, size=1)
    assert restore(tmp_path / "run").same_corpus
    assert not restore(tmp_path / "run", [f"data.path={workplace / 'corpus'}"]).same_corpus


def test_a_corpus_that_is_not_there_is_reported_with_what_to_do(trained):
    with pytest.raises(UserError) as caught:
        restore(trained, ["data.path=gone"])
    assert str(caught.value).startswith(
        f"the tokenizer of {trained} is stored with its corpus: data directory gone does not"
    )
    assert str(caught.value).endswith("If the corpus has moved, add data.path=DIR")


def test_a_tokenizers_file_that_is_not_there_is_reported(ranks, workplace, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    prepare([workplace / "corpus-texts"], tmp_path / "corpus", tokenizer=str(tokenizer), progress=False, workers=1)
    overrides = ("train.steps=2", "parallel.cp=1", f"data.path={tmp_path / 'corpus'}")
    ranks.run(train, workplace, tmp_path / "run", overrides, size=1)
    assert restore(tmp_path / "run").tokenizer.vocab_size > 257
    (tmp_path / "corpus" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"is stored with its corpus: tokenizer .*tokenizer\.json': No such file"):
        restore(tmp_path / "run")


# Mistakes


def test_what_is_no_run_is_reported_with_those_there_are(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"gone is not a run: there is no such directory\. Give .*runs/<name>\.$"):
        restore(Path("gone"))
    shutil.copytree(trained, tmp_path / "runs/tiny")
    with pytest.raises(UserError, match=r"gone is not a run: .* Existing runs: runs/tiny$"):
        restore(Path("gone"))
    with pytest.raises(UserError, match=r"checkpoints is not a run: it has no recipe\.toml"):
        restore(Path("runs/tiny/checkpoints"))


def test_a_run_without_a_checkpoint_is_reported(copy):
    for name in ("step-00000002", "step-00000004"):
        (copy / "checkpoints" / name).rename(copy / "checkpoints" / f"{name}.partial")
    with pytest.raises(UserError, match="has no checkpoint yet: train until the first one"):
        restore(copy)


def test_a_checkpoint_of_another_model_is_reported(copy):
    recipe = (copy / "recipe.toml").read_text()
    assert "\ndim = 16\n" in recipe
    (copy / "recipe.toml").write_text(recipe.replace("\ndim = 16\n", "\ndim = 32\n"))
    with pytest.raises(UserError, match=r"of another model: dim: 16, expected 32\. Give a checkpoint of this run"):
        restore(copy)


def test_a_checkpoint_of_megatrons_tensors_is_reported_with_what_makes_weights_of_it(copy):
    trainer = copy / "checkpoints/step-00000004/trainer.json"
    content = unseal(trainer.read_text())
    content["state"]["format"] = "megatron"
    trainer.write_text(seal(content))
    with pytest.raises(UserError, match=r"engine = 'megatron'\. Generation needs .* longctx convert from-megatron"):
        restore(copy)


@pytest.mark.parametrize("override", ["model.dim=32", "seed=9", "train.steps=1", "nonsense"])
def test_what_has_no_part_in_generation_cannot_be_overridden(trained, override):
    with pytest.raises(
        UserError, match=f"{override}: generation can override only checkpoint.verify, data.path, train.device, train"
    ):
        restore(trained, [override])


@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_a_damaged_checkpoint_is_reported_with_the_others(copy, damage):
    newest = copy / "checkpoints/step-00000004"
    file = newest / (".metadata" if damage == "zeroed" else "__0_0.distcp")
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 10)
    else:
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match=rf"--checkpoint PATH \(available: {newest.with_name('step-00000002')}\)"):
        restore(copy)
    assert restore(copy, (), newest.with_name("step-00000002")).state.step == 2
