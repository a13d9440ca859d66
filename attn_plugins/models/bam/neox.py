"""GPT-NeoX with shared KV: its one projection of q, k and v has as many of each, so here they are three."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attn_plugins.models.bam.architectures import heads_of
from attn_plugins.models.bam.attention import BamAttention, grouped_attention


class SharedNeoXAttention(BamAttention):
    """Stands before GPTNeoXAttention; what it does there, with N H query heads over H KV heads."""

    def widen(self, experts: int, shared: bool) -> None:
        if not shared:
            return super().widen(experts, shared)
        config: Any = self.config
        heads, _, head_dim = heads_of(config)
        bias = self.query_key_value.bias is not None  # type: ignore[union-attr]
        del self.query_key_value
        for name, count in (("q_proj", experts * heads), ("k_proj", heads), ("v_proj", heads)):
            setattr(self, name, nn.Linear(config.hidden_size, count * head_dim, bias=bias))
        self.num_key_value_groups = experts
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if hasattr(self, "query_key_value"):
            return super().forward(
                hidden_states, attention_mask=attention_mask, layer_past=layer_past,
                position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

        config: Any = self.config
        q, k, v = (
            getattr(self, name)(hidden_states).unflatten(-1, (-1, heads_of(config)[2])).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        heads, weights = grouped_attention(self, q, k, v, attention_mask, **kwargs)
        return self.mix(heads.flatten(2), hidden_states), weights
