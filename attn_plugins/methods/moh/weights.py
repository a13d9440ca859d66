"""A layer's router: linear maps of its input to be trained, or the coefficients of a calibration."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attn_plugins.methods.moh.config import Budget
from attn_plugins.methods.moh.gates import Routing, hard, in_heads, two_stage

SPREAD = 0.02  # of a new router's logits, about: gates begin near 1


class HeadRouter(nn.Module):
    """What chooses a layer's heads by the layer's input x (arXiv 2410.11842, equations 5 and 6).

    Buffers: `units` (U,), the layer's units (heads, or KV groups), the shared ones first; `routed`, K. Of kind
    "learned" the linear maps `w_r` (E), `w_s` (h_s, if that is above 1) and `w_h` (2, if it is not 0), without biases.
    Of kind "ridge" the buffers `coefficients` (E, C) and `intercept` (E,), all zero until they are calibrated.

    Args:
        kind: "learned" or "ridge".
        width: C, channels of x.
        budget: of the layer.
        scale: of learned gates.
        seed: of W_r, which may not begin at zero: rows that are not chosen get no gradient of the task, so that equal
            ones would never be told apart. W_s and W_h do: their gates begin at 1.
        output: the name of the layer's output projection, for `calibrate`.
    """

    units: torch.Tensor
    routed: torch.Tensor
    coefficients: torch.Tensor
    intercept: torch.Tensor

    def __init__(
        self, kind: str, width: int, budget: Budget, *, scale: str = "code", seed: int = 0, output: str | None = None
    ) -> None:
        super().__init__()
        self.kind, self.budget, self.scale, self.output = kind, budget, scale, output
        self.register_buffer("units", torch.arange(budget.units))
        self.register_buffer("routed", torch.tensor(budget.routed))
        if kind == "ridge":
            self.register_buffer("coefficients", torch.zeros(budget.experts, width))
            self.register_buffer("intercept", torch.zeros(budget.experts))
            return
        self.w_r = _linear(width, budget.experts)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.w_r.weight.copy_(torch.randn(budget.experts, width, generator=draw) * (SPREAD / width**0.5))
        if budget.shared > 1:
            self.w_s = _linear(width, budget.shared)
        if budget.shared:
            self.w_h = _linear(width, 2)

    def forward(self, x: torch.Tensor) -> Routing:
        """Of the layer's input (B, N, C), in float32 whatever the model computes in."""
        budget = self.budget
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none of "meta"
            if self.kind == "ridge":
                scores = F.linear(_wide(x), _wide(self.coefficients), _wide(self.intercept))
                gates, share, chosen = hard(scores, self.routed, budget.shared, straight_through=False)
            else:
                gates, share, chosen = two_stage(
                    _logits(self.w_r, x), _logits(self.w_s, x) if budget.shared > 1 else None,
                    _logits(self.w_h, x) if budget.shared else None, self.routed, shared_count=budget.shared,
                    scale=self.scale,
                )  # fmt: skip
        return Routing(in_heads(gates, self.units, budget.group), share, chosen, budget.group)

    @torch.no_grad()
    def fill(
        self, units: torch.Tensor, routed: int, coefficients: torch.Tensor, intercept: torch.Tensor | None = None
    ) -> None:
        """Set what a calibration found, in place.

        Args:
            units: (U,), the shared ones first. routed: K.
            coefficients: (E, C), of the routed units in that order, and `intercept` (E,), of kind "ridge". Of kind
                "learned" the coefficients become W_r.
        """
        self.units.copy_(units)
        self.routed.fill_(routed)
        if self.kind == "ridge":
            assert intercept is not None  # calibrate gives it
            self.coefficients.copy_(coefficients)
            self.intercept.copy_(intercept)
        else:
            self.w_r.weight.copy_(coefficients)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.budget}"


def _linear(width: int, rows: int) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, width, rows, bias=False)  # which draws nothing from the global random state
    nn.init.zeros_(made.weight)
    return made


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _logits(linear: Any, x: torch.Tensor) -> torch.Tensor:
    if type(linear) is nn.Linear:
        return F.linear(_wide(x), linear.weight.to(_wide(x).dtype))
    return _wide(linear(x.to(linear.weight.dtype)))  # a LoRA around it, a quantised one
