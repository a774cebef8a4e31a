"""Counter-based random numbers against splitmix64 in integers, and what they are keyed by."""

import pytest
import torch

from longctx.moe import noise
from longctx.moe.noise import jitter_factors
from longctx.parallel.layout import Layout

STEP, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
CPU = torch.device("cpu")


def mix(x):
    """The output function of splitmix64, of an integer."""
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def factors(layout, width=0.25, batch=2, channels=3, layer=1):
    return jitter_factors(layout, width, torch.Size((batch, layout.local_length, channels)), layer, CPU)


def test_the_mix_is_that_of_splitmix64():
    """Its first outputs for the seed 0, as published."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((n + 1) * STEP) for n in range(3)] == published
    counters = torch.arange(1, 4) * noise._STEP
    assert [x % 2**64 for x in noise._mix(counters).tolist()] == published


@pytest.mark.parametrize("bits", [1, 27, 63])
def test_shifts_are_unsigned(bits):
    values = [0, 1, -1, -(2**63), 2**63 - 1]
    shifted = noise._shift_right(torch.tensor(values), bits)
    assert shifted.tolist() == [(x % 2**64) >> bits for x in values]


def test_factors_are_keyed_by_sequence_layer_row_place_and_channel():
    layout = Layout((0, 2, 5), sequence=7)
    got = factors(layout)
    key = mix(mix(7 * STEP) + 1 * STEP)
    for row in range(2):
        for place in range(5):
            for channel in range(3):
                bits = mix(mix(mix(key + row * STEP) + place * STEP) + (channel + 1) * STEP) >> 40
                assert got[row, place, channel].item() == pytest.approx(0.75 + 0.5 * bits / 2**24, abs=1e-7)
    assert got.unique().numel() == got.numel()


def test_factors_do_not_depend_on_sharding():
    bounds = (0, 4, 13)
    want = factors(Layout(bounds))
    for order in ("contiguous", "zigzag"):
        for rank in range(2):
            layout = Layout(bounds, order, 2, rank)
            rows = layout.tokens >= 0
            assert torch.equal(factors(layout)[:, rows], want[:, layout.tokens[rows]])


def test_factors_do_not_depend_on_the_block_or_the_batch(monkeypatch):
    layout = Layout((0, 9))
    want = factors(layout)
    monkeypatch.setattr(noise, "_BLOCK", 12)
    assert torch.equal(factors(layout), want)
    monkeypatch.setattr(noise, "_BLOCK", 1)
    assert torch.equal(factors(layout), want)
    assert torch.equal(factors(layout, batch=1), want[:1])
    assert torch.equal(factors(layout, channels=2), want[..., :2])


def test_another_layer_or_sequence_has_other_factors():
    want = factors(Layout((0, 9)))
    assert not (factors(Layout((0, 9)), layer=2) == want).any()
    assert not (factors(Layout((0, 9), sequence=1)) == want).any()


@pytest.mark.parametrize("width", [0.0, 0.1, 1.0])
def test_factors_are_float32_within_the_width(width):
    got = factors(Layout((0, 500)), width)
    assert got.dtype == torch.float32
    assert (got >= 1 - width - 1e-7).all()
    assert (got <= 1 + width).all()
    assert got.mean().item() == pytest.approx(1, abs=0.05 * width)
    assert (got.max() - got.min()).item() >= 1.95 * width


def test_no_row_has_no_factor():
    assert factors(Layout((0, 4)), batch=0).shape == (0, 4, 3)
