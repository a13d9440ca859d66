"""FLUX.2's attention beside cached reference pictures (Klein KV), which stands outside of its processors' `__call__`.

In the first step the references are computed with the rest, [text, references, picture], and see themselves alone; in
the later ones their keys and values come from a cache, and there are queries of [text, picture] only.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.patches import interception


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_txt_tokens: int, num_ref_tokens: int,
    kv_cache: Any = None, backend: Any = None,
) -> torch.Tensor:  # fmt: skip
    """(B, N, H, D), as diffusers' own function: the method where it takes the call, else that function."""
    from diffusers.models.transformers import transformer_flux2

    out = None
    before, references = num_txt_tokens, num_ref_tokens
    if interception.asks_for_method():
        q, k, v = query, key, value
        if kv_cache is not None:
            held_k, held_v = kv_cache.get()
            references = held_k.shape[1]
            q = _between(query, torch.zeros_like(held_k), before)  # rows that nobody asks for
            k, v = _between(key, held_k, before), _between(value, held_v, before)
        out = interception.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if out is None:
        return transformer_flux2._flux2_kv_causal_attention(
            query, key, value, num_txt_tokens, num_ref_tokens, kv_cache, backend
        )
    out = out.transpose(1, 2)
    text, picture = out[:, :before], out[:, before + references :]
    if kv_cache is not None or not references:
        return torch.cat([text, picture], dim=1)
    q, k, v = (part[:, before : before + references] for part in (query, key, value))
    alone = transformer_flux2.dispatch_attention_fn(q, k, v, backend=backend)
    return torch.cat([text, alone, picture], dim=1)


def _between(tokens: torch.Tensor, more: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([tokens[:, :place], more, tokens[:, place:]], dim=1)
