"""Token mixers, by their letters in `model.layers`. A new one is a file here and a name in `MIXERS`."""

from longctx.mixers.base import Mixer, MixerConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig

MIXERS: dict[str, type[MixerConfig]] = {config.letter: config for config in (LightningConfig, SoftmaxConfig)}

__all__ = ["MIXERS", "Mixer", "MixerConfig"]
