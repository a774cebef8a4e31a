"""Ranks that stop answering: SIGSTOP on one machine and in a cluster, and a link that is cut between two hosts."""

import os
import re
import signal

from longctx.launch.hosts import INTERFACE, address, hosts
from tests.e2e.jobs import Job
from tests.faults.faults import Kind, Trial, expect, run
from tests.faults.starts import ranks_of_a_cluster

PORT = 29511
"""Of rank 0, on a host of its own."""
LONG = ("train.steps=100000", "checkpoint.every=100000", "parallel.timeout=16s")
RANKS_4 = ("parallel.cp=2", "parallel.dp_shard=2")


def _stop_a_rank(trial: Trial) -> None:
    """SIGSTOP one of 2 or 4 ranks; the launcher names it."""
    folder = trial.shared.copy(trial.folder)
    size = trial.random.choice([2, 4])
    job = Job(folder, *LONG, *(RANKS_4 if size == 4 else ()), ranks=size)
    job.wait_for_step(trial.random.randint(1, 5))
    ranks = job.ranks()
    victim = trial.random.randrange(size)
    os.kill(ranks[victim], signal.SIGSTOP)
    status, _, stderr = job.wait()
    expect(status == 1, f"status {status}: {stderr}")
    named = re.findall(r"rank (\d+) \(process (\d+) on ", stderr)
    expect(named == [(str(victim), str(ranks[victim]))], f"rank {victim} was stopped, {named} named: {stderr}")


def _stop_a_machine(trial: Trial) -> None:
    """SIGSTOP one of the two ranks of a cluster; the other ends and says why."""
    folder = trial.shared.copy(trial.folder)
    ranks = ranks_of_a_cluster(folder, [LONG, LONG])
    victim = trial.random.randint(0, 1)
    try:
        _wait_for_steps(trial, ranks)
        ranks[victim].send_signal(signal.SIGSTOP)
        _, stderr = ranks[1 - victim].communicate(timeout=100)
    finally:
        for rank in ranks:
            rank.kill()
    expect(ranks[1 - victim].returncode == 1, f"status {ranks[1 - victim].returncode}: {stderr}")
    named = f"rank 1 (process {ranks[1].pid} on " if victim else "the rendezvous store at 127.0.0.1:"
    expect(named in stderr, f"rank {victim} was stopped: {stderr}")


def _cut_a_link(trial: Trial) -> None:
    """Cut the link between the hosts of two ranks; both end within their timeout and say why."""
    folder = trial.shared.copy(trial.folder)
    with hosts(2, gbit=1.0) as prefixes:
        environment = {"MASTER_ADDR": address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
        ranks = ranks_of_a_cluster(folder, [LONG, LONG], prefixes, **environment)
        try:
            _wait_for_steps(trial, ranks)
            run(*prefixes[trial.random.randint(0, 1)], "ip", "link", "set", INTERFACE, "down")
            said = [rank.communicate(timeout=100)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    for number, (rank, stderr) in enumerate(zip(ranks, said, strict=True)):
        expect(rank.returncode == 1, f"rank {number}: status {rank.returncode}: {stderr}")
        expect(
            re.search(r"rank 1 \(process \d+ on |the rendezvous store at |lost contact with another rank", stderr),
            stderr,
        )


def _wait_for_steps(trial: Trial, ranks: list) -> None:
    metrics = trial.folder / "out" / "metrics.jsonl"
    wanted = f'"step": {trial.random.randint(1, 5)},'
    while not (metrics.exists() and wanted in metrics.read_text()):
        ended = [rank.communicate()[1] for rank in ranks if rank.poll() is not None]
        expect(not ended, f"a rank ended: {ended}")


KINDS = (
    Kind("stop", "SIGSTOP of one of 2 or 4 ranks; it alone is named", 20, _stop_a_rank),
    Kind(
        "stop-machine",
        "SIGSTOP of one of two nodes; the other names it, or the store that it holds",
        10,
        _stop_a_machine,
    ),
    Kind("cut", "the link between two hosts is cut; both ranks end and say why", 5, _cut_a_link, needs_root=True),
)
