"""Linear projections and RMSNorm, against their formulas."""

import pytest
import torch
from torch import nn

from longctx.layers.basic import Linear, RMSNorm, SelfInitialised, ZeroCenteredRMSNorm, norm_layer


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rms_norm(x, scale, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale


def test_a_linear_layer_has_no_bias_and_declares_its_standard_deviation():
    layer = Linear(16, 5, scale=0.5)
    assert layer.bias is None
    assert layer.init_std == pytest.approx(0.5 / 4)
    assert layer.flops_per_token == 2 * 16 * 5


def test_rms_norm_equals_its_formula():
    layer = RMSNorm(6, 0.1).double()
    layer.weight.data.copy_(draw(6, seed=1))
    x = draw(2, 3, 6)
    torch.testing.assert_close(layer(x), rms_norm(x, layer.weight, 0.1), rtol=1e-12, atol=0)


def test_rms_norm_is_computed_in_float32_and_cast_once():
    x = draw(4, 300, dtype=torch.bfloat16)
    got = RMSNorm(300, 1e-5)(x)
    assert got.dtype == torch.bfloat16
    want = rms_norm(x.float(), torch.ones(300), 1e-5).bfloat16()
    assert torch.equal(got, want)


def test_a_zero_centered_norm_starts_as_a_plain_norm_and_adds_one_to_its_weight():
    layer, x = ZeroCenteredRMSNorm(6, 1e-5).double(), draw(2, 3, 6)
    assert torch.equal(layer(x), RMSNorm(6, 1e-5).double()(x))
    assert torch.equal(layer.initial("weight", torch.Size([6]), torch.Generator()), torch.zeros(6))
    layer.weight.data.copy_(draw(6, seed=1))
    torch.testing.assert_close(layer(x), rms_norm(x, 1 + layer.weight, 1e-5), rtol=1e-12, atol=0)


def test_small_zero_centered_weights_are_not_rounded_away_in_bfloat16():
    layer = ZeroCenteredRMSNorm(64, 1e-5).bfloat16()
    # In bfloat16, 1 + 2^-9 is 1.
    layer.weight.data.fill_(2.0**-9)
    x = draw(500, 64, dtype=torch.bfloat16)
    want = rms_norm(x.float(), 1 + 2.0**-9, 1e-5).bfloat16()
    assert torch.equal(layer(x), want)
    assert not torch.equal(want, rms_norm(x.float(), 1.0, 1e-5).bfloat16())


@pytest.mark.parametrize(("kind", "layer"), [("rms", RMSNorm), ("zero_centered_rms", ZeroCenteredRMSNorm)])
def test_norms_are_built_by_kind(kind, layer):
    norm = norm_layer(kind, 8, 0.25)
    assert type(norm) is layer
    assert norm.weight.shape == (8,)
    assert norm.eps == 0.25


class Filled(SelfInitialised):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2, 3))
        self.inner = nn.Linear(2, 2)

    def initial(self, name, shape, generator):
        return torch.full(shape, 7.0) if name == "a" else torch.rand(shape, generator=generator)


def test_parameters_of_a_layer_itself_are_reset_from_the_global_generator():
    layer = Filled()
    inner = layer.inner.weight.clone()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer.reset_parameters()
        torch.manual_seed(3)
        want = torch.rand(2, 3)
    assert layer.a.tolist() == [7.0, 7.0]
    assert torch.equal(layer.b, want)
    assert torch.equal(layer.inner.weight, inner)
    assert layer.a.requires_grad


def test_a_layer_without_initial_values_cannot_be_reset():
    class Empty(SelfInitialised):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.empty(2))

    with pytest.raises(NotImplementedError):
        Empty().reset_parameters()
