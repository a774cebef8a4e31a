"""DeepSpeed adapter: `initialize` over a mesh, Ulysses `DistributedAttention`, and ZeRO's gradient scale.

`longctx.adapters.deepspeed.engine` is the engine of recipes.
"""

from longctx.adapters.versions import TestedVersions

TESTED = TestedVersions("deepspeed", "deepspeed", oldest="0.19.8", newest="0.19", extra="deepspeed")
TESTED.check()

from longctx.adapters.deepspeed.attention import DistributedAttention  # noqa: E402 - the version is checked first
from longctx.adapters.deepspeed.groups import Groups  # noqa: E402
from longctx.adapters.deepspeed.initialize import initialize  # noqa: E402
from longctx.adapters.deepspeed.probe import gradients_of  # noqa: E402

__all__ = ["TESTED", "DistributedAttention", "Groups", "gradients_of", "initialize"]
