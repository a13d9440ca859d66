"""ViT with shared KV: its own forward, eager above all, knows no keys that several heads share."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.models.bam.attention import BamAttention, grouped_attention


class SharedViTAttention(BamAttention):
    """Stands before ViTAttention; what it does there, with N H query heads over H KV heads."""

    head_dim: int
    scaling: float
    attention_dropout: float

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        if self.num_key_value_groups == 1:
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[operator]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads, weights = grouped_attention(self, q, k, v, attention_mask, **kwargs)
        return self.mix(heads.flatten(2), hidden_states), weights
