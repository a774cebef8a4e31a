"""Softmax attention over ranks: ring, all-gather, Ulysses and 2-D schedules."""

from longctx.parallel.attention.api import routed_attention, softmax_attention

__all__ = ["routed_attention", "softmax_attention"]
