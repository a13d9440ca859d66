"""Routed-head attention by its definition: dense attention, then mask and gate. Any dtype, differentiable."""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.routed_heads.inputs import host_bounds, real_rows


def routed_head_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    mask: torch.Tensor,
    causal: bool,
    bounds: torch.Tensor | None,
    dense_backward: bool,
    scale: float,
) -> torch.Tensor:
    """Arguments as `routed_head_attention` takes them, `mask` (B, N, H) of the heads to compute, bounds (B, 2)."""
    queries, keys = q.shape[2], k.shape[2]
    host_bounds(bounds, q.shape[0], keys)
    wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), gates.dtype)
    computed = real_rows(mask, bounds, keys, causal)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(keys - queries)
    seen = seen & real_rows(mask.new_ones(*mask.shape[:2], 1), bounds, keys, causal)[:, None, :, 0, None]
    if bounds is not None:
        at = torch.arange(keys, device=q.device)
        seen = seen & ((at >= bounds[:, :1]) & (at < bounds[:, 1:]))[:, None, None]
    skipped = ~computed.transpose(1, 2)[..., None]
    weights = gates.transpose(1, 2)[..., None].to(wide)

    def attend(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return masked_attention(rows.to(wide), keys.to(wide), values.to(wide), seen, scale)[0]

    attention = attend(q.masked_fill(skipped, 0.0), k, v)  # whatever stands in the skipped rows is not read
    out = (attention * weights).masked_fill(skipped, 0.0)
    if dense_backward:
        # What is not finite there is no part of the output, not even times 0.
        straight = attend(q.detach(), k.detach(), v.detach()).masked_fill(~skipped, 0.0).nan_to_num(0.0)
        out = out + straight * (weights - weights.detach())  # 0, with the gradient of the gates
    return torch.empty_like(q).copy_(out)
