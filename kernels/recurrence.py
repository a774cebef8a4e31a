"""The contract of a linear recurrence, and the algebra of its carries.

Every linear mixer is `S_t = A_t S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`. A piece of a sequence (a tile in a kernel, a
slice on a rank) is therefore an affine map of the state that it receives, `S_out = A S_in + S`, and affine maps
compose associatively. A mixer gives four functions over a piece (`LinearRecurrence`); what scans the pieces, in
whatever order they lie over devices (`longctx.parallel.scan`), needs nothing else of it.

`starts` are the positions of a piece at which a document begins: before that token is read the state is dropped. A
piece in which a document begins therefore has `A = 0`, kept as the logarithm -inf.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Starts = tuple[int, ...]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, decays and merges: float32, or float64 where the input is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_ids(length: int, starts: Starts, device: torch.device) -> Tensor:
    """Number the documents of a piece: `[length]` int64, 0 for what comes before the first start."""
    ids = torch.zeros(length, dtype=torch.int64, device=device)
    if starts:
        ids.index_add_(0, torch.tensor(starts, device=device), torch.ones(len(starts), dtype=ids.dtype, device=device))
    return ids.cumsum(0)


@dataclass(frozen=True)
class Carry:
    """The affine map of one piece, `S -> exp(log_decay) S + state`, in the accumulation dtype.

    log_decay `[B, H]` is the logarithm of the scalar transition over the whole piece (-inf: nothing survives it),
    state `[B, H, K, V]` what the piece itself adds.
    """

    log_decay: Tensor
    state: Tensor

    def carry_over(self, state: Tensor) -> Tensor:
        """The state after the piece, `[B, H, K, V]`, for the state before it."""
        return torch.addcmul(self.state, state, self.log_decay.exp()[..., None, None])


def combine(left: Carry, right: Carry) -> Carry:
    """The map of two neighbouring pieces, `left` first. Associative."""
    return Carry(left.log_decay + right.log_decay, right.carry_over(left.state))


def exclusive_scan(carries: Iterable[Carry], state: Tensor) -> list[Tensor]:
    """The state that each piece receives, and last the state after all of them.

    `carries` in the order in which the pieces follow each other, `state` what the first one receives.
    """
    states = [state]
    for carry in carries:
        states.append(carry.carry_over(states[-1]))
    return states


class LinearRecurrence(Protocol):
    """Four functions over one piece, forward and backward in two steps each, with a scan between the steps.

    Shapes: q, k `[B, T, H, K]`, v, o `[B, T, H, V]`, states `[B, H, K, V]` in the accumulation dtype. `gates` is what
    the mixer defines: for a constant decay the logarithms `[H]`. A module with these functions is one.
    """

    def summarize(self, k: Tensor, v: Tensor, gates: Tensor, starts: Starts) -> Carry:
        """The map of the piece, from the start state to the end state."""

    def apply(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Starts, state: Tensor) -> Tensor:
        """The outputs of the piece that receives `state`."""

    def summarize_grad(self, q: Tensor, do: Tensor, gates: Tensor, starts: Starts) -> Carry:
        """The map of the piece backward: from the gradient of its end state to that of its start state."""

    def apply_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Starts, do: Tensor, state: Tensor, dstate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the piece that received `state` and whose end state has the gradient `dstate`."""
