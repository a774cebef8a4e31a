"""Board of heartbeats in the rendezvous store of a job of torchrun or a cluster."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from longctx.health.beat import Beat, decode, encode


class StoreBoard:
    """A board in the rendezvous store of a job, over a connection of its own."""

    is_watched = False

    def __init__(self, host: str, port: int, timeout: float) -> None:
        """Connect; every call waits at most `timeout` seconds. Raises RuntimeError if the store does not answer."""
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        # Ranks that an elastic agent starts again find what those before them wrote.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"longctx/heartbeats/{start}", store)
        self._posted: set[int] = set()

    def post(self, rank: int, beat: Beat) -> None:
        """Report: see Board."""
        self._store.set(f"rank-{rank}", encode(beat).decode())

    def read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """Return reports: see Board."""
        self._posted |= {rank for rank in {*ranks} - self._posted if self._store.check([f"rank-{rank}"])}
        posted = sorted(self._posted & {*ranks})
        contents = self._store.multi_get([f"rank-{rank}" for rank in posted]) if posted else []
        beats = {rank: decode(content) for rank, content in zip(posted, contents, strict=True)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def declare_hang(self) -> None:
        """Ask for stacks: see Board."""
        self._store.set("hang", "declared")

    def is_hang_declared(self) -> bool:
        """Return whether stacks are asked for: see Board."""
        return bool(self._store.check(["hang"]))
