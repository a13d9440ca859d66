"""The joint attention of a double block of FLUX with an IP-Adapter: stock, merged, and merged as the formula reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.methods.mip import MIPConfig, MIPProcessor
from attn_plugins.patches.interception import STATE
from attn_plugins.patches.processors.mip_flux import Merging, MIPFluxIPAdapterAttnProcessor
from attn_plugins.runtime import Layer, RootState
from attn_plugins.schedule import Schedule

TEXT, SCALE = 512, 0.75


def sides(
    name: str, shape: tuple[int, int, int, int], references: int, tokens: int, rows: int, kind: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is added for the images, (1, S, C), by each side; all of them compute the whole layer.

    shape: positions, channels, heads, channels of the adapter's tokens. rows: tokens of a phrase.
    """
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor, FluxPosEmbed

    positions, channels, heads, width = shape
    torch.manual_seed(0)
    attn = FluxAttention(
        channels, heads, channels // heads, bias=True, added_kv_proj_dim=channels, out_dim=channels,
        context_pre_only=False, eps=1e-6,
    ).to(kind)  # fmt: skip
    stock = FluxIPAdapterAttnProcessor(channels, width, num_tokens=(tokens,), scale=[SCALE]).to(kind)
    ours = MIPFluxIPAdapterAttnProcessor(channels, width, num_tokens=(tokens,), scale=[SCALE]).to(kind)
    ours.load_state_dict(stock.state_dict())
    x, text = torch.randn(1, positions, channels, dtype=kind), torch.randn(1, TEXT, channels, dtype=kind)
    images = [torch.randn(1, references, tokens, width, dtype=kind)]
    side = int(positions**0.5)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    rotary = FluxPosEmbed(10000, [16, 56, 56])(torch.cat([torch.zeros(TEXT, 3), grid]))
    names = tuple(f"thing {index}" for index in range(references))
    attn.__dict__[STATE] = Layer(RootState(Schedule(0)), MIPProcessor(MIPConfig(phrases=names)), "cross", name, 0)
    places = torch.arange(references * rows).reshape(1, references, rows)
    merging = Merging(places, torch.full((1, references), rows), None)
    return {
        "stock": lambda: stock(attn, x, text, None, rotary, images)[2],
        "mip": lambda: ours(attn, x, text, None, rotary, images, merging)[2],
        "plain": lambda: plain(attn, stock, x, text, rotary, images[0], places),
    }


def plain(
    attn: Any, adapter: Any, x: torch.Tensor, text: torch.Tensor, rotary: Any, images: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The layer as its formula reads."""
    from diffusers.models.embeddings import apply_rotary_emb

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (attn.heads, -1))

    words = text.shape[1]
    q = attn.norm_q(split(attn.to_q(x)))
    queries = torch.cat([attn.norm_added_q(split(attn.add_q_proj(text))), q], dim=1)
    keys = torch.cat([attn.norm_added_k(split(attn.add_k_proj(text))), attn.norm_k(split(attn.to_k(x)))], dim=1)
    values = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(x))], dim=1)
    queries, keys = (apply_rotary_emb(t, rotary, sequence_dim=1).transpose(1, 2) for t in (queries, keys))
    joint = F.scaled_dot_product_attention(queries, keys, values.transpose(1, 2)).transpose(1, 2).flatten(2)
    attn.to_add_out(joint[:, :words]), attn.to_out[0](joint[:, words:])
    relevances = []
    for row in places[0]:
        scores = (keys[:, :, row] * q.shape[-1] ** -0.5) @ queries[:, :, words:].transpose(-1, -2)
        relevances.append(torch.softmax(scores.float(), dim=-1).mean((1, 2)))
    total, out = torch.stack(relevances).sum(0), torch.zeros_like(x)
    for i, relevance in enumerate(relevances):
        k, v = (split(to[0](images[:, i])).transpose(1, 2) for to in (adapter.to_k_ip, adapter.to_v_ip))
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)
        out = out + SCALE * (relevance / total)[..., None].to(x.dtype) * attended
    return out
