"""The softmax layer against a dense one whose positions turn complex numbers."""

import pytest
import torch

from longctx.layers.rotary import RopeScaling
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import LayerContext, parameters_of
from longctx.verify.equations.softmax import softmax, softmax_weights
from tests.mixers.equations import check, each_of

LENGTH = {"original_max_position_embeddings": 64}


@each_of("S")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, softmax)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, None, None), (6, 2, 6), (4, 1, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("theta", [10_000.0, 30.0])
@pytest.mark.parametrize("bounds", [(0, 40), (0, 1, 13, 39, 40)], ids=["one document", "packed"])
def test_layer_equals_a_dense_one(heads, kv_heads, head_dim, theta, bounds):
    config = SoftmaxConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=theta)
    mixer = config.build(12, 0, 2, 1e-5).double()
    initialise(mixer, seed=5)
    # Wide inputs, so that the weights are far from equal and a wrong position shows.
    x = 3 * torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = softmax(parameters_of(mixer), x, config, LayerContext(bounds, 0, 2, 1e-5))
    torch.testing.assert_close(mixer(x, Layout(bounds)), want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("qk_norm", ["rms", "zero_centered_rms"])
def test_norms_a_gate_and_channels_that_stay_are_as_written_out(qk_norm):
    config = SoftmaxConfig(heads=4, kv_heads=2, head_dim=6, rotary_dim=4, qk_norm=qk_norm, output_gate=True)
    mixer = config.build(12, 0, 2, 1e-3).double()
    initialise(mixer, seed=5)
    generator, bounds = torch.Generator().manual_seed(0), (0, 1, 13, 40)
    x = 3 * torch.randn(2, 40, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm):
            norm.weight += 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
    want = softmax(parameters_of(mixer), x, config, LayerContext(bounds, 0, 2, 1e-3))
    torch.testing.assert_close(mixer(x, Layout(bounds)), want, rtol=1e-10, atol=1e-11)


def test_norms_of_queries_begin_as_norms_alone_and_the_rest_as_without_options():
    plain = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4).build(12, 0, 2, 1e-5)
    other = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, qk_norm="zero_centered_rms").build(12, 0, 2, 1e-5)
    for mixer in (plain, other):
        initialise(mixer, seed=5)
    assert not other.q_norm.weight.any()
    assert all(torch.equal(other.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_moving_a_document_changes_nothing_but_the_distances_within_it_do():
    mixer = SoftmaxConfig(heads=2).build(8, 0, 1, 1e-5).double()
    initialise(mixer, seed=5)
    x = 3 * torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.cat([torch.ones(1, 5, 8, dtype=torch.float64), x], dim=1)
    torch.testing.assert_close(mixer(moved, Layout((0, 5, 17)))[:, 5:], mixer(x, Layout((0, 12))))
    swapped = x[:, [1, 0, *range(2, 12)]]
    assert (mixer(swapped, Layout((0, 12)))[:, -1] - mixer(x, Layout((0, 12)))[:, -1]).norm() > 1e-3


@pytest.mark.parametrize("window", [None, 6])
def test_the_attention_that_it_lends_is_the_mean_of_its_heads(window):
    config = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, window=window)
    mixer = config.build(12, 0, 2, 1e-5).double()
    initialise(mixer, seed=5)
    layout, generator = Layout((0, 1, 13, 40)), torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 40, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    r, do = (torch.randn(2, 40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = mixer(x, layout)
    assert isinstance(plain, torch.Tensor), "no attention without a router that needs it"
    mixer.attention_channels = 5
    given = mixer(x, layout)
    assert torch.equal(given.out, plain)
    weights, _ = softmax_weights(parameters_of(mixer), x, config, LayerContext(layout.cu_seqlens, 0, 2, 1e-5))
    want = weights.mean(dim=1) @ r
    torch.testing.assert_close(given.attend(r, None), want, rtol=1e-11, atol=1e-12)
    for weight in (x, mixer.qkv.weight):
        (got,) = torch.autograd.grad(given.attend(r, None), weight, do, retain_graph=True)
        (ref,) = torch.autograd.grad(want, weight, do, retain_graph=True)
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-11)


def test_attention_that_is_lent_costs_its_scores_and_the_channels_once_more():
    mixer, layout = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4).build(10, 0, 1, 1e-5), Layout((0, 3, 10))
    before, mixer.attention_channels = mixer.flops(layout), 5
    assert mixer.flops(layout) - before == (3 * 4 + 7 * 8) // 2 * 6 * (2 * 4 + 2 * 5)


def test_flops_are_the_projections_and_two_products_for_each_pair_that_is_seen():
    mixer = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4).build(10, 0, 1, 1e-5)
    seen = (3 * 4 + 7 * 8) // 2
    assert mixer.flops(Layout((0, 3, 10))) == 10 * (2 * 10 * 40 + 2 * 24 * 10) + seen * 6 * (2 * 4 + 2 * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 5}, "heads: 5 heads do not divide dim 12"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads: 6 query heads are not a multiple of 4"),
        ({"heads": 2, "kv_heads": 4}, "kv_heads: 2 query heads are not a multiple of 4"),
        ({"heads": 4}, "head_dim: 3 has to be even for rotary embedding"),
        ({"heads": 4, "head_dim": 5}, "head_dim: 5 has to be even for rotary embedding"),
        ({"heads": 4, "rotary_dim": 4}, "rotary_dim: 4 has to be even and at most head_dim 3"),
        ({"heads": 2, "rotary_dim": 3}, "rotary_dim: 3 has to be even and at most head_dim 6"),
        (
            {"heads": 2, "rope_scaling": RopeScaling(factor=2.0, low_freq_factor=4.0, **LENGTH)},
            "rope_scaling.high_freq_factor: 4.0 has to be above low_freq_factor 4.0",
        ),
    ],
)
def test_heads_that_do_not_fit_are_named_with_their_key(arguments, words):
    (problem,) = SoftmaxConfig(**arguments).problems(12)
    assert problem.startswith(words)


def test_two_mistakes_are_both_reported():
    problems = SoftmaxConfig(heads=4, kv_heads=3, head_dim=5).problems(12)
    assert [problem.split(":")[0] for problem in problems] == ["head_dim", "kv_heads"]


def test_shrunk_has_few_heads_also_where_all_share_their_keys():
    small = SoftmaxConfig(heads=32, kv_heads=1).shrunk()
    assert (small.heads, small.kv_heads) == (4, 1)


def test_shrunk_keeps_groups_of_query_heads_and_the_base_of_the_positions():
    small = SoftmaxConfig(heads=32, kv_heads=8, head_dim=128, rope_theta=5e5).shrunk()
    assert small.heads // small.kv_heads == 4
    assert small.rope_theta == 5e5
