"""Attention experts in one attention: N H query heads, each times the gate of its expert, and one wide projection out.

    out = sum_i g_i(x) MHA_i(x),  g = softmax(W_attn x)                                (arXiv 2408.08274, section 3.1)

The architecture's own forward does it: its projections are wider, its output projection hands the heads through, and
what follows is here. Gates are soft, so no head of any token could be skipped, and the heads run on whichever attention
implementation the model has.

Order of heads: (expert, head) with expert KV; (KV head, expert, head of its group) with shared KV, which makes the
queries that share a KV head neighbours: plain GQA with groups of N H / H_kv.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attn_plugins.models.bam.architectures import Architecture, heads_of
from attn_plugins.models.bam.router import BamRouter
from attn_plugins.models.bam.routing import current


class ExpertOutput(nn.Module):
    """Gates, and the output projections of all experts as one.

    Args:
        size, width: of the model, of one expert's heads together.
        experts: N.
        kv_heads: with shared KV, whose heads are ordered by them; else None.
        bias: the experts' output projections have biases; each counts as much as its expert.
    """

    def __init__(self, size: int, width: int, experts: int, kv_heads: int | None, bias: bool) -> None:
        super().__init__()
        self.experts, self.kv_heads = experts, kv_heads
        self.router = BamRouter(size, experts)
        self.o_proj = nn.Linear(experts * width, size, bias=False)
        self.bias = nn.Parameter(torch.empty(experts, size)) if bias else None
        self.watch: Any = None  # a LayerWatch, while someone watches

    def forward(self, heads: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """heads (B, S, N H D) in the order above, x (B, S, C) the attention's input -> (B, S, C)."""
        _, gates = self.router(x)
        if self.watch is not None:
            call = current()
            self.watch(gates, gates, gates, None if call is None else call.real)
        gates = gates.to(heads.dtype)
        if self.kv_heads is None:
            gated = heads.unflatten(-1, (self.experts, -1)) * gates[..., None]
        else:
            gated = heads.unflatten(-1, (self.kv_heads, self.experts, -1)) * gates[..., None, :, None]
        out = self.o_proj(gated.flatten(2))
        return out if self.bias is None else out + gates @ self.bias


class HeadLayerNorm(nn.Module):
    """nn.LayerNorm over a head of (B, H, S, D), with weights for each head: PyTorch's has one for all."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, size))
        self.bias = nn.Parameter(torch.zeros(heads, 1, size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class BamAttention(nn.Module):
    """Stands before an architecture's attention class in the bases of a class made for it (`model.part_class`)."""

    architecture: Architecture
    num_key_value_groups: int = 1  # of an architecture that knows no shared keys

    def __init__(self, config: Any, layer_idx: int) -> None:
        row, experts = self.architecture, config.num_experts
        super().__init__(*((config, layer_idx) if row.numbered else (config,)))
        heads, kv_heads, head_dim = heads_of(config)
        shared = config.attention_experts == "shared_kv"
        self.widen(experts, shared)
        norms = [(row.q_norm, heads), *(() if shared else ((row.k_norm, kv_heads),))]
        for name, count in norms:
            norm = getattr(self, name, None) if name else None
            if norm is not None:
                setattr(self, name, _norm_of_heads(norm, experts * count, head_dim))
        out = getattr(self, row.o)
        self.mix = ExpertOutput(
            config.hidden_size, heads * head_dim, experts, kv_heads if shared else None, out.bias is not None
        )
        delattr(self, row.o)
        setattr(self, row.o, _as_it_is)

    def widen(self, experts: int, shared: bool) -> None:
        """The projections of one expert become those of all that have their own."""
        row = self.architecture
        own = [row.q] if shared else [row.fused] if row.fused else [row.q, row.k, row.v]
        for name in own:
            dense = getattr(self, name)
            wide = nn.Linear(dense.in_features, experts * dense.out_features, bias=dense.bias is not None)
            setattr(self, name, wide)
        if shared:
            self.num_key_value_groups = self.num_key_value_groups * experts

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """As the architecture's; the weights of `output_attentions` have all N H heads."""
        heads, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self.mix(heads, hidden_states), weights


def grouped_attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """Attention by the implementation that the model has, for architectures whose own forward knows no shared keys.

    q (B, N H, S, D), k and v (B, H, S', D) -> heads (B, S, N H, D), and the weights where there are any.
    """
    from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, eager_attention_forward

    implementation = module.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)  # it repeats KV heads
    dropout = module.attention_dropout if module.training else 0.0
    return attend(module, q, k, v, mask, scaling=module.scaling, dropout=dropout, **kwargs)


def _norm_of_heads(norm: Any, heads: int, head_dim: int) -> nn.Module:
    if isinstance(norm, nn.LayerNorm):  # Phi's, over (B, H, S, D)
        return HeadLayerNorm(heads, head_dim, norm.eps)
    norm.weight = nn.Parameter(torch.ones(heads, head_dim))  # over (B, S, H, D), where a weight may be of heads too
    return norm


def _as_it_is(heads: torch.Tensor) -> torch.Tensor:
    """In the output projection's place: `ExpertOutput` needs the heads before it."""
    return heads
