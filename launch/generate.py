"""`longctx generate`: streams the continuation of a prompt to stdout."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from longctx.errors import UserError
from longctx.generate import Sampling, generate
from longctx.generate.restore import Restored, restore
from longctx.generate.stream import PREFILL_CHUNK
from longctx.generate.text import TextStream
from longctx.launch.rank_settings import threads_per_rank
from longctx.launch.terminal import echo
from longctx.model.decoder import Decoder

ONE_THREAD = 2**28
"""Parameters times tokens of a forward pass up to which one thread is about as fast as two: measured with 1M to
211M parameters, decoding and prefill. Beside other processes two are slower: each operator waits for the later one."""


def run(
    directory: Path,
    overrides: Sequence[str],
    *,
    prompt: str | None,
    prompt_file: Path | None,
    count: int,
    sampling: Sampling,
    checkpoint: Path | None,
) -> int:
    """Stream the continuation of a prompt by the model in `directory` to stdout; return the exit status.

    Messages go to stderr. Raises UserError for user errors, before any output.
    """
    text = _prompt(prompt, prompt_file)
    restored = restore(directory, overrides, checkpoint)
    tokenizer = restored.tokenizer
    tokens = torch.from_numpy(tokenizer.encode_batch([text])[0].astype(np.int64))
    stream = generate(
        restored.decoder, tokens, count, sampling, stop=(tokenizer.eos_id,), vocabulary=tokenizer.vocab_size
    )
    _echo_model(restored, len(tokens))
    text_stream, generated = TextStream(tokenizer, tokens.tolist()), 0
    with _threads_restored():
        set_threads(restored.decoder, min(len(tokens), PREFILL_CHUNK))
        start = first = time.perf_counter()
        for token in stream:
            if generated == 0:
                first = time.perf_counter()
                set_threads(restored.decoder, 1)
            generated += 1
            _write(text_stream.add(token))
    _write(text_stream.end() + "\n")
    ended = "" if generated == count else "; stopped at the end-of-document token"
    rate = f", then {(generated - 1) / (time.perf_counter() - first):,.0f} tokens/s" if generated > 1 else ""
    timing = f" ({first - start:.2f} s to first token{rate})" if generated else ""
    echo(f"{generated:,} tokens{timing}{ended}")
    return 0


def set_threads(decoder: Decoder, tokens: int) -> None:
    """Set torch's threads for passes over `tokens` tokens on a CPU: one for little work, else one per core.

    OMP_NUM_THREADS, which torch has read, takes precedence.
    """
    if decoder.head_weight.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    work = tokens * sum(parameter.numel() for parameter in decoder.parameters())
    torch.set_num_threads(1 if work <= ONE_THREAD else threads_per_rank(1))


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prompt(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise UserError("prompt: give either --prompt TEXT or --prompt-file FILE")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--prompt-file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt: not UTF-8 text (at character {error.start})") from None
    return text


def _echo_model(restored: Restored, prompt: int) -> None:
    parameter = restored.decoder.head_weight
    precision = str(parameter.dtype).removeprefix("torch.")
    echo(f"{restored.checkpoint}, {precision} on {parameter.device.type}; prompt of {prompt:,} tokens")
    if not restored.same_corpus:
        echo(
            "Warning: the tokenizer's corpus is not the one that this checkpoint was trained on; with a different "
            "tokenizer the text will be meaningless."
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
