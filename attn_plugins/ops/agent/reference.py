"""Agent attention by its definition: two softmaxes over dense scores. Any dtype, differentiable."""

from __future__ import annotations

import torch


def agent_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    bias_aggregate: torch.Tensor | None,
    bias_broadcast: torch.Tensor | None,
    scales: tuple[float, float],
    shortcut: float,
    exact: tuple[int, int],
) -> torch.Tensor:
    """q (B, H, Nq, D), k and v (B, H_kv, Nk, D), agents (B, H, n, D) to (B, H, Nq, D), computed in at least float32."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values, means = (t.to(wide) for t in (q, k, v, agents))
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    first, last = exact[0], q.shape[2] - exact[1]

    gathered = _softmax(means, keys, bias_aggregate, scales[0]) @ values
    out = _softmax(queries, means, bias_broadcast, scales[1]) @ gathered
    if shortcut:
        out = out + shortcut * values
    ends = (_softmax(rows, keys, None, scales[0]) @ values for rows in (queries[:, :, :first], queries[:, :, last:]))
    out = torch.cat([next(ends), out[:, :, first:last], next(ends)], dim=2)
    return torch.empty_like(q).copy_(out)


def _softmax(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = scale * q @ k.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)
