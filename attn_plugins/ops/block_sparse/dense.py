"""Plain dense attention with LSE: what a plan without a hole in it dispatches to."""

from __future__ import annotations

import itertools

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward


def dense_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D). Returns out in q's memory layout and LSE (B, H, N)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for b in range(q.shape[0]):
        tile_q, tile_k, tile_v = _grouped(q[b], k[b], v[b])
        found, found_lse = attend(tile_q, tile_k, tile_v, None, scale)
        out[b], lse[b] = found.flatten(0, 1), found_lse.flatten(0, 1)
    return out, lse


def dense_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v for gradients of the output and (or None) the LSE."""
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    step = kv_heads if grad_lse is None else 1  # a gradient of the LSE needs wider copies: of one KV head at a time
    for b, first in itertools.product(range(q.shape[0]), range(0, kv_heads, step)):
        kv, heads = slice(first, first + step), slice(first * group, (first + step) * group)
        tiles = _grouped(q[b, heads], k[b, kv], v[b, kv])
        rows = [None if t is None else t[b, heads].unflatten(0, (step, -1)) for t in (grad_out, grad_lse, out, lse)]
        dq, dk, dv = attend_backward(rows[0], rows[1], *tiles, rows[2], rows[3], None, scale)  # type: ignore[arg-type]
        grads[0][b, heads], grads[1][b, kv], grads[2][b, kv] = dq.flatten(0, 1), dk.sum(1), dv.sum(1)
    return grads  # type: ignore[return-value]


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(H, N, D) to (H_kv, H / H_kv, N, D); the keys of a group are a view with stride 0."""
    q = q.unflatten(0, (k.shape[0], -1))
    k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return q, k, v
