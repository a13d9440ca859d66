"""Launches the kernel, and the backward by the block-sparse kernels. The forward reads nothing back from the device."""

from __future__ import annotations

import torch

from attn_plugins.ops.agent.triton.strides import strides, unit_of
from attn_plugins.ops.block_sparse.triton.launch import backward as plan_backward
from attn_plugins.ops.block_sparse.triton.launch import tile_constants
from attn_plugins.ops.heads import equal_runs
from attn_plugins.ops.routed_heads.inputs import host_bounds, query_offset, real_rows
from attn_plugins.ops.routed_heads.triton import configs
from attn_plugins.ops.routed_heads.triton.kernel import attend_rows
from attn_plugins.ops.routed_heads.triton.plans import plan_of
from attn_plugins.ops.routed_heads.triton.tables import row_lists, tile_table
from attn_plugins.ops.target import on_device, triton_target


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `cpu.forward`. Lengths that leave k are cut to it."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    out = torch.zeros_like(q)
    attention = torch.zeros_like(q) if keep else None
    lse = torch.full(q.shape[:3] if keep else (0,), float("inf"), dtype=torch.float32, device=q.device)
    config = configs.choose(triton_target() or "", q.dtype, head_dim, queries, keys, causal)
    lists, counts = row_lists(real_rows(mask, bounds, keys, causal))
    table = tile_table(counts, queries, config.block_m)
    unit = unit_of(q, k, v, out, attention)
    with on_device(q):
        attend_rows[len(table),](
            q, k, v, gates, out, attention, lse, table, lists, counts, bounds,
            *strides(unit, q, k, v, out, attention), *gates.stride(),
            lists.stride(0), heads, heads // kv_heads, queries, keys, query_offset(queries, keys, causal) or 0, scale,
            CAUSAL=causal, **tile_constants(head_dim, config), UNIT=unit,
        )  # fmt: skip
    return out, q.new_empty(0) if attention is None else attention, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    attention: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, by the dense form of the block-sparse kernels over all rows.

    A row that was not computed has an LSE of +inf: its probabilities are 0 and it adds nothing to any sum.
    """
    keys = k.shape[2]
    skipped = ~real_rows(mask, bounds, keys, causal).transpose(1, 2)[..., None]
    rows = q.masked_fill(skipped, 0.0)  # what is not finite there would be, even times 0
    upstream = (grad * gates.transpose(1, 2)[..., None]).to(q.dtype).masked_fill(skipped, 0.0)
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    for items, (first, end) in equal_runs(host_bounds(bounds, q.shape[0], keys)):
        plan = plan_of(q.shape[2], keys, first, end, causal)
        tensors = rows[items], k[items], v[items], attention[items], lse[items]
        found = plan_backward(upstream[items], None, *tensors, plan, scale)
        for whole, part in zip(grads, found, strict=True):
            whole[items] = part
    return grads  # type: ignore[return-value]
