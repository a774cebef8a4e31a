"""The models that the tests are made with."""

import itertools

import torch

from longctx.kernels import reference
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.ffn import SwigluConfig
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout

VOCABULARY = 29
ROUTERS = {"token": {}, "similarity": {"similarity_dim": 3, "temperature": 0.5}, "attention": {}}
"""The routers of experts, and keys that only one of them has."""


def hybrid(**changes: object) -> ModelConfig:
    """A lightning layer, a softmax layer with grouped heads, and so on; no width is a power of two."""
    fields: dict[str, object] = {
        "layers": "LS",
        "depth": 3,
        "dim": 12,
        "lightning": LightningConfig(heads=3),
        "softmax": SoftmaxConfig(heads=6, kv_heads=2, head_dim=4),
        "swiglu": SwigluConfig(hidden=10),
    }
    return ModelConfig(**(fields | changes))


def with_experts(**changes: object) -> ModelConfig:
    """The same with experts in the second of its layers and dense feed-forwards in the others; all losses, a bias."""
    moe = MoeConfig(experts=4, active=2, hidden=6, shared=1, balance=0.3, z=0.05, bias_rate=0.1)
    return hybrid(**({"ffn": ("swiglu", "moe"), "moe": moe, "depth": 4} | changes))


def routed(**changes: object) -> ModelConfig:
    """The same with a mixture of heads in all layers."""
    heads = HeadMixtureConfig(mixers=("softmax", "lightning"), active=1, balance=0.2)
    return with_experts(**({"heads": heads} | changes))


def routed_by(router: str, **changes: object) -> ModelConfig:
    """`with_experts` with one of the routers."""
    config = with_experts(**changes)
    moe = MoeConfig(**(config.moe.model_dump() | {"router": router} | ROUTERS[router]))
    return with_experts(moe=moe, **changes)


def model_of(router: str | None) -> ModelConfig:
    """The dense model, or one with experts and that router of theirs; with the plain one heads are routed too."""
    if router is None:
        return hybrid()
    return routed() if router == "token" else routed_by(router)


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    """The model on one rank."""
    model = Decoder(config, VOCABULARY).to(dtype)
    initialise(model, seed=7)
    return model


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Tokens of chance, `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def recomputed(config: ModelConfig, layout: Layout) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Every parameter's gradient of all losses of a batch, with kept activations and with blocks computed again."""
    x, labels = tokens(layout.length), tokens(layout.length, seed=1)
    answers = []
    for recompute in (False, True):
        model = decoder(config)
        for block in model.blocks:
            block.recompute = recompute
        losses = model(x, layout, labels)
        (losses.total + sum(r.loss for r in losses.reports.values())).backward()
        answers.append([p.grad for p in model.parameters()])
    return answers[0], answers[1]


def best_two(layer, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The sum of each token's two experts of largest scores p `[B, T, E]`, x `[B, T, D]`, a token at a time."""
    out = torch.zeros_like(x)
    for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        best = p[b, t].argsort(descending=True)[:2]
        for e in best:
            y = reference.swiglu(x[b, t] @ layer.experts.gate_up[e].T) @ layer.experts.down[e].T
            out[b, t] = out[b, t] + p[b, t, e] / p[b, t, best].sum() * y
    return out
