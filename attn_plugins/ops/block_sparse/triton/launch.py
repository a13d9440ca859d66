"""Launchers: what each kernel is called with. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton

from attn_plugins.ops.block_sparse.triton import configs
from attn_plugins.ops.block_sparse.triton.backward import delta_kernel, grad_kv_kernel, grad_q_kernel
from attn_plugins.ops.block_sparse.triton.configs import Config
from attn_plugins.ops.block_sparse.triton.forward import forward_kernel
from attn_plugins.ops.target import OPTIONS, on_device, triton_target
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.tables import PlanTables, Walk, device_tables

DELTA_ROWS = 64


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D) to the output, in q's memory layout, and the LSE (B, H, N) float32."""
    tables = device_tables(plan, q.device)
    config = config or config_of("forward", q, plan)
    walk, bits = tables.over_queries(config.block_m, config.block_n), tables.bits(own_keys=False)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not tables.covers_q:
        out.zero_()
        lse.fill_(float("-inf"))
    with on_device(q):
        forward_kernel[walk.rows * q.shape[0] * q.shape[1],](
            q, k, v, out, lse,
            *_tables(tables, walk, bits),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            *_table_strides(walk, bits),
            q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], walk.rows, walk.lead, _guards(tables),
            scale,
            **_shape(q, plan, config), FALLING=scale < 0,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    config_q: Config | None = None,
    config_kv: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, in their own layouts, for gradients of the output and (or None) of the LSE."""
    delta = row_deltas(grad_out, out, grad_lse)
    tables = device_tables(plan, q.device)
    grads = tuple(
        torch.empty_like(t) if covered else torch.zeros_like(t)
        for t, covered in ((q, tables.covers_q), (k, tables.covers_kv), (v, tables.covers_kv))
    )
    group = q.shape[1] // k.shape[1]
    config = config_q or config_of("grad_q", q, plan)
    walk, bits = tables.over_queries(config.block_m, config.block_n), tables.bits(own_keys=False)
    with on_device(q):
        grad_q_kernel[walk.rows * q.shape[0] * q.shape[1],](
            grad_out, q, k, v, lse, delta, grads[0],
            *_tables(tables, walk, bits),
            *grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *grads[0].stride(),
            *_table_strides(walk, bits),
            q.shape[1], group, q.shape[2], k.shape[2], walk.rows, walk.lead, _guards(tables), scale,
            **_shape(q, plan, config),
        )  # fmt: skip
        config = config_kv or config_of("grad_kv", q, plan)
        walk, bits = tables.over_keys(config.block_m, config.block_n), tables.bits(own_keys=True)
        grad_kv_kernel[walk.rows * k.shape[0] * k.shape[1],](
            grad_out, q, k, v, lse, delta, *grads[1:],
            *_tables(tables, walk, bits),
            *grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *grads[1].stride(), *grads[2].stride(),
            *_table_strides(walk, bits),
            k.shape[1], group, q.shape[2], k.shape[2], walk.rows, walk.lead, _guards(tables), scale,
            **_shape(q, plan, config),
        )  # fmt: skip
    return grads  # type: ignore[return-value]


def config_of(kernel: str, q: torch.Tensor, plan: BlockPlan) -> Config:
    """The table's config for this device, precision and head size, no larger than the plan's blocks."""
    target = triton_target()
    assert target is not None  # whoever dispatched here has asked
    config = configs.choose(kernel, target, q.dtype, q.shape[-1])
    return configs.fitted(config, _usual(plan, "q"), _usual(plan, "kv"))


def _usual(plan: BlockPlan, side: str) -> int | None:
    """The block size in which the middle token lies; None where only the device knows."""
    key = ("usual size", side)
    if key not in plan.prepared:
        size = plan.q_size if side == "q" else plan.kv_size
        if size.device.type != "cpu":
            return None
        ordered = size.long().sort().values
        ends = ordered.cumsum(0)
        plan.prepared[key] = int(ordered[torch.searchsorted(ends, ends[-1] / 2).clamp(max=len(ordered) - 1)])
    return plan.prepared[key]


def row_deltas(grad_out: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor | None) -> torch.Tensor:
    """(B, H, N) float32: what the softmax takes off the gradient of each of a row's probabilities."""
    batch, heads, length, head_dim = out.shape
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=out.device)
    with on_device(out):
        delta_kernel[triton.cdiv(length, DELTA_ROWS), batch * heads](
            grad_out, out, grad_lse, delta,
            *grad_out.stride(), *out.stride(), *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
            heads, length,
            D=head_dim, WIDTH=tile_width(head_dim), BLOCK_M=DELTA_ROWS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return delta


def _tables(tables: PlanTables, walk: Walk, bits: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    intervals = (None, None) if tables.intervals is None else (tables.intervals.q, tables.intervals.k)
    return walk.work, walk.entries, walk.pattern, tables.q_order, tables.kv_order, *intervals, bits


def _table_strides(walk: Walk, bits: torch.Tensor | None) -> tuple[int, ...]:
    """Of (item, head) in work, lists and bits, 0 where shared; and words in a row of bits."""
    of_bits = (0, 0, 0) if bits is None else (*_shared(bits), bits.shape[3])
    return *_shared(walk.work), *_shared(walk.entries), *of_bits


def _shared(t: torch.Tensor) -> tuple[int, int]:
    return (t.stride(0) if t.shape[0] > 1 else 0), (t.stride(1) if t.shape[1] > 1 else 0)


def _guards(tables: PlanTables) -> int:
    return 0 if tables.intervals is None else tables.intervals.guards


def _shape(q: torch.Tensor, plan: BlockPlan, config: Config) -> dict[str, object]:
    return {**tile_constants(q.shape[-1], config), "RULED": plan.rule is not None}


def tile_constants(head_dim: int, config: Config) -> dict[str, object]:
    """What every kernel that owns a tile is compiled for, and how."""
    return {
        "D": head_dim,
        "WIDTH": tile_width(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **OPTIONS,
    }


def tile_width(head_dim: int) -> int:
    """Tiles are powers of two wide, and a product needs 16."""
    return max(16, triton.next_power_of_2(head_dim))
