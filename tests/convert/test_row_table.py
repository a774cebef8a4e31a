"""Row tables: rows only move, so that a tensor written by a table is read back bit for bit."""

import pytest
import torch

from longctx.convert import row_table
from longctx.convert.row_table import (
    CachedRows,
    MappedTensor,
    RowRange,
    RowTable,
    flat_shape,
    gather_rows,
    lazy_tensor,
    rows_per_buffer,
)

SHAPES = {
    "qkv": torch.Size([10, 4]),
    "conv": torch.Size([10, 3]),
    "experts": torch.Size([2, 3, 4]),
    "norm": torch.Size([5]),
}


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OURS = {name: draw(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def table():
    """Queries, and keys and values in one tensor, in another order than ours; an expert per tensor."""
    rows = RowTable(SHAPES)
    rows.put("qkv", "q", RowRange("kv", 2, 2), RowRange("kv", 0, 2))
    rows.put("conv", "conv1d", conv=True)
    rows.put("experts", RowRange("expert.0", 0, 3), RowRange("expert.1", 0, 3))
    rows.put("norm", "norm.weight")
    return rows


def reader(tensors):
    """Reads rows of tensors, all dimensions but the last as rows."""

    def read(name, begin, end):
        tensor = tensors[name]
        flat = tensor if tensor.dim() == 1 else tensor.reshape(-1, tensor.shape[-1])
        return flat[begin:end]

    return read


def gathered(mapped, read):
    lazy = lazy_tensor(mapped, read)
    entries, step = mapped.shape[0], lazy.rows
    return torch.cat([lazy.make(begin, min(begin + step, entries)) for begin in range(0, entries, step)])


def test_tensors_are_split_into_those_of_the_other_layout():
    theirs = table().theirs
    assert {name: mapped.shape for name, mapped in theirs.items()} == {
        "q": (6, 4),
        "kv": (4, 4),
        "conv1d": (10, 1, 3),
        "expert.0": (3, 4),
        "expert.1": (3, 4),
        "norm.weight": (5,),
    }
    assert theirs["kv"].ranges == (RowRange("qkv", 8, 2), RowRange("qkv", 6, 2))
    got = {name: gathered(mapped, reader(OURS)) for name, mapped in theirs.items()}
    assert torch.equal(got["q"], OURS["qkv"][:6])
    assert torch.equal(got["kv"], OURS["qkv"][[8, 9, 6, 7]])
    assert torch.equal(got["conv1d"][:, 0], OURS["conv"])
    assert torch.equal(got["expert.1"], OURS["experts"][1])
    assert torch.equal(got["norm.weight"], OURS["norm"])


@pytest.mark.parametrize("buffer_bytes", [1, 40, 2**30])
def test_both_directions_are_inverse_whatever_the_buffers(monkeypatch, buffer_bytes):
    monkeypatch.setattr(row_table, "BUFFER_BYTES", buffer_bytes)
    theirs = {name: gathered(mapped, reader(OURS)) for name, mapped in table().theirs.items()}
    back = {name: gathered(mapped, reader(theirs)) for name, mapped in table().ours.items()}
    assert {name: tensor.shape for name, tensor in back.items()} == SHAPES
    assert all(torch.equal(back[name], OURS[name]) for name in SHAPES)


def test_a_tensor_of_the_same_shape_keeps_its_dimensions():
    rows = RowTable({"experts": torch.Size([2, 3, 4])})
    rows.put("experts", "all", same_shape=True)
    assert rows.theirs["all"].shape == (2, 3, 4)
    assert rows.shape("experts") == (2, 3, 4)


def test_ranges_that_do_not_make_up_a_tensor_are_refused():
    with pytest.raises(AssertionError, match="qkv"):
        RowTable(SHAPES).put("qkv", RowRange("q", 0, 6))


def test_a_tensor_that_is_not_mapped_is_refused():
    rows = RowTable(SHAPES)
    rows.put("qkv", "qkv")
    with pytest.raises(AssertionError, match="norm"):
        _ = rows.ours


def test_rows_of_the_other_layout_that_nothing_maps_are_refused():
    rows = RowTable({"q": torch.Size([2, 4])})
    rows.put("q", RowRange("qkv", 2, 2))
    with pytest.raises(AssertionError, match="qkv"):
        _ = rows.theirs


@pytest.mark.parametrize(
    ("shape", "rows", "row"), [((5,), 5, ()), ((5, 4), 5, (4,)), ((2, 3, 4), 6, (4,)), ((5, 1, 3), 5, (3,))]
)
def test_a_row_is_the_last_dimension_and_a_number_of_a_vector(shape, rows, row):
    assert flat_shape(shape) == (rows, row)


def test_a_buffer_has_at_least_one_entry(monkeypatch):
    monkeypatch.setattr(row_table, "BUFFER_BYTES", 100)
    assert rows_per_buffer((50,)) == 25
    assert rows_per_buffer((50, 6)) == 4
    assert rows_per_buffer((50, 2, 6)) == 2
    assert rows_per_buffer((50, 1000)) == 1


def test_only_the_rows_of_the_range_are_read_in_buffers(monkeypatch):
    monkeypatch.setattr(row_table, "BUFFER_BYTES", 2 * 4 * 4)  # two rows of 4
    tensors, reads = {"a": draw((6, 4), 1), "b": draw((3, 4), 2)}, []

    def read(name, begin, end):
        reads.append((name, begin, end))
        return tensors[name][begin:end]

    ranges = (RowRange("a", 1, 5), RowRange("b", 0, 2))
    got = gather_rows(ranges, 2, 6, torch.empty(4, 4), read)
    assert torch.equal(got, torch.cat([tensors["a"][1:], tensors["b"][:2]])[2:6])
    assert reads == [("a", 3, 5), ("a", 5, 6), ("b", 0, 1)]


def test_nothing_is_read_before_a_tensor_is_made():
    def read(name, begin, end):
        raise AssertionError("read")

    lazy = lazy_tensor(MappedTensor(torch.Size([2, 3]), (RowRange("a", 0, 2),)), read)
    assert lazy.shape == (2, 3)
    with pytest.raises(AssertionError, match="read"):
        lazy.make(0, 2)


class Stored:
    """Weights in memory that count reads."""

    def __init__(self):
        self.shapes, self.reads = SHAPES, []

    def read_rows(self, name, begin, end):
        self.reads.append((name, begin, end))
        return OURS[name][begin:end]


def test_a_buffer_is_read_once_for_neighbouring_rows(monkeypatch):
    monkeypatch.setattr(row_table, "BUFFER_BYTES", 4 * 4 * 4)  # four rows of 4, one expert
    weights = Stored()
    cached = CachedRows(weights)
    for begin, end in ((0, 2), (2, 5), (5, 8)):
        assert torch.equal(cached.read_rows("qkv", begin, end), OURS["qkv"][begin:end])
    assert weights.reads == [("qkv", 0, 4), ("qkv", 4, 8)]
    assert torch.equal(cached.read_rows("qkv", 7, 10), OURS["qkv"][7:])
    assert weights.reads[2:] == [("qkv", 8, 10)]


def test_rows_of_experts_and_vectors_are_read_through_the_cache():
    cached = CachedRows(Stored())
    assert torch.equal(cached.read_rows("experts", 2, 5), OURS["experts"].view(6, 4)[2:5])
    assert torch.equal(cached.read_rows("norm", 1, 4), OURS["norm"][1:4])
