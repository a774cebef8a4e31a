"""Rows that are spread to several places and summed, against the sums written out."""

import pytest
import torch

from longctx.kernels.routed import permute as module
from longctx.kernels.routed.permute import combine, permute

PLACES = {
    "all": [[3, 0], [5, 1], [2, 4]],
    "some go nowhere": [[-1, 0], [1, -1], [-1, -1], [2, 3]],
    "one place each": [[2], [0], [1]],
    "nothing": [[-1], [-1]],
    "no tokens": torch.empty(0, 2, dtype=torch.int64),
}


def draw(places):
    places = torch.as_tensor(places)
    count = int((places >= 0).sum())
    tokens = torch.empty(count, dtype=torch.int64)
    for token, row in enumerate(places.tolist()):
        for place in row:
            if place >= 0:
                tokens[place] = token
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (len(places), count))
    weights = torch.rand(places.shape, generator=generator, dtype=torch.float64)
    return places, tokens, x, rows, weights


@pytest.mark.parametrize("block", [1, 10, 2**18])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_values_and_gradients(monkeypatch, places, block):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    places, tokens, x, rows, weights = draw(places)
    for tensor in (x, rows, weights):
        tensor.requires_grad_()
    want = torch.zeros(len(places), 5, dtype=torch.float64)
    for token, row in enumerate(places.tolist()):
        for column, place in enumerate(row):
            if place >= 0:
                want[token] += weights[token, column] * rows[place]
    got = combine(rows, places, weights)
    torch.testing.assert_close(got, want)
    assert torch.equal(permute(x, tokens, places), x[tokens])
    if got.numel():
        assert torch.autograd.gradcheck(lambda r, w: combine(r, places, w), (rows, weights))
        assert torch.autograd.gradcheck(lambda y: permute(y, tokens, places), (x,))


def test_halves_are_summed_in_float32():
    places = torch.arange(64).view(1, 64)
    rows = torch.full((64, 3), 1 + 2**-7, dtype=torch.bfloat16)
    got = combine(rows, places, torch.ones(1, 64))
    assert torch.equal(got, torch.full((1, 3), 64.5, dtype=torch.bfloat16))


def test_a_place_that_counts_nothing_does_not_read_its_weight():
    weights = torch.tensor([[torch.nan, 2.0]])
    assert torch.equal(combine(torch.ones(1, 2), torch.tensor([[-1, 0]]), weights), torch.full((1, 2), 2.0))
