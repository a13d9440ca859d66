"""A router: shares of the experts for each token, in float32 whatever the model's precision is."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class BamRouter(nn.Module):
    """`softmax(W x)` without a bias. No nn.Linear: adapters and quantisers that take all of those leave it alone.

    16 bits would turn choices between experts that are nearly equal, so logits are of float32, under autocast too.
    """

    def __init__(self, size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, S, C) -> logits and shares, (B, S, N) float32."""
        device = x.device.type
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with exact:
            logits = F.linear(x.float(), self.weight.float())
        return logits, logits.softmax(-1)
