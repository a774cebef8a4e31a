"""Decoder language model: embedding, blocks of a mixer and a feed-forward with a norm before each, output head.

    h_0 = E[token]
    h  <- h + mixer(norm(h)),  h <- h + ffn(norm(h))     block = "sequential"
    h  <- h + mixer(norm(h)) + ffn(norm(h)), one norm    block = "parallel" (Chowdhery et al. 2022, PaLM, section 2)
    h  <- norm(h),  h <- a h + b mixer(h),  and so with ffn    block = "postnorm" (MiniMax-01 2025, section 2.2)
    logits = norm(h) H^T           (H = E where tied)

Logits of all tokens are never materialised: `forward` with labels returns losses (longctx.kernels.loss), and generation
uses `next_logits`, the logits of the last token only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longctx.kernels.loss import linear_cross_entropy
from longctx.layers.basic import Linear, RMSNorm, norm_layer
from longctx.layers.output import Output
from longctx.mixers import Cache
from longctx.model.config import ModelConfig
from longctx.moe.report import RouterReport
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import layer


class Embedding(nn.Embedding):
    """Token embedding, initialised with standard deviation `1 / sqrt(D)`, so that tied logits start at unit scale."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim)
        self.init_std = dim**-0.5


class Losses(NamedTuple):
    """Losses of this rank's tokens, and the routers' statistics."""

    total: Tensor
    """Sum of the negative log likelihoods (nats) times `scale`, float32 or float64; differentiable."""
    nll: Tensor
    """Negative log likelihood of each token, `[B, T_local]`, 0 without a label; not differentiable."""
    reports: dict[str, RouterReport]
    """Router statistics by the name of the layer (`blocks.3.ffn`)."""


class Block(nn.Module):
    """Decoder block, in one of the forms of the module's docstring; `h + mixer(norm(h))` without a feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = norm_layer(config.norm, config.dim, config.norm_eps)
        self.mixer = config.build_mixer(layer)
        table = config.feed_forward(layer)
        self.ffn_norm: RMSNorm | None = None
        if table is not None and config.block != "parallel":
            self.ffn_norm = norm_layer(config.norm, config.dim, config.norm_eps)
        self.ffn = None if table is None else table.build(config.dim, layer, config.depth)
        self.mixer.attention_channels = 0 if self.ffn is None else self.ffn.attention_channels
        self.normed_stream = config.block == "postnorm"
        """Whether the output of each norm replaces the residual stream."""
        factors = config.residual or {}
        self.factors = factors.get(config.mixer(layer).name), factors.get(config.feed_forwards[layer])
        """(stream, output) factors of the mixer's residual connection and of the feed-forward's; None for 1 and 1."""
        self.recompute = False
        """Activation checkpointing: keep only the block's input and recompute the block in the backward pass."""

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> tuple[Tensor, dict[str, RouterReport]]:
        """Compute the block for x `[B, T_local, D]`; return the output of the same shape and the routers' reports.

        Reports are by the name of the layer in the block (`mixer`, `ffn`). `cache` is as in
        `longctx.mixers.Mixer.forward`.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._compute, x, layout, cache, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), self._recomputing()),
            )  # fmt: skip
        return self._compute(x, layout, cache)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Recompute what the backward pass needs: the feed-forward's output goes into the block's, which nobody reads.

        The last product of a feed-forward without tiles is left out by torch, which stops once all is saved.
        """
        if self.ffn is None:
            yield
            return
        self.ffn.output_read = False
        try:
            yield
        finally:
            self.ffn.output_read = True

    def _compute(self, x: Tensor, layout: Layout, cache: Cache | None) -> tuple[Tensor, dict[str, RouterReport]]:
        normed = self.mixer_norm(x)
        mixed = Output.of(self.mixer(normed, layout, cache))
        x = _add_residual(normed if self.normed_stream else x, mixed.out, self.factors[0])
        reports = {"mixer": mixed.report}
        if self.ffn is not None:
            normed = normed if self.ffn_norm is None else self.ffn_norm(x)
            fed = Output.of(self.ffn(normed, layout, mixed.attend, cache))
            x = _add_residual(normed if self.normed_stream else x, fed.out, self.factors[1])
            reports["ffn"] = fed.report
        return x, {name: report for name, report in reports.items() if report is not None}


def _add_residual(stream: Tensor, out: Tensor, factors: tuple[float, float] | None) -> Tensor:
    return stream + out if factors is None else factors[0] * stream + factors[1] * out


class Decoder(nn.Module):
    """A language model over `vocab_size` tokens."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = norm_layer(config.norm, config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix, `[N, D]`: the embedding if tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        labels: Tensor | None = None,
        *,
        loss_tile: int = 4096,
        scale: Tensor | float = 1.0,
    ) -> Tensor | Losses:
        """Compute the logits `[B, T_local, N]` or, with labels, the losses of this rank's tokens.

        Shapes: tokens and labels `[B, T_local]` int64, labels already shifted, -100 to ignore a token. The sum of the
        losses is multiplied by `scale`. Logits exist for `loss_tile` tokens at a time.
        """
        x = self.embedding(tokens)
        reports: dict[str, RouterReport] = {}
        for number, block in enumerate(self.blocks):
            with layer(f"blocks.{number}"):
                x, block_reports = block(x, layout)
            reports |= {f"blocks.{number}.{name}": report for name, report in block_reports.items()}
        x = self.norm(x)
        if labels is None:
            return F.linear(x, self.head_weight)
        total, nll = linear_cross_entropy(x.flatten(0, 1), self.head_weight, labels.flatten(), loss_tile, scale)
        return Losses(total, nll.view(labels.shape), reports)

    def new_cache(self) -> list[Cache]:
        """Return an empty cache per block, for `next_logits` with a batch of any size."""
        return [block.mixer.new_cache() for block in self.blocks if isinstance(block, Block)]

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Sequence[Cache]) -> Tensor:
        """Prefill or decode: return the logits `[B, N]` of the token after `tokens [B, n]` and update `cache`.

        tokens (int64, n at least 1) continue the cached ones. Chunked prefill and token-by-token decoding match one
        full forward pass. On one rank. Raises ValueError if the cache is of another model or batch.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {list(tokens.shape)}: expected [batch, tokens], at least one token")
        if len(cache) != len(self.blocks):
            raise ValueError(f"cache has {len(cache)} layers, and the decoder has {len(self.blocks)}")
        layout = Layout((0, tokens.shape[1]), past_tokens=cache[0].tokens)
        x = self.embedding(tokens)
        for block, block_cache in zip(self.blocks, cache, strict=True):
            x, _ = block(x, layout, block_cache)
        return F.linear(self.norm(x[:, -1]), self.head_weight)

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """Describe the attention schedules chosen for a layout, by layer number."""
        chosen = {}
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for name, part in ((str(number), block.mixer), (f"{number} (router)", block.ffn)):
                schedule = None if part is None else part.describe_schedule(layout, dtype)
                if schedule is not None:
                    chosen[name] = schedule
        return chosen

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of one forward pass over this rank's tokens of one sequence."""
        rows, dim = self.embedding.weight.shape
        total = layout.local_length * 2 * rows * dim
        for block in self.blocks:
            assert isinstance(block, Block)
            total += block.mixer.flops(layout) + (0 if block.ffn is None else block.ffn.flops(layout))
        return total


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Count the parameters of a model with `vocab_size` rows of the vocabulary, without allocating them."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)
    return sum(parameter.numel() for parameter in decoder.parameters())
