"""Token generation: chunked prefill of the prompt, then decoding with a cache."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from longctx.errors import UserError
from longctx.generate.sampling import Sampling
from longctx.model.decoder import Decoder

PREFILL_CHUNK = 4096
"""Tokens per prefill pass: bounds the activations, whatever the length of the prompt."""


def generate(
    decoder: Decoder,
    tokens: Sequence[int] | Tensor,
    count: int,
    sampling: Sampling | None = None,
    *,
    stop: Collection[int] = (),
    vocabulary: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[int]:
    """Generate up to `count` tokens after the prompt `tokens [n]`, yielding each as soon as it is sampled.

    A token in `stop` ends generation and is not yielded. Only tokens below `vocabulary` are sampled, since an embedding
    often has more rows than the tokenizer has tokens; None: all rows. `sampling`: `Sampling()` if None. The prompt is
    prefilled `prefill_chunk` tokens at a time. Linear layers decode from a fixed-size recurrent state and softmax
    layers from a KV cache (`longctx.layers.cache.Cache`): if all layers are linear or windowed, the cost per token does
    not grow with the context.

    Raises UserError, before any computation, if an argument is invalid.
    """
    sampling = Sampling() if sampling is None else sampling
    rows = decoder.head_weight.shape[0]
    vocabulary = rows if vocabulary is None else vocabulary
    if not 0 < vocabulary <= rows:
        raise UserError(f"vocabulary: {vocabulary} tokens, but the model's embedding has {rows} rows")
    if count < 1:
        raise UserError(f"count: {count}; give the number of tokens to generate, 1 or more")
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk: {prefill_chunk}; give the number of tokens per prefill pass, 1 or more")
    prompt = torch.as_tensor(tokens)
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise UserError(f"tokens: the prompt has shape {list(prompt.shape)}; give one sequence of at least one token")
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise UserError(f"tokens: the prompt is {prompt.dtype}; give integers")
    prompt = prompt.long()
    if int(prompt.min()) < 0 or int(prompt.max()) >= rows:
        raise UserError(
            f"tokens: the prompt has ids from {int(prompt.min())} to {int(prompt.max())}, but the embedding has ids 0 "
            f"to {rows - 1}; encode it with the tokenizer that the model was trained with"
        )
    return _generate(
        decoder, prompt.to(decoder.head_weight.device), count, sampling, set(stop), vocabulary, prefill_chunk
    )


def _generate(
    decoder: Decoder,
    prompt: Tensor,
    count: int,
    sampling: Sampling,
    stop: set[int],
    vocabulary: int,
    prefill_chunk: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = decoder.new_cache()
    *earlier, last = prompt[None].split(prefill_chunk, dim=1)
    for chunk in earlier:
        decoder.next_logits(chunk, cache)
    for _ in range(count):
        logits = decoder.next_logits(last, cache)[0, :vocabulary]
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        token = sampling.draw(logits, uniform)
        if token in stop:
            return
        yield token
        last = prompt.new_tensor([[token]])
