"""
Windows: pieces of a split of the data, as tensors.
"""

import numpy as np
import torch


def cut_windows(data, starts, length):
    """Return the windows of data (N,) that begin at starts (B,): (B, length) long."""
    positions = starts[:, None] + torch.arange(length)       # (B, length)
    return torch.from_numpy(np.asarray(data)[positions.numpy()].astype(np.int64))


def spread_windows(data, n_tokens, length):
    """Return as many windows of data (N,) as n_tokens hold, spread evenly over it: (W, length)."""
    n_windows = min(n_tokens, len(data)) // length
    starts = length * torch.linspace(0, len(data) // length - 1, n_windows).round().long()
    return cut_windows(data, starts, length)
