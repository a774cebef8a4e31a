"""Reports in the rendezvous store: read by every rank, apart for each start of a job, and an error without a store."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from longctx.health.store_board import StoreBoard
from tests.health.test_beat import BEAT


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def test_the_last_report_of_each_rank_that_reported_is_read(store: dist.TCPStore) -> None:
    ranks = [StoreBoard("127.0.0.1", store.port, 5.0) for _ in range(3)]
    assert ranks[0].read(range(3)) == {}
    ranks[2].post(2, BEAT)
    assert ranks[2].read(range(3)) == {2: BEAT}
    assert ranks[0].read(range(3)) == {2: BEAT}
    ranks[2].post(2, replace(BEAT, number=2))
    ranks[1].post(1, BEAT)
    assert ranks[2].read([2]) == {2: replace(BEAT, number=2)}
    assert ranks[1].read([1]) == {1: BEAT}
    assert ranks[0].read(range(3)) == {1: BEAT, 2: replace(BEAT, number=2)}
    assert ranks[0].read([1]) == {1: BEAT}


def test_a_hang_is_declared_to_all(store: dist.TCPStore) -> None:
    one, other = (StoreBoard("127.0.0.1", store.port, 5.0) for _ in range(2))
    assert not other.is_hang_declared()
    one.declare_hang()
    one.is_hang_declared()  # a store answers questions, but not what is set: that has arrived now
    assert other.is_hang_declared()


def test_ranks_that_torchrun_starts_again_do_not_see_the_hang_before(store, monkeypatch) -> None:
    before = StoreBoard("127.0.0.1", store.port, 5.0)
    before.post(0, BEAT)
    before.declare_hang()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    after = StoreBoard("127.0.0.1", store.port, 5.0)
    assert not after.is_hang_declared()
    assert after.read([0]) == {}


def test_without_a_store_it_is_an_error(store: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError):
        StoreBoard("127.0.0.1", 1, 0.2)
