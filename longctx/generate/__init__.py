"""Generation: a trained model goes on from a prompt, token by token, on one device."""

from longctx.generate.sampling import Sampling
from longctx.generate.stream import generate

__all__ = ["Sampling", "generate"]
