"""The process group of a run: which device, a rank alone, and a peer that is lost."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longctx.errors import UserError
from longctx.parallel.rank_errors import RankError
from longctx.recipe.tables import TrainConfig
from longctx.train import process_group as process_groups
from longctx.train.machines import Machine
from longctx.train.process_group import collective_errors, device_type, process_group


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_ranks", "device"),
    [
        ("auto", 0, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("cuda", 2, 2, "cuda"),
        ("cpu", 8, 1, "cpu"),
    ],
)
def test_cuda_is_for_a_gpu_for_every_local_rank(monkeypatch, wanted, gpus, local_ranks, device):
    pretend(monkeypatch, gpus, local_ranks)
    assert device_type(TrainConfig(steps=1, device=wanted)) == device


def test_cuda_without_enough_gpus_is_the_users_mistake(monkeypatch):
    pretend(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=r"train\.device: 'cuda' needs one GPU per local rank \(2\); there are 1"):
        device_type(TrainConfig(steps=1, device="cuda"))


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, local_ranks: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))


def test_groups_of_two_backends_are_not_split(monkeypatch):
    """A default group that is bound to a device makes DeviceMesh call split_group (pytorch issue 159200)."""
    calls = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **keywords: iter([(dist.HashStore(), 3, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **keywords: calls.append((*args, keywords)))
    monkeypatch.setattr(process_groups, "gather_machines", tuple)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with process_group("cuda", 5.0):
        pass
    (_, (backend, options), _) = calls
    assert (calls[0], backend, calls[2]) == (("device", 1), "cpu:gloo,cuda:nccl", "destroyed")
    assert options.pop("store") is not None
    assert options == {"rank": 3, "world_size": 8, "timeout": timedelta(seconds=5)}, "no device_id"


def test_a_rank_alone_needs_no_environment_and_leaves_no_group(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names})
    for _ in range(2):
        with process_group("cpu", 5.0):
            total = torch.ones(2)
            dist.all_reduce(total)
            assert (dist.get_world_size(), total.tolist()) == (1, [1.0, 1.0])
        assert not dist.is_initialized()
    with pytest.raises(KeyError), process_group("cpu", 5.0):
        raise KeyError
    assert not dist.is_initialized()


def lose_rank_1() -> str:
    """Rank 1 leaves, as one does that has failed, and rank 0 waits for it in a step."""
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(RankError) as caught, collective_errors("step 3"):
        dist.all_reduce(torch.ones(2))
    return str(caught.value)


def test_a_peer_that_is_gone_is_reported_with_what_was_under_way(ranks):
    told, _ = ranks.run(lose_rank_1, size=2)
    assert told.startswith("step 3: rank 0 lost contact with another rank, which died or timed out")
    assert "--resume auto" in told


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        (
            "[/gloo/tcp/pair.cc:553] Connection closed by peer [10.213.0.2]:48354. This is typically",
            r"rank 1 on node1 \(10.213.0.2\)",
        ),
        ("[/gloo/tcp/pair.cc:537] Read error [fe80::1]:22739: Connection reset by peer", "a rank at fe80::1"),
        ("[/gloo/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:48354", "another rank"),
        ("[/gloo/tcp/unbound_buffer.cc:87] Timed out waiting 500ms for recv operation", "another rank"),
    ],
)
def test_the_machine_of_a_lost_peer_is_named(monkeypatch, text, peer):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    machines = (Machine("node0", frozenset()), Machine("node1", frozenset({"10.213.0.2"})))
    monkeypatch.setattr(process_groups, "_machines", machines)
    with pytest.raises(RankError, match=f"lost contact with {peer}, which died"), collective_errors("step 3"):
        raise RuntimeError(text)


def wait_for_rank_1() -> float:
    """Rank 1 does not come for 2 s, and the group waits for half a second; how long rank 0 waited."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    began = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(2)
    else:
        with pytest.raises(RankError, match=r"^the end: rank 0 lost contact"), collective_errors("the end"):
            dist.all_reduce(torch.ones(2), group=group)
    return time.monotonic() - began


def test_a_peer_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(ranks):
    waited, slept = ranks.run(wait_for_rank_1, size=2)
    assert 0.4 < waited < slept


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), UserError("a mistake"), KeyError("key")])
def test_errors_of_this_rank_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, collective_errors("step 3"):
        raise error
    assert caught.value is error
