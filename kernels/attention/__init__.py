"""Block attention on one device, with the log-sum-exp (lse) that merges blocks: masks, backends, Triton."""

from longctx.kernels.attention.block import (
    CAUSAL,
    CAUSAL_MASK,
    FULL,
    BlockMask,
    IntervalMask,
    Mask,
    PlainMask,
    Positions,
    backward,
    explain_backends,
    forward,
    merge_,
    packed_documents,
    sliding_window,
)

__all__ = [
    "CAUSAL",
    "CAUSAL_MASK",
    "FULL",
    "BlockMask",
    "IntervalMask",
    "Mask",
    "PlainMask",
    "Positions",
    "backward",
    "explain_backends",
    "forward",
    "merge_",
    "packed_documents",
    "sliding_window",
]
