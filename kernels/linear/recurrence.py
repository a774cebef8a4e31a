"""The contract of a linear recurrence, and the algebra of its carries.

Every linear mixer is `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = S_t^T q_t`, and they differ in the transition `A_t`: a
scalar per head, a diagonal over K, or a matrix (the delta rule). A segment of a sequence is therefore an affine map of
the state that it receives, `S_out = A S_in + S`, and affine maps compose associatively. A recurrence gives a few
functions over segments (`LinearRecurrence`); what scans the segments, in whatever order they lie over programs of a
device and over ranks (`longctx.parallel.linear.state_scan`), needs nothing else of it.

A document that begins drops the state before its first token is read. A segment in which a document begins has A = 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Gates = tuple[Tensor, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens `begin` to `end` of the tensors at hand, which follow each other in the sequence.

    `starts` are the places at which documents begin, ascending, counted from `begin`.
    """

    begin: int
    end: int
    starts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens in the segment."""
        return self.end - self.begin

    @property
    def at(self) -> slice:
        """Where it lies in the dimension of tokens."""
        return slice(self.begin, self.end)

    def cut(self, size: int) -> "list[Segment]":
        """The segment in parts of at most `size` tokens, in order; without a token, itself."""
        if self.size == 0:
            return [self]
        parts = []
        for begin in range(0, self.size, size):
            end = min(begin + size, self.size)
            inside = tuple(start - begin for start in self.starts if begin <= start < end)
            parts.append(Segment(self.begin + begin, self.begin + end, inside))
        return parts


def state_heads(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> int:
    """H: the heads that have a state, of k `[B, T, Hk, K]`, v `[B, T, Hv, V]` and gates `[H]` or `[B, T, H, ...]`."""
    return max([k.shape[2], v.shape[2], *(g.shape[0] if g.dim() == 1 else g.shape[2] for g in gates)])


def document_ids(length: int, starts: tuple[int, ...], device: torch.device) -> Tensor:
    """Number the documents of a segment: `[length]` int64, 0 for what comes before the first start."""
    ids = torch.zeros(length, dtype=torch.int64, device=device)
    if starts:
        ids.index_add_(0, torch.tensor(starts, device=device), torch.ones(len(starts), dtype=ids.dtype, device=device))
    return ids.cumsum(0)


@dataclass(frozen=True)
class Carry:
    """The affine map of a segment, `S -> A S + state`, in the accumulation dtype.

    state `[..., H, K, V]` is what the segment itself adds. transition is A: logarithms `[..., H]` (a scalar per head)
    or `[..., H, K]` (a diagonal), -inf where nothing survives, or the matrix itself `[..., H, K, K]`. The leading
    dimensions are `B`, or `N, B` for N segments at once.
    """

    transition: Tensor
    state: Tensor

    def carry_over(self, state: Tensor) -> Tensor:
        """The state after the segment, `[..., H, K, V]`, for the state before it."""
        return self._transported(state) + self.state

    def _transported(self, x: Tensor) -> Tensor:
        """A times a state, or times another transition matrix."""
        missing = self.state.dim() - self.transition.dim()
        if missing == 0:
            return self.transition @ x
        return x * self.transition.exp().view(*self.transition.shape, *[1] * missing)

    def __getitem__(self, number: int) -> "Carry":
        """The carry of one of N segments."""
        return Carry(self.transition[number], self.state[number])


def compose(left: Carry, right: Carry) -> Carry:
    """The map of two neighbouring segments, `left` first. Associative."""
    logarithms = right.transition.dim() < right.state.dim()
    transition = left.transition + right.transition if logarithms else right.transition @ left.transition
    return Carry(transition, right.carry_over(left.state))


def exclusive_scan(carries: Iterable[Carry], state: Tensor) -> list[Tensor]:
    """The state that each segment receives, and last the state after all of them.

    `carries` in the order in which the segments follow each other, `state` what the first one receives.
    """
    states = [state]
    for carry in carries:
        states.append(carry.carry_over(states[-1]))
    return states


class LinearRecurrence(Protocol):
    """Functions over N segments, forward and backward in two steps each, with a scan between the steps.

    Shapes: q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, o and do `[B, T, Ho, V]`. `gates` is what the
    recurrence defines; a gate of one dimension `[H]` is constant over the sequence, any other runs along it,
    `[B, T, H, ...]`. A state belongs to one of H heads, H the most heads that k, v and the gates have; each of them may
    have fewer, a divisor of H (state h takes head `h // (H / Hk)` of k); q may have fewer as well, or a multiple of H
    (query head i reads state `i // (Hq / H)`). Ho is the larger of Hq and H. states, ends and their gradients are
    `[N, B, H, K, V]` in the accumulation dtype. Segments do not overlap and come in any order; what a result has of
    tokens that lie in no segment is undefined.
    """

    def check(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> None:
        """Raise ValueError, naming the argument, where the tensors do not fit the recurrence."""

    def segment_length(self, heads: int, length: int, device: torch.device) -> int:
        """The most tokens that a segment should have on this device, where `heads` (B x H) run side by side."""

    def summarize(self, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
        """Pass 1: the map of each segment, from its start state to its end state; leading dimensions `N, B`."""

    def apply(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pass 2: o, in v's dtype, of segments that receive `states`, and the states after them."""

    def summarize_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor
    ) -> Carry:
        """Pass 1 backward: the maps from the gradients of the end states to those of the start states."""

    def apply_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        segments: Sequence[Segment],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Tensor]:
        """Pass 2 backward: dq, dk, dv, dgates and the gradient of `states`.

        For segments that received `states` and whose end states have the gradients `dends`. dgates are None where
        `gate_grads` is False, which some recurrences can save.
        """

    def query_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, states: Tensor
    ) -> Tensor | None:
        """Of pass 2 backward dq alone, which needs no gradient of a state: to be made while those are under way.

        None where the recurrence would compute something twice for it.
        """

    def key_value_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, dends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `query_grad` leaves, where it gave dq and no gate has a gradient: dk, dv and the gradient of the states
        that the segments received.
        """
