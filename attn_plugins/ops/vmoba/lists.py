"""Attention over lists of blocks that are tensors, made anew in each call: a `torch.library` op with fake and autograd.

`block_sparse` takes the number of a plan that someone keeps; here the lists themselves are inputs, and stay where they
are: the op makes a plan of them when it runs, and reads nothing back on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch

from attn_plugins.ops.block_sparse import triton
from attn_plugins.ops.block_sparse.dense import dense_backward, dense_forward
from attn_plugins.ops.vmoba import tiles
from attn_plugins.ops.vmoba.layout import decode
from attn_plugins.plan.block_plan import BlockPlan

_OUT = "Tensor lists, Tensor count, float scale, SymInt[] spec, str backend)"
Pair = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op(
    "attn_plugins::block_lists", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_OUT} -> (Tensor, Tensor)"
)
def _op(q, k, v, lists, count, scale, spec, backend):  # type: ignore[no-untyped-def]
    plans = _plans(lists, count, spec)
    if len(plans) == 1:
        return _forward(q, k, v, plans[0][1], scale, backend)
    out, lse = empty_results(q)
    for items, plan in plans:
        out[items], lse[items] = _forward(q[items], k[items], v[items], plan, scale, backend)
    return out, lse


@torch.library.custom_op(
    "attn_plugins::block_lists_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OUT}"
    " -> (Tensor, Tensor, Tensor)",
)
def _op_backward(grad_out, grad_lse, q, k, v, out, lse, lists, count, scale, spec, backend):  # type: ignore[no-untyped-def]
    plans = _plans(lists, count, spec)
    if len(plans) == 1:
        return _backward(grad_out, grad_lse, q, k, v, out, lse, plans[0][1], scale, backend)
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    for items, plan in plans:
        of_lse = None if grad_lse is None else grad_lse[items]
        mine = (grad_out[items], of_lse, q[items], k[items], v[items], out[items], lse[items])
        for whole, part in zip(grads, _backward(*mine, plan, scale, backend), strict=True):
            whole[items] = part
    return grads


@_op.register_fake
def _(q, k, v, lists, count, scale, spec, backend):  # type: ignore[no-untyped-def]
    return empty_results(q)


@_op_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, lists, count, scale, spec, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, lists, count, ctx.scale, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, lists, count)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    grad_out = torch.zeros_like(ctx.saved_tensors[3]) if grad_out is None else grad_out
    grads = _op_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.spec, ctx.backend)
    return *grads, None, None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def attend_lists(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, count: torch.Tensor, scale: float,
    spec: Rows[int], backend: str,
) -> Pair:  # fmt: skip
    """Attention in which each query tile sees the blocks of its list and all text, and text sees everything.

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, N, D).
        lists, count: (B or 1, H or 1, tiles, L) and (.., tiles) int32: the first `count` of a list are blocks of the
            layout that `spec` encodes, each at most once.

    Returns:
        (output in q's memory layout, LSE (B, H, N)), both with gradients.
    """
    return _op(q, k, v, lists, count, scale, spec, backend)


def empty_results(q: torch.Tensor) -> Pair:
    """Room for an output in q's memory layout and an LSE."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)


def _plans(lists: torch.Tensor, count: torch.Tensor, spec: Rows[int]) -> list[tuple[slice, BlockPlan]]:
    """A plan for each run of items with equal text lengths."""
    parts = decode(spec)
    shared = lists.shape[0] == 1
    return [(items, one.plan(*((t if shared else t[items]) for t in (lists, count)))) for items, one in parts]


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, backend: str) -> Pair:
    if backend == "triton":
        return triton.run_forward(q, k, v, plan, scale)
    plan = _on_host(plan)
    return dense_forward(q, k, v, scale) if plan.is_dense else tiles.forward(q, k, v, plan, scale)


def _backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale, backend):  # type: ignore[no-untyped-def]
    if backend == "triton":
        return triton.run_backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
    plan = _on_host(plan)
    if plan.is_dense:
        return dense_backward(grad_out, grad_lse, q, k, v, out, lse, scale)
    return tiles.backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)


def _on_host(plan: BlockPlan) -> BlockPlan:
    """The CPU backend makes its jobs on the host, on whatever device it runs them."""
    plan.lists, plan.full, plan.count = (t.cpu() for t in (plan.lists, plan.full, plan.count))
    return plan
