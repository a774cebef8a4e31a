"""`longctx generate`: streams the continuation of a prompt to stdout."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from longctx.errors import UserError
from longctx.generate import Sampling, generate
from longctx.generate.restore import Restored, restore
from longctx.generate.text import TextStream
from longctx.launch.terminal import echo


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
    start = first = time.perf_counter()
    text_stream, generated = TextStream(tokenizer, tokens.tolist()), 0
    for token in stream:
        if generated == 0:
            first = time.perf_counter()
        generated += 1
        _write(text_stream.add(token))
    _write(text_stream.end() + "\n")
    ended = "" if generated == count else "; stopped at the end-of-document token"
    rate = f", then {(generated - 1) / (time.perf_counter() - first):,.0f} tokens/s" if generated > 1 else ""
    timing = f" ({first - start:.2f} s to first token{rate})" if generated else ""
    echo(f"{generated:,} tokens{timing}{ended}")
    return 0


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
