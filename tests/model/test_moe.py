"""The layer of experts in a model: its router's precision, noise by place, its bias."""

import pytest
import torch

from longctx.kernels import reference
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.moe.noise import jitter_factors
from longctx.parallel.layout import Layout
from tests.model.cases import VOCABULARY, best_two, decoder, hybrid, recomputed, routed, tokens, with_experts

LAYOUT = Layout((0, 4, 13))


def layer_of(dtype=torch.float64, **changes):
    layer = MoeConfig(**({"experts": 5, "active": 2, "hidden": 7} | changes)).build(6, 1, 4).to(dtype)
    initialise(layer, seed=3)
    return layer


def draw(dtype=torch.float64):
    return torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def written_out(layer, x):
    p = (x @ layer.router.weight.T).softmax(dim=-1)
    out = best_two(layer, x, p)
    if layer.shared is not None:
        shared = reference.swiglu(x @ layer.shared.gate_up.weight.T) @ layer.shared.down.weight.T
        out += shared if layer.shared_gate is None else (x @ layer.shared_gate.weight[0]).sigmoid()[..., None] * shared
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("shared", "width"), [({}, 0), ({"shared": 2}, 14), ({"shared": 1, "shared_hidden": 9, "shared_gate": True}, 9)]
)
@pytest.mark.parametrize("tile", [None, 3])
def test_the_layer_equals_its_equation(shared, width, tile):
    layer, x = layer_of(**shared), draw()
    layer.tile = tile
    assert width == (0 if layer.shared is None else layer.shared.down.in_features)
    gate = 2 * 6 if "shared_gate" in shared else 0
    assert layer.flops_per_token == 2 * 6 * 5 + 2 * (3 * 6 * 7) * 2 + 2 * 3 * 6 * width + gate
    torch.testing.assert_close(layer(x, LAYOUT).out, written_out(layer, x), rtol=1e-11, atol=1e-12)


def test_the_router_computes_in_float32_whatever_the_rest_does():
    layer, x = layer_of(torch.bfloat16), draw(torch.bfloat16)
    exact = x.float() @ layer.router.weight.float().T
    assert torch.equal(layer.router(x), exact)
    wide, y = layer_of(torch.float32), draw(torch.float32)
    want = wide.router(y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.router(y), want)
        assert layer(x, LAYOUT).out.dtype == torch.bfloat16


def test_each_expert_begins_as_it_would_among_more():
    few, many = layer_of(), layer_of(experts=9)
    assert torch.equal(few.experts.gate_up, many.experts.gate_up[:5])
    assert torch.equal(few.experts.down, many.experts.down[:5])
    assert not torch.equal(few.experts.down[0], few.experts.down[1])


def test_experts_begin_at_the_scale_of_a_dense_layer():
    layer = MoeConfig(experts=3, active=1, hidden=300).build(200, 0, 5)
    initialise(layer, seed=0)
    assert layer.experts.gate_up.std().item() == pytest.approx(200**-0.5, rel=0.02)
    assert layer.experts.down.std().item() == pytest.approx(300**-0.5 * 10**-0.5, rel=0.02)


def test_the_noise_of_a_token_depends_on_its_place_and_not_on_its_rank():
    shape, bounds = torch.Size((2, 48, 6)), (0, 17, 48)
    whole = jitter_factors(Layout(bounds, sequence=5), 0.2, shape, 1, torch.device("cpu"))
    for order in ("contiguous", "zigzag"):
        parts = [
            jitter_factors(
                Layout(bounds, order, 4, rank, sequence=5), 0.2, torch.Size((2, 12, 6)), 1, torch.device("cpu")
            )
            for rank in range(4)
        ]
        assert torch.equal(Layout(bounds, order, 4).unshard(parts), whole)
    for other in (
        jitter_factors(Layout(bounds, sequence=6), 0.2, shape, 1, torch.device("cpu")),
        jitter_factors(Layout(bounds, sequence=5), 0.2, shape, 2, torch.device("cpu")),
    ):
        assert (other != whole).float().mean() > 0.99
    assert not torch.equal(whole[0], whole[1])


def test_the_noise_is_uniform():
    x = jitter_factors(Layout((0, 4096)), 0.5, torch.Size((1, 4096, 64)), 0, torch.device("cpu")).flatten()
    assert x.min() >= 0.5
    assert x.max() < 1.5
    counts = torch.histc(x, 16, 0.5, 1.5) / len(x)
    assert (counts - 1 / 16).abs().max() < 2e-3
    a, b = x.view(4096, 64)[:, :-1] - 1, x.view(4096, 64)[:, 1:] - 1
    assert abs((a * b).mean() / (1 / 12)) < 0.01, "neighbouring channels are independent"
    a, b = x.view(4096, 64)[:-1] - 1, x.view(4096, 64)[1:] - 1
    assert abs((a * b).mean() / (1 / 12)) < 0.01, "neighbouring tokens are independent"


def test_jitter_moves_choices_in_training_alone():
    plain, noisy, x = layer_of(), layer_of(jitter=0.5), draw()
    want = plain(x, LAYOUT)
    assert torch.equal(noisy.eval()(x, LAYOUT).out, want.out)
    assert not torch.equal(noisy.train()(x, LAYOUT).report.choice, want.report.choice)
    assert torch.equal(noisy(x, LAYOUT).out, noisy(x, LAYOUT).out)


def test_a_capacity_drops_in_training_alone():
    layer, x = layer_of(capacity=0.5), draw()
    assert layer.train()(x, LAYOUT).report.dropped > 0
    assert torch.equal(layer.eval()(x, LAYOUT).out, layer_of()(x, LAYOUT).out)


def test_generation_routes_token_by_token():
    """In pieces and token by token, with a capacity and noise, which are of training."""
    moe = MoeConfig(experts=4, active=2, hidden=6, capacity=0.5, jitter=0.3, shared=1)
    model, x = decoder(routed(moe=moe)).eval(), tokens(13, batch=2)
    with torch.no_grad():
        whole = model(x, Layout((0, 13)))
        cache = model.new_cache()
        got = [model.next_logits(piece, cache) for piece in x.split([4, 1, 1, 6, 1], dim=1)]
    for end, logits in zip((4, 5, 6, 12, 13), got, strict=True):
        torch.testing.assert_close(logits, whole[:, end - 1], rtol=1e-10, atol=1e-11)


def test_the_bias_is_kept_with_the_model_and_moves_after_a_step():
    layer = layer_of(bias_rate=0.5)
    assert "bias" in layer.state_dict()
    assert "bias" not in layer_of().state_dict()
    layer.after_step(torch.tensor([0.0, 4.0, 2.0, 2.0, 2.0]))
    torch.testing.assert_close(layer.bias, torch.tensor([0.5, -0.5, 0, 0, 0], dtype=torch.float64))
    layer.after_step(torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0]))
    torch.testing.assert_close(layer.bias, torch.tensor([0.5, -0.5, 0, 0, 0], dtype=torch.float64))


def test_a_decoder_reports_each_router_by_the_name_of_its_layer():
    model, x = decoder(routed()), tokens(13)
    reports = model(x, LAYOUT, tokens(13, seed=1)).reports
    assert list(reports) == [
        f"blocks.{n}.{part}" for n in range(4) for part in ("mixer", "ffn") if part == "mixer" or n % 2
    ]
    assert all(report.counts.sum() == 13 for name, report in reports.items() if name.endswith("mixer"))
    model, x = decoder(with_experts()), tokens(13)
    losses = model(x, LAYOUT, tokens(13, seed=1))
    assert list(losses.reports) == ["blocks.1.ffn", "blocks.3.ffn"]
    for name, report in losses.reports.items():
        assert model.get_submodule(name).layer == int(name.split(".")[1])
        assert report.tokens == 13
        assert report.counts.sum() == 26
        assert report.loss.requires_grad
    assert decoder(hybrid())(x, LAYOUT, x).reports == {}


def test_a_later_token_changes_no_earlier_choice_and_no_output_but_for_rounding():
    """To the bit an output is not the same: how many rows an expert has decides in which order a product is summed."""
    model, x = decoder(routed(), torch.float32), tokens(13)
    before, said = model(x, LAYOUT), model(x, LAYOUT, x).reports
    for t in range(13):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        torch.testing.assert_close(model(changed, LAYOUT)[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
        for name, report in model(changed, LAYOUT, x).reports.items():
            assert torch.equal(report.choice[:, :t], said[name].choice[:, :t]), name


def test_recomputed_blocks_route_and_report_the_same():
    answers = recomputed(routed(), LAYOUT)
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)
