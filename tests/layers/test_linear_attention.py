"""Building blocks of the linear mixers, against their formulas."""

import math

import pytest
import torch

from longctx.layers.linear_attention import (
    AllHeadsNorm,
    HeadNorm,
    LowRank,
    ShortConvolution,
    StepDecay,
    l2_norm,
    log_sigmoid,
)
from longctx.parallel.layout import Layout


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def silu(x):
    return x * x.sigmoid()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_short_convolution_is_causal_and_stays_within_documents(bias, activation):
    layer, bounds = ShortConvolution(4, 3, bias=bias, activation=activation).double(), (0, 2, 3, 8)
    x, want = draw(2, 8, 4), torch.zeros(2, 8, 4, dtype=torch.float64)
    for t in range(8):
        begin = max(bound for bound in bounds if bound <= t)
        for tap in range(3):
            source = t - 2 + tap
            if source >= begin:
                want[:, t] += layer.weight[:, tap].detach() * x[:, source]
    want = want + layer.bias if bias else want
    want = silu(want) if activation else want
    torch.testing.assert_close(layer(x, Layout(bounds), None), want, rtol=1e-12, atol=1e-14)
    assert layer.flops_per_token == 2 * 4 * 3


def test_a_short_convolution_starts_uniform_within_the_root_of_its_width():
    layer = ShortConvolution(8, 4)
    drawn = layer.initial("weight", torch.Size([4000, 4]), torch.Generator().manual_seed(0))
    assert 0.49 < drawn.max() <= 0.5
    assert -0.5 <= drawn.min() < -0.49
    assert drawn.mean().abs() < 0.01


def test_a_head_norm_normalises_each_head_and_gates_it():
    o, gate = draw(2, 3, 4, 5), draw(2, 3, 20, seed=1)
    layer = HeadNorm(5, 0.1).double()
    layer.weight.data.copy_(draw(5, seed=2))
    normed = o / (o.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * layer.weight
    torch.testing.assert_close(layer(o), normed, rtol=1e-12, atol=0)
    # The gate may have all heads in one dimension.
    torch.testing.assert_close(layer(o, gate), normed * gate.view_as(o).sigmoid(), rtol=1e-12, atol=0)
    layer.activation = "silu"
    torch.testing.assert_close(layer(o, gate), normed * silu(gate.view_as(o)), rtol=1e-12, atol=0)


def test_a_norm_over_all_heads_has_one_scale_per_token():
    o, gate = draw(2, 3, 20), draw(2, 3, 4, 5, seed=1)
    layer = AllHeadsNorm(20, 0.1, "silu").double()
    want = o / (o.square().mean(dim=-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(layer(o), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(o, gate), want * silu(gate.flatten(2)), rtol=1e-12, atol=0)
    by_head = o.view_as(gate) / (o.view_as(gate).square().mean(dim=-1, keepdim=True) + 0.1).sqrt()
    assert not torch.allclose(layer(o), by_head.flatten(2))


@pytest.mark.parametrize("bias", [False, True])
def test_a_low_rank_layer_is_the_product_of_two_matrices(bias):
    layer, x = LowRank(6, 2, 5, bias=bias).double(), draw(3, 6)
    if bias:
        assert torch.equal(layer.bias, torch.zeros(5, dtype=torch.float64))
        layer.bias.data.copy_(draw(5, seed=1))
    want = x @ (layer.up.weight @ layer.down.weight).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-12)
    assert layer.flops_per_token == 2 * (6 * 2 + 2 * 5)


def softplus(x):
    return torch.log1p(x.exp())


@pytest.mark.parametrize("limits", [(0.0, None), (0.5, 1.0), (0.0, 1.0)])
def test_a_step_decay_equals_its_formula_per_head_and_per_channel(limits):
    low, high = limits[0], math.inf if limits[1] is None else limits[1]
    for shape in ((2, 4, 3), (2, 4, 3, 5)):
        x = draw(*shape)
        layer = StepDecay(3, math.prod(shape[2:]), *limits).double()
        layer.dt_bias.data.copy_(draw(*layer.dt_bias.shape, seed=1))
        dt = softplus(x + layer.dt_bias.view(shape[2:])).clamp(low, high)
        rate = layer.A_log.exp().view(3, *[1] * (len(shape) - 3))
        got = layer(x)
        torch.testing.assert_close(got[0], -rate * dt, rtol=1e-10, atol=0)
        torch.testing.assert_close(got[1], dt, rtol=1e-10, atol=0)


def test_step_decays_start_in_the_range_of_mamba_2():
    layer, generator = StepDecay(2, 2), torch.Generator().manual_seed(0)
    rates = layer.initial("A_log", torch.Size([4000]), generator).exp()
    steps = softplus(layer.initial("dt_bias", torch.Size([4000]), generator).double())
    assert 1 <= rates.min() < 1.1
    assert 15.9 < rates.max() <= 16.001
    assert 0.00099 < steps.min() < 0.0011
    assert 0.095 < steps.max() < 0.1001
    # Log-uniform: the median is the geometric mean of the ends.
    assert steps.median().item() == pytest.approx(0.01, rel=0.1)


def test_decays_of_bfloat16_inputs_are_float32():
    x = draw(1, 2, 3, dtype=torch.bfloat16)
    assert [y.dtype for y in StepDecay(3, 3)(x)] == [torch.float32, torch.float32]
    assert log_sigmoid(x, 16.0).dtype == torch.float32


def test_log_sigmoid_is_divided():
    x = draw(50) * 5
    torch.testing.assert_close(log_sigmoid(x, 16.0), x.sigmoid().log() / 16, rtol=1e-10, atol=1e-14)


def test_l2_norm_equals_its_formula_and_keeps_the_dtype():
    x = draw(3, 4, 7)
    want = x / (x.square().sum(dim=-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(l2_norm(x, 0.5), want, rtol=1e-12, atol=0)
    assert torch.equal(l2_norm(torch.zeros(2, 3)), torch.zeros(2, 3))
    narrow = x.bfloat16()
    assert l2_norm(narrow).dtype == torch.bfloat16
    wide = narrow.float()
    assert torch.equal(l2_norm(narrow), (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16())
