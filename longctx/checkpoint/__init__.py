"""Checkpoints: saving, resuming, sharded storage, and initial weights for other runs."""
