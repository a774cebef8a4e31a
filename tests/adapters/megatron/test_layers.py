"""Megatron's GPT with our layers, over tensor- and context-parallel ranks: the losses and gradients of one rank."""

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.adapters.megatron import specs
from longctx.adapters.megatron.router import RouterConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from tests.adapters.megatron.cases import EXPERTS, Run, gathered, trained

HYBRIDS = {name: value for name, value in vars(specs).items() if isinstance(value, specs.ModuleSpec)}


def compare(run, answers, alone, reference):
    found, gradients = gathered(run, answers)
    want, wanted = gathered(reference, alone)
    assert (found - want).norm() <= 1e-10 * want.norm(), run
    assert set(gradients) == set(wanted)
    for name, ref in wanted.items():
        assert (gradients[name] - ref).norm() <= 1e-10 * ref.norm(), f"{name}, {run}"


def check(ranks, spec, runs, own=False):
    """Runs against one rank, whose attention is Megatron's own where `own`."""
    alone_of = {run: replace(run, tp=1, cp=1, sequence_parallel=False, comm=None, levels=None, own=own) for run in runs}
    for reference in dict.fromkeys(alone_of.values()):
        alone = [answer[0] for answer in ranks.run(trained, [reference], spec, size=1)]
        mine = [run for run in runs if alone_of[run] == reference]
        for size in sorted({run.ranks for run in mine}):
            these = [run for run in mine if run.ranks == size]
            answers = ranks.run(trained, these, spec, size=size)
            for number, run in enumerate(these):
                compare(run, [answer[number] for answer in answers], alone, reference)


def test_attention_is_megatrons_own(ranks):
    more = [Run(), Run(batch=2), Run(options=(("window_size", (5, 0)),))]
    schedules = [Run(cp=2, comm=comm) for comm in (None, "p2p", "all_gather", "a2a", "ring")]
    over = [Run(tp=2, cp=2, sequence_parallel=True, batch=2), Run(tp=2, cp=2), Run(tp=4, sequence_parallel=True)]
    levels = [Run(cp=4, comm="a2a+p2p", levels=(2, 2)), Run(cp=4, comm="ulysses-all-gather", levels=(2, 2))]
    windows = [Run(cp=4, comm="ring", options=(("window_size", (5, 0)),))]
    check(ranks, specs.softmax, [*more, *schedules, *over, *levels, *windows], own=True)


PARALLEL = [
    Run(cp=2, batch=2),
    Run(tp=2, sequence_parallel=True),
    Run(tp=2, cp=2),
    Run(cp=2, packed=True),
    Run(tp=2, cp=2, sequence_parallel=True, packed=True),
    Run(cp=4, packed=True),
]


@pytest.mark.parametrize(
    "name",
    # A mixer that a hybrid has as well is in the default run with that hybrid.
    [pytest.param(name, marks=[pytest.mark.slow] * (f"{name}_hybrid" in HYBRIDS)) for name in HYBRIDS],
)
def test_every_stack_equals_itself_on_one_rank(ranks, name):
    check(ranks, HYBRIDS[name], PARALLEL)


@pytest.mark.parametrize("by", ["token", "similarity", "attention"])
def test_experts_that_tokens_choose_together(ranks, by):
    spec = specs.layer_spec("S", router=RouterConfig(kind=by, similarity_dim=6, temperature=0.5))
    over = [Run(cp=2, batch=2), Run(tp=2, sequence_parallel=True), Run(tp=2, cp=2, sequence_parallel=True)]
    check(ranks, spec, [replace(run, options=EXPERTS) for run in [*over, Run(cp=4, packed=True)]])


def test_a_mixture_of_heads(ranks):
    heads = HeadMixtureConfig(mixers=("softmax", "lightning"), shared=4, active=2)
    over = [Run(cp=2, batch=2), Run(cp=4), Run(cp=2, packed=True), Run(tp=2), Run(tp=2, cp=2, sequence_parallel=True)]
    check(ranks, specs.layer_spec("LS", heads=heads), [*over, Run(tp=2, cp=2, packed=True)])


def test_a_mixture_of_heads_without_shared_ones(ranks):
    learned = HeadMixtureConfig(mixers=("gated_deltanet", "mamba2"), active=2)
    by_norm = HeadMixtureConfig(mixers=("softmax",), active=2, router="norm")
    over = [Run(cp=2), Run(tp=2, cp=2, sequence_parallel=True), Run(tp=4, sequence_parallel=True, batch=2)]
    check(ranks, specs.layer_spec("EM", heads=learned), over)
    check(ranks, specs.layer_spec("S", heads=by_norm), over)
