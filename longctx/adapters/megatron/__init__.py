"""Layers for Megatron-Core, in its own terms: specs, process groups, layouts and checkpoints."""

from longctx.adapters.versions import Tested

TESTED = Tested("megatron-core", oldest="0.16.1", newest="0.16", extra="megatron")
TESTED.check()
