"""Layers for DeepSpeed, its groups of a mesh, and what it makes of gradients; `engine` has that of a recipe."""

from longctx.adapters.versions import Tested

TESTED = Tested("deepspeed", "deepspeed", oldest="0.19.8", newest="0.19", extra="deepspeed")
TESTED.check()

from longctx.adapters.deepspeed.attention import DistributedAttention  # noqa: E402 - the version comes first
from longctx.adapters.deepspeed.groups import Groups  # noqa: E402
from longctx.adapters.deepspeed.initialize import initialize  # noqa: E402
from longctx.adapters.deepspeed.probe import gradients_of  # noqa: E402

__all__ = ["TESTED", "DistributedAttention", "Groups", "gradients_of", "initialize"]
