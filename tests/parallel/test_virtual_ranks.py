"""Virtual ranks: the collectives of P ranks on fewer processes give what they give on P, to the bit."""

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.collectives import (
    CollectiveError,
    all_gather,
    all_reduce,
    all_to_all,
    all_to_all_rows,
    exchange,
    reduce_scatter,
)
from longctx.parallel.mesh import Axis
from longctx.parallel.virtual_ranks import VirtualRanks

SIZE = 4


def numbers(rank, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def collectives(group):
    """Every collective once, on one rank; some are begun before others have ended."""
    rank, size = group.rank(), group.size()
    mine = numbers(rank, 3, 2)
    gathering = all_gather(mine, group)
    scattering = reduce_scatter(numbers(rank, size, 5), group)
    summed = all_reduce(mine.clone(), group)
    parts = [numbers(10 * rank + peer, rank + 2 * peer) for peer in range(size)]
    crossing = all_to_all(parts, [peer + 2 * rank for peer in range(size)], group)
    rows = all_to_all_rows(numbers(rank, 2 * size, 3), [2] * size, [2] * size, group).wait()
    following, previous, received = (rank + 1) % size, (rank - 1) % size, [torch.empty(7) for _ in range(2)]
    both = [exchange({following: numbers(rank + 100 * n, 7)}, {previous: received[n]}, group, tag=n) for n in range(2)]
    for pending in both[::-1]:
        pending.wait()
    nothing = exchange({following: torch.empty(0)} if rank == 0 else {}, {}, group).wait()
    assert nothing is None
    return [gathering.wait(), scattering.wait(), summed, *crossing.wait(), rows, *received]


def on_threads():
    """The results of this process's virtual ranks, in their order."""
    world = dist.group.WORLD
    ranks = VirtualRanks(SIZE, Axis.from_group(world))
    answers = [ranks.run(collectives, ranks.ranks) for _ in range(3)]
    ranks.close()
    for again in answers[1:]:
        for one, other in zip(answers[0], again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    return answers[0]


def on_processes():
    return collectives(dist.group.WORLD)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_collectives_give_what_they_give_on_processes(ranks, processes):
    want = ranks.run(on_processes, size=SIZE)
    got = [answer for answers in ranks.run(on_threads, size=processes) for answer in answers]
    assert len(got) == SIZE
    for one, other in zip(got, want, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("processes", [2, 4])
def test_sums_are_equal_to_the_bit_on_any_number_of_processes(ranks, processes):
    want = ranks.run(on_threads, size=1)[0]
    got = [answer for answers in ranks.run(on_threads, size=processes) for answer in answers]
    for one, other in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def wrong_on_rank_2(group):
    if group.rank() == 2:
        raise ZeroDivisionError("on rank 2")
    return all_reduce(torch.ones(1), group)


def with_a_failing_rank():
    ranks = VirtualRanks(SIZE, Axis())
    with pytest.raises(ZeroDivisionError, match="on rank 2"):
        ranks.run(wrong_on_rank_2, ranks.ranks)
    # The next call is not that one's.
    assert [float(x) for x in ranks.run(lambda group: all_reduce(torch.ones(1), group), ranks.ranks)] == [4.0] * 4
    ranks.close()
    return True


def test_an_error_of_one_rank_releases_the_others(ranks):
    assert ranks.run(with_a_failing_rank, size=1) == [True]


def released(group):
    if group.rank() == 0:
        raise ZeroDivisionError
    try:
        exchange({}, {0: torch.empty(1)}, group).wait()
    except CollectiveError as error:
        return str(error)


def waiting_for_mail():
    ranks, seen = VirtualRanks(2, Axis()), []
    with pytest.raises(ZeroDivisionError):
        ranks.run(lambda group: seen.append(released(group)), ranks.ranks)
    ranks.close()
    return seen


def test_a_rank_that_waits_for_a_message_is_released_too(ranks):
    ((text,),) = ranks.run(waiting_for_mail, size=1)
    assert text == "exchange (to none, from 0) on rank 0 failed: another virtual rank of this process failed"


def test_processes_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match="3 processes do not divide 4 virtual ranks"):
        VirtualRanks(4, Axis(3, 0, None))
