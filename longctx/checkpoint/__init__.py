"""Checkpoints: saving, resuming, storage with checksums, weights to begin another run with."""
