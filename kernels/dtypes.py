"""Accumulation dtype: the precision of states, decays, sums and merges."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states, decays and merges: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
