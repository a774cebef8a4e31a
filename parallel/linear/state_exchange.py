"""How the states of a linear recurrence reach the pieces of a sequence that lies over ranks: three schedules.

Every piece is an affine map of the state that it receives (`longctx.kernels.linear.recurrence.Carry`), P pieces over W
ranks.

| schedule | what travels | received by a rank | one after the other |
|---|---|---|---|
| `all-gather` | all maps to all ranks (LASP-2, Sun et al. 2025) | (W-1) P/W maps | 1 collective |
| `ring` | the state, from piece to piece (LASP-1, Sun et al. 2024) | a state for a piece | P-1 messages |
| `tree` | maps of 1, 2, 4 ... pieces (Hillis and Steele 1986) | (1 + log2 P) maps for a piece | 1 + log2 P messages |

A map is a state and, where a transition is a matrix, as much again or more: the tree is for these, and many ranks. The
state after the whole sequence is known to every rank after an all-gather, and costs the others a message to each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.linear.api import Received
from longctx.kernels.linear.recurrence import Carry, compose, exclusive_scan
from longctx.parallel.collectives import Pending, all_gather, exchange
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import layer


def _packed(carry: Carry) -> Tensor:
    return torch.cat([carry.transition.flatten(), carry.state.flatten()])


def _unpacked(flat: Tensor, like: Carry) -> Carry:
    transition, state = flat.split([like.transition.numel(), like.state.numel()])
    return Carry(transition.view_as(like.transition), state.view_as(like.state))


@dataclass(frozen=True)
class RankExchange:
    """A schedule on a layout, for one layer. Called with this rank's carries it begins; what it returns waits."""

    layout: Layout
    group: ProcessGroup
    schedule: str
    name: str
    """Of the layer; backward nobody else says it."""
    wanted: tuple[bool, bool]
    """Whether the state after the sequence is asked for, forward, and that before it, backward; else it may be NaN."""

    def __call__(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], Received]:
        """carries of this rank's pieces in local order, state what the first piece in sequence order receives.

        `reverse`: the sequence runs from its end, and the carries are maps of gradients.
        """
        run = {"all-gather": self._all_gather, "ring": self._ring, "tree": self._tree}[self.schedule]
        with layer(self.name):
            finish = run(carries, state, reverse)

        def wait() -> Received:
            with layer(self.name):
                return finish()

        return wait

    def _order(self, reverse: bool) -> Sequence[int]:
        """The owner of each piece, in the order in which states pass through them."""
        return self.layout.owners[::-1] if reverse else self.layout.owners

    def _mine(self, reverse: bool) -> list[int]:
        """This rank's pieces in local order, counted in that order."""
        numbers = self.layout.numbers(self.layout.rank)
        return [self.layout.pieces - 1 - n if reverse else n for n in numbers]

    def _all_gather(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], Received]:
        pending = all_gather(torch.stack([_packed(carry) for carry in carries]), self.group)

        def finish() -> Received:
            rows = pending.wait()
            maps = [_unpacked(rows[rank, place], carries[0]) for rank, place in self.layout.places]
            *received, final = exclusive_scan(reversed(maps) if reverse else maps, state)
            return [received[n] for n in self._mine(reverse)], final

        return finish

    def _ring(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], Received]:
        def finish() -> Received:
            owners, rank, mine = self._order(reverse), self.layout.rank, self._mine(reverse)
            received: dict[int, Tensor] = {}
            sent: list[Pending[None]] = []
            running = state
            for number in sorted(mine):
                if number and owners[number - 1] != rank:
                    running = torch.empty_like(state)
                    exchange({}, {owners[number - 1]: running}, self.group).wait()
                received[number] = running
                running = carries[mine.index(number)].carry_over(running)
                if number + 1 < len(owners) and owners[number + 1] != rank:
                    sent.append(exchange({owners[number + 1]: running}, {}, self.group))
            for each in sent:
                each.wait()
            return [received[n] for n in mine], self._final(running, owners[-1], reverse)

        return finish

    def _tree(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], Received]:
        def finish() -> Received:
            owners, mine = self._order(reverse), self._mine(reverse)
            own = dict(zip(mine, carries, strict=True))
            # The maps of the pieces before each one: first of one, then of twice as many in each round.
            before = self._shifted(own, 1, 0, owners, carries[0])
            distance = 1
            while distance < len(owners):
                came = self._shifted(before, distance, 1, owners, carries[0])
                before = {n: compose(came[n], each) if n in came else each for n, each in before.items()}
                distance *= 2
            received = [before[n].carry_over(state) if n in before else state for n in mine]
            last = len(owners) - 1
            after = own[last].carry_over(received[mine.index(last)]) if last in own else state
            return received, self._final(after, owners[-1], reverse)

        return finish

    def _shifted(
        self, maps: Mapping[int, Carry], distance: int, first: int, owners: Sequence[int], like: Carry
    ) -> dict[int, Carry]:
        """For each of this rank's pieces the map of the one `distance` before it; those before `first` have none."""
        rank = self.layout.rank
        came: dict[int, Carry] = {}
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[int]] = {}
        for number in range(first + distance, len(owners)):
            source, target = owners[number - distance], owners[number]
            if source == target == rank:
                came[number] = maps[number - distance]
            elif source == rank:
                sends.setdefault(target, []).append(_packed(maps[number - distance]))
            elif target == rank:
                receives.setdefault(source, []).append(number)
        size = like.transition.numel() + like.state.numel()
        coming = {peer: like.state.new_empty(len(numbers), size) for peer, numbers in receives.items()}
        exchange({peer: torch.stack(flats) for peer, flats in sends.items()}, coming, self.group).wait()
        for peer, numbers in receives.items():
            came |= {number: _unpacked(flat, like) for number, flat in zip(numbers, coming[peer], strict=True)}
        return came

    def _final(self, after: Tensor, owner: int, reverse: bool) -> Tensor:
        """What the owner of the last piece has behind it, on every rank, if it is wanted."""
        if not self.wanted[reverse]:
            return torch.full_like(after, float("nan"))
        rank = self.layout.rank
        if rank == owner:
            exchange({other: after for other in range(self.layout.size) if other != rank}, {}, self.group).wait()
            return after
        final = torch.empty_like(after)
        exchange({}, {owner: final}, self.group).wait()
        return final
