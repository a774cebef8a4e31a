"""A configuration of every registered mixer, for the properties that all of them have, and of options beside it."""

from itertools import pairwise

import torch
from torch import Tensor

from longctx.layers.output import Output
from longctx.layers.rotary import RopeScaling
from longctx.mixers import MIXERS, Cache, Mixer, MixerConfig
from longctx.mixers.attention_experts import AttentionExpertsConfig
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
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout

DIM = 12

CONFIGS: dict[str, MixerConfig] = {
    "L": LightningConfig(heads=3, head_dim=5),
    "S": SoftmaxConfig(heads=6, kv_heads=2, head_dim=4),
    "A": AttentionExpertsConfig(experts=3, heads=4, kv_heads=2, head_dim=4, kv="shared"),
    "B": LinearConfig(heads=6, kv_heads=3, head_dim=5, feature_map="hedgehog"),
    "R": RetentionConfig(heads=3, head_dim=6),
    "I": SimpleGlaConfig(heads=3, head_dim=5, value_dim=7),
    "M": Mamba2Config(heads=4, head_dim=5, state_dim=7, groups=2),
    "G": GlaConfig(heads=3, head_dim=5, value_dim=7, gate_rank=4, conv=3),
    "H": Hgrn2Config(heads=3, head_dim=5, value_dim=7, conv=3),
    "N": LightNetConfig(heads=3, head_dim=5, value_dim=7, gate_rank=4, conv=2),
    "D": DeltaNetConfig(heads=3, head_dim=5, negative_eigenvalues=True),
    "E": GatedDeltaNetConfig(heads=3, head_dim=5),
    "K": KdaConfig(heads=3, head_dim=5, value_dim=7, conv=0),
}
"""By letter: head widths that are no powers of two, and heads that do not make up the model's width."""


OPTIONS: dict[str, MixerConfig] = {
    "S with norms, a gate and some channels turned": SoftmaxConfig(
        heads=6,
        kv_heads=2,
        head_dim=6,
        rotary_dim=4,
        rope_theta=30.0,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=0.5, original_max_position_embeddings=20),
        qk_norm="zero_centered_rms",
        output_gate=True,
    ),
    "M with limits and no bias": Mamba2Config(
        heads=4, head_dim=5, state_dim=7, groups=2, conv_bias=False, dt_min=0.01, dt_max=0.05
    ),
    "E with two heads for one of keys": GatedDeltaNetConfig(heads=4, qk_heads=2, head_dim=5, value_dim=3),
    "L as in MiniMax": LightningConfig(heads=3, head_dim=5, form="minimax", norm_eps=1e-3),
    "S with norms": SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, qk_norm="rms", window=9),
}
"""What a published model has a layer of and the letter's own configuration has not, by words that begin with it."""


def config_of(letter: str) -> MixerConfig:
    """The mixer's entry in `CONFIGS`, which every registered one must have; or that of an option in `OPTIONS`."""
    if letter in OPTIONS:
        return OPTIONS[letter]
    assert letter in CONFIGS, (
        f"{MIXERS[letter].name} ({letter}) is registered, but tests/mixers/cases.py has no configuration of it: add "
        "one, and what every mixer has to fulfil is tested of it"
    )
    return CONFIGS[letter]


def built(letter: str, dtype: torch.dtype = torch.float64, *, layer: int = 1, depth: int = 4) -> Mixer:
    """The mixer of one layer with weights of chance, the same ones on every rank."""
    mixer = config_of(letter).build(DIM, layer, depth, 1e-5).to(dtype)
    initialise(mixer, seed=3)
    return mixer


def draw(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of a mixer and a gradient of its output, `[batch, length, DIM]`."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), dy.to(dtype)


def run(mixer: Mixer, x: torch.Tensor, layout: Layout, cache: Cache | None = None) -> torch.Tensor:
    """What the mixer gives, without what a router in it says."""
    return Output.of(mixer(x, layout, cache)).out


def causal_document_mask(cu_seqlens: tuple[int, ...]) -> Tensor:
    """`[T, T]` bool: position i sees j where both lie in one document and `j <= i`. T is the last of `cu_seqlens`."""
    length = cu_seqlens[-1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for begin, end in pairwise(cu_seqlens):
        mask[begin:end, begin:end] = True
    return mask.tril()
