"""Masks by position and the dense masks that their definition gives, for the tests of block attention."""

import torch

from longctx.kernels.attention import reference
from longctx.kernels.attention.block import CAUSAL_MASK, IntervalMask, Positions, packed_documents, sliding_window

BIDIRECTIONAL = IntervalMask(causal=False)


def last(window):
    """The causal mask of a sliding window."""
    return IntervalMask(window=window)


def dense(mask):
    """`[Tq, Tk]` or `[B, H, Tq, Tk]` bool, from the definition."""
    p, s = mask.query[..., :, None], mask.key
    seen = torch.ones(*mask.query.shape, len(s), dtype=torch.bool)
    causal, window = mask.mask.causal, mask.mask.window
    if causal:
        seen &= s <= p
    if window is not None:
        seen &= p - s < window if causal else (p - s).abs() < window
    if mask.query_document is not None:
        seen &= mask.query_document[..., :, None] == mask.key_document
    return seen


def draw(tq, tk, heads=4, kv_heads=2, key_dim=8, value_dim=8, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, do = normal(batch, tq, heads, key_dim), normal(batch, tq, heads, value_dim)
    return q, normal(batch, tk, kv_heads, key_dim), normal(batch, tk, kv_heads, value_dim), do


def gathered(tq, tk, mask=CAUSAL_MASK, batch=2, heads=4):
    """Another sorted choice of queries for each head of each sequence; the first head begins with padding."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(batch, heads, tk, generator=generator).argsort(-1)[..., :tq].sort(-1).values
    chosen[:, 0, : tq // 3] = -1
    return Positions(chosen, torch.arange(tk), mask=mask)


def masks():
    """Name -> a mask by position."""
    halves = torch.cat([torch.arange(10, 25), torch.arange(70, 85)])
    inner = torch.cat([torch.arange(20, 40), torch.arange(60, 73)])
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor([30, 1, 1, 40, 28]))
    return {
        "causal": Positions(torch.arange(37), torch.arange(37)),
        "full": Positions(torch.arange(37), torch.arange(50), mask=BIDIRECTIONAL),
        "window 1": sliding_window(37, 37, last(1)),
        "window": sliding_window(70, 70, last(9)),
        "window of a later block": sliding_window(40, 30, last(16), offset=25),
        "window on both sides": sliding_window(50, 45, IntervalMask(causal=False, window=6), offset=-3),
        "window wider than all": sliding_window(33, 33, last(1000)),
        "documents": packed_documents((0, 30, 31, 32, 32, 60)),
        "document per token": packed_documents(tuple(range(20))),
        "documents and window": packed_documents((0, 40, 45, 75), last(7)),
        "documents, not causal": packed_documents((0, 5, 37, 52), BIDIRECTIONAL),
        "one token": sliding_window(1, 1, last(3)),
        "zigzag halves": Positions(halves, inner),
        "zigzag halves, window": Positions(halves, torch.arange(100), mask=last(12)),
        "zigzag halves, documents": Positions(halves, inner, documents[halves], documents[inner]),
        "zigzag halves, documents, window": Positions(halves, torch.arange(100), documents[halves], documents, last(5)),
        "sparse queries, documents": Positions(
            torch.tensor([3, 33, 50, 90]), torch.arange(100), documents[[3, 33, 50, 90]], documents
        ),
        "documents that no key has": Positions(
            torch.arange(9), torch.arange(4, 9), torch.arange(9) // 3, torch.tensor([1, 1, 4, 4, 4])
        ),
        "nothing seen": Positions(torch.arange(5), torch.arange(10, 20)),
        "equal places": Positions(torch.tensor([2, 2, 5, 5, 5]), torch.tensor([0, 2, 2, 2, 5, 6]), mask=last(2)),
        "gathered": gathered(21, 60),
        "gathered, window": gathered(21, 60, last(4)),
        "gathered, one query": gathered(1, 60),
    }


def by_reference(q, k, v, do, mask, scale):
    """out, lse, dq, dk, dv of the dense reference."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference.softmax_attention(*leaves, mask, scale)
    out.backward(do)
    return out.detach(), lse.detach(), *(x.grad for x in leaves)
