"""Masks by position: what they show, and the tiles and pieces that are left of them."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.attention import masks as attention_masks
from longctx.kernels.attention.block import CAUSAL, FULL, IntervalMask, Positions, packed_documents, sliding_window
from longctx.kernels.attention.masks import key_bounds, mask_tiles, query_bounds, visible_tiles
from tests.kernels.attention.cases import dense, masks


def shown(begin, end, keys):
    j = torch.arange(keys)
    return (j >= begin[..., None]) & (j < end[..., None])


@st.composite
def positions(draw):
    with_documents, causal = draw(st.booleans()), draw(st.booleans())
    window = draw(st.one_of(st.none(), st.integers(1, 12)))

    def places(least, most):
        pair = st.tuples(st.integers(0, 3 if with_documents else 0), st.integers(-5, 40))
        rows = sorted(draw(st.lists(pair, min_size=least, max_size=most)))
        documents, at = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows], dtype=torch.int64)
        return at, documents.long() if with_documents else None

    (query, query_document), (key, key_document) = places(0, 30), places(0, 40)
    return Positions(query, key, query_document, key_document, IntervalMask(causal, window))


@pytest.mark.parametrize("name", masks())
def test_bounds_show_what_the_definition_shows(name):
    mask = masks()[name]
    begin, end = mask.bounds
    assert begin.dtype == end.dtype == torch.int32
    assert torch.equal(shown(begin, end, len(mask.key)), dense(mask))
    assert (begin.diff() >= 0).all()
    assert (end.diff() >= 0).all()


@settings(max_examples=150, deadline=None)
@given(
    mask=positions(),
    q_tile=st.sampled_from([1, 4, 16]),
    k_tile=st.sampled_from([1, 3, 16]),
    fine=st.sampled_from([1, 3, 16]),
)
def test_any_sorted_positions_give_exact_bounds_tiles_and_pieces(mask, q_tile, k_tile, fine):
    (begin, end), seen = mask.bounds, dense(mask)
    keys = len(mask.key)
    assert torch.equal(shown(begin, end, keys), seen)

    needed = {
        (i, j)
        for i in range(-(-len(begin) // q_tile))
        for j in range(-(-keys // k_tile))
        if seen[i * q_tile : (i + 1) * q_tile, j * k_tile : (j + 1) * k_tile].any()
    }
    walked = [(i, j) for i, run in visible_tiles(begin, end, q_tile, k_tile) for j in run]
    assert len(walked) == len(set(walked))
    assert set(walked) == needed

    first, last = query_bounds(begin, end, keys, k_tile)
    assert len(first) == len(last) == -(-keys // k_tile)
    for j, (top, bottom) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        rows = seen[:, j * k_tile : (j + 1) * k_tile].any(dim=1)
        assert rows.sum() == rows[top:bottom].sum()
        inside = torch.arange(len(rows))[top:bottom]
        assert not seen[inside[~rows[inside]]].any()

    covered = torch.zeros_like(seen, dtype=torch.int64)
    with patch.object(attention_masks, "FINE", fine):
        cut = mask_tiles(begin, end, q_tile, k_tile)
    for piece in cut:
        view = covered[piece.q_begin : piece.q_end, piece.k_begin : piece.k_end]
        if isinstance(piece.mask, torch.Tensor):
            assert piece.mask.numel() <= min(q_tile, fine) * k_tile
            assert piece.mask.any(dim=1).any()
            view += piece.mask
        else:
            view += torch.ones_like(view) if piece.mask is FULL else torch.ones_like(view).tril()
    assert torch.equal(covered, seen.long())


@given(
    mask=st.builds(IntervalMask, st.booleans(), st.none() | st.integers(1, 12)),
    places=st.lists(st.integers(0, 30), min_size=4, max_size=4, unique=True).map(sorted),
)
def test_a_mask_answers_what_its_definition_shows(mask, places):
    begin, first, last, end = places
    document, queries = range(begin, end), range(first, last)
    seen = dense(Positions(torch.tensor(queries), torch.tensor(document), mask=mask))
    (keys,) = mask.keys_seen(queries, document)
    assert [*keys] == [document[i] for i in seen.any(dim=0).nonzero()[:, 0]]
    assert mask.pairs(queries, document) == seen.sum()
    if mask.causal:
        # The query after the document's first tokens sees itself and what a decode cache keeps of these.
        held = range(begin, last)
        shown = dense(Positions(torch.tensor([last]), torch.tensor(held), mask=mask))
        assert mask.cached_keys(len(held)) == shown.sum()


@pytest.mark.parametrize(("mask", "tokens"), [(FULL, 7), (CAUSAL, 7)])
def test_plain_masks_have_bounds_too(mask, tokens):
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    begin, end = key_bounds(mask, tokens, tokens, torch.device("cpu"))
    assert torch.equal(shown(begin, end, tokens), seen if mask is FULL else seen.tril())


def test_the_work_of_a_window_grows_with_the_sequence_and_not_with_its_square():
    def work(tokens):
        begin, end = sliding_window(tokens, tokens, IntervalMask(window=64)).bounds
        cut = mask_tiles(begin, end, 256, 1024)
        return sum((p.q_end - p.q_begin) * (p.k_end - p.k_begin) for p in cut)

    assert work(8192) < 8192 * (256 + 64)
    assert work(16384) <= 2.02 * work(8192)


def test_most_of_a_long_causal_mask_is_one_piece_without_mask_a_query_tile():
    places = torch.arange(2048)
    cut = mask_tiles(*Positions(places, places).bounds, 256, 1024)
    assert [p.mask for p in cut] == [CAUSAL, *[FULL, CAUSAL] * 7]
    assert [(p.k_begin, p.k_end) for p in cut if p.mask is FULL] == [(0, 256 * n + 1) for n in range(1, 8)]


def test_a_gap_between_the_halves_of_a_zigzag_rank_is_jumped_over():
    query = torch.cat([torch.arange(64), torch.arange(960, 1024)])
    mask = Positions(query, torch.arange(1024), mask=IntervalMask(window=16))
    assert list(visible_tiles(*mask.bounds, 128, 64)) == [(0, range(0, 1)), (0, range(14, 16))]


def test_what_is_no_mask_is_refused():
    places = torch.arange(4)
    for make, message in (
        (lambda: Positions(torch.tensor([0, 2, 1]), places), "query positions are not sorted by position"),
        (lambda: Positions(places, places.flip(0)), "key positions are not sorted by position"),
        (
            lambda: Positions(places, places, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1])),
            "key positions are not sorted by document, then position",
        ),
        (lambda: Positions(places.expand(2, 3, 4).flip(-1), places), "query positions are not sorted"),
        (lambda: Positions(places, places, places), "for both queries and keys, or for neither"),
        (lambda: IntervalMask(window=0), "a window of 0 holds no token"),
        (lambda: Positions(places[None], places), r"\[Tq\] or \[B, H, Tq\]"),
        (lambda: Positions(places.float(), places), "must be integers"),
        (lambda: Positions(places, places, places[:2], places), "of one shape"),
        (lambda: packed_documents((0, 5, 3)), "must not decrease"),
        (lambda: packed_documents((1, 5)), "must begin with 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
