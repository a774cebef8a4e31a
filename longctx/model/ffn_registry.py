"""Registry of feed-forward layers, by the names that recipes use. A new one is a file here and an entry in `FFNS`."""

from longctx.model.ffn import FeedForwardConfig, SwigluConfig
from longctx.model.moe import MoeConfig

FFNS: dict[str, type[FeedForwardConfig]] = {config.name: config for config in (SwigluConfig, MoeConfig)}

NO_FFN = "none"
"""The name for layers without a feed-forward."""
