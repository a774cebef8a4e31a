"""Verification that a recipe computes the same on one rank and on N, before spending compute on it."""

from longctx.verify.bits import verify_bits
from longctx.verify.run import Row, shrink, subject_of, verify

__all__ = ["Row", "shrink", "subject_of", "verify", "verify_bits"]
