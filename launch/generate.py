"""`longctx generate`: a prompt in, text out as it comes."""

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
    """Write to stdout what the model in `directory` goes on with after a prompt; the exit status.

    What is said about it goes to stderr. Raises UserError for what the user can mend, before anything is written.
    """
    text = _prompt(prompt, prompt_file)
    restored = restore(directory, overrides, checkpoint)
    tokenizer = restored.tokenizer
    tokens = torch.from_numpy(tokenizer.encode_batch([text])[0].astype(np.int64))
    stream = generate(
        restored.decoder, tokens, count, sampling, stop=(tokenizer.eos_id,), vocabulary=tokenizer.vocab_size
    )
    _introduce(restored, len(tokens))
    began = first = time.perf_counter()
    pieces, given = TextStream(tokenizer, tokens.tolist()), 0
    for token in stream:
        if given == 0:
            first = time.perf_counter()
        given += 1
        _write(pieces.add(token))
    _write(pieces.end() + "\n")
    ended = "" if given == count else ": here the model ended the document"
    rate = f", then {(given - 1) / (time.perf_counter() - first):,.0f} a second" if given > 1 else ""
    spent = f" ({first - began:.2f} s to the first{rate})" if given else ""
    echo(f"{given:,} tokens{spent}{ended}")
    return 0


def _prompt(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise UserError("the prompt: give one of --prompt TEXT and --prompt-file FILE")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--prompt-file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text:
        raise UserError("the prompt is empty: give at least a character, since a model says only what follows one")
    return text


def _introduce(restored: Restored, prompt: int) -> None:
    parameter = restored.decoder.head_weight
    precision = str(parameter.dtype).removeprefix("torch.")
    echo(f"{restored.checkpoint}, {precision} on {parameter.device.type}; {prompt:,} tokens of prompt")
    if not restored.same_corpus:
        echo(
            "The corpus that gives the tokenizer is not the one that this checkpoint was trained on: where its "
            "tokenizer is another one, the text will be nonsense."
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
