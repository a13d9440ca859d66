"""Decode attention by its definition: a mask over all tokens, and a softmax. Dense, any dtype, differentiable."""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.decode.inputs import Positions
from attn_plugins.ops.decode.parts import host_ranges


def decode_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor, positions: Positions | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the (query, token) pairs that ranges and positions allow; arguments as in `decode_attention`."""
    return masked_attention(q, k[:, None], v[:, None], decode_mask(q, k, ranges, positions), scale)


def decode_mask(q: torch.Tensor, k: torch.Tensor, ranges: torch.Tensor, positions: Positions | None) -> torch.Tensor:
    """(1 or B, H, 1 or Nq, total) bool."""
    mask = torch.zeros(*ranges.shape[:2], k.shape[1], dtype=torch.bool, device=q.device)
    for b, item in enumerate(host_ranges(ranges.flatten().tolist(), ranges.shape, k.shape[1])):
        for head, rows in enumerate(item):
            for start, end in rows:
                mask[b, head, start:end] = True
    mask = mask.repeat_interleave(q.shape[1] // ranges.shape[1], dim=1)[:, :, None]
    return mask if positions is None else mask & positions.seen(positions.keys[:, None])
