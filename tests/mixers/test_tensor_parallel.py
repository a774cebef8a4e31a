"""The heads of every mixer divided over ranks: the sum of what these give is what one gives."""

import pytest
import torch
import torch.distributed as dist

from longctx.layers.output import Output
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.tensor_parallel import head_shares, shard_heads
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.combinations import mostly_slow_rows
from tests.mixers.cases import DIM, config_of, draw

BOUNDS = (0, 5, 17, 18, 31, 48)
EIGHT = {
    "L": {"heads": 8},
    "S": {"heads": 8, "kv_heads": 4},
    "B": {"heads": 8, "kv_heads": 4},
    "M": {"heads": 8, "groups": 4},
    **{letter: {"heads": 4} for letter in "RIGHNDEK"},
}
"""Heads that divide over 4 ranks."""
LETTERS = sorted(EIGHT)
EIGHT["E with two heads for one of keys"] = {"heads": 8, "qk_heads": 4}
SIXTEEN = {letter: {name: 2 * count for name, count in EIGHT[letter].items()} for letter in LETTERS}
"""As many, half of which all tokens read, and half of which are routed."""


def on_one_rank(letter, router=None, **changes):
    counts = (EIGHT if router is None else SIXTEEN).get(letter, EIGHT[letter[0]])
    config = config_of(letter).model_copy(update=counts | changes)
    mixer = config.build(DIM, 1, 4, 1e-5)
    if router is not None:
        half = mixer.heads // 2
        routed = HeadMixtureConfig(mixers=(config.name,), shared=half, active=half // 2, router=router)
        mixer.add_head_router(routed, DIM, mixer.heads)
    initialise(mixer.double(), seed=3)
    return mixer


def trained(mixer, layout):
    """The output, and the gradients with that of the load's balance."""
    x, dy = map(layout.shard, draw(BOUNDS[-1]))
    x.requires_grad_()
    y, report, _ = Output.of(mixer(x, layout))
    ((y * dy).sum() + (0 if report is None else 100 * report.loss)).backward()
    return y.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}


def over_ranks(letter, router, tp):
    mesh = Mesh.build("cpu", tp=tp, cp=dist.get_world_size() // tp)
    mixer = on_one_rank(letter, router)
    shares = head_shares(mixer)
    shard_heads(mixer, mesh.tp)
    return mesh.tp.rank, mesh.cp.rank, *trained(mixer, Layout.on(mesh, BOUNDS, "zigzag")), shares


SIZES = [(4, 2), (4, 4), (2, 2)]
MIXTURES = [*((letter, "learned") for letter in LETTERS), ("S", "norm")]
CELLS = mostly_slow_rows(
    [(*layer, *sizes) for layer in (*((letter, None) for letter in LETTERS), *MIXTURES) for sizes in SIZES],
    lambda letter, router, *sizes: letter in "SMEK" if (router is None) != (sizes == SIZES[0]) else router is None,
)


@pytest.mark.parametrize(("letter", "router", "size", "tp"), CELLS)
def test_summands_add_up_to_the_layer(ranks, letter, router, size, tp):
    mixer = on_one_rank(letter, router)
    y, dx, gradients = trained(mixer, Layout(BOUNDS))
    answers = ranks.run(over_ranks, letter, router, tp, size=size)
    shares = answers[0][-1]
    layout = Layout(BOUNDS, "zigzag", size // tp)

    def over_cp(parts):
        return layout.unshard([sum(part for _, at, part in parts if at == rank) for rank in range(size // tp)])

    for index, want in ((2, y), (3, dx)):
        got = over_cp([(answer[0], answer[1], answer[index]) for answer in answers])
        assert (got - want).norm() <= 1e-10 * want.norm()
    assert "out.weight" in shares
    for name, want in gradients.items():
        each = [sum(answer[4][name] for answer in answers if answer[0] == rank) for rank in range(tp)]
        got = shares[name].join(each) if name in shares else sum(each)
        assert (got - want).norm() <= 1e-10 * want.norm(), name


@pytest.mark.parametrize("router", [None, "learned"])
@pytest.mark.parametrize("letter", LETTERS)
def test_parts_that_are_put_together_are_the_whole(letter, router):
    mixer = on_one_rank(letter, router)
    tensors = dict([*mixer.named_parameters(), *mixer.named_buffers()])
    for name, share in head_shares(mixer).items():
        parts = [share.shard(tensors[name], rank, 4) for rank in range(4)]
        assert torch.equal(share.join(parts), tensors[name]), name
        assert sum(share.parts) == tensors[name].shape[share.dim]


def refusal(letter, changes, shared=None):
    mesh = Mesh.build("cpu", tp=2)
    mixer = on_one_rank(letter, **changes) if letter in EIGHT else config_of(letter).build(DIM, 0, 1, 1e-5)
    if shared is not None:
        mixer.add_head_router(
            HeadMixtureConfig(mixers=(config_of(letter).name,), shared=shared, active=2), DIM, mixer.heads
        )
    try:
        shard_heads(mixer, mesh.tp)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("letter", "changes", "message"),
    [
        ("L", {"heads": 3}, "heads 3 does not divide over 2 ranks"),
        ("S", {"heads": 3, "kv_heads": 3}, "heads 3 does not divide over 2 ranks"),
        ("S", {"heads": 2, "kv_heads": 1}, "kv_heads 1 does not divide over 2 ranks"),
        ("M", {"groups": 1}, "groups 1 does not divide over 2 ranks"),
        ("E", {"heads": 2, "qk_heads": 1}, "qk_heads 1 does not divide over 2 ranks"),
        ("A", {}, "AttentionExperts does not support tensor parallelism"),
    ],
)
def test_heads_that_do_not_divide_are_refused(ranks, letter, changes, message):
    assert all(f"tensor parallelism: {message}" == each for each in ranks.run(refusal, letter, changes, size=2))


@pytest.mark.parametrize(
    ("letter", "shared", "message"),
    [
        ("L", 3, "heads 8 (3 shared and 5 routed heads)"),
        ("S", 2, "kv_heads 4 (2 shared and 6 routed heads)"),
        ("B", 2, "kv_heads 4 (2 shared and 6 routed heads)"),
    ],
)
def test_each_kind_of_heads_of_a_mixture_has_to_divide(ranks, letter, shared, message):
    answers = ranks.run(refusal, letter, {}, shared, size=2)
    assert all(f"tensor parallelism: {message} does not divide over 2 ranks" == each for each in answers)


def buffers(letter):
    mesh = Mesh.build("cpu", tp=2)
    mixer = on_one_rank(letter, "learned")
    shard_heads(mixer, mesh.tp)
    over_ranks = mixer.log_decay.clone()
    mixer.reset_buffers()
    return over_ranks, mixer.log_decay


@pytest.mark.parametrize("letter", ["L", "R"])
def test_decays_that_are_made_again_are_those_of_the_heads_here(ranks, letter):
    first, second = ranks.run(buffers, letter, size=2)
    for over_ranks, made in (first, second):
        torch.testing.assert_close(made, over_ranks, rtol=1e-7, atol=0)
    assert not torch.equal(first[0], second[0])
