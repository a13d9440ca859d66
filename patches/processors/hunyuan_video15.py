"""The attention of HunyuanVideo 1.5 without its N x N mask.

diffusers' processor makes a bool mask (B, 1, N, N) in every layer, 2.5 GB for each item of 50,000 tokens, only to keep
padding of the text out. The same holds with one row of it, (B, 1, 1, N): padding is no key. Rows of padding then have
values where they had zeros; nothing attends them. The interception runs this in the processor's place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb


def call(
    self: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stands in for `HunyuanVideo15AttnProcessor2_0.__call__`.

    Args:
        hidden_states: (B, N_video, C). encoder_hidden_states: (B, N_text, C).
        attention_mask: (B, N_text), nonzero where a text token is real.
        image_rotary_emb: cosines and sines, (N_video, D) each.

    Returns:
        Video (B, N_video, C), text (B, N_text, C).
    """
    query, key, value = (_heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if image_rotary_emb is not None:
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
    video = query.shape[1]
    if encoder_hidden_states is not None:
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        added = [_heads(project(encoder_hidden_states), attn) for project in projections]
        if attn.norm_added_q is not None:
            added[0] = attn.norm_added_q(added[0])
        if attn.norm_added_k is not None:
            added[1] = attn.norm_added_k(added[1])
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask.bool(), (query.shape[1] - attention_mask.shape[1], 0), value=True)
        attention_mask = attention_mask[:, None, None]
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=self._attention_backend,
        parallel_config=self._parallel_config,
    )
    out = out.flatten(2, 3).to(query.dtype)
    if encoder_hidden_states is None:
        return out, None
    hidden_states, encoder_hidden_states = out[:, :video], out[:, video:]
    if getattr(attn, "to_out", None) is not None:
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if getattr(attn, "to_add_out", None) is not None:
        encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
    return hidden_states, encoder_hidden_states


def _heads(tokens: torch.Tensor, attn: Any) -> torch.Tensor:
    return tokens.unflatten(2, (attn.heads, -1))
