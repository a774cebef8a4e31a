"""Megatron-Core adapter: layer specs, process groups, batch layouts and distributed checkpoints."""

from longctx.adapters.versions import TestedVersions

TESTED = TestedVersions("megatron-core", "megatron.core", oldest="0.16.1", newest="0.20", extra="megatron")
TESTED.check()
