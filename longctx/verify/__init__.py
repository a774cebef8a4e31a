"""Verification that a recipe computes the same on one rank and on N, before spending compute on it."""

from longctx.verify.bits import verify_bits
from longctx.verify.run import Row, shrink, subject_of, verify
from longctx.verify.training import verify_training

__all__ = ["Row", "shrink", "subject_of", "verify", "verify_bits", "verify_training"]
