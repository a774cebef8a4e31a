"""NaN and infinity in the inputs of block attention: what does not see them does not change by a bit."""

import math

import pytest
import torch

from longctx.kernels import attention
from longctx.kernels.attention import CAUSAL, FULL, packed_documents, sliding_window
from longctx.kernels.attention.masks import IntervalMask, Positions
from tests.combinations import pairs_first

LENGTH, BOUNDS = 300, (0, 20, 150, 300)


def draw(dtype=torch.float32, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def visible(mask):
    """Which key each query sees, `[Tq, Tk]`."""
    if isinstance(mask, torch.Tensor):
        return mask
    begin, end = attention.masks.key_bounds(mask, LENGTH, LENGTH, torch.device("cpu"))
    keys = torch.arange(LENGTH)
    return (keys >= begin[:, None]) & (keys < end[:, None])


def passes(do, q, k, v, mask, backend):
    out, lse = attention.forward(q, k, v, mask, 0.3, backend)
    grads = attention.backward(do, q, k, v, out, lse, mask, 0.3, backend)
    return {"out": out, "dq": grads[0], "dk": grads[1], "dv": grads[2]}


MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "documents": packed_documents(BOUNDS),
    "window": sliding_window(LENGTH, LENGTH, IntervalMask(window=33)),
    "tensor": torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.1,
}


@pytest.mark.parametrize(
    ("mask", "name", "value", "backend"),
    pairs_first(
        list(MASKS), ["q", "k", "v", "do"], [float("nan"), float("-inf")], ["cpu-flash", "tiled", "cpu-native"]
    ),
)
def test_what_does_not_see_it_does_not_change_by_a_bit(mask, name, value, backend):
    q, k, v, do = draw()
    mask = MASKS[mask]
    if lacks := attention.explain_backends(q, k, v, mask)[backend]:
        pytest.skip(lacks)
    sees = visible(mask)
    before = passes(do, q, k, v, mask, backend)
    for t in (0, 25, 149, 299):
        spoiled = {"q": q, "k": k, "v": v, "do": do}
        spoiled[name] = spoiled[name].clone()
        spoiled[name][1, t, 1, 3] = value
        after = passes(spoiled["do"], spoiled["q"], spoiled["k"], spoiled["v"], mask, backend)
        own = torch.arange(LENGTH) == t
        heads = [2, 3] if name in ("k", "v") else [1]
        queries = sees[:, t] if name in ("k", "v") else own
        seen = (sees & queries[:, None]).any(dim=0) | (own if name in ("k", "v") else False)
        reached = {"out": queries & (name != "do"), "dq": queries, "dk": seen, "dv": seen}
        for other, bad in reached.items():
            some = torch.zeros(before[other].shape[:3], dtype=torch.bool)
            some[1, :, heads if other in ("out", "dq") else [heads[0] // 2]] = bad[:, None]
            assert torch.equal(before[other][~some], after[other][~some]), (other, t)
            # An infinite score may have the weight 0.
            if other in ("out", "dq") and math.isnan(value) and sees[t].any():
                assert not torch.isfinite(after[other][some]).all(dim=-1).any(), (other, t)


def test_each_head_has_queries_of_its_own():
    q, k, v, do = draw()
    place = torch.arange(LENGTH).expand(2, 4, -1).clone()
    place[0, 3] = torch.arange(LENGTH) // 2
    mask = Positions(place, torch.arange(LENGTH))
    before = passes(do, q, k, v, mask, None)
    v[0, 200, 1, 0] = float("nan")
    after = passes(do, q, k, v, mask, None)
    bad = torch.zeros(2, LENGTH, 4, dtype=torch.bool)
    bad[0, 200:, 2] = True
    assert torch.equal(before["out"][~bad], after["out"][~bad])
    assert not torch.isfinite(after["out"][bad]).any()
    assert torch.isfinite(after["dk"][0, :, 0]).all()
