"""Delta-rule recurrence: DeltaNet, Gated DeltaNet, KDA."""

from longctx.kernels.linear.delta.recurrence import DELTA

__all__ = ["DELTA"]
