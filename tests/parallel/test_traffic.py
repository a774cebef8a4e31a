"""What is communicated is counted by layer and collective, and an error names both."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from longctx.parallel import traffic
from longctx.parallel.attention.api import softmax_attention
from longctx.parallel.collectives import all_gather, exchange
from longctx.parallel.local_ranks import LocalRankError, LocalRanks
from longctx.parallel.traffic import count_traffic, layer
from tests.parallel.cases import layout_here


def by_layer():
    layout = layout_here((0, 16), "contiguous")
    before = traffic.total().received
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    with count_traffic() as outer, count_traffic() as inner:
        with layer("first"):
            one = softmax_attention(q, k, v, layout, 1.0, schedule="all-gather")
        with layer("second"):
            two = softmax_attention(one, k, v, layout, 1.0, schedule="ring")
        # Backward nobody says which layer it is.
        two.sum().backward()
    assert inner.calls == outer.calls
    assert traffic.total().received == before + inner.received
    assert inner.bytes.total() == sum(each.received for each in inner.layers.values())
    return {name: dict(each.calls) for name, each in inner.layers.items()}


def test_forward_and_backward_are_counted_by_layer(ranks):
    gathered = {"all_gather": 4, "reduce_scatter": 2}
    # Rank 0 sends keys twice and gets gradients once; rank 1 gets keys twice, and sends gradients.
    assert ranks.run(by_layer, size=2) == [{"first": gathered, "second": {"exchange": 3}}] * 2


def seen_by_a_thread():
    seen: list[traffic.Communication | None] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            seen.append(traffic.communication())

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(2):
        dist.barrier()
        time.sleep(0.2 * dist.get_rank())
        with layer("blocks.3"):
            all_gather(torch.zeros(4)).wait()
    stop.set()
    thread.join()
    assert traffic.communication() is None
    return list(dict.fromkeys(each for each in seen if each is not None))


def test_another_thread_sees_what_is_waited_for_and_each_wait_apart(ranks):
    first, _ = ranks.run(seen_by_a_thread, size=2)
    waits = [(each.layer, each.description) for each in first]
    assert set(waits) == {("blocks.3", "all_gather of [4] float32 over 2 ranks")}
    assert len({each.number for each in first}) == len(first) >= 2


def gather_in_a_layer(rank, fault):
    with layer("blocks.3"):
        if dist.get_rank() == rank and fault == "raises":
            raise ZeroDivisionError("on purpose")
        if dist.get_rank() == rank and fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        all_gather(torch.zeros(5 if dist.get_rank() == rank and fault == "another shape" else 4)).wait()


@pytest.mark.parametrize("fault", ["raises", "dies", "another shape"])
def test_ranks_that_wait_for_one_that_failed_end_with_the_layer_and_the_collective(fault):
    began = time.monotonic()
    with LocalRanks(3, timeout=10, settle=30) as pool, pytest.raises(LocalRankError) as caught:
        pool.run(gather_in_a_layer, 1, fault)
    assert time.monotonic() - began < 60
    told = str(caught.value)
    if fault == "raises":
        assert "ZeroDivisionError: on purpose" in told
    error = "CollectiveError: layer blocks.3: all_gather of [4] float32 over 3 ranks on rank {} failed"
    named = [rank for rank in (0, 2) if error.format(rank) in told]
    # gloo ends the process that receives more than it expects.
    assert named == [0, 2] or (fault == "another shape" and len(named) == told.count("the process died") == 1)


def silent(rank):
    with layer("blocks.7"):
        buffer = torch.zeros(4)
        if dist.get_rank() == rank:
            time.sleep(60)
        exchange({rank: torch.ones(4)}, {rank: buffer}, dist.group.WORLD).wait()


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_timeout():
    began = time.monotonic()
    with LocalRanks(2, timeout=3, settle=1) as pool, pytest.raises(LocalRankError) as caught:
        pool.run(silent, 1)
    assert time.monotonic() - began < 45
    assert "layer blocks.7: exchange (to 1, from 1) on rank 0 failed" in str(caught.value)
