"""Rotary positions, against complex numbers."""

import cmath
import math

import pytest
import torch

from longctx.layers.rotary import RopeScaling, rotary_table, rotate

POSITIONS = (0, 1, 1000, 2**20 + 1, 2**23 + 5)


def turned(x, positions, theta):
    """Channels i and i + D/2 as one number, turned by `position * theta^(-2i/D)`, in Python's own numbers."""
    half = len(x[0]) // 2
    rows = [
        [complex(row[i], row[i + half]) * cmath.exp(1j * p * theta ** (-2 * i / (2 * half))) for i in range(half)]
        for row, p in zip(x, positions, strict=True)
    ]
    return torch.tensor([[z.real for z in row] + [z.imag for z in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)], ids=str
)
def test_pairs_are_turned_by_their_angle_at_a_million_too(dtype, bound):
    x = torch.randn(len(POSITIONS), 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    table = rotary_table(torch.tensor(POSITIONS), 10, 500.0)
    got = rotate(x[None, :, None], table)[0, :, 0]
    assert got.dtype == dtype
    want = turned(x.double().tolist(), POSITIONS, 500.0)
    assert (got.double() - want).norm() < bound * want.norm()


def test_scores_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = lambda at, to: (  # noqa: E731
        rotate(q, rotary_table(torch.tensor([at]), 8, 1e4)) * rotate(k, rotary_table(torch.tensor([to]), 8, 1e4))
    ).sum()
    torch.testing.assert_close(score(7, 3), score(2**20 + 4, 2**20), rtol=1e-7, atol=1e-8)
    assert abs(score(7, 3) - score(7, 2)) > 1e-3


def test_scaled_frequencies_are_those_of_llama_3_1():
    """Case by case, with wavelengths, as the release of Llama 3.1 has it; 8, 1, 4 and 8192 are its numbers."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain = [5e5 ** (-2 * i / 128) for i in range(64)]
    want, kinds = [], set()
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
            kinds.add("short")
        elif wavelength > 8192 / 1:
            want.append(frequency / 8)
            kinds.add("long")
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
            kinds.add("between")
    assert len(kinds) == 3
    cos, sin = rotary_table(torch.tensor([1]), 128, 5e5, scaling)
    got = torch.atan2(sin, cos)[0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_of_a_narrower_table_the_first_channels_are_turned_and_the_rest_stays():
    x = torch.randn(1, 3, 2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = rotary_table(torch.arange(3), 6, 500.0)
    got = rotate(x, table)
    assert torch.equal(got[..., :6], rotate(x[..., :6], table))
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_positions_of_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="x has 3 tokens: expected the 4"):
        rotate(torch.zeros(1, 3, 1, 8), rotary_table(torch.arange(4), 8, 1e4))
