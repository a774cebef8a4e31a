"""Linear recurrence: the contract of every linear mixer's kernels, and the algebra of carries.

Every linear mixer is `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = S_t^T q_t`; mixers differ in the transition `A_t`: a
scalar per head, a diagonal over K, or a matrix (the delta rule). A segment of a sequence is therefore an affine map of
its start state, `S_out = A S_in + S`, and affine maps compose associatively. A recurrence implements a few functions
over segments (`LinearRecurrence`); the inter-segment scan, over programs of a device and over ranks
(`longctx.parallel.linear.state_scan`), needs nothing else.

A new document resets the recurrent state before its first token. A segment in which a document begins has A = 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype

Gates = tuple[Tensor, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens `[begin, end)` of a device's tensors, consecutive in the sequence.

    `starts` are the offsets in the segment at which documents start, ascending.
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
        """The segment's slice of the token dimension."""
        return slice(self.begin, self.end)

    def cut(self, size: int) -> "list[Segment]":
        """Cut into segments of at most `size` tokens, in order; an empty segment stays one segment."""
        # torch.compile traces through caches, with a warning.
        return list(_cut(self, size) if torch.compiler.is_compiling() else _cut_once(self, size))


def _cut(whole: Segment, size: int) -> tuple[Segment, ...]:
    if whole.size == 0:
        return (whole,)
    parts, first = [], 0
    for begin in range(0, whole.size, size):
        end = min(begin + size, whole.size)
        last = first
        while last < len(whole.starts) and whole.starts[last] < end:
            last += 1
        inside = tuple(start - begin for start in whole.starts[first:last])
        parts.append(Segment(whole.begin + begin, whole.begin + end, inside))
        first = last
    return tuple(parts)


@lru_cache(maxsize=64)
def _cut_once(whole: Segment, size: int) -> tuple[Segment, ...]:
    """Cut a segment once for all layers and passes of a step: into hundreds, with thousands of documents."""
    return _cut(whole, size)


def state_heads(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> int:
    """Return H, the largest head count of k `[B, T, Hk, K]`, v `[B, T, Hv, V]` and gates `[H]` or `[B, T, H, ...]`."""
    return max([k.shape[2], v.shape[2], *(g.shape[0] if g.dim() == 1 else g.shape[2] for g in gates)])


def document_ids(length: int, starts: tuple[int, ...], device: torch.device) -> Tensor:
    """Number a segment's tokens by document: `[length]` int64, 0 before the first document start."""
    ids = torch.zeros(length, dtype=torch.int64, device=device)
    if starts:
        ids.index_add_(0, torch.tensor(starts, device=device), torch.ones(len(starts), dtype=ids.dtype, device=device))
    return ids.cumsum(0)


@dataclass(frozen=True)
class Carry:
    """The affine map of a segment, `S -> A S + state`, in the accumulation dtype.

    state `[..., H, K, V]` is what the segment adds. transition is A: cumulative log-decays `[..., H]` (a scalar per
    head) or `[..., H, K]` (a diagonal), -inf where nothing survives, or the matrix `[..., H, K, K]`. The leading
    dimensions are `B`, or `N, B` for N segments at once.
    """

    transition: Tensor
    state: Tensor

    def carry_over(self, state: Tensor) -> Tensor:
        """Return the state after the segment, `[..., H, K, V]`, for the state before it; computed in float64."""
        return (self._apply_transition(state.double()) + self.state).to(state.dtype)

    def _apply_transition(self, x: Tensor) -> Tensor:
        """Compute A times a state. Where A is 0 the result is, whatever the state: NaN does not enter a document."""
        transition = self.transition.to(x.dtype)
        missing = self.state.dim() - transition.dim()
        if missing == 0:
            nothing = (transition == 0).flatten(-2).all(dim=-1)[..., None, None]
            return (transition @ x).masked_fill_(nothing, 0.0)
        transition = transition.view(*transition.shape, *[1] * missing)
        return (x * transition.exp()).masked_fill_(transition == float("-inf"), 0.0)

    def __getitem__(self, number: int) -> "Carry":
        """Return the carry of one of N segments."""
        return Carry(self.transition[number], self.state[number])


def compose(left: Carry, right: Carry) -> Carry:
    """Compose the carries of two consecutive segments, `left` first. Associative."""
    logarithms = right.transition.dim() < right.state.dim()
    transition = left.transition + right.transition if logarithms else right.transition @ left.transition
    return Carry(transition, right.carry_over(left.state))


def exclusive_scan(carries: Iterable[Carry], state: Tensor) -> list[Tensor]:
    """Return the start state of each segment, and last the state after all of them.

    `carries` are in sequence order; `state` is the start state of the first segment. Scans in float64, as many
    roundings of a state would add up.
    """
    states, running = [state], state.double()
    for carry in carries:
        running = carry.carry_over(running)
        states.append(running.to(state.dtype))
    return states


@dataclass(frozen=True)
class Inputs:
    """Inputs of a linear recurrence: the tokens of one device, in any number of segments.

    Shapes: q `[B, T, Hq, K]`, None where only states are computed; k `[B, T, Hk, K]`; v `[B, T, Hv, V]`. `gates` are
    the recurrence's (`LinearRecurrence.gate_names`): a gate of one dimension `[H]` is constant over the sequence, any
    other runs along it, `[B, T, H, ...]`.

    Heads group without repeating anything in memory. A state belongs to one of H heads, H the largest head count of k,
    v and the gates; each of these may have a divisor of H (state h reads head `h // (H / Hk)` of k). q has a divisor or
    a multiple of H (query head i reads state `i // (Hq / H)`).

    `prepared` is what `LinearRecurrence.prepare` computed of k and the gates for these tokens and segments, in a form
    of the implementation's own; without it each pass computes it again.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates
    prepared: tuple[Tensor, ...] = ()

    @property
    def queries(self) -> Tensor:
        """q of a pass that reads states."""
        assert self.q is not None
        return self.q

    @property
    def heads(self) -> int:
        """H, the number of states per batch row."""
        return state_heads(self.k, self.v, self.gates)

    @property
    def output_heads(self) -> int:
        """Ho, the larger of Hq and H."""
        return max(self.queries.shape[2], self.heads)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """`B, H, K, V`."""
        return self.k.shape[0], self.heads, self.k.shape[3], self.v.shape[3]

    def empty_state(self) -> Tensor:
        """Return the state before the first token: zeros `[B, H, K, V]` in the accumulation dtype."""
        return torch.zeros(self.state_shape, dtype=accumulation_dtype(self.k.dtype), device=self.k.device)


GateGrads = tuple[Tensor | None, ...]


class LinearRecurrence(Protocol):
    """A linear recurrence over N segments: forward and backward in two passes each, with a scan between the passes.

    Shapes as in `Inputs`; o and do `[B, T, Ho, V]`; states, end states and their gradients `[N, B, H, K, V]` in the
    accumulation dtype. Segments do not overlap and come in any order; outputs of tokens in no segment are undefined.
    """

    @property
    def name(self) -> str:
        """Prefix of its operators, `torch.ops.longctx.<name>_apply`."""

    @property
    def gate_names(self) -> tuple[str, ...]:
        """Names of the gates, in their order in `Inputs.gates`."""

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError, naming the argument, where the inputs do not fit the recurrence."""

    def segment_length(self, heads: int, length: int, device: torch.device) -> int:
        """Return the most tokens a segment should have on this device, where `heads` (B x H) run side by side."""

    def prepare(self, inputs: Inputs, segments: Sequence[Segment]) -> Inputs:
        """Return the inputs with `prepared`: what both passes of a direction need of k and the gates. Ignores q.

        For a caller that runs both passes, before the first; `segments` are theirs. Most recurrences share nothing
        between their passes, and return the inputs as they are.
        """

    def summarize(self, inputs: Inputs, segments: Sequence[Segment]) -> Carry:
        """Pass 1: each segment's map from its start state to its end state; leading dimensions `N, B`. Ignores q."""

    def apply(self, inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """Pass 2: o in v's dtype, and the end states, for segments that start from `states`."""

    def summarize_grad(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
        """Pass 1 backward: the maps from the gradients of end states to those of start states."""

    def apply_grad(
        self,
        inputs: Inputs,
        segments: Sequence[Segment],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
        """Pass 2 backward: dq, dk, dv, the gates' gradients and that of `states`.

        The segments started from `states`, and their end states have the gradients `dends`. Without `gate_grads` the
        gates' gradients are None, which saves some recurrences work.
        """

    def query_grad(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor | None:
        """Only dq of pass 2 backward, which needs no gradient of a state and overlaps with their exchange.

        None where the recurrence would then compute something twice.
        """

    def key_value_grad(
        self, inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rest after `query_grad`, where no gate needs a gradient: dk, dv and the gradient of the start states."""

    def step(self, inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decode one token (T = 1): o `[B, 1, Ho, V]` and the new state, from the state `[B, H, K, V]` before it.

        Computed in the state's dtype; differentiable by autograd.
        """
