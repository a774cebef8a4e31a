"""The decoder: embedding, blocks of a mixer and a feed-forward before each of which the stream is normed, head.

    h_0 = E[token]
    h  <- h + mixer(norm(h)),  h <- h + ffn(norm(h))     block = "sequential"
    h  <- h + mixer(norm(h)) + ffn(norm(h)), one norm    block = "parallel" (Chowdhery et al. 2022, PaLM, section 2)
    h  <- norm(h),  h <- a h + b mixer(h),  and so with ffn    block = "postnorm" (MiniMax-01 2025, section 2.2)
    logits = norm(h) H^T           (H = E where tied)

Nothing of size tokens x vocabulary exists in training: `forward` with labels returns losses (longctx.kernels.loss);
nor in generation: `next_logits` gives those of the last token alone.
"""

from collections.abc import Sequence
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
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import layer


class Embedding(nn.Embedding):
    """Rows drawn with standard deviation `1 / sqrt(D)`: logits of a normed stream start at unit scale where tied."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim)
        self.init_std = dim**-0.5


class Losses(NamedTuple):
    """What a decoder says of a batch with labels, of this rank's tokens."""

    total: Tensor
    """The negative log likelihoods (nats) times `scale`, summed, float32 or float64; differentiable."""
    nll: Tensor
    """`[B, T_local]`: that of each token, 0 where there is no label; not differentiable."""
    reports: dict[str, RouterReport]
    """What each router says, by the name of its layer (`blocks.3.ffn`)."""


class Block(nn.Module):
    """One layer, in one of the forms of the module's docstring; without a feed-forward, `h + mixer(norm(h))`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = norm_layer(config.norm, config.dim, config.norm_eps)
        self.mixer = config.build_mixer(layer)
        table = config.feed_forward(layer)
        self.ffn_norm: RMSNorm | None = None
        if table is not None and config.block != "parallel":
            self.ffn_norm = norm_layer(config.norm, config.dim, config.norm_eps)
        self.ffn = None if table is None else table.build(config.dim, layer, config.depth)
        self.mixer.lent = 0 if self.ffn is None else self.ffn.borrowed
        self.normed_stream = config.block == "postnorm"
        """Whether what a norm gives is the stream from there on."""
        factors = config.residual or {}
        self.factors = factors.get(config.mixer(layer).name), factors.get(config.feed_forwards[layer])
        """Of the stream and of what the mixer, and the feed-forward, add to it; None: nothing is multiplied."""
        self.recompute = False
        """Keep the block's input alone, and compute the block again in the backward pass."""

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> tuple[Tensor, dict[str, RouterReport]]:
        """`[B, T_local, D]` to the same, and what the routers in it say, by the names of their layers.

        With a memory as in `longctx.mixers.Mixer.forward`.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, layout, cache, use_reentrant=False, preserve_rng_state=False)
        return self._compute(x, layout, cache)

    def _compute(self, x: Tensor, layout: Layout, cache: Cache | None) -> tuple[Tensor, dict[str, RouterReport]]:
        normed = self.mixer_norm(x)
        mixed = Output.of(self.mixer(normed, layout, cache))
        x = _added(normed if self.normed_stream else x, mixed.out, self.factors[0])
        said = {"mixer": mixed.report}
        if self.ffn is not None:
            normed = normed if self.ffn_norm is None else self.ffn_norm(x)
            fed = Output.of(self.ffn(normed, layout, mixed.attend, cache))
            x = _added(normed if self.normed_stream else x, fed.out, self.factors[1])
            said["ffn"] = fed.report
        return x, {name: report for name, report in said.items() if report is not None}


def _added(stream: Tensor, out: Tensor, factors: tuple[float, float] | None) -> Tensor:
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
        """`[N, D]`: the matrix that makes logits."""
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
        """Logits `[B, T_local, N]`, or with labels the losses of this rank's tokens.

        Shapes: tokens and labels `[B, T_local]` int64, labels already shifted, -100 where there is none. `scale` is
        what the sum of the losses is multiplied with; `loss_tile` tokens have their logits in memory at one time.
        """
        x = self.embedding(tokens)
        reports: dict[str, RouterReport] = {}
        for number, block in enumerate(self.blocks):
            with layer(f"blocks.{number}"):
                x, said = block(x, layout)
            reports |= {f"blocks.{number}.{name}": report for name, report in said.items()}
        x = self.norm(x)
        if labels is None:
            return F.linear(x, self.head_weight)
        total, nll = linear_cross_entropy(x.flatten(0, 1), self.head_weight, labels.flatten(), loss_tile, scale)
        return Losses(total, nll.view(labels.shape), reports)

    def new_cache(self) -> list[Cache]:
        """What each block remembers before the first token, for a batch of any size: `next_logits` goes on from it."""
        return [block.mixer.new_cache() for block in self.blocks if isinstance(block, Block)]

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Sequence[Cache]) -> Tensor:
        """Logits `[B, N]` of what follows `tokens [B, n]`, int64, n at least 1, which follow those in `cache`.

        After it, these are in `cache` too; a document may come in pieces of any lengths, down to token by token. On
        one rank. Raises ValueError where the memory is of another model or batch.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {list(tokens.shape)}: expected [batch, tokens], at least one token")
        if len(cache) != len(self.blocks):
            raise ValueError(f"memory is of {len(cache)} layers, and the decoder has {len(self.blocks)}")
        layout = Layout((0, tokens.shape[1]), past_tokens=cache[0].tokens)
        x = self.embedding(tokens)
        for block, remembered in zip(self.blocks, cache, strict=True):
            x, _ = block(x, layout, remembered)
        return F.linear(self.norm(x[:, -1]), self.head_weight)

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
        """The schedules of attention that were chosen for a layout, in words, by the layer's number."""
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
