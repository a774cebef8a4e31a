"""The chunked lightning recurrence against the token-by-token reference."""

import pytest
import torch

from longctx.kernels import lightning, reference
from longctx.kernels.recurrence import Carry, combine

LENGTHS = [1, 2, 127, 128, 129, 300, 512]
STARTS = {
    "none": lambda length: (),
    "at 0": lambda length: (0,),
    "inside": lambda length: tuple(sorted({length // 3, length // 2, length - 1})),
    "every token": lambda length: tuple(range(length)),
    "chunk edges": lambda length: tuple(x for x in (0, 127, 128, 129, 256, 383) if x < length),
}


def draw(length, batch=1, heads=3, key_dim=5, value_dim=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, key_dim, generator=generator, dtype=dtype) for _ in range(2))
    v, do = (torch.randn(batch, length, heads, value_dim, generator=generator, dtype=dtype) for _ in range(2))
    state, dstate = (torch.randn(batch, heads, key_dim, value_dim, generator=generator, dtype=dtype) for _ in range(2))
    log_decay = -torch.tensor([0.0, 0.03, 2.5, 1e4][:heads], dtype=dtype)
    return q, k, v, do, log_decay, state, dstate


def relative(x, ref):
    return ((x - ref).norm() / ref.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_backward_equal_the_reference(length, starts):
    starts = starts(length)
    q, k, v, do, log_decay, state, dstate = draw(length, batch=2, heads=4)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    out, final = reference.lightning(*leaves[:3], log_decay, starts, leaves[3])
    torch.autograd.backward([out, final], [do, dstate])
    # A state that nothing reads has no gradient in autograd's eyes.
    dq, dk, dv, dstate_in = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)

    carry = lightning.summarize(k, v, log_decay, starts)
    back = lightning.summarize_grad(q, do, log_decay, starts)
    grads = lightning.apply_grad(q, k, v, log_decay, starts, do, state, dstate)

    assert relative(lightning.apply(q, k, v, log_decay, starts, state), out) < 1e-12
    assert relative(carry.carry_over(state), final) < 1e-12
    for name, got, want in zip(("dq", "dk", "dv"), grads, (dq, dk, dv), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10), name
    assert torch.allclose(back.carry_over(dstate), dstate_in, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_reference():
    q, k, v, _, log_decay, state, _ = draw(5, heads=2, key_dim=2, value_dim=3)
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: reference.lightning(q, k, v, log_decay, (2,), initial_state=s), inputs
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precisions_keep_a_float32_state(dtype, bound):
    q, k, v, do, log_decay, state, dstate = draw(700, key_dim=64, value_dim=64)
    low = [x.to(dtype) for x in (q, k, v, do)]
    exact = [x.double() for x in low]
    out = lightning.apply(*low[:3], log_decay.float(), (300,), state.float())
    assert out.dtype == dtype
    assert relative(out.double(), reference.lightning(*exact[:3], log_decay, (300,), state)[0]) < bound
    carry = lightning.summarize(low[1], low[2], log_decay.float(), ())
    assert carry.state.dtype == torch.float32
    assert relative(carry.state.double(), lightning.summarize(exact[1], exact[2], log_decay, ()).state) < 1e-5
    grads = lightning.apply_grad(*low[:3], log_decay.float(), (300,), low[3], state.float(), dstate.float())
    wants = lightning.apply_grad(*exact[:3], log_decay, (300,), exact[3], state, dstate)
    for got, want in zip(grads, wants, strict=True):
        assert got.dtype == dtype
        assert relative(got.double(), want) < bound


@pytest.mark.parametrize("cut", [1, 128, 333])
def test_state_of_a_prefix_continues_in_the_rest(cut):
    q, k, v, _, log_decay, state, _ = draw(400, batch=2)
    starts = (50, 128, 200)
    whole = lightning.apply(q, k, v, log_decay, starts, state)
    before = tuple(s for s in starts if s < cut)
    after = tuple(s - cut for s in starts if s >= cut)
    left = lightning.summarize(k[:, :cut], v[:, :cut], log_decay, before)
    right = lightning.summarize(k[:, cut:], v[:, cut:], log_decay, after)
    rest = lightning.apply(q[:, cut:], k[:, cut:], v[:, cut:], log_decay, after, left.carry_over(state))
    assert relative(rest, whole[:, cut:]) < 1e-12
    both = combine(left, right)
    direct = lightning.summarize(k, v, log_decay, starts)
    assert relative(both.state, direct.state) < 1e-12
    assert torch.equal(both.log_decay, direct.log_decay)


def test_combine_is_associative_through_resets():
    generator = torch.Generator().manual_seed(1)
    carries = [
        Carry(torch.full((1, 2), decay), torch.randn(1, 2, 3, 4, generator=generator))
        for decay in (-0.5, float("-inf"), -2.0)
    ]
    left = combine(combine(carries[0], carries[1]), carries[2])
    right = combine(carries[0], combine(carries[1], carries[2]))
    assert torch.allclose(left.state, right.state)
    assert torch.equal(left.log_decay, right.log_decay)


@pytest.mark.parametrize("t", [0, 100, 127, 128, 299])
def test_changing_a_token_leaves_earlier_outputs_bitwise_unchanged(t):
    q, k, v, _, log_decay, state, _ = draw(300, dtype=torch.float32)
    before = lightning.apply(q, k, v, log_decay, (60,), state)
    for x in (q, k, v):
        x[:, t] = 100 * torch.randn_like(x[:, t])
    after = lightning.apply(q, k, v, log_decay, (60,), state)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_non_contiguous_inputs_and_their_gradients():
    q, k, v, do, log_decay, state, dstate = draw(200, batch=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do)]
    assert not strided[0].is_contiguous()
    assert torch.equal(
        lightning.apply(q, k, v, log_decay, (3,), state), lightning.apply(*strided[:3], log_decay, (3,), state)
    )
    for a, b in zip(
        lightning.apply_grad(q, k, v, log_decay, (3,), do, state, dstate),
        lightning.apply_grad(*strided[:3], log_decay, (3,), strided[3], state, dstate),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_inputs_are_not_changed():
    tensors = draw(260, dtype=torch.float32)
    copies = [x.clone() for x in tensors]
    q, k, v, do, log_decay, state, dstate = tensors
    lightning.apply(q, k, v, log_decay, (3,), state)
    lightning.summarize(k, v, log_decay, (3,))
    lightning.summarize_grad(q, do, log_decay, (3,))
    lightning.apply_grad(q, k, v, log_decay, (3,), do, state, dstate)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
