"""Registration of torch operators `longctx::<name>`: opaque to torch.compile, counted by FlopCounterMode."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register(
    name: str,
    signature: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    *,
    values: bool = False,
) -> Any:
    """Register an operator and return it. `fake` returns its results without contents, for tensors without contents.

    `flops` takes the arguments with shapes in the place of tensors; with `values`, the tensors.
    """
    torch.library.define(f"longctx::{name}", signature)
    torch.library.impl(f"longctx::{name}", "CompositeExplicitAutograd")(function)
    torch.library.register_fake(f"longctx::{name}")(fake)
    packet = getattr(torch.ops.longctx, name)
    register_flop_formula(packet, get_raw=values)(flops)
    return packet.default
