"""Which keys are seen, planned on the host, against masks written out."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.attention.block import CAUSAL, CAUSAL_MASK, FULL, IntervalMask, Positions
from longctx.parallel.attention.visibility import KVOwners, score_elements
from longctx.parallel.layout import Layout
from tests.parallel.attention.test_api import dense_mask
from tests.parallel.cases import ORDERS


@st.composite
def plans(draw):
    """KV owners of a random packed sequence: ranks, or pairs of ranks."""
    size, length = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 60))
    inner = draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    layout = Layout((0, *sorted(inner), length), draw(st.sampled_from(ORDERS)), size)
    numbers = [layout.pieces_of(rank) for rank in range(size)]
    if size == 4 and draw(st.booleans()):
        numbers = [numbers[0] + numbers[1], numbers[2] + numbers[3]]
    return KVOwners(layout, numbers, IntervalMask(draw(st.booleans()), draw(st.none() | st.integers(1, 20))))


@settings(max_examples=150)
@given(plans())
def test_what_travels_is_what_is_seen_and_every_block_shows_exactly_the_mask(owners):
    layout = owners.layout
    mask = dense_mask(layout.cu_seqlens, owners.mask)
    for reader in range(len(owners.pieces)):
        queries = owners.tokens(reader)
        real = queries < layout.length
        for source in range(len(owners.pieces)):
            held = owners.tokens(source)
            parts = owners.needed(reader, source)
            keys = torch.cat([held[part] for part in parts]) if parts else held[:0]
            seen = mask[queries[real]][:, held[held < layout.length]].any(dim=0)
            assert torch.equal(keys, held[held < layout.length][seen])
            block = owners.block(queries, keys, torch.device("cpu"))
            if block is None:
                assert not seen.any()
                continue
            got = torch.zeros(len(queries), len(keys), dtype=torch.bool)
            got[block.queries] = written_out(block.mask, got[block.queries].shape)
            assert torch.equal(got[real], mask[queries[real]][:, keys])
            assert not got[~real].any()
            assert got[block.queries][0].any()
            assert got[block.queries][-1].any()
        assert owners.score_elements[reader] == mask[queries[real]].sum()
    if len(owners.pieces) == layout.size:
        work = [score_elements(layout.for_rank(rank), owners.mask) for rank in range(layout.size)]
        assert tuple(work) == owners.score_elements


def written_out(mask, shape):
    if mask is FULL:
        return torch.ones(shape, dtype=torch.bool)
    if mask is CAUSAL:
        return torch.ones(shape, dtype=torch.bool).tril()
    assert isinstance(mask, Positions)
    begin, end = (x[:, None] for x in mask.bounds)
    places = torch.arange(shape[1])
    return (places >= begin) & (places < end)


def test_plain_blocks_have_plain_masks():
    layout = Layout((0, 64), "zigzag", 4)
    owners = KVOwners(layout, [layout.pieces_of(rank) for rank in range(4)], CAUSAL_MASK)

    def block(reader, source):
        parts = owners.needed(reader, source)
        keys = torch.cat([owners.tokens(source)[part] for part in parts])
        return owners.block(owners.tokens(reader), keys, torch.device("cpu")), len(keys)

    # Its own keys; the early piece of a rank before it, for all queries; both pieces of one behind it, for the late.
    (own, _), (before, early), (behind, both) = block(1, 1), block(1, 0), block(1, 2)
    assert (own.mask, own.queries) == (CAUSAL, slice(0, 16))
    assert (before.mask, before.queries, early) == (FULL, slice(0, 16), 8)
    assert (behind.mask, behind.queries, both) == (FULL, slice(8, 16), 16)
