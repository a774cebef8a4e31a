"""State exchange between the pieces of a sequence that is split over ranks, with three schedules.

Every piece is an affine map of its start state, a carry (`longctx.kernels.linear.recurrence.Carry`). With P pieces over
W ranks:

| schedule | sends | received per rank | sequential steps |
|---|---|---|---|
| `all-gather` | all carries to all ranks (LASP-2, Sun et al. 2025) | (W-1) P/W carries | 1 collective |
| `ring` | the state, from piece to piece (LASP-1, Sun et al. 2024) | 1 state per piece | P-1 messages |
| `tree` | carries of 1, 2, 4 ... pieces (Hillis and Steele 1986) | 1 + log2 P carries per piece | 1 + log2 P messages |

A carry is about as large as a state, and twice as large or more where the transition is a matrix: `tree` is for these
carries and many ranks. All-gather leaves the state after the whole sequence on every rank; the other schedules send it
to each rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.linear.api import PieceStates
from longctx.kernels.linear.recurrence import Carry, compose, exclusive_scan
from longctx.parallel.collectives import Pending, all_gather, exchange
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import layer


def _pack(carry: Carry) -> Tensor:
    return torch.cat([carry.transition.flatten(), carry.state.flatten()])


def _unpack(flat: Tensor, like: Carry) -> Carry:
    transition, state = flat.split([like.transition.numel(), like.state.numel()])
    return Carry(transition.view_as(like.transition), state.view_as(like.state))


@dataclass(frozen=True)
class RankExchange:
    """State exchange of one layer: a call starts it, and the returned function waits for the states."""

    layout: Layout
    group: ProcessGroup
    schedule: str
    layer_name: str
    """The layer's name for traffic accounting, also in the backward pass."""
    final_needed: tuple[bool, bool]
    """Whether the final state of the scan is needed, forward and backward; if not, it may be NaN."""

    def __call__(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], PieceStates]:
        """Start the exchange of this rank's carries, in local order; `state` is the start state of the sequence.

        `reverse` scans from the last piece to the first; carries are then of gradients.
        """
        run = {"all-gather": self._all_gather, "ring": self._ring, "tree": self._tree}[self.schedule]
        with layer(self.layer_name):
            finish = run(carries, state, reverse)

        def wait() -> PieceStates:
            with layer(self.layer_name):
                return finish()

        return wait

    def _scan_order(self, reverse: bool) -> Sequence[int]:
        """Return the owner of each piece, in scan order."""
        return self.layout.owners[::-1] if reverse else self.layout.owners

    def _local_pieces(self, reverse: bool) -> list[int]:
        """Return this rank's pieces in local order, as indices in scan order."""
        numbers = self.layout.pieces_of(self.layout.rank)
        return [self.layout.pieces - 1 - n if reverse else n for n in numbers]

    def _all_gather(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], PieceStates]:
        pending = all_gather(torch.stack([_pack(carry) for carry in carries]), self.group)

        def finish() -> PieceStates:
            rows = pending.wait()
            all_carries = [_unpack(rows[rank, index], carries[0]) for rank, index in self.layout.piece_locations]
            *states, final = exclusive_scan(reversed(all_carries) if reverse else all_carries, state)
            return [states[n] for n in self._local_pieces(reverse)], final

        return finish

    def _ring(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], PieceStates]:
        def finish() -> PieceStates:
            owners, rank, local = self._scan_order(reverse), self.layout.rank, self._local_pieces(reverse)
            states: dict[int, Tensor] = {}
            sends: list[Pending[None]] = []
            running = state
            for number in sorted(local):
                if number and owners[number - 1] != rank:
                    running = torch.empty_like(state)
                    exchange({}, {owners[number - 1]: running}, self.group).wait()
                states[number] = running
                running = carries[local.index(number)].carry_over(running)
                if number + 1 < len(owners) and owners[number + 1] != rank:
                    sends.append(exchange({owners[number + 1]: running}, {}, self.group))
            for send in sends:
                send.wait()
            return [states[n] for n in local], self._final(running, owners[-1], reverse)

        return finish

    def _tree(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], PieceStates]:
        def finish() -> PieceStates:
            owners, local = self._scan_order(reverse), self._local_pieces(reverse)
            own = dict(zip(local, carries, strict=True))
            # The carry of the pieces before each one: first of one piece, then of twice as many per round.
            before = self._shift(own, 1, 0, owners, carries[0])
            distance = 1
            while distance < len(owners):
                shifted = self._shift(before, distance, 1, owners, carries[0])
                before = {n: compose(shifted[n], current) if n in shifted else current for n, current in before.items()}
                distance *= 2
            states = [before[n].carry_over(state) if n in before else state for n in local]
            last = len(owners) - 1
            end_state = own[last].carry_over(states[local.index(last)]) if last in own else state
            return states, self._final(end_state, owners[-1], reverse)

        return finish

    def _shift(
        self, carries: Mapping[int, Carry], distance: int, first: int, owners: Sequence[int], like: Carry
    ) -> dict[int, Carry]:
        """Return, per local piece, the carry of the piece `distance` before it; none for pieces before `first`."""
        rank = self.layout.rank
        shifted: dict[int, Carry] = {}
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[int]] = {}
        for number in range(first + distance, len(owners)):
            source, target = owners[number - distance], owners[number]
            if source == target == rank:
                shifted[number] = carries[number - distance]
            elif source == rank:
                sends.setdefault(target, []).append(_pack(carries[number - distance]))
            elif target == rank:
                receives.setdefault(source, []).append(number)
        size = like.transition.numel() + like.state.numel()
        buffers = {peer: like.state.new_empty(len(numbers), size) for peer, numbers in receives.items()}
        exchange({peer: torch.stack(flats) for peer, flats in sends.items()}, buffers, self.group).wait()
        for peer, numbers in receives.items():
            shifted |= {number: _unpack(flat, like) for number, flat in zip(numbers, buffers[peer], strict=True)}
        return shifted

    def _final(self, state: Tensor, owner: int, reverse: bool) -> Tensor:
        """Send the state after the last piece from its owner to every rank, if needed."""
        if not self.final_needed[reverse]:
            return torch.full_like(state, float("nan"))
        rank = self.layout.rank
        if rank == owner:
            exchange({other: state for other in range(self.layout.size) if other != rank}, {}, self.group).wait()
            return state
        final = torch.empty_like(state)
        exchange({}, {owner: final}, self.group).wait()
        return final
