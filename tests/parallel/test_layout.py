"""How a packed sequence lies over ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.layout import Layout, Slice, check_divisible

ORDERS = st.sampled_from(["contiguous", "zigzag"])


@st.composite
def layouts(draw):
    """The layouts of all ranks for one random packed sequence."""
    size, order = draw(st.integers(1, 5)), draw(ORDERS)
    length = draw(st.integers(1, 6)) * size * (2 if order == "zigzag" else 1)
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    bounds = (0, *sorted(inner), length)
    return [Layout(bounds, order, size, rank) for rank in range(size)]


@given(layouts())
def test_ranks_hold_every_token_once_and_unshard_is_the_inverse(ranks):
    tokens = torch.arange(ranks[0].length)[None, :, None].expand(2, -1, 3)
    parts = [layout.shard(tokens) for layout in ranks]
    assert all(part.shape == (2, layout.local_length, 3) for part, layout in zip(parts, ranks, strict=True))
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
    assert [layout.owner(n) for n in range(8)] == [
        (0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1), (0, 1)
    ]  # fmt: skip


def test_one_rank_holds_one_slice_in_any_order():
    assert Layout((0, 7), "zigzag").slices == Layout((0, 7), "contiguous").slices == (Slice(0, 7),)


def test_a_continued_document_does_not_start_and_keeps_its_positions():
    layout = Layout((0, 3, 8), continued=10)
    assert layout.starts(layout.slices[0]) == (3,)
    assert layout.positions.tolist() == [10, 11, 12, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": (1, 4)}, r"begins \[1, 4\]: expected 0"),
        ({"cu_seqlens": (0,)}, "at least one document"),
        ({"cu_seqlens": (0, 3, 3, 4)}, "has 3 after 3: expected strictly increasing"),
        ({"cu_seqlens": (0, 2.5, 4)}, "expected integers"),
        ({"cu_seqlens": (0, 4), "order": "diagonal"}, "'contiguous' or 'zigzag', not 'diagonal'"),
        ({"cu_seqlens": (0, 4), "size": 2, "rank": 2}, "rank 2 is not one of 2 ranks"),
        ({"cu_seqlens": (0, 4), "continued": -1}, "number of tokens, not -1"),
        ({"cu_seqlens": (0, 6), "order": "zigzag", "size": 2}, "multiple of 4 tokens .2 ranks x 2 slices., .* 4 or 8"),
    ],
)
def test_wrong_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


def test_fewer_tokens_than_ranks_are_refused_with_what_would_work():
    with pytest.raises(ValueError, match=r"3 tokens does not split over 4 ranks .* for example 4"):
        check_divisible(3, "contiguous", 4)


def test_a_layout_over_ranks_without_their_group_cannot_be_computed_on():
    assert Layout((0, 8)).peers is None
    with pytest.raises(ValueError, match="over 2 ranks and has no process group"):
        _ = Layout((0, 8), "contiguous", size=2, rank=1).peers


def test_shard_and_unshard_refuse_what_does_not_fit():
    layout = Layout((0, 8), "contiguous", size=2, rank=0)
    with pytest.raises(ValueError, match="has 7 tokens, the layout 8"):
        layout.shard(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="1 parts for 2 ranks"):
        layout.unshard([torch.zeros(1, 4)])
