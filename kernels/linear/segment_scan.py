"""The exclusive scan over the segments of a piece, and the map of the piece as a whole.

A device with many programs cuts a long sequence into hundreds of segments. On CUDA the scan over them is one kernel;
elsewhere there are few, and a loop does.
"""

import importlib.util

import torch
from torch import Tensor

from longctx.kernels.linear.recurrence import Carry


def scan_segments(carries: Carry, state: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The state that each of N segments receives, `[N, B, H, K, V]`, and the state after all of them, `[B, H, K, V]`.

    carries has the leading dimensions `N, B`, in the order in which the segments follow each other; `reverse`: they
    follow each other from the last to the first, and the results are in the order of the carries all the same. state
    `[B, H, K, V]` is what the first one in that order receives.
    """
    logarithms = carries.transition.dim() < carries.state.dim()
    if logarithms and carries.state.is_cuda and importlib.util.find_spec("triton") is not None:
        from longctx.kernels.linear.triton_segment_scan import scan_segments_triton

        return scan_segments_triton(carries.transition, carries.state, state, reverse)
    states = torch.empty_like(carries.state)
    count = len(carries.state)
    for number in reversed(range(count)) if reverse else range(count):
        states[number] = state
        state = carries[number].carry_over(state)
    return states, state


def combined(carries: Carry, *, reverse: bool = False) -> Carry:
    """The map of all segments together, `[B, ...]`."""
    if len(carries.state) == 1:
        return carries[0]
    _, state = scan_segments(carries, torch.zeros_like(carries.state[0]), reverse=reverse)
    if carries.transition.dim() < carries.state.dim():
        return Carry(carries.transition.sum(dim=0), state)
    numbers = range(len(carries.state))
    first, *others = reversed(numbers) if reverse else numbers
    transition = carries.transition[first]
    for number in others:
        transition = carries.transition[number] @ transition
    return Carry(transition, state)
