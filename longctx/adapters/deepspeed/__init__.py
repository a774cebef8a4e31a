"""Layers for DeepSpeed, in its own terms."""

from longctx.adapters.versions import Tested

TESTED = Tested("deepspeed", "deepspeed", oldest="0.19.8", newest="0.19", extra="deepspeed")
TESTED.check()

from longctx.adapters.deepspeed.attention import DistributedAttention  # noqa: E402 - the version comes first

__all__ = ["TESTED", "DistributedAttention"]
