"""Token mixers: softmax attention, linear attention and state-space layers, registered by their letters.

A new one is a file here and its configuration in `_CONFIGS`; recipes then use its letter in `model.layers`.
"""

from longctx.layers.cache import Cache
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.base import Mixer, MixerConfig
from longctx.mixers.deltanet import DeltaNetConfig, GatedDeltaNetConfig, KdaConfig
from longctx.mixers.gla import GlaConfig
from longctx.mixers.hgrn2 import Hgrn2Config
from longctx.mixers.lightnet import LightNetConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.retention import RetentionConfig
from longctx.mixers.simple_gla import SimpleGlaConfig
from longctx.mixers.softmax import SoftmaxConfig

_CONFIGS: tuple[type[MixerConfig], ...] = (
    LightningConfig,
    SoftmaxConfig,
    AttentionExpertsConfig,
    LinearConfig,
    RetentionConfig,
    SimpleGlaConfig,
    Mamba2Config,
    GlaConfig,
    Hgrn2Config,
    LightNetConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    KdaConfig,
)

MIXERS: dict[str, type[MixerConfig]] = {config.letter: config for config in _CONFIGS}

__all__ = ["MIXERS", "Cache", "Mixer", "MixerConfig"]
