"""The weighted merge by its definition: dense scores, one softmax after another. Any dtype, differentiable."""

from __future__ import annotations

import math

import torch


def relevance_reference(
    q: torch.Tensor, phrase_k: torch.Tensor, phrase_lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """log(S r), (B, R, S), in at least float32: 0 is an even spread; -inf for a phrase without rows."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, rows = phrase_k.shape[2:4]
    scores = scale * torch.einsum("brhld,bhsd->brhls", phrase_k.to(wide).expand(q.shape[0], -1, -1, -1, -1), q.to(wide))
    log_p = torch.log_softmax(scores, dim=-1) + math.log(q.shape[2])  # over positions
    real = torch.arange(rows, device=q.device) < phrase_lengths[..., None]
    log_p = log_p.masked_fill(~real[:, :, None, :, None], -math.inf)
    count = heads * phrase_lengths.clamp_min(1).to(wide)
    return torch.logsumexp(log_p, dim=(2, 3)) - count.log()[..., None]


def merge_reference(
    q: torch.Tensor,
    text_out: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    strengths: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """text_out + sum_i strengths_i Z_i; strengths (B, R, S)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = image_k.to(wide), image_v.to(wide)
    if image_lengths is not None:
        real = torch.arange(keys.shape[3], device=q.device) < image_lengths[..., None]
        keys, values = (t.masked_fill(~real[:, :, None, :, None], 0.0) for t in (keys, values))
    scores = scale * torch.einsum("bhsd,brhtd->brhst", q.to(wide), keys)
    if image_lengths is not None:
        scores = scores.masked_fill(~real[:, :, None, None, :], torch.finfo(wide).min)  # none real: any finite, times 0
    attended = torch.softmax(scores, dim=-1) @ values  # (B, R, H, S, D)
    out = text_out.to(wide) + (strengths[:, :, None, :, None] * attended).sum(1)
    return torch.empty_like(q).copy_(out)
