"""Decay factors of a chunk, and their gradients, against sums of log-decays written out pair by pair."""

import pytest
import torch

from longctx.kernels.linear import linear_attention, reference
from longctx.kernels.linear.chunking import Chunk, ChunkLoop, Scratch
from longctx.kernels.linear.decay import ChunkMasks, Decays, LogDecayGrad, ScalarDecay, VectorDecay
from longctx.kernels.linear.recurrence import Inputs

F64, CPU = torch.float64, torch.device("cpu")
KEY_DIM = 3
SIZES = [("scalar", 7), ("scalar", 1), ("vector", 8), ("vector", 1)]
STARTS = {"none": (), "at 0": (0,), "inside": (3,), "several": (0, 2, 3, 6)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draw(kind, size):
    """Log-decays, x and y of two heads."""
    g = -normal(2, size, 1 if kind == "scalar" else KEY_DIM, seed=size).abs()
    return g, normal(2, size, KEY_DIM, seed=1), normal(2, size, KEY_DIM, seed=2)


def decay_of(g, starts):
    size = g.shape[1]
    masks = ChunkMasks(Chunk(0, size, starts, size), g.dtype, CPU)
    return (ScalarDecay if g.shape[2] == 1 else VectorDecay)(g, masks, Scratch(g.dtype, CPU))


def written_out(g, starts, x, y):
    """reads, writes, keeps and pairs(x, y) from the definitions."""
    size = g.shape[1]
    document = [sum(start <= t for start in starts) for t in range(size)]

    def between(j, i):
        return g[:, j + 1 : i + 1].sum(dim=1).exp()

    reads = torch.stack([between(-1, i) * (document[i] == 0) for i in range(size)], dim=1)
    writes = torch.stack([between(j, size - 1) * (document[j] == len(starts)) for j in range(size)], dim=1)
    keeps = (between(-1, size - 1) * (not starts))[..., None]
    rows = []
    for i in range(size):
        seen = [j <= i and document[j] == document[i] for j in range(size)]
        rows.append(torch.stack([(x[:, i] * y[:, j] * between(j, i)).sum(-1) * seen[j] for j in range(size)], dim=1))
    return reads, writes, keeps, torch.stack(rows, dim=1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("pairs_first", [False, True])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_factors_equal_their_definitions_in_either_order(kind, size, starts, pairs_first):
    starts = tuple(s for s in starts if s < size)
    g, x, y = draw(kind, size)
    reads, writes, keeps, pairs = written_out(g, starts, x, y)
    decay, out = decay_of(g.clone(), starts), torch.full((2, size, size), torch.nan, dtype=F64)
    if pairs_first:
        close(decay.pairs(x, y, out), pairs)
    close(decay.reads, reads)
    close(decay.writes, writes)
    close(decay.keeps, keeps)
    if not pairs_first:
        close(decay.pairs(x, y, out), pairs)


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_gradients_of_pairs_equal_autograd_and_are_added(kind, size, starts):
    starts = tuple(s for s in starts if s < size)
    leaves = [tensor.requires_grad_() for tensor in draw(kind, size)]
    d = normal(2, size, size, seed=3)
    pairs = written_out(leaves[0], starts, *leaves[1:])[3]
    dg, dx, dy = torch.autograd.grad(pairs, leaves, d, materialize_grads=True)
    g, x, y = (leaf.detach() for leaf in leaves)

    decay = decay_of(g, starts)
    got_dx, got_dy, got_dg = torch.ones_like(x), torch.ones_like(y), torch.ones_like(g)
    decay.pairs_and_decay_grad(d.clone(), pairs.detach(), x, y, got_dx, got_dy, got_dg)
    for got, want in ((got_dx, dx), (got_dy, dy), (got_dg, dg)):
        close(got, want + 1)

    for only in ("x", "y"):
        got_dx, got_dy = torch.ones_like(x), torch.ones_like(y)
        decay.pairs_grad(d.clone(), x, y, got_dx if only == "x" else None, got_dy if only == "y" else None)
        close(got_dx, dx + 1 if only == "x" else torch.ones_like(x))
        close(got_dy, dy + 1 if only == "y" else torch.ones_like(y))


@pytest.mark.parametrize("starts", [(), (3,)])
@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_log_decay_gradients_of_reads_writes_and_the_kept_state_equal_autograd(kind, size, starts):
    starts = tuple(s for s in starts if s < size)
    g, q, keys = draw(kind, size)
    g.requires_grad_()
    dread, dwritten = normal(2, size, KEY_DIM, seed=4), normal(2, size, KEY_DIM, seed=5)
    state, dstate = normal(2, KEY_DIM, 4, seed=6), normal(2, KEY_DIM, 4, seed=7)
    reads, writes, keeps, _ = written_out(g, starts, q, keys)
    loss = (q * dread * reads).sum() + (keys * dwritten * writes).sum() + (state * dstate * keeps).sum()
    (want,) = torch.autograd.grad(loss, g)

    k = torch.zeros(2, size, 1, KEY_DIM, dtype=F64)
    loop = ChunkLoop(Inputs(None, k, k, ()), 8)
    decay = decay_of(g.detach(), starts)
    grad = LogDecayGrad(loop, decay, keys, dwritten * decay.writes, state, dstate)
    grad.reads.addcmul_(q, dread * decay.reads)
    close(grad.finish(), want)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_sums_after_a_strong_decay_are_exact_in_float32(kind):
    g, x, y = (tensor.float() for tensor in draw(kind, 8))
    g[:, 2] = -1e4
    want = written_out(g.double(), (), x.double(), y.double())
    decay = decay_of(g, ())
    got = (decay.reads, decay.writes, decay.keeps, decay.pairs(x, y, torch.empty(2, 8, 8)))
    for factor, exact in zip(got, want, strict=True):
        assert factor.dtype == (torch.float64 if factor is decay.keeps else torch.float32)
        torch.testing.assert_close(factor.double(), exact, rtol=2e-6, atol=2e-6)
    assert not got[0][:, 2:].any()
    assert not got[3][:, 2:, :2].any()


def test_masks_hide_later_tokens_and_other_documents():
    masks = ChunkMasks(Chunk(5, 9, (1, 3), 4), F64, CPU)
    assert masks.hidden.int().tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]
    assert masks.before_first_start[:, 0].tolist() == [1, 0, 0, 0]
    assert masks.after_last_start[:, 0].tolist() == [0, 0, 0, 1]
    assert torch.equal(masks.strictly_causal, torch.ones(4, 4, dtype=F64).tril(-1))


def decays_over(log_decay):
    k = torch.zeros(1, 12, 2, KEY_DIM, dtype=F64)
    loop = ChunkLoop(Inputs(None, k, k, ()), 8)
    decays, group = Decays(log_decay, loop), next(loop.head_groups())
    return lambda chunk: decays.for_chunk(loop, group, chunk)


@pytest.mark.parametrize("log_decay", [None, torch.tensor([-0.5, -2.0], dtype=F64)], ids=["none", "constant"])
def test_full_chunks_of_a_constant_decay_share_one_object(log_decay):
    of = decays_over(log_decay)
    first = of(Chunk(0, 4, (), 4))
    assert of(Chunk(4, 8, (), 4)) is first
    rate = torch.zeros(2, dtype=F64) if log_decay is None else log_decay
    close(first.reads[..., 0], torch.exp(rate[:, None] * torch.arange(1, 5)).expand(first.reads.shape[0], -1))
    with_start, shorter = of(Chunk(8, 12, (2,), 4)), of(Chunk(8, 11, (), 3))
    assert not with_start.keeps.any()
    close(shorter.keeps[:, 0, 0], torch.exp(3 * rate).expand(shorter.keeps.shape[0]))


@pytest.mark.parametrize("shape", [(1, 12, 2), (1, 12, 2, KEY_DIM)], ids=["scalar", "vector"])
def test_decays_along_the_sequence_are_those_of_the_chunk_and_minus_infinity_is_zero(shape):
    log_decay = -normal(*shape).abs()
    log_decay[:, 5] = float("-inf")
    of, rows = decays_over(log_decay), log_decay[0].transpose(0, 1).reshape(2, 12, -1)
    for begin in (0, 4, 8):
        close(of(Chunk(begin, begin + 4, (), 4)).reads, rows[:, begin : begin + 4].cumsum(1).exp())
    ones = torch.ones(2, 4, KEY_DIM, dtype=F64)
    pairs = of(Chunk(4, 8, (), 4)).pairs(ones, ones, torch.empty(2, 4, 4, dtype=F64))
    assert torch.isfinite(pairs).all()
    assert not pairs[:, 1:, 0].any()
    assert (pairs[:, 3, 1:] > 0).all()


def test_after_a_run_of_decays_to_nothing_the_others_are_as_exact_as_before():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    log_decay = -0.1 * torch.rand(1, 64, 1, dtype=torch.float64, generator=generator)
    log_decay[:, :60] = -1e4
    want, _ = reference.linear_recurrence(q, k, v, log_decay)
    got, _ = linear_attention(q, k, v, log_decay)
    assert (got - want).abs().max() < 5e-12 * want.abs().max()
