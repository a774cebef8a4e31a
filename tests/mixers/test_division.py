"""The heads of every mixer divided over ranks: the sum of what these give is what one gives."""

import pytest
import torch
import torch.distributed as dist

from longctx.mixers.division import divide
from longctx.mixers.heads import HeadsMixConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.mixers.cases import DIM, config_of, draw, run

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


def whole(letter, **changes):
    config = config_of(letter).model_copy(update=EIGHT.get(letter, EIGHT[letter[0]]) | changes)
    mixer = config.build(DIM, 1, 4, 1e-5).double()
    initialise(mixer, seed=3)
    return mixer


def divided(letter, tp):
    mesh = Mesh.build("cpu", tp=tp, cp=dist.get_world_size() // tp)
    layout = Layout.on(mesh, BOUNDS, "zigzag")
    mixer = whole(letter)
    shares = mixer.shares()
    divide(mixer, mesh.tp)
    x, dy = map(layout.shard, draw(BOUNDS[-1]))
    x.requires_grad_()
    y = run(mixer, x, layout)
    y.backward(dy)
    return mesh.tp.rank, mesh.cp.rank, y.detach(), x.grad, {n: p.grad for n, p in mixer.named_parameters()}, shares


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize(("size", "tp"), [(2, 2), (4, 4), (4, 2)])
def test_summands_add_up_to_the_layer(ranks, letter, size, tp):
    mixer, (x, dy) = whole(letter), draw(BOUNDS[-1])
    x.requires_grad_()
    y = run(mixer, x, Layout(BOUNDS))
    y.backward(dy)
    answers = ranks.run(divided, letter, tp, size=size)
    shares = answers[0][-1]
    layout = Layout(BOUNDS, "zigzag", size // tp)

    def over_cp(parts):
        return layout.unshard([sum(part for _, at, part in parts if at == rank) for rank in range(size // tp)])

    for index, want in ((2, y.detach()), (3, x.grad)):
        got = over_cp([(answer[0], answer[1], answer[index]) for answer in answers])
        assert (got - want).norm() <= 1e-10 * want.norm()
    assert "out.weight" in shares
    for name, parameter in mixer.named_parameters():
        each = [sum(answer[4][name] for answer in answers if answer[0] == rank) for rank in range(tp)]
        got = shares[name].whole(each) if name in shares else sum(each)
        assert (got - parameter.grad).norm() <= 1e-10 * parameter.grad.norm(), name


@pytest.mark.parametrize("letter", LETTERS)
def test_parts_that_are_put_together_are_the_whole(letter):
    mixer = whole(letter)
    tensors = dict([*mixer.named_parameters(), *mixer.named_buffers()])
    for name, share in mixer.shares().items():
        parts = [share.of(tensors[name], rank, 4) for rank in range(4)]
        assert torch.equal(share.whole(parts), tensors[name]), name
        assert sum(share.parts) == tensors[name].shape[share.dim]


def refusal(letter, changes):
    mesh = Mesh.build("cpu", tp=2)
    mixer = whole(letter, **changes) if letter in EIGHT else config_of(letter).build(DIM, 0, 1, 1e-5)
    try:
        divide(mixer, mesh.tp)
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
        ("A", {}, "the heads of AttentionExperts are not divided"),
    ],
)
def test_heads_that_do_not_divide_are_refused(ranks, letter, changes, message):
    assert all(f"tensor parallelism: {message}" == each for each in ranks.run(refusal, letter, changes, size=2))


def mixed_refusal():
    mesh = Mesh.build("cpu", tp=2)
    mixer = whole("L")
    mixer.mix_heads(HeadsMixConfig(mixers=("lightning",), active=2), DIM, 8)
    with pytest.raises(ValueError, match="the heads of a mixture of heads are not divided"):
        divide(mixer, mesh.tp)


def test_a_mixture_of_heads_is_refused(ranks):
    ranks.run(mixed_refusal, size=2)
