"""Causal windows, exact under any padding, cache, capped scores or learned sinks: a tile of rows at a time.

What `gna_causal.py` turns to where the operator has no argument for what the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from attn_plugins.method import CausalKeys

if TYPE_CHECKING:
    from attn_plugins.methods.gna_causal import CausalRule

TILE = 128, 512  # rows of queries whose keys are sliced together under a mask: at least, at most


@dataclass(frozen=True, eq=False)
class Score:
    """How a pair is scored: `scale` (None: D ** -0.5), and the model's `softcap` and `sinks` (H,), if it has them."""

    scale: float | None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def plain_keys(q: torch.Tensor, k: torch.Tensor) -> CausalKeys:
    """What `CausalKeys` says of a call that needs none: real, consecutive, the last key with the last query."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    first = torch.full((batch,), keys - queries, device=q.device)
    return CausalKeys(torch.arange(keys, device=q.device).expand(batch, -1), first, first[:1])


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: CausalKeys, rule: CausalRule, score: Score
) -> torch.Tensor:
    """Exact under any padding, without reading a value: tiles of queries, the slots they may see, and a mask for them.

    A query that is padding sees its own slot and whatever else the rule leaves it: finite, and of no consequence.
    """
    queries, keys = q.shape[2], k.shape[2]
    position = where.first[:, None] + torch.arange(queries, device=q.device)
    column = where.column.reshape(()) + torch.arange(queries, device=q.device)
    tile = min(max(rule.reach, TILE[0]), TILE[1]) if score.plain else TILE[0]
    outs = []
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        width = rule.reach + end - begin
        slots = torch.arange(keys, device=q.device)
        tile_k, tile_v, key = k, v, where.positions
        inside = None
        if queries == keys:  # then the first query has the first slot
            span = slice(max(begin - rule.reach, 0), end)
            slots, tile_k, tile_v, key = slots[span], k[:, :, span], v[:, :, span], key[:, span]
        elif width < keys:
            slots = column[begin] - rule.reach + torch.arange(width, device=q.device)
            inside = (slots >= 0) & (slots < keys)
            held = slots.clamp(0, keys - 1)
            tile_k, tile_v, key = k.index_select(2, held), v.index_select(2, held), key.index_select(1, held)
        seen = rule.sees(position[:, begin:end, None], key[:, None]) & (key >= 0)[:, None]
        if inside is not None:
            seen &= inside
        seen |= slots == column[begin:end, None]
        outs.append(attention(q[:, :, begin:end], tile_k, tile_v, seen[:, None], score))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, score: Score
) -> torch.Tensor:
    """SDPA, where it can; the query heads of one key head stand as its rows where there is one row each."""
    if not score.plain:
        return _scored(q, k, v, mask, score)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and q.shape[2] == 1:
        rows = q.reshape(q.shape[0], kv_heads, heads // kv_heads, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, mask, scale=score.scale).reshape(*q.shape[:3], v.shape[3])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=score.scale, enable_gqa=heads != kv_heads)


def _scored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, score: Score) -> torch.Tensor:
    """Attention by its scores, softmax in float32: what SDPA has no arguments for."""
    batch, heads, queries, size = q.shape
    shape = batch, k.shape[1], heads // k.shape[1], queries
    scores = q.reshape(*shape, size) @ k[:, :, None].transpose(-1, -2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (size**-0.5 if score.scale is None else score.scale)
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if score.sinks is not None:
        total = torch.logaddexp(total, score.sinks.to(total.dtype).reshape(1, *shape[1:3], 1, 1))
    weights = (scores - total).exp().to(v.dtype)
    return (weights @ v[:, :, None]).reshape(batch, heads, queries, v.shape[3])
