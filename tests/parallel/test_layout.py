"""How a packed sequence lies over ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.layout import Layout, Slice
from tests.parallel.cases import ORDERS


@st.composite
def layouts(draw):
    """The layouts of all ranks for one random packed sequence."""
    size, order, length = draw(st.integers(1, 5)), draw(st.sampled_from(ORDERS)), draw(st.integers(1, 60))
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    bounds = (0, *sorted(inner), length)
    return [Layout(bounds, order, size, rank) for rank in range(size)]


@given(layouts())
def test_ranks_hold_every_token_once_and_unshard_is_the_inverse(ranks):
    tokens = torch.arange(ranks[0].length)[None, :, None].expand(2, -1, 3)
    parts = [layout.shard(tokens) for layout in ranks]
    assert all(part.shape == (2, layout.local_length, 3) for part, layout in zip(parts, ranks, strict=True))
    for layout in ranks:
        assert all((layout.shard(tokens + 1, fill=-1)[:, gap] == -1).all() for gap in layout.padding)
        real = sum(each.size for each in layout.slices)
        assert real + sum(gap.stop - gap.start for gap in layout.padding) == layout.local_length
    assert torch.equal(ranks[0].unshard(parts), tokens)


@given(layouts())
def test_positions_count_from_the_start_of_each_document(ranks):
    bounds = ranks[0].cu_seqlens
    want = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])
    assert torch.equal(ranks[0].unshard([layout.positions for layout in ranks], dim=0), want)


@given(layouts())
def test_starts_of_slices_are_the_documents_begins(ranks):
    found = {part.begin + s for layout in ranks for part in layout.slices for s in layout.starts(part)}
    assert found == set(ranks[0].cu_seqlens[:-1])


def test_zigzag_pairs_the_first_slice_with_the_last():
    layout = Layout((0, 16), "zigzag", size=4, rank=1)
    assert layout.slices == (Slice(2, 4), Slice(12, 14))
    assert layout.piece_locations == ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1), (0, 1))


def test_padding_is_behind_the_last_token():
    layouts = [Layout((0, 4, 9), "zigzag", 3, rank) for rank in range(3)]
    assert [layout.slices for layout in layouts] == [
        (Slice(0, 2), Slice(9, 9)), (Slice(2, 4), Slice(8, 9)), (Slice(4, 6), Slice(6, 8))
    ]  # fmt: skip
    assert [layout.padding for layout in layouts] == [(slice(2, 4),), (slice(3, 4),), ()]
    assert layouts[1].tokens.tolist() == [2, 3, 8, -1]
    assert layouts[1].positions.tolist() == [2, 3, 4, 0]
    assert layouts[1].zero_padding_(torch.ones(1, 4)).tolist() == [[1, 1, 1, 0]]


def test_one_rank_holds_one_slice_in_any_order():
    assert Layout((0, 7), "zigzag").slices == Layout((0, 7), "contiguous").slices == (Slice(0, 7),)


def test_a_continued_document_does_not_start_and_keeps_its_positions():
    layout = Layout((0, 3, 8), past_tokens=10)
    assert layout.starts(layout.slices[0]) == (3,)
    assert layout.positions.tolist() == [10, 11, 12, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": (1, 4)}, r"begins \[1, 4\]: expected 0"),
        ({"cu_seqlens": (0,)}, "at least one document"),
        ({"cu_seqlens": (0, 3, 3, 4)}, "has 3 after 3: expected strictly increasing"),
        ({"cu_seqlens": (0, 2.5, 4)}, "expected integers"),
        ({"cu_seqlens": (0, 4), "order": "diagonal"}, "one of contiguous, zigzag, balanced, not 'diagonal'"),
        ({"cu_seqlens": (0, 4), "size": 2, "rank": 2}, "rank 2 is not one of 2 ranks"),
        ({"cu_seqlens": (0, 4), "past_tokens": -1}, "number of tokens, not -1"),
    ],
)
def test_wrong_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


def test_a_layout_over_ranks_without_their_group_cannot_be_computed_on():
    assert Layout((0, 8)).comm_group is None
    with pytest.raises(ValueError, match="over 2 ranks and has no process group"):
        _ = Layout((0, 8), "contiguous", size=2, rank=1).comm_group


def test_shard_and_unshard_refuse_what_does_not_fit():
    layout = Layout((0, 8), "contiguous", size=2, rank=0)
    with pytest.raises(ValueError, match="has 7 tokens, the layout 8"):
        layout.shard(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="1 parts for 2 ranks"):
        layout.unshard([torch.zeros(1, 4)])
