"""The tokens that a model goes on with."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from longctx.errors import UserError
from longctx.generate.sampling import Sampling
from longctx.model.decoder import Decoder

TILE = 4096
"""Tokens of a prompt that are computed at one time: activations do not grow with the prompt."""


def generate(
    decoder: Decoder,
    tokens: Sequence[int] | Tensor,
    count: int,
    sampling: Sampling | None = None,
    *,
    stop: Collection[int] = (),
    vocabulary: int | None = None,
    tile: int = TILE,
) -> Iterator[int]:
    """At most `count` tokens that follow the prompt `tokens [n]`, each as soon as it is known.

    A token of `stop` ends them and is not given. Only tokens below `vocabulary` are drawn: an embedding often has more
    rows than the tokenizer has tokens; all rows where None. `sampling`: `Sampling()` where None. What the layers
    remember is `longctx.mixers.Cache`: a token costs the same at every length where all layers are linear or have a
    window. The prompt is computed `tile` tokens at a time.

    Raises UserError, before anything is computed, where an argument does not fit.
    """
    sampling = Sampling() if sampling is None else sampling
    rows = decoder.head_weight.shape[0]
    vocabulary = rows if vocabulary is None else vocabulary
    if not 0 < vocabulary <= rows:
        raise UserError(f"vocabulary: {vocabulary} tokens, but the model's embedding has {rows} rows")
    if count < 1:
        raise UserError(f"count: {count} tokens; give the number of tokens to generate, 1 or more")
    if tile < 1:
        raise UserError(f"tile: {tile} tokens; give the number of tokens to compute at one time, 1 or more")
    prompt = torch.as_tensor(tokens)
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise UserError(
            f"tokens: the prompt has shape {list(prompt.shape)}; give one sequence of at least one token, since a "
            "model says only what follows one"
        )
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise UserError(f"tokens: the prompt is {prompt.dtype}; give integers")
    prompt = prompt.long()
    if int(prompt.min()) < 0 or int(prompt.max()) >= rows:
        raise UserError(
            f"tokens: the prompt has tokens from {int(prompt.min())} to {int(prompt.max())}, and the model knows 0 to "
            f"{rows - 1}; encode it with the tokenizer that the model was trained with"
        )
    return _generate(decoder, prompt.to(decoder.head_weight.device), count, sampling, set(stop), vocabulary, tile)


def _generate(
    decoder: Decoder, prompt: Tensor, count: int, sampling: Sampling, stop: set[int], vocabulary: int, tile: int
) -> Iterator[int]:
    chances = torch.Generator().manual_seed(sampling.seed)
    cache = decoder.new_cache()
    *earlier, last = prompt[None].split(tile, dim=1)
    for piece in earlier:
        decoder.next_logits(piece, cache)
    for _ in range(count):
        logits = decoder.next_logits(last, cache)[0, :vocabulary]
        chance = float(torch.rand((), generator=chances, dtype=torch.float64))
        token = sampling.draw(logits, chance)
        if token in stop:
            return
        yield token
        last = prompt.new_tensor([[token]])
