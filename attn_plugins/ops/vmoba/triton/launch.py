"""Launches the kernels of the exact form. Grids come from shapes alone: nothing is read back from the device."""

from __future__ import annotations

import torch
import triton

from attn_plugins.ops.block_sparse.triton.configs import Config, fitted
from attn_plugins.ops.block_sparse.triton.launch import row_deltas, tile_constants
from attn_plugins.ops.target import on_device, triton_target
from attn_plugins.ops.vmoba import tables
from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.ops.vmoba.tables import Boxes
from attn_plugins.ops.vmoba.triton import configs
from attn_plugins.ops.vmoba.triton.keys import grad_kv_kernel
from attn_plugins.ops.vmoba.triton.visits import list_visits
from attn_plugins.ops.vmoba.triton.walk import forward_kernel, grad_q_kernel


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N, D), selected (B, H, grid tokens, blocks) to the output and LSE (B, H, N)."""
    boxes = tables.blocks(one, q.device)
    slab = configs.slab(_target())
    visits = list_visits(selected, one, boxes, slab)
    k, v = (_in_blocks(t, boxes) for t in (k, v))
    out, acc = torch.empty_like(q), torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    config = _config("forward", q, boxes)
    with on_device(q):
        forward_kernel[visits.slabs, q.shape[0] * q.shape[1]](
            q, k, v, out, lse, acc, torch.empty_like(lse),
            visits.tokens, visits.counts, boxes.starts, boxes.sizes, boxes.order,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            q.shape[1], q.shape[1] // k.shape[1], q.shape[2], boxes.count, scale,
            **_constants(q, config, slab, causal), FALLING=scale < 0,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v, in their own layouts."""
    delta = row_deltas(grad_out, out, grad_lse)
    boxes = tables.blocks(one, q.device)
    slab = configs.slab(_target())
    visits = list_visits(selected, one, boxes, slab)
    whole = len(one.real_places) == one.sequence.length
    grad_q, grad_k, grad_v = (
        torch.empty_like(q),
        *(torch.empty_like(t) if whole else torch.zeros_like(t) for t in (k, v)),
    )
    group = q.shape[1] // k.shape[1]
    with on_device(q):
        config = _config("grad_kv", q, boxes)
        pieces = triton.cdiv(boxes.longest, config.block_n)
        grad_kv_kernel[pieces * boxes.count, k.shape[0] * k.shape[1]](
            grad_out, q, k, v, lse, delta, grad_k, grad_v,
            visits.tokens, visits.counts, boxes.starts, boxes.sizes, boxes.order,
            *grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *grad_k.stride(), *grad_v.stride(),
            k.shape[1], group, q.shape[2], visits.slabs, boxes.count, pieces, scale,
            **_constants(q, config, slab, causal),
        )  # fmt: skip
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        k, v = (_in_blocks(t, boxes) for t in (k, v))
        grad_q_kernel[visits.slabs, q.shape[0] * q.shape[1]](
            grad_out, q, k, v, lse, delta, sums,
            visits.tokens, visits.counts, boxes.starts, boxes.sizes,
            *grad_out.stride(), *q.stride(), *k.stride(), *v.stride(),
            q.shape[1], group, q.shape[2], boxes.count, scale,
            **_constants(q, _config("grad_q", q, boxes), slab, causal),
        )  # fmt: skip
        torch.mul(sums, scale, out=grad_q)
    return grad_q, grad_k, grad_v


def _in_blocks(t: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Tokens in the order of blocks: copied once, for what many programs would gather again and again."""
    return t if boxes.order is None else t.index_select(2, boxes.order)


def _config(kernel: str, q: torch.Tensor, boxes: Boxes) -> Config:
    return fitted(configs.choose(kernel, _target(), q.dtype, q.shape[-1]), None, boxes.longest)


def _target() -> str:
    target = triton_target()
    assert target is not None  # whoever dispatched here has asked
    return target


def _constants(q: torch.Tensor, config: Config, slab: int, causal: bool) -> dict[str, object]:
    return {**tile_constants(q.shape[-1], config), "SLAB": slab, "CAUSAL": causal}
