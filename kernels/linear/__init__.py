"""Linear recurrences on one device: every linear mixer's kernel, chunkwise, in torch operators and in Triton."""

from longctx.kernels.linear.api import linear_attention, step

__all__ = ["linear_attention", "step"]
