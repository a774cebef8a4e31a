"""Feed-forward layers, by name. A new one is a file here and a name in `FFNS`."""

from longctx.model.ffn import FeedForwardConfig, SwigluConfig
from longctx.model.moe import MoeConfig

FFNS: dict[str, type[FeedForwardConfig]] = {config.name: config for config in (SwigluConfig, MoeConfig)}

NO_FFN = "none"
"""In the place of a name, of a layer that is a mixer alone."""
