"""Block-sparse attention by its definition: the plan's mask, and a softmax. Dense, any dtype, differentiable."""

from __future__ import annotations

import torch

from attn_plugins.plan.block_plan import BlockPlan


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention under a bool mask broadcastable to (B, H, N, N_kv), computed in at least float32.

    Rows that see nothing give 0 and an LSE of -inf. Returns (output (B, H, N, D), LSE (B, H, N), natural log).
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    unseen, blind = ~mask.any(-2)[..., None], ~mask.any(-1)[..., None]  # padding: whatever stands there is not read
    k, v = (t.to(wide).repeat_interleave(groups, dim=1).masked_fill(unseen, 0.0) for t in (k, v))
    scores = (q.to(wide).masked_fill(blind, 0.0) * scale) @ k.transpose(-1, -2)
    scores = scores.masked_fill(~mask, float("-inf"))
    empty = blind[..., 0].expand(scores.shape[:-1])
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1).masked_fill(empty, float("-inf"))
    probabilities = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    return (probabilities @ v).to(q.dtype), lse


def block_sparse_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the (query, key) pairs that `plan.to_mask()` allows."""
    return masked_attention(q, k, v, plan.to_mask().to(q.device), scale)
