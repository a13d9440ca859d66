"""The routing of one call: which tokens are real, and the losses of the routers (arXiv 2408.08274, section 3).

    NLL + alpha * N sum_i f_i P_i + beta * mean(logsumexp(logits)^2)        mean over layers, padding left out

A layer's loss is tied to its gates: their backward adds its gradient, so it is there once under checkpointing of either
kind. How much is due is the gradient that arrives at the main loss, so that whatever divides or scales that one (loss
scaling, accumulation) does so with these. A compiler wants no such side effects: there the losses are collected by the
call and added.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_plugins.training.routers import balance_loss, noted, tied

# The running layer's call. Set by the layer and not by the model: a checkpoint's recomputation runs layers alone.
_RUNNING = threading.local()


@dataclass(eq=False)
class RoutingCall:
    """Handed down to the layers by a model's forward.

    Attributes:
        real: (B, S) bool, False where padding is; None: there is none.
        balance, z: weights of the two losses for one layer; 0 and 0: none.
        scale: the gradient that arrived at the main loss, in the running backward.
        losses: of the layers so far, where a compiler traces.
    """

    real: torch.Tensor | None = None
    balance: float = 0.0
    z: float = 0.0
    over: str = "batch"
    scale: torch.Tensor | float = 1.0
    losses: list[torch.Tensor] = field(default_factory=list)

    def loss(self, logits: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """A layer's; logits, shares and chosen (B, S, N)."""
        found = self.balance * balance_loss(shares, chosen, self.real, self.over)
        squares = logits.logsumexp(-1).square()
        if self.real is None:
            return found + self.z * squares.mean()
        rows = self.real.to(squares.dtype)
        return found + self.z * (squares * rows).sum() / rows.sum().clamp(min=1)

    def bound(
        self, gates: torch.Tensor, logits: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """The gates as they are, with the gradient of the layer's loss beside theirs."""
        if not (self.balance or self.z) or not torch.is_grad_enabled():
            return gates
        loss = self.loss(logits, shares, chosen)
        if torch.compiler.is_compiling():
            self.losses.append(loss)
            return gates
        return tied(gates, loss, self)

    def joined(self, loss: torch.Tensor, share: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The main loss, with its value; the routers' losses get their gradient through it.

        share: of an optimizer step's tokens that are in this call, where the loss is divided by those of all.
        """
        if torch.compiler.is_compiling():
            if not self.losses:
                return loss
            more = torch.stack(self.losses).sum() * share
            return loss + (more - more.detach())
        return noted(loss, self, share)


@contextlib.contextmanager
def running(call: RoutingCall) -> Iterator[None]:
    """Inside, `current` is this call."""
    before = current()
    _RUNNING.call = call
    try:
        yield
    finally:
        _RUNNING.call = before


def current() -> RoutingCall | None:
    return getattr(_RUNNING, "call", None)


def real_tokens(attention_mask: Any, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """(B, S) bool of a call's tokens (B, S, ...) that are not padding; None if the mask does not say."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    start = 0 if tokens is None else attention_mask.shape[1] - tokens.shape[1]  # a mask covers the cache too
    return attention_mask[:, start:].bool()
