"""A gradient that is wrong in one place, which a check of gradients must see."""

from __future__ import annotations

from typing import Any

import torch


class Spoiled(torch.autograd.Function):
    """The identity, with the gradient of one token (or slot) of the last head of the last item changed."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[(-1,) * (grad.dim() - 2) + (77,)] *= 1.02
        return grad
