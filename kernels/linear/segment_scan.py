"""Exclusive scan over the segments of a piece, and the composed carry of the piece.

A GPU runs a long sequence as hundreds of segments, and the scan over them is one Triton kernel. Other devices have few
segments and scan them in a loop.
"""

from types import ModuleType

import torch
from torch import Tensor

from longctx.kernels.device import import_triton
from longctx.kernels.linear.recurrence import Carry, exclusive_scan


def _logarithms(carries: Carry) -> bool:
    """Whether transitions are cumulative log-decays; else they are matrices."""
    return carries.transition.dim() < carries.state.dim()


def _triton(carries: Carry) -> ModuleType | None:
    """Return the kernels for float32 carries on CUDA; None for others, or where Triton is not installed."""
    usable = carries.state.is_cuda and carries.state.dtype == torch.float32
    return import_triton("longctx.kernels.linear.triton_segment_scan") if usable else None


def scan_segments(carries: Carry, state: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Return the start state of each of N segments, `[N, B, H, K, V]`, and the end state of the scan, `[B, H, K, V]`.

    `carries` have the leading dimensions `N, B`, in sequence order; `state` `[B, H, K, V]` is the start state of the
    first segment. `reverse` scans from the last segment to the first; results stay in the order of the carries.
    """
    triton = _triton(carries)
    if triton is not None:
        scan = triton.scan_segments_triton if _logarithms(carries) else triton.scan_matrices
        return scan(carries.transition, carries.state, state, reverse)
    order = range(len(carries.state))
    order = order[::-1] if reverse else order
    scanned = exclusive_scan((carries[number] for number in order), state)
    states = torch.empty_like(carries.state)
    for number, start in zip(order, scanned, strict=False):
        states[number] = start
    return states, scanned[-1]


def compose_segments(carries: Carry, *, reverse: bool = False) -> Carry:
    """Return the carry of all segments in sequence, leading dimension `B`; `reverse` as in `scan_segments`."""
    if len(carries.state) == 1:
        return carries[0]
    triton = _triton(carries)
    if triton is not None and not _logarithms(carries):
        return Carry(*triton.compose_matrices(carries.transition, carries.state, reverse))
    _, state = scan_segments(carries, torch.zeros_like(carries.state[0]), reverse=reverse)
    if _logarithms(carries):
        return Carry(carries.transition.sum(dim=0), state)
    order = range(len(carries.state))
    first, *others = reversed(order) if reverse else order
    transition = carries.transition[first]
    for number in others:
        transition = carries.transition[number] @ transition
    return Carry(transition, state)
