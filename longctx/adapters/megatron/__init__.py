"""Layers for Megatron-Core, in its own terms: specs, process groups, layouts and checkpoints."""

from longctx.adapters.versions import Tested

TESTED = Tested("megatron-core", "megatron.core", oldest="0.16.1", newest="0.20", extra="megatron")
TESTED.check()
