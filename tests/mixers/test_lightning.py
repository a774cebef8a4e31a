"""The lightning layer against its equations, and its decays."""

import pytest
import torch

from longctx.mixers.lightning import LightningConfig, alibi_slopes, log_decays, minimax_log_decays
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import LayerContext, parameters_of
from longctx.verify.equations.constant_decay import lightning, lightning_log_decays
from tests.mixers.equations import check, each_of

BOUNDS = (0, 1, 40, 129, 140)


@each_of("L")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, lightning)


@pytest.mark.parametrize(
    ("heads", "head_dim", "slopes"),
    [(4, None, [2**-2, 2**-4, 2**-6, 2**-8]), (3, 5, [2**-4, 2**-8, 2**-2]), (1, 7, [2**-8])],
)
@pytest.mark.parametrize(("layer", "depth", "factor"), [(0, 1, 1 + 1e-5), (1, 3, 0.5 + 1e-5), (2, 3, 1e-5)])
def test_layer_equals_its_equations(heads, head_dim, slopes, layer, depth, factor):
    config = LightningConfig(heads=heads, head_dim=head_dim)
    mixer = config.build(12, layer, depth, 1e-3).double()
    initialise(mixer, seed=5)
    x = torch.randn(2, 140, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert lightning_log_decays(config, layer, depth) == pytest.approx([-s * factor for s in slopes], rel=1e-14)
    want = lightning(parameters_of(mixer), x, config, LayerContext(BOUNDS, layer, depth, 1e-3))
    torch.testing.assert_close(mixer(x, Layout(BOUNDS)), want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("layer", "depth", "factor"), [(0, 1, 1 + 1e-5), (1, 3, 1 - 1 / 2.00001 + 1e-5)])
def test_minimaxs_layer_equals_its_equations(layer, depth, factor):
    config = LightningConfig(heads=3, head_dim=5, form="minimax", norm_eps=1e-3)
    mixer = config.build(12, layer, depth, 1e-6).double()
    initialise(mixer, seed=5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 140, 12, generator=generator, dtype=torch.float64)
    mixer.norm.weight.data += 0.3 * torch.randn(15, generator=generator, dtype=torch.float64)
    slopes = [2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8]
    assert lightning_log_decays(config, layer, depth) == pytest.approx([-s * factor for s in slopes], rel=1e-14)
    want = lightning(parameters_of(mixer), x, config, LayerContext(BOUNDS, layer, depth, 1e-6))
    torch.testing.assert_close(mixer(x, Layout(BOUNDS)), want, rtol=1e-10, atol=1e-11)
    assert mixer.log_decay.tolist() == pytest.approx(minimax_log_decays(3, layer, depth), rel=1e-7)


def test_slopes_of_powers_of_two():
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_slopes_of_12_heads_are_those_of_8_and_every_second_one_of_16():
    # Press et al. 2022, get_slopes(12) of the published code.
    want = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12) == pytest.approx(want, rel=1e-15)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 12, 31, 33])
def test_every_head_has_a_slope_of_its_own_between_0_and_1(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == len(set(slopes)) == heads
    assert all(0 < slope < 1 for slope in slopes)


def test_later_layers_forget_less_and_the_last_hardly_at_all():
    by_layer = [log_decays(2, layer, 5) for layer in range(5)]
    assert [decay[0] for decay in by_layer] == pytest.approx([-(2**-4) * (f + 1e-5) for f in (1, 0.75, 0.5, 0.25, 0)])
    assert all(decay[1] < 0 for decay in by_layer)


def test_decays_are_filled_in_when_the_layer_leaves_the_meta_device():
    with torch.device("meta"):
        mixer = LightningConfig(heads=3, head_dim=2).build(8, 1, 4, 1e-5)
    mixer.to_empty(device="cpu")
    initialise(mixer, seed=0)
    assert mixer.log_decay.tolist() == pytest.approx(log_decays(3, 1, 4))
    assert "log_decay" not in mixer.state_dict()


def test_flops_are_the_projections_and_a_write_and_a_read_of_the_state():
    mixer = LightningConfig(heads=3, head_dim=5).build(8, 0, 1, 1e-5)
    assert mixer.flops(Layout((0, 3, 10))) == 10 * (2 * 8 * 60 + 2 * 15 * 8 + 3 * (2 * 25 + 2 * 25))


def test_heads_that_do_not_divide_the_width_are_refused_unless_a_head_dim_is_given():
    assert LightningConfig(heads=5).problems(12) == [
        "heads: 5 heads do not divide dim 12; set head_dim or change heads"
    ]
    assert LightningConfig(heads=5, head_dim=3).problems(12) == []
