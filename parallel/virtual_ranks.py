"""Virtual ranks: a context-parallel group of P ranks on fewer processes, which compute what P processes would.

Each process hosts P / c of the ranks, one per thread, on any number c of processes that divides P. A rank computes on
its own shard of a sequence, with operators of the same shapes wherever it runs, and sums over ranks are in the order of
the ranks: results are equal to the bit for every c.

`VirtualRank` is the process group of one rank, as which layouts and schedules pass it on; the collectives of
`longctx.parallel.collectives` call its methods. The ranks of a process meet in the n-th collective that each of them
calls, and the last one to arrive communicates with the other processes for all of them. Point-to-point messages go
through mailboxes, and between processes as messages of their own.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.parallel.collectives import CollectiveError, VirtualGroup, all_gather, all_to_all
from longctx.parallel.mesh import Axis

A = TypeVar("A")
R = TypeVar("R")
Together = Callable[[list[Any]], Sequence[Any]]
"""Returns the result of each hosted rank from the arguments of all of them, in rank order."""


RELEASED = "another virtual rank of this process failed"
"""The error of ranks that wait for a rank which failed."""


@dataclass
class _Meeting:
    """A collective in which the hosted ranks meet."""

    arguments: dict[int, Any] = field(default_factory=dict)
    results: Sequence[Any] | None = None
    collected: int = 0


class VirtualRanks:
    """The ranks `[first, first + hosted)` of `size`, hosted by this process of an axis."""

    def __init__(self, size: int, axis: Axis) -> None:
        """`axis`: the processes that share the ranks. Raises ValueError where their number does not divide `size`."""
        if size % axis.size:
            raise ValueError(f"{axis.size} processes do not divide {size} virtual ranks")
        self.size, self.axis = size, axis
        self.hosted = size // axis.size
        self.first = axis.rank * self.hosted
        self.ranks = [VirtualRank(self, self.first + number) for number in range(self.hosted)]
        self._changed = threading.Condition()
        self._meetings: dict[int, _Meeting] = {}
        self._mail: defaultdict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self._failure: BaseException | None = None
        self._sending = threading.Lock()
        self._threads = ThreadPoolExecutor(self.hosted, thread_name_prefix="virtual-rank")

    def run(self, function: Callable[[A], R], arguments: Sequence[A]) -> list[R]:
        """Call `function` with an argument per hosted rank, all at once; return the results in rank order.

        Each thread has one intra-operator thread: the number changes the order of some sums. Raises the first error of
        a rank; the others are then released from collectives in which they wait for it.
        """

        def on_rank(argument: A) -> R:
            torch.set_num_threads(1)
            try:
                return function(argument)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
                raise

        self._meetings.clear()
        self._mail.clear()
        self._failure = None
        for rank in self.ranks:
            rank.calls = 0
        futures = [self._threads.submit(on_rank, argument) for argument in arguments]
        wait(futures)
        if self._failure is not None:
            raise self._failure
        return [future.result() for future in futures]

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def meet(self, rank: "VirtualRank", argument: Any, together: Together) -> Callable[[], Any]:
        """Enter the rank's next collective; the returned function waits for its result."""
        local = rank.number - self.first
        with self._changed:
            number = rank.calls
            rank.calls += 1
            meeting = self._meetings.setdefault(number, _Meeting())
            meeting.arguments[local] = argument
            last = len(meeting.arguments) == self.hosted
        if last:
            results = together([meeting.arguments[n] for n in range(self.hosted)])
            with self._changed:
                meeting.results = results
                self._changed.notify_all()

        def collect() -> Any:
            with self._changed:
                self._changed.wait_for(lambda: meeting.results is not None or self._failure is not None)
                if meeting.results is None:
                    raise CollectiveError(RELEASED)
                meeting.collected += 1
                if meeting.collected == self.hosted:
                    del self._meetings[number]
                return meeting.results[local]

        return collect

    def post(self, source: int, target: int, tag: int, x: Tensor) -> None:
        """Put a message to a rank of this process into its mailbox."""
        with self._changed:
            self._mail[source, target, tag].append(x)
            self._changed.notify_all()

    def collect(self, source: int, target: int, tag: int) -> Tensor:
        """Wait for a message from a rank of this process."""
        box = self._mail[source, target, tag]
        with self._changed:
            self._changed.wait_for(lambda: box or self._failure is not None)
            if not box:
                raise CollectiveError(RELEASED)
            return box.popleft()

    def host_of(self, number: int) -> int:
        """Return the process that hosts a rank."""
        return number // self.hosted

    def send(self, x: Tensor, source: int, target: int, tag: int) -> dist.Work:
        """Start to send to a rank of another process."""
        with self._sending:
            work = dist.isend(
                x, group=self.axis.group, group_dst=self.host_of(target), tag=self._tag(source, target, tag)
            )
        assert work is not None
        return work

    def receive(self, x: Tensor, source: int, target: int, tag: int) -> dist.Work:
        """Start to receive from a rank of another process."""
        with self._sending:
            work = dist.irecv(
                x, group=self.axis.group, group_src=self.host_of(source), tag=self._tag(source, target, tag)
            )
        assert work is not None
        return work

    def _tag(self, source: int, target: int, tag: int) -> int:
        """Number messages between processes by their ranks: those of a number arrive in order."""
        return (tag * self.size + source) * self.size + target


def _sum_in_order(rows: Sequence[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


class VirtualRank(VirtualGroup):
    """The process group of P ranks as one of them sees it."""

    def __init__(self, ranks: VirtualRanks, number: int) -> None:
        super().__init__(number, ranks.size)  # type: ignore[call-arg]  # the stub has one of two constructors
        self.number, self.calls = number, 0
        self._ranks = ranks

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """See `longctx.parallel.collectives.all_gather`; the returned function waits for the result."""
        return self._ranks.meet(self, x, self._gathered)

    def _gathered(self, rows: list[Tensor]) -> Sequence[Tensor]:
        both = torch.stack(rows)
        if self._ranks.axis.group is not None:
            both = all_gather(both, self._ranks.axis.group).wait().flatten(0, 1)
        # A result per rank: callers may write to it.
        return [both, *(both.clone() for _ in rows[1:])]

    def start_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """Sum over ranks, in their order."""

        def summed(rows: list[Tensor]) -> Sequence[Tensor]:
            total = _sum_in_order(self._gathered(rows)[0].unbind())
            return [total, *(total.clone() for _ in rows[1:])]

        return self._ranks.meet(self, x, summed)

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """See `longctx.parallel.collectives.reduce_scatter`; sums are in the order of ranks."""

        def summed(sources: list[Tensor]) -> Sequence[Tensor]:
            ranks = self._ranks
            both = torch.stack(sources)  # [sources here, P, ...]
            if ranks.axis.group is not None:
                parts = both.split(ranks.hosted, dim=1)
                received = all_to_all(parts, [part.numel() for part in parts], ranks.axis.group).wait()
                both = torch.cat([part.view(ranks.hosted, ranks.hosted, *both.shape[2:]) for part in received])
            return [_sum_in_order(both[:, n].unbind()) for n in range(ranks.hosted)]

        return self._ranks.meet(self, x, summed)

    def start_all_to_all(self, sent: Tensor, sends: list[int], receives: list[int]) -> Callable[[], Tensor]:
        """Send `sends[r]` elements to rank r and receive `receives[r]` from it, flat and in rank order."""
        return self._ranks.meet(self, (sent, sends, receives), self._exchanged)

    def _exchanged(self, arguments: list[tuple[Tensor, list[int], list[int]]]) -> Sequence[Tensor]:
        ranks = self._ranks
        pieces = [sent.split(sends) for sent, sends, _ in arguments]
        if ranks.axis.group is None:
            return [torch.cat([row[n] for row in pieces]) for n in range(ranks.hosted)]
        hosts = [range(n * ranks.hosted, (n + 1) * ranks.hosted) for n in range(ranks.axis.size)]
        parts = [torch.cat([row[target] for row in pieces for target in host]) for host in hosts]
        # From a process: by its ranks, and of each by ours.
        sizes = [[receives[source] for source in host for _, _, receives in arguments] for host in hosts]
        received = all_to_all(parts, [sum(of_host) for of_host in sizes], ranks.axis.group).wait()
        split = [part.split(of_host) for part, of_host in zip(received, sizes, strict=True)]
        return [torch.cat([x for of_host in split for x in of_host[n :: ranks.hosted]]) for n in range(ranks.hosted)]

    def start_exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int
    ) -> Callable[[], None]:
        """See `longctx.parallel.collectives.exchange`."""
        ranks, here = self._ranks, self._ranks.axis.rank
        works: list[dist.Work] = []
        for target, x in sends.items():
            if ranks.host_of(target) == here:
                # The sender may write to its buffer once `wait` returns, before the receiver reads.
                ranks.post(self.number, target, tag, x.clone())
            elif x.numel():
                works.append(ranks.send(x, self.number, target, tag))
        for source, x in receives.items():
            if ranks.host_of(source) != here and x.numel():
                works.append(ranks.receive(x, source, self.number, tag))

        def finish() -> None:
            for source, x in receives.items():
                if ranks.host_of(source) == here:
                    x.copy_(ranks.collect(source, self.number, tag))
            for work in works:
                work.wait()

        return finish
