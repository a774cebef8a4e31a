"""Verification: the same numbers on one rank and on N, shown for a recipe before a week of compute goes into it."""

from longctx.verify.run import Row, shrink, subject_of, verify

__all__ = ["Row", "shrink", "subject_of", "verify"]
