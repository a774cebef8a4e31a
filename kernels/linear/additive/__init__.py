"""Additive recurrence: linear attention, lightning, retention, simple GLA, Mamba-2, GLA, HGRN-2, LightNet."""

from longctx.kernels.linear.additive.recurrence import ADDITIVE

__all__ = ["ADDITIVE"]
