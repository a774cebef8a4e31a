"""Memory that nobody wrote holds NaN, so that reading it shows."""

import torch


def poison() -> None:
    """From now on fresh allocations of this process are filled with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
