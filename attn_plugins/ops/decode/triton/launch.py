"""Launches the decode kernels. Grids come from shapes alone: nothing is read back from the device."""

from __future__ import annotations

import math

import torch
import triton

from attn_plugins.ops.decode.inputs import Positions
from attn_plugins.ops.decode.triton.configs import config_for, rows_for, split_count
from attn_plugins.ops.decode.triton.kernels import attend_share, combine_shares
from attn_plugins.ops.target import OPTIONS, on_device, triton_target

SHARES = 16  # that the merge holds at once


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor, positions: Positions | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Nq, D), k and v (B, total, D) to the output, in q's memory layout, and the LSE (B, H, Nq)."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, range_count = ranges.shape[1:3]
    total, group = k.shape[1], heads // kv_heads
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    splits = split_count(total, kv_heads)
    partial = torch.empty(*q.shape[:3], splits, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(head_dim))
    config = config_for(triton_target() or "", q.element_size(), width)
    rows = rows_for(group * queries, config)
    ranges = ranges.contiguous()
    keys, keys_strides = _spread(None if positions is None else positions.keys)
    query, query_strides = _spread(None if positions is None else positions.queries)
    spans = None if positions is None or positions.spans is None else positions.spans.contiguous()
    with on_device(q):
        attend_share[(batch * kv_heads, splits, triton.cdiv(group * queries, rows))](
            q, k, v, ranges, keys, query, spans, partial, partial_lse, scale * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), ranges.stride(0) if ranges.shape[0] > 1 else 0,
            *keys_strides, *query_strides, kv_heads, group, queries, total, range_count, splits,
            0 if positions is None else positions.sink,
            HAS_POSITIONS=positions is not None, HAS_SPANS=spans is not None, ROWS=rows, KEYS=config.keys,
            D=head_dim, WIDTH=width,
            PRECISION="ieee", num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip
        combine_shares[(batch * heads * queries,)](
            partial, partial_lse, out, lse, *out.stride(), heads, queries, splits,
            SHARES=SHARES, D=head_dim, WIDTH=width, num_warps=2, **OPTIONS,
        )  # fmt: skip
    return out, lse


def _spread(positions: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """Positions and their strides, 0 over the batch where all items share them."""
    if positions is None:
        return None, (0, 0)
    return positions, (positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1))
