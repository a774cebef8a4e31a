"""Training with Megatron-Core around our layers: its optimizer, pipeline, recomputation and checkpoints."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.adapters.megatron.router import RouterConfig
from longctx.adapters.megatron.specs import layer_spec
from longctx.mixers.head_mixture import HeadMixtureConfig
from tests.adapters.megatron.cases import EXPERTS, Run, gpt, losses, parallel
from tests.adapters.megatron.shim import on_cpu
from tests.adapters.megatron.training import Training, trained

HYBRID = layer_spec("EMSL")


@pytest.fixture(scope="module")
def alone(ranks):
    """The losses of six steps on one rank."""
    return ranks.run(trained, HYBRID, Training(Run(), 6), size=1)[0]


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TRAININGS = {
    "tp 2, cp 2": (4, Training(Run(tp=2, cp=2, sequence_parallel=True), 3)),
    "cp 2, dp 2": (4, Training(Run(cp=2), 3)),
    "dp 2": (2, Training(Run(), 3)),
    "tp 2, distributed optimizer": (2, Training(Run(tp=2), 3, distributed=True)),
    "cp 2, distributed optimizer": (2, Training(Run(cp=2), 3, distributed=True)),
    "all recomputed": (2, Training(Run(cp=2), 3, changes=RECOMPUTED)),
    "attention recomputed": (
        2,
        Training(Run(cp=2), 3, changes={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    ),
}


@pytest.mark.parametrize(("size", "training"), TRAININGS.values(), ids=TRAININGS)
def test_losses_are_those_of_one_rank(ranks, alone, size, training):
    for found in ranks.run(trained, HYBRID, training, size=size):
        # The distributed optimizer keeps its parts in float32.
        assert found == pytest.approx(alone[:3], rel=1e-5 if training.distributed else 1e-9)


MIXTURE = layer_spec("LS", heads=HeadMixtureConfig(mixers=("softmax", "lightning"), shared=4, active=2))


def test_a_mixture_of_heads_resumes_on_other_ranks(ranks, tmp_path):
    folder = tmp_path / "checkpoint"
    alone = ranks.run(trained, MIXTURE, Training(Run(), 6), size=1)[0]
    for found in ranks.run(trained, MIXTURE, Training(Run(tp=2, cp=2, sequence_parallel=True), 3, save=folder), size=4):
        assert found == pytest.approx(alone[:3], rel=1e-9)
    for run in (Run(), Run(cp=4), Run(tp=2)):
        rest = Training(run, 3, begin=3, load=folder)
        for found in ranks.run(trained, MIXTURE, rest, size=run.ranks):
            assert found == pytest.approx(alone[3:], rel=1e-9), run


GRAPHS = {
    "token": layer_spec("LS"),
    "similarity": layer_spec("LS", router=RouterConfig(kind="similarity", similarity_dim=6, temperature=0.5)),
    "attention": layer_spec("S", router=RouterConfig(kind="attention")),
}


@pytest.mark.parametrize("by", GRAPHS)
def test_experts_over_ranks(ranks, tmp_path, by):
    """Megatron's experts, divided over ranks, with each of the routers."""
    experts, folder = Run(options=EXPERTS), tmp_path / "checkpoint"
    ranks.run(trained, GRAPHS[by], Training(experts, 3, save=folder), size=1)
    rest = Training(experts, 3, begin=3, load=folder, afresh=True)
    one = ranks.run(trained, GRAPHS[by], rest, size=1)[0]
    for run in (replace(experts, cp=2), experts):
        for found in ranks.run(trained, GRAPHS[by], replace(rest, run=run, ep=2), size=2):
            assert found == pytest.approx(one, rel=1e-9), (by, run)


def in_bf16():
    """Of a model as Megatron makes it one of bf16: what is in float32, and how far its losses are from exact ones."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    with on_cpu():
        run = Run()
        parallel(run)
        exact = gpt(run, HYBRID, params_dtype=torch.float32).float()
        want = losses(run, exact)
        narrow = gpt(run, HYBRID, bf16=True, params_dtype=torch.bfloat16)
        model = Float16Module(narrow.config, narrow)
        found = losses(run, model)
        found.mean().backward()
        parallel_state.destroy_model_parallel()
        exact_of = dict([*exact.named_parameters(), *exact.named_buffers()])
        kept = {}
        for name, x in [*model.module.named_parameters(), *model.module.named_buffers()]:
            if x.dtype == torch.float32:
                kept[name] = torch.equal(x, exact_of[name].float())
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        return kept, finite, ((found - want).norm() / want.norm()).item()


def test_decays_stay_in_float32_in_a_model_of_bf16(ranks):
    ((kept, finite, difference),) = ranks.run(in_bf16, size=1)
    names = {name.rpartition("self_attention.mixer.")[2] for name in kept}
    assert {"decay.A_log", "decay.dt_bias", "log_decay"} <= names
    assert all(same for name, same in kept.items() if "mixer" in name)
    assert finite
    assert difference < 0.02


ONWARD = {
    "cp 4": (Run(cp=4), 1, 1),
    "tp 4": (Run(tp=4, sequence_parallel=True), 1, 1),
    "pp 2, cp 2": (Run(cp=2), 2, 1),
    "pp 2, two stages a rank": (Run(), 2, 2),
    "pp 2, two stages a rank, cp 2": (Run(cp=2), 2, 2),
    "one rank": (Run(), 1, 1),
}
"""Ranks, stages of the pipeline, and how many of these a rank has."""


def test_saved_on_some_ranks_it_resumes_on_others(ranks, alone, tmp_path):
    folder = tmp_path / "checkpoint"
    ranks.run(trained, HYBRID, Training(Run(tp=2, cp=2), 3, save=folder), size=4)
    for name, (run, pp, chunks) in ONWARD.items():
        rest = Training(run, 3, begin=3, load=folder, pp=pp, chunks=chunks)
        for found in ranks.run(trained, HYBRID, rest, size=run.ranks * pp):
            assert found == pytest.approx(alone[3:], rel=1e-9), name
