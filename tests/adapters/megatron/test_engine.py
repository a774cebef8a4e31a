"""`engine = "megatron"`: a recipe's run is that of the built-in engine."""

import errno
import os
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.checkpoint.read import list_checkpoints
from longctx.checkpoint.restricted import METADATA
from longctx.checkpoint.weights import find_weights
from longctx.convert.megatron import from_megatron
from longctx.errors import UserError
from tests.adapters.megatron.shim import on_cpu
from tests.adapters.megatron.training import may_start_processes
from tests.checkpoint.payloads import spoil
from tests.train.runs import interrupted_copy, losses, metrics, mistake, train, write_workplace

STEPS = ["train.steps=8", "checkpoint.every=4", "evaluation.every=8", "evaluation.sequences=3"]
HYBRID = ["model.layers=LES", "model.depth=4", "model.gated_deltanet.heads=2", "model.lightning.heads=2"]
HYBRID += ["model.softmax.heads=4", "model.softmax.kv_heads=2", *STEPS]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("megatron"))


def megatron(workplace, out, overrides=(), resume="auto"):
    may_start_processes()
    train(workplace, out, ["engine=megatron", "train.deterministic=false", *overrides], resume, on_cpu)


@pytest.fixture(scope="module")
def built_in(ranks, workplace):
    """A run of eight steps on one rank, saved after four."""
    out = workplace / "torch"
    ranks.run(train, workplace, out, [*HYBRID, "parallel.cp=1"], size=1)
    return out


def curve(out):
    """The loss and the norm of the gradient of each step."""
    return [(step.loss, step.grad_norm) for step in metrics(out).steps]


def assert_same(found, want, rel=3e-5):
    """Losses within 1e-6. The norm of the seventh step amplifies rounding: layouts differ by up to 1e-5 in it."""
    assert len(found) == len(want)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, want, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=rel / 30)
        assert norm == pytest.approx(wanted_norm, rel=rel)


ONE = "parallel.cp=1"
RUNS = {
    "one rank": (1, [ONE]),
    "one rank, no distributed optimizer": (1, [ONE, "megatron.distributed_optimizer=false"]),
    "cp 2": (2, []),
    "cp 2, balanced, one document after another": (2, ["parallel.layout=balanced"]),
    "tp 2": (2, [ONE, "parallel.tp=2"]),
    "tp 2, no sequence parallelism": (2, [ONE, "parallel.tp=2", "megatron.sequence_parallel=false"]),
    "dp 2": (2, [ONE]),
    "pp 2": (2, [ONE, "parallel.pp=2"]),
    "pp 2, tp 2, recomputed": (4, [ONE, "parallel.pp=2", "parallel.tp=2", "train.activation_checkpointing=block"]),
    "tp 2, cp 2": (4, ["parallel.tp=2"]),
    "ulysses 2 of cp 4": (4, ["parallel.cp=4", "parallel.ulysses=2", "parallel.attention=ulysses-ring"]),
}


@pytest.mark.parametrize(("size", "overrides"), RUNS.values(), ids=RUNS)
def test_a_run_is_that_of_the_built_in_engine(ranks, workplace, built_in, tmp_path, size, overrides):
    ranks.run(megatron, workplace, tmp_path / "run", [*HYBRID, *overrides, "checkpoint.every=100"], size=size)
    assert_same(curve(tmp_path / "run"), curve(built_in))
    held, want = metrics(tmp_path / "run").evaluations, metrics(built_in).evaluations
    assert [e.loss for e in held] == pytest.approx([e.loss for e in want], rel=1e-5)
    assert [[p.tokens for p in e.positions] for e in held] == [[p.tokens for p in e.positions] for e in want]


def test_an_untied_head(ranks, workplace, tmp_path):
    untied = [*HYBRID, "model.tie_embeddings=false", "train.steps=3"]
    ranks.run(train, workplace, tmp_path / "torch", [*untied, ONE], size=1)
    ranks.run(megatron, workplace, tmp_path / "run", [*untied, ONE, "parallel.tp=2", "parallel.pp=2"], size=4)
    assert_same(curve(tmp_path / "run"), curve(tmp_path / "torch"))


MIXTURE = ["model.depth=4", "model.lightning.heads=8", "model.softmax.heads=8", "model.softmax.kv_heads=4", *STEPS]
MIXTURE += ['model.heads.mixers=["softmax", "lightning"]', "model.heads.shared=4", "model.heads.active=2"]
MIXTURE += ["model.heads.balance=1.0", "evaluation.every=4"]
MIXED = {
    **{name: RUNS[name] for name in ("one rank", "cp 2", "tp 2, no sequence parallelism", "dp 2", "pp 2")},
    "tp 2, cp 2": (4, ["parallel.tp=2"]),
    "pp 2, tp 2, recomputed": RUNS["pp 2, tp 2, recomputed"],
}


@pytest.fixture(scope="module")
def mixture(ranks, workplace):
    out = workplace / "mixture"
    ranks.run(train, workplace, out, [*MIXTURE, ONE], size=1)
    return out


def assert_routes_alike(found, want):
    """Where tokens go, over steps and between evaluations, of every layer."""
    assert_same(curve(found), curve(want))
    for each, wanted in zip(metrics(found).steps, metrics(want).steps, strict=True):
        assert list(each.routers) == list(wanted.routers) == [f"blocks.{layer}.mixer" for layer in range(4)]
        for name, router in wanted.routers.items():
            assert each.routers[name].imbalance == pytest.approx(router.imbalance, rel=1e-9), name
            assert each.routers[name].entropy == pytest.approx(router.entropy, rel=1e-5), name
    assert [e.fluctuation for e in metrics(found).evaluations] == [e.fluctuation for e in metrics(want).evaluations]


@pytest.mark.parametrize(("size", "overrides"), MIXED.values(), ids=MIXED)
def test_a_mixture_of_heads_is_that_of_the_built_in_engine(ranks, workplace, mixture, tmp_path, size, overrides):
    ranks.run(megatron, workplace, tmp_path / "run", [*MIXTURE, *overrides, "checkpoint.every=100"], size=size)
    assert_routes_alike(tmp_path / "run", mixture)
    assert len(metrics(mixture).evaluations[-1].fluctuation) == 4


def test_a_mixture_of_heads_resumes_on_other_ranks_and_is_converted(ranks, workplace, mixture, tmp_path):
    ranks.run(megatron, workplace, tmp_path / "run", [*MIXTURE, "parallel.tp=2"], size=4)
    out = interrupted_copy(tmp_path / "run", tmp_path / "on", 4)
    ranks.run(megatron, workplace, out, [*MIXTURE, ONE, "parallel.pp=2"], size=2)
    assert_same(curve(out), curve(mixture))
    from_megatron(tmp_path / "run", None, tmp_path / "weights")
    found, want = (find_weights(path, "as SOURCE") for path in (tmp_path / "weights", mixture))
    for name in want.shapes:
        torch.testing.assert_close(found.read(name), want.read(name), rtol=1e-4, atol=1e-5)


def test_attention_experts_are_those_of_the_built_in_engine(ranks, workplace, tmp_path):
    experts = [*STEPS, ONE, "model.layers=LAS", "model.depth=3", "model.attention_experts={experts = 3, heads = 2}"]
    ranks.run(train, workplace, tmp_path / "torch", experts, size=1)
    ranks.run(megatron, workplace, tmp_path / "run", [*experts, "parallel.pp=3"], size=3)
    assert_same(curve(tmp_path / "run"), curve(tmp_path / "torch"))
    assert list(metrics(tmp_path / "run").steps[0].routers) == ["blocks.1.mixer"]


@pytest.fixture(scope="module")
def saved(ranks, workplace, built_in):
    """A run that was saved after four steps, on tp 2 and cp 2."""
    out = workplace / "megatron"
    ranks.run(megatron, workplace, out, [*HYBRID, "parallel.tp=2"], size=4)
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-00000004", "step-00000008"]
    return out


RESUMED = {name: RUNS[name] for name in ("one rank", "tp 2", "pp 2", "ulysses 2 of cp 4")}


@pytest.mark.parametrize(("size", "overrides"), RESUMED.values(), ids=RESUMED)
def test_it_resumes_from_a_checkpoint_on_other_ranks(ranks, workplace, built_in, saved, tmp_path, size, overrides):
    out = interrupted_copy(saved, tmp_path / "run", 4)
    ranks.run(megatron, workplace, out, [*HYBRID, *overrides], size=size)
    assert_same(curve(out), curve(built_in))


OTHER_ADAM = ["optimizer.betas=[0.5, 0.7]", "optimizer.eps=0.001", "optimizer.weight_decay=0.9"]


def test_hyperparameters_that_changed_in_the_recipe_hold_after_resuming(ranks, workplace, built_in, saved, tmp_path):
    want = interrupted_copy(built_in, tmp_path / "torch", 4)
    ranks.run(train, workplace, want, [*HYBRID, ONE, *OTHER_ADAM], size=1)
    assert curve(want)[-1] != pytest.approx(curve(built_in)[-1], rel=1e-3), "they change nothing"
    out = interrupted_copy(saved, tmp_path / "run", 4)
    ranks.run(megatron, workplace, out, [*HYBRID, ONE, *OTHER_ADAM], size=1)
    assert_same(curve(out), curve(want), rel=5e-5)  # such short memories of moments amplify rounding


def test_it_resumes_without_the_distributed_optimizer_and_never_with_another_one(ranks, workplace, built_in, tmp_path):
    whole = [*HYBRID, "megatron.distributed_optimizer=false"]
    ranks.run(megatron, workplace, tmp_path / "run", [*whole, "parallel.tp=2", "parallel.cp=1"], size=2)
    out = interrupted_copy(tmp_path / "run", tmp_path / "on", 4)
    ranks.run(megatron, workplace, out, whole, size=2)
    assert_same(curve(out), curve(built_in))
    out = interrupted_copy(tmp_path / "run", tmp_path / "other", 4)
    (said,) = set(ranks.run(mistake, workplace, out, [*HYBRID, "engine=megatron"], "auto", on_cpu, size=2))
    assert "from a run with megatron.distributed_optimizer = False, but this run has True" in said


EXTRA_STATE = "decoder.layers.0.mlp.linear_fc1._extra_state"
"""An entry that is not a tensor."""


def resume_unchecked(workplace, out):
    """On a rank: resume without the check, however that ends."""
    with patch("longctx.adapters.megatron.engine.check_entries"), suppress(Exception):
        megatron(workplace, out, [*HYBRID, ONE])


@pytest.mark.parametrize("where", [METADATA, EXTRA_STATE, "optimizer", "common.pt"])
def test_a_payload_in_its_files_does_not_run_when_it_resumes(ranks, workplace, saved, tmp_path, where):
    out, mark = interrupted_copy(saved, tmp_path / "run", 4), tmp_path / "mark"
    spoil(out / "checkpoints/step-00000004", mark, where)
    (said,) = set(ranks.run(mistake, workplace, out, [*HYBRID, "engine=megatron"], "auto", on_cpu, size=2))
    assert "step-00000004 cannot be read" in said
    assert "io.open" in said
    assert not mark.exists()
    # Megatron reads common.pt with restrictions, and expects tensors in the place of tensors.
    if where in (METADATA, EXTRA_STATE):
        ranks.run(resume_unchecked, workplace, out, size=1)
        assert mark.exists()


def full_disk(workplace, out, overrides):
    """On a rank: the words where the second rank's disk is full as it saves."""
    from megatron.core import dist_checkpointing

    may_start_processes()
    save = dist_checkpointing.save

    def fail(*args, **kwargs):
        save(*args, **kwargs)
        if torch.distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(dist_checkpointing, "save", fail):
        return mistake(workplace, out, ["engine=megatron", *overrides], "auto", on_cpu)


def test_a_save_that_fails_on_one_rank_is_reported_by_all(ranks, workplace, tmp_path):
    (said,) = set(ranks.run(full_disk, workplace, tmp_path / "run", HYBRID, size=2))
    assert "step-00000004 could not be written: rank 1: [Errno 28] No space left on device" in said
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_it_starts_from_weights_of_the_built_in_engine(ranks, workplace, built_in, tmp_path):
    begin = [*HYBRID, "train.steps=2", f"train.init={built_in}"]
    ranks.run(train, workplace, tmp_path / "torch", [*begin, ONE], size=1)
    ranks.run(megatron, workplace, tmp_path / "run", [*begin, "parallel.tp=2"], size=4)
    assert_same(curve(tmp_path / "run"), curve(tmp_path / "torch"))


def test_its_checkpoint_becomes_weights_of_the_built_in_model(ranks, workplace, built_in, saved, tmp_path):
    from_megatron(saved, None, tmp_path / "weights")
    found, want = (find_weights(path, "as SOURCE") for path in (tmp_path / "weights", built_in))
    assert found.model == want.model
    for name, shape in want.shapes.items():
        assert found.shapes[name] == shape
        torch.testing.assert_close(found.read(name), want.read(name), rtol=1e-4, atol=1e-5)
    begin = [*HYBRID, "train.steps=2", f"train.init={tmp_path / 'weights'}"]
    ranks.run(train, workplace, tmp_path / "run", begin, size=2)
    with pytest.raises(UserError, match="longctx convert from-megatron"):
        find_weights(saved, "as SOURCE")


def test_bf16_follows_the_curve_of_float32_and_resumes(ranks, workplace, built_in, tmp_path):
    """With decays in float32 beside it, in one optimizer."""
    overrides = [*HYBRID, "train.precision=bf16"]
    ranks.run(megatron, workplace, tmp_path / "run", overrides, size=2)
    for found, want in zip(losses(tmp_path / "run"), losses(built_in), strict=True):
        assert found == pytest.approx(want, rel=0.02)
    out = interrupted_copy(tmp_path / "run", tmp_path / "resumed", 4)
    ranks.run(megatron, workplace, out, overrides, size=2)
    assert curve(out) == curve(tmp_path / "run")


def test_a_checkpoint_of_another_engine_is_refused(ranks, workplace, built_in, saved, tmp_path):
    out = interrupted_copy(saved, tmp_path / "run", 4)
    (said,) = set(ranks.run(mistake, workplace, out, HYBRID, size=2))
    assert "step-00000004 has tensors in the format of engine = 'megatron'" in said
    out = interrupted_copy(built_in, tmp_path / "other", 4)
    (said,) = set(ranks.run(mistake, workplace, out, [*HYBRID, "engine=megatron"], "auto", on_cpu, size=2))
    assert "step-00000004 has tensors in the format of engine = 'torch'" in said


def test_without_a_gpu_it_is_refused(ranks, workplace, tmp_path):
    (said,) = set(ranks.run(mistake, workplace, tmp_path / "run", [*HYBRID, "engine=megatron"], size=2))
    assert "engine: 'megatron' needs GPUs" in said


def test_a_length_that_sequence_parallelism_does_not_divide_is_refused(ranks, workplace, tmp_path):
    overrides = [*HYBRID, ONE, "engine=megatron", "parallel.tp=2", "data.sequence_length=63"]
    (said,) = set(ranks.run(mistake, workplace, tmp_path / "run", overrides, "auto", on_cpu, size=2))
    assert "a rank has 63 of 63 tokens, which is not a multiple of tp = 2" in said
