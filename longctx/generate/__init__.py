"""Text generation: sampling from a trained model, token by token, on one device."""

from longctx.generate.sampling import Sampling
from longctx.generate.stream import generate

__all__ = ["Sampling", "generate"]
