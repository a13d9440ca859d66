"""How spread attention is: the entropy of rows of weights."""

from __future__ import annotations

import torch


def row_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row of (..., N) non-negative weights, in float64; 0 where a row has none.

    A row is made to sum to 1 first (a learned sink takes a part of it). exp(entropy) is how many keys would share it
    evenly.
    """
    weights = weights.double()
    total = weights.sum(-1, keepdim=True)
    shares = weights / total.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum(-1)
