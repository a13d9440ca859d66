"""Spans under a mask, a tile of rows at a time: exact under any padding, window, capped scores or learned sinks.

For what the operators have no argument for. It costs what dense attention costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_plugins.methods.gna_causal_tiles import Score
from attn_plugins.plan.spans import SpanRule

ROWS = 128  # queries of a tile


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, rule: Rule,
    score: Score,
) -> torch.Tensor:  # fmt: skip
    """q (B, H, n, D), k and v (B, H_kv, K, D), at positions `queries` (1 or B, n) and `keys` (1 or B, 1 or H_kv, K).

    Negative keys are no tokens. Rows that see nothing give 0. No value is read on the host.
    """
    group = q.shape[1] // k.shape[1]
    if keys.shape[1] > 1:
        keys = keys.repeat_interleave(group, dim=1)
    outs = []
    for tile, i in zip(q.split(ROWS, dim=2), queries.split(ROWS, dim=1), strict=True):
        seen = rule.sees(i[:, None, :, None], keys[:, :, None])
        outs.append(_attention(tile, k, v, seen, score))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


class Rule:
    """`spans` (H,) of the query heads, `sink`, blocks of `grain` tokens; `limit`: the model's own window, if any."""

    def __init__(self, spans: tuple[int, ...], sink: int, grain: int, limit: int | None, device: torch.device) -> None:
        self.spans = torch.tensor(spans, device=device)[:, None, None]
        self.sink, self.grain, self.limit = sink, grain, limit

    def sees(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Positions (B, 1, n, 1) and (B, 1 or H, 1, K) to (B, H, n, K) bool."""
        first = SpanRule(self.spans, self.sink, self.grain).first(i)  # type: ignore[arg-type]
        seen = (j >= 0) & (j <= i) & ((j < self.sink) | (j >= first))
        return seen if self.limit is None else seen & (i - j < self.limit)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, score: Score) -> torch.Tensor:
    blind = ~seen.any(-1, keepdim=True)
    if score.plain:
        shape = (q.shape[0], *seen.shape[1:])
        mask, grouped = (seen | blind).expand(shape), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=score.scale, enable_gqa=grouped)
        return out.masked_fill(blind, 0.0)
    batch, heads, rows, size = q.shape
    grouped_rows = q.reshape(batch, k.shape[1], -1, size)
    scores = (grouped_rows @ k.transpose(-1, -2)).view(batch, heads, rows, -1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (size**-0.5 if score.scale is None else score.scale)
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    scores = scores.masked_fill(~(seen | blind), float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if score.sinks is not None:
        total = torch.logaddexp(total, score.sinks.to(total.dtype)[:, None, None])
    weights = (scores - total).exp().masked_fill(blind, 0.0).to(v.dtype)
    out = weights.view(batch, k.shape[1], -1, weights.shape[-1]) @ v
    return out.view(batch, heads, rows, -1)
