"""Attention over ragged ranges as tiles: each view of the cache is one call, and what no tile takes is copied for one.

A tile lies inside one range, so it has one KV head, whose queries are its rows. Each head's tiles are merged by their
LSE, all heads at once.
"""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, bias_of
from attn_plugins.ops.decode.inputs import Positions
from attn_plugins.ops.decode.tiling import Tiling


def attend_tiles(
    rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiling: Tiling, positions: Positions | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (B, H_kv, R, D), k and v (B, total, D) to the output, like rows, in the LSE's dtype, and the LSE."""
    queries, done, found = _of_owners(rows, tiling.owner), 0, []
    rule = None if positions is None else _Rule(positions, *rows.shape[1:3])
    for view in tiling.views:
        here = slice(done, done + view.count)
        seen = None if rule is None else rule.sees(view.of(rule.positions.keys), tiling.owner[:, here])
        found.append(_one_call(queries[:, here], view.of(k), view.of(v), None, seen, scale))
        done = here.stop
    if tiling.ends is not None:
        keys, values = (_take(t, tiling.ends) for t in (k, v))
        seen = None
        if rule is not None:
            where = _take(rule.positions.keys[..., None], tiling.ends)[..., 0]
            seen = rule.sees(where, tiling.owner[:, done:])
        found.append(_one_call(queries[:, done:], keys, values, tiling.end_bias, seen, scale))
    out, lse = (one[0] if len(one) == 1 else torch.cat(one, dim=1) for one in zip(*found, strict=True))
    if tiling.nobodys is not None:  # what stands there may be anything
        out = out.masked_fill(tiling.nobodys[:, :, None, None], 0.0)
        lse = lse.masked_fill(tiling.nobodys[:, :, None], float("-inf"))
    scores = lse.mT[:, :, None] + tiling.among  # (B, R, H_kv, T + E)
    # Their softmax times the outputs, and its LSE, are attention again, of queries that are 0 under a bias: one call.
    out = out.transpose(1, 2).to(scores.dtype)
    merged, total = attend(out.new_zeros(()).expand(*scores.shape[:3], out.shape[3]), out, out, scores, 1.0)
    if tiling.bare or positions is not None:
        blind = scores.amax(-1) == float("-inf")
        merged, total = merged.masked_fill(blind[..., None], 0.0), total.masked_fill(blind, float("-inf"))
    return merged.transpose(1, 2), total.transpose(1, 2)


def _one_call(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    seen: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, T, R, D) against keys (B, T, C, D), as far as they are seen (b, T, R or 1, C): (B, T, R, D), (B, T, R)."""
    bias = None if bias is None else bias.to(q.dtype)
    if seen is None:
        return attend(q, keys, values, bias, scale)
    mask = bias_of(seen, q.dtype)
    out, lse = attend(q, keys, values, mask if bias is None else mask + bias, scale)
    blind = ~seen.any(-1)  # without the copies of the last token, which are seen where it is
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))


class _Rule:
    """The rule of positions for tiles."""

    def __init__(self, positions: Positions, kv_heads: int, rows: int) -> None:
        self.positions = positions
        self.group = rows // positions.queries.shape[1]
        # Rows are the query heads of a KV head, each with all its queries.
        self.spans = None if positions.spans is None else positions.spans.view(kv_heads, -1)
        self.queries = positions.queries[:, None, None, :, None]

    def sees(self, where: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Keys at positions `where` (b, T, C): (b, T, R, C), or (b, T, 1, C) where all rows see alike."""
        spans = None if self.spans is None else self.spans[owner][..., None, None]
        seen = self.positions.sees(self.queries, where[:, :, None, None], spans)
        if seen.shape[3] > 1:
            seen = seen.expand(-1, -1, self.group, -1, -1)
        return seen.flatten(2, 3)


def _of_owners(rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """(B, H_kv, R, D) to (B, T, R, D)."""
    if owner.shape[0] == 1:
        return rows.index_select(1, owner[0])
    return rows.gather(1, owner[..., None, None].expand(-1, -1, *rows.shape[2:]))


def _take(t: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(1 or B, total, D) at slots (b, E, W): (1 or B, E, W, D), a copy."""
    flat = slots.flatten(1)
    if flat.shape[0] == 1:
        return t.index_select(1, flat[0]).unflatten(1, slots.shape[1:])
    index = flat[..., None].expand(-1, -1, t.shape[2])
    return t.expand(flat.shape[0], -1, -1).gather(1, index).unflatten(1, slots.shape[1:])
