"""The engine `deepspeed`: the gradient of one rank at every ZeRO stage, and the losses of the torch engine."""

import itertools

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")

from tests.adapters.deepspeed.training import (
    CLIP,
    RATES,
    Run,
    alike,
    batches_of,
    deepspeed_engine,
    one_rank_gradients,
    torch_engine,
)

RATIO = 1e-5
"""How far the gradient may be from one rank's, in float32: its part along that gradient, and the rest."""


def first_gradients(runs):
    """Of each run, from rank 0: every parameter's gradient, its norm as the engine's step says, and the notes."""
    answers = []
    for run in runs:
        with deepspeed_engine(run) as engine:
            engine.gradients(batches_of(run, engine.mesh, 0))
            gradients = {name: g.clone() for name, g in engine.named_gradients()}
            answers.append((gradients, engine.startup_messages))
    return answers


def ratios(run, gradients):
    """The worst part along the one-rank gradient, next to 1, and the worst part across it, over all parameters."""
    along, across = 0.0, 0.0
    for name, want in one_rank_gradients(alike(run))[0].items():
        got = gradients[name].double()
        ratio = ((got * want).sum() / want.square().sum()).item()
        along = max(along, abs(ratio - 1))
        across = max(across, ((got - ratio * want).norm() / want.norm()).item())
    return along, across


STAGES, SHARES = (0, 1, 2, 3), ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2))
GRID = [
    Run(stage=stage, dp=dp, cp=cp, packed=packed, accumulation=accumulation, experts=experts)
    for (dp, cp), stage, packed, accumulation, experts in itertools.product(
        SHARES, STAGES, (False, True), (1, 3), (None, "token")
    )
]
COVERING = [
    run
    for number, run in enumerate(GRID)
    if (run.packed, run.accumulation, run.experts) in ((True, 3, "token"), (False, 1, None))
    or (run.ranks == 4 and (run.packed, run.accumulation, run.experts) == (True, 1, None))
]
"""All stages and shares with everything at once, and with nothing."""
ROUTED = [
    Run(stage=stage, dp=dp, cp=cp, experts=experts, lean=lean)
    for stage in (2, 3)
    for (dp, cp), experts, lean in (((1, 2), "similarity", False), ((1, 2), "attention", True), ((2, 2), "token", True))
]
EVERY_MIXER = [
    Run(stage=stage, dp=dp, cp=2, mixers=True, lean=lean) for stage, dp, lean in ((1, 1, False), (3, 2, True))
]
OFFLOADED = [
    Run(stage=stage, offload=offload, dp=2, cp=cp, accumulation=3, experts="token")
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters"))
    for cp in (1, 2)
]


def by_ranks(runs):
    return [
        pytest.param([run for run in runs if (run.dp, run.cp) == share], id="dp {} cp {}".format(*share))
        for share in SHARES
        if any((run.dp, run.cp) == share for run in runs)
    ]


def check(ranks, runs, bound=RATIO):
    answers = ranks.run(first_gradients, runs, size=runs[0].ranks)
    for number, run in enumerate(runs):
        for gradients, _ in (answer[number] for answer in answers):
            along, across = ratios(run, gradients)
            assert along <= bound, f"{run}: ratio off by {along:.1e}"
            assert across <= bound, f"{run}: {across:.1e} across"


@pytest.mark.parametrize("runs", by_ranks(COVERING))
def test_gradients_are_those_of_one_rank(ranks, runs):
    check(ranks, runs)


@pytest.mark.parametrize("runs", by_ranks(ROUTED))
def test_so_are_those_of_routers_and_of_blocks_computed_again(ranks, runs):
    check(ranks, runs)


@pytest.mark.parametrize("runs", by_ranks(EVERY_MIXER))
def test_so_are_those_of_every_mixer(ranks, runs):
    # One rank without an engine is 9e-6 off in float32: there are 13 layers.
    check(ranks, runs, bound=3e-5)


@pytest.mark.parametrize("runs", by_ranks(OFFLOADED))
def test_so_are_those_of_offloaded_states(ranks, runs):
    check(ranks, runs)


@pytest.mark.slow
@pytest.mark.parametrize("runs", by_ranks([run for run in GRID if run not in COVERING]))
def test_so_are_all_others(ranks, runs):
    check(ranks, runs)


def curve(runs, engine_of, steps):
    """Of each run: every step's loss and norm."""
    answers = []
    for run in runs:
        with engine_of(run) as engine:
            results = [engine.step(batches_of(run, engine.mesh, n), RATES[n % 3]) for n in range(steps)]
            held_out = [engine.losses(batch).nll for batch in batches_of(run, engine.mesh, 40)]
            answers.append(([(r.loss, r.grad_norm) for r in results], held_out))
    return answers


CURVES = {
    "1 rank": [Run(stage=stage, accumulation=2, experts="token") for stage in STAGES],
    "2 ranks": [
        *(Run(stage=stage, cp=2, accumulation=2) for stage in (0, 3)),
        *(Run(stage=stage, dp=2, accumulation=2, experts="token") for stage in STAGES),
        Run(stage=3, dp=2, clip="none", lean=True),
        Run(stage=2, dp=2, accumulation=2, precision="bf16"),
        Run(stage=1, dp=2, offload="optimizer"),
        Run(stage=3, dp=2, offload="parameters", accumulation=2),
    ],
    "4 ranks": [Run(stage=stage, dp=2, cp=2, experts="token") for stage in (0, 3)],
}
OTHER_CURVES = {
    "2 ranks, the rest": [
        *(Run(stage=stage, cp=2, accumulation=2) for stage in (1, 2)),
        Run(stage=0, dp=2, clip="none", lean=True),
        *(Run(stage=stage, dp=2, accumulation=2, precision="bf16") for stage in (1, 3)),
    ],
    "4 ranks, the rest": [Run(stage=stage, dp=2, cp=2, experts="token") for stage in (1, 2)],
}


@pytest.mark.parametrize(
    "runs",
    [
        *(pytest.param(runs, id=name) for name, runs in CURVES.items()),
        *(pytest.param(runs, id=name, marks=pytest.mark.slow) for name, runs in OTHER_CURVES.items()),
    ],
)
def test_losses_over_steps_are_the_torch_engines(ranks, runs):
    ours = ranks.run(curve, runs, deepspeed_engine, 6, size=runs[0].ranks)
    torchs = ranks.run(curve, runs, torch_engine, 6, size=runs[0].ranks)
    for number, run in enumerate(runs):
        for got, want in zip(ours, torchs, strict=True):
            (losses, norms), nll = zip(*got[number][0], strict=True), got[number][1]
            (wanted_losses, wanted_norms), wanted_nll = zip(*want[number][0], strict=True), want[number][1]
            assert run.clip == "none" or all(norm > CLIP for norm in wanted_norms), "nothing was clipped"
            torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=0, msg=str(run))
            # Adam divides by the gradient's size, which raises the rounding of small ones from the second step on.
            torch.testing.assert_close(norms, wanted_norms, rtol=1e-3, atol=0, msg=str(run))
            torch.testing.assert_close(norms[0], wanted_norms[0], rtol=1e-6, atol=0, msg=str(run))
            torch.testing.assert_close(nll, wanted_nll, rtol=1e-3, atol=1e-4, msg=str(run))


def bf16_with_experts(run):
    """Dtypes that the routers' and other layers' weights have as they are computed with, and the loss before and after
    a step on the same batches."""
    with deepspeed_engine(run) as engine:
        seen = {}
        for name, module in engine.model.named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                module.register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
        losses = [engine.step(batches_of(run, engine.mesh, 0), 0.002).loss for _ in range(4)]
        return seen, losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_routers_are_computed_in_float32_in_a_bf16_model(ranks, stage):
    run = Run(stage=stage, dp=2, precision="bf16", experts="token", clip=1.0)
    for seen, losses in ranks.run(bf16_with_experts, run, size=2):
        for name, dtype in seen.items():
            assert dtype == (torch.float32 if "router" in name else torch.bfloat16), name
        assert sum("router" in name for name in seen) >= 4
        assert losses[3] < losses[0]


def probed(run, injected):
    """The gradient of a run whose engine multiplies gradients by `injected` besides; and what it tells the user."""
    from longctx.adapters.deepspeed.runtime import DeepSpeedModel

    backward = DeepSpeedModel.backward
    DeepSpeedModel.backward = lambda self, loss: backward(self, loss * injected)
    try:
        return first_gradients([run])[0]
    finally:
        DeepSpeedModel.backward = backward


def uneven(run, what):
    """The error of an engine that counts batches or ranks differently."""
    from longctx.adapters.deepspeed.runtime import DeepSpeedModel

    backward, begin, seen = DeepSpeedModel.backward, DeepSpeedModel.begin_batch, {}

    def begin_batch(self, *, last):
        seen["last"] = last
        begin(self, last=last)

    def other(self, loss):
        doubled = seen["last"] if what == "batches" else torch.distributed.get_rank() == 1
        backward(self, loss * (2.0 if doubled else 1.0))

    DeepSpeedModel.backward, DeepSpeedModel.begin_batch = other, begin_batch
    try:
        with pytest.raises(ValueError) as caught, deepspeed_engine(run):  # noqa: PT011 - the text is looked at below
            pass
        return str(caught.value)
    finally:
        DeepSpeedModel.backward, DeepSpeedModel.begin_batch = backward, begin


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_scale_of_gradients_is_found_corrected_and_reported(ranks, stage):
    run = Run(stage=stage, dp=2, cp=2, accumulation=2)
    scale = 3.0 / (4 if stage == 3 else 2)
    for gradients, notes in ranks.run(probed, run, 3.0, size=4):
        assert max(ratios(run, gradients)) <= RATIO
        assert notes == (
            f"DeepSpeed, ZeRO stage {stage}: gradients are {scale:.6g} times their sum over ranks, as measured; the "
            f"loss is multiplied by {1 / scale:.6g}.",
        )


def test_nothing_is_reported_of_a_scale_of_1(ranks):
    assert all(notes == () for _, notes in ranks.run(probed, Run(stage=2, cp=2), 1.0, size=2))


@pytest.mark.parametrize("what", ["batches", "ranks"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_scale_that_differs_between_batches_or_ranks_is_an_error(ranks, stage, what):
    for text in ranks.run(uneven, Run(stage=stage, dp=2, accumulation=3), what, size=2):
        assert f"ZeRO stage {stage} multiplies the gradients of 3 batches on each of 2 ranks by [[" in text
        assert "the factors have to be equal. Use another zero_stage" in text


def untouched(run):
    """Whether measuring changed weights, moments or buffers."""
    with deepspeed_engine(run) as engine:
        engine.step(batches_of(run, engine.mesh, 0), 0.01)
        before = engine._state_dict()
        engine._scale(5)
        after = engine._state_dict()
        return [
            torch.equal(x.to_local() if hasattr(x, "to_local") else x, y.to_local() if hasattr(y, "to_local") else y)
            for x, y in zip(*(map(flat_tensors, (before, after))), strict=True)
        ]


def flat_tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("stage", STAGES)
def test_measuring_changes_nothing(ranks, stage):
    for same in ranks.run(untouched, Run(stage=stage, dp=2, experts="token"), size=2):
        assert len(same) > 50
        assert all(same)
