"""Feed-forward experts: top-k of N, as 3-D tensors that transformers' experts implementations run (grouped_mm, ...).

p = softmax(W_ffn x),  out = sum over the k largest of gate_i FFN_i(x)              (arXiv 2408.08274, section 3.2)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from attn_plugins.models.bam.architectures import Architecture
from attn_plugins.models.bam.router import BamRouter
from attn_plugins.models.bam.routing import current


class BamExperts(nn.Module):
    """The weights of all experts, and the plain way to run them ("eager").

    up, (N, I, C), or (N, 2 I, C) of gate and up where the architecture has both; down_proj (N, C, I); biases (N, rows).
    """

    def __init__(self, config: Any, width: int, up: str, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.up = config.num_experts, up
        rows = 2 * width if up == "gate_up_proj" else width
        for name, shape in ((up, (rows, config.hidden_size)), ("down_proj", (config.hidden_size, width))):
            setattr(self, name, nn.Parameter(torch.empty(self.num_experts, *shape)))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, shape[0])))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (T, C); top_k_index, top_k_weights (T, k) -> (T, C)."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, place = torch.where(top_k_index == expert)
            rows = F.linear(hidden_states[tokens], *self._of(self.up, expert))
            rows = self._apply_gate(rows) if self.up == "gate_up_proj" else self.act_fn(rows)  # type: ignore[operator]
            rows = F.linear(rows, *self._of("down_proj", expert)) * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, rows.to(out.dtype))
        return out

    def _of(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = getattr(self, f"{name}_bias", None)
        return getattr(self, name)[expert], None if bias is None else bias[expert]


@use_experts_implementation
class GatedExperts(BamExperts):
    """act(gate x) * up x, without biases."""


@use_experts_implementation(has_bias=True)
class BiasedGatedExperts(BamExperts):
    """act(gate x) * up x, with biases."""


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExperts(BamExperts):
    """act(up x), with biases."""


class BamFeedForward(nn.Module):
    """In the place of a layer's `mlp`.

    Args:
        config: of the mixture.
        row: its architecture.
        dense: the feed-forward of one expert, for its sizes.
    """

    def __init__(self, config: Any, row: Architecture, dense: nn.Module) -> None:
        super().__init__()
        self.experts_per_token, self.gate = config.num_experts_per_tok, config.expert_gate
        width, bias = getattr(dense, row.down).in_features, getattr(dense, row.down).bias is not None
        gated = len(row.up) == 2
        kind = (BiasedGatedExperts if bias else GatedExperts) if gated else PlainExperts
        self.router = BamRouter(config.hidden_size, config.num_experts)
        self.experts = kind(config, width, "gate_up_proj" if gated else "up_proj", bias)
        self.watch: Any = None  # a LayerWatch, while someone watches

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        logits, shares = self.router(hidden_states)
        top, index = shares.topk(self.experts_per_token, dim=-1)
        # "unit" is worth 1 in all and has the gradient of p: one that is renormalised learns nothing from one expert.
        gates = top if self.gate == "paper" else top / top.detach().sum(-1, keepdim=True)
        call = current()
        if call is not None or self.watch is not None:
            chosen = torch.zeros_like(shares).scatter(-1, index, 1.0)
            if self.watch is not None:
                gates = self.watch(gates, shares, chosen, None if call is None else call.real)
            if call is not None:
                gates = call.bound(gates, logits, shares, chosen)
        out = self.experts(hidden_states.flatten(0, 1), index.flatten(0, 1), gates.flatten(0, 1))
        return out.view_as(hidden_states)
