"""Tokens per second of a plain training loop around Hugging Face's MiniMax, of the size of the quickstart.

    python -m benchmarks.minimax_loop [--tokens 4096] [--steps 12] [--threads 2]

Three lightning layers to one of softmax attention, one expert as the feed-forward, bf16 autocast, AdamW with clipped
gradients, as recipes/quickstart.toml trains. The first two steps do not count. Prints the number of parameters and the
median of the other steps. Needs `pip install -e '.[compare]'`.
"""

import argparse
import sys
import time
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_

WARM_UP = 2


def steps(tokens: int, count: int) -> tuple[int, list[float]]:
    """Train on random tokens; return the number of parameters and the seconds of each step after the warm-up."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(
        vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=1, num_experts_per_tok=1, tie_word_embeddings=True,
        layer_types=[*["linear_attention"] * 3, "full_attention"], max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    seconds = []
    for _ in range(WARM_UP + count):
        inputs = torch.randint(256, (1, tokens))
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return sum(x.numel() for x in model.parameters()), seconds[WARM_UP:]


def main() -> None:
    """Train and print a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minimax_loop", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parameters, seconds = steps(arguments.tokens, arguments.steps)
    rate = arguments.tokens / median(seconds)
    sys.stdout.write(f"{parameters:,} parameters, {arguments.tokens:,} tokens per step: {rate:,.0f} tokens/s\n")


if __name__ == "__main__":
    main()
