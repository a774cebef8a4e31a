"""Chunk loops: how segments and heads are cut, tiles that are loaded and stored, and checkpointed states."""

import pytest
import torch

from longctx.kernels.linear.chunking import (
    Chunk,
    ChunkLoop,
    HeadGroup,
    Scratch,
    power_of_two,
    split_chunks,
)
from longctx.kernels.linear.recurrence import Inputs, Segment

F64, CPU = torch.float64, torch.device("cpu")


def numbers(*shape, dtype=F64):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)


def loop_of(batch=2, length=6, heads=4, group_size=8, dtype=F64):
    return ChunkLoop(
        Inputs(
            None, torch.zeros(batch, length, heads, 3, dtype=dtype), torch.zeros(batch, length, 1, 2, dtype=dtype), ()
        ),
        group_size,
    )


def test_power_of_two_is_the_smallest_that_is_enough():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


@pytest.mark.parametrize("pad", [False, True])
def test_a_ragged_segment_ends_in_a_shorter_chunk_and_starts_become_offsets_in_their_chunk(pad):
    chunks = split_chunks(Segment(10, 21, (0, 3, 4, 10)), 4, pad_to_power_of_two=pad)
    assert chunks == [
        Chunk(10, 14, (0, 3), 4),
        Chunk(14, 18, (0,), 4),
        Chunk(18, 21, (2,), 4 if pad else 3),
    ]
    assert [chunk.tokens for chunk in chunks] == [4, 4, 3]


def test_one_token_is_one_chunk_and_no_token_is_none():
    assert split_chunks(Segment(7, 8), 64, pad_to_power_of_two=True) == [Chunk(7, 8, (), 1)]
    assert split_chunks(Segment(7, 7), 64, pad_to_power_of_two=True) == []


def test_scratch_buffers_of_one_name_share_memory_and_grow():
    scratch = Scratch(torch.float32, CPU)
    large = scratch("a", 4, 6)
    assert scratch("a", 4, 6) is large
    small = scratch("a", 3, 2)
    assert small.data_ptr() == large.data_ptr()
    assert small.is_contiguous()
    assert (small.shape, small.dtype) == ((3, 2), torch.float32)
    assert scratch("b", 4, 6).data_ptr() != large.data_ptr()
    assert scratch("a", 5, 6).shape == (5, 6)
    assert scratch("wide", 2, dtype=F64).dtype == F64


@pytest.mark.parametrize(("batch", "heads", "group_size"), [(5, 3, 8), (2, 9, 8), (3, 8, 8), (1, 1, 8), (4, 2, 1)])
def test_head_groups_hold_every_pair_once_and_no_more_than_the_group_size(batch, heads, group_size):
    groups = list(loop_of(batch=batch, heads=heads, group_size=group_size).head_groups())
    pairs = [
        (row, head)
        for group in groups
        for row in range(group.rows.start, group.rows.stop)
        for head in range(group.first_head, group.end_head)
    ]
    assert sorted(pairs) == [(row, head) for row in range(batch) for head in range(heads)]
    assert sum(group.size for group in groups) == len(pairs)
    assert max(group.size for group in groups) <= group_size


def test_groups_hold_several_batch_rows_where_heads_are_few():
    assert [group.size for group in loop_of(batch=5, heads=3).head_groups()] == [6, 6, 3]


GROUP = HeadGroup(1, 2, 1, 3)
"""Heads 1 and 2 of batch row 1."""


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_loaded_tile_holds_the_chunk_of_each_head(dtype):
    loop, x = loop_of(), numbers(2, 6, 4, 3, dtype=dtype)
    tile = loop.load("x", x, GROUP, Chunk(2, 5, (), 3))
    assert tile.dtype == F64
    assert torch.equal(tile, x[1, 2:5, 1:3].transpose(0, 1).double())
    same_memory = tile.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert same_memory == (dtype == F64)


def test_rows_after_the_tokens_of_a_padded_tile_are_zero():
    loop, x = loop_of(), numbers(2, 6, 4, 3)
    loop.scratch("x", 1, 2, 4, 3).fill_(torch.nan)
    tile = loop.load("x", x, GROUP, Chunk(3, 6, (), 4))
    assert torch.equal(tile[:, :3], x[1, 3:6, 1:3].transpose(0, 1))
    assert not tile[:, 3].any()


def test_states_that_share_a_head_load_it_and_sum_what_they_store():
    loop, x, chunk = loop_of(), numbers(2, 6, 2, 3), Chunk(0, 2, (), 2)
    tile = loop.load("x", x, GROUP, chunk)
    assert torch.equal(tile, torch.stack([x[1, :2, 0], x[1, :2, 1]]))
    group = HeadGroup(0, 1, 0, 4)
    grad = loop.grad_buffer(x)
    for _ in range(2):
        loop.store(grad, group, chunk, numbers(4, 2, 3))
    want = 2 * (numbers(4, 2, 3)[0::2] + numbers(4, 2, 3)[1::2])
    assert torch.equal(grad[0, :2], want.transpose(0, 1))
    assert not grad[0, 2:].any()
    assert not grad[1].any()


def test_query_heads_that_read_one_state_are_loaded_and_stored_one_reader_at_a_time():
    loop, q, chunk = loop_of(), numbers(2, 6, 8, 3), Chunk(1, 4, (), 3)
    assert loop.readers(q) == 2
    assert loop.readers(q[:, :, :2]) == 1
    out = torch.zeros_like(q)
    for reader in range(2):
        tile = loop.load("q", q, GROUP, chunk, reader)
        assert torch.equal(tile, q[1, 1:4, 2 + reader : 6 : 2].transpose(0, 1))
        loop.store(out, GROUP, chunk, tile, reader)
    want = torch.zeros_like(q)
    want[1, 1:4, 2:6] = q[1, 1:4, 2:6]
    assert torch.equal(out, want)


def test_gradients_are_summed_in_the_accumulation_dtype_where_heads_are_shared():
    loop = loop_of(dtype=torch.bfloat16)
    shared, own = (torch.ones(2, 6, heads, 3, dtype=torch.bfloat16) for heads in (2, 4))
    assert loop.grad_buffer(shared).dtype == torch.float32
    assert not loop.grad_buffer(shared).any()
    assert loop.grad_buffer(own).dtype == torch.bfloat16


def test_outputs_have_the_larger_head_count_and_the_dtype_of_v():
    loop = loop_of()
    v = torch.zeros(2, 6, 1, 2, dtype=torch.float16)
    assert [loop.empty_outputs(torch.zeros(2, 6, heads, 3), v).shape[2] for heads in (1, 4, 8)] == [4, 4, 8]
    assert loop.empty_outputs(torch.zeros(2, 6, 1, 3), v).dtype == torch.float16


def test_states_are_copied_in_and_written_back():
    loop, states = loop_of(), numbers(2, 4, 3, 2)
    state = loop.load_state(states, GROUP)
    assert torch.equal(state, states[1, 1:3])
    state += 100
    assert torch.equal(states, numbers(2, 4, 3, 2))
    loop.store_state(states, GROUP, state)
    want = numbers(2, 4, 3, 2)
    want[1, 1:3] += 100
    assert torch.equal(states, want)
    assert loop.zero_states([Segment(0, 3), Segment(3, 6)], 5).shape == (2, 2, 4, 3, 5)
