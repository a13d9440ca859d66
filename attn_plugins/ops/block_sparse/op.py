"""One body for every operator that is exact attention over block plans: a `torch.library` op with fake and autograd.

An operator is a name and a function from a list of ints (its spec) to plans. The ints are what a compiled graph
carries: plans are looked up when the op runs, so nothing of them is traced, and SymInts in the spec need no new graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_plugins.ops.block_sparse import cpu, triton
from attn_plugins.ops.block_sparse.dense import dense_backward, dense_forward
from attn_plugins.plan.block_plan import BlockPlan

# A spec, q and the backend -> which batch items each plan is for.
PlansOf = Callable[[Sequence[int], torch.Tensor, str], list[tuple[slice, BlockPlan]]]
Pair = tuple[torch.Tensor, torch.Tensor]
SparseOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, Sequence[int], str], Pair]


def register_sparse_op(name: str, plans_of: PlansOf, keep: Callable[[Sequence[int]], object] | None = None) -> SparseOp:
    """Register `attn_plugins::name(q, k, v, scale, spec, backend) -> (out, lse)` and its backward.

    `keep(spec)` is held until the backward has run: for plans that only their maker would keep alive.
    """
    schema = "(Tensor q, Tensor k, Tensor v, float scale, SymInt[] spec, str backend) -> (Tensor, Tensor)"
    backward_schema = (
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "float scale, SymInt[] spec, str backend) -> (Tensor, Tensor, Tensor)"
    )

    @torch.library.custom_op(f"attn_plugins::{name}", mutates_args=(), schema=schema)
    def op(q, k, v, scale, spec, backend):  # type: ignore[no-untyped-def]
        parts = plans_of(spec, q, backend)
        if len(parts) == 1:
            return _forward(q, k, v, parts[0][1], scale, backend)
        out, lse = _empty(q)
        for items, plan in parts:
            out[items], lse[items] = _forward(q[items], k[items], v[items], plan, scale, backend)
        return out, lse

    @torch.library.custom_op(f"attn_plugins::{name}_backward", mutates_args=(), schema=backward_schema)
    def op_backward(grad_out, grad_lse, q, k, v, out, lse, scale, spec, backend):  # type: ignore[no-untyped-def]
        parts = plans_of(spec, q, backend)
        if len(parts) == 1:
            return _backward(grad_out, grad_lse, q, k, v, out, lse, parts[0][1], scale, backend)
        grads = tuple(torch.empty_like(t) for t in (q, k, v))
        for items, plan in parts:
            part_lse = None if grad_lse is None else grad_lse[items]
            mine = (q[items], k[items], v[items], out[items], lse[items])
            found = _backward(grad_out[items], part_lse, *mine, plan, scale, backend)
            for whole, part in zip(grads, found, strict=True):
                whole[items] = part
        return grads

    @op.register_fake
    def _(q, k, v, scale, spec, backend):  # type: ignore[no-untyped-def]
        return _empty(q)

    @op_backward.register_fake
    def _(grad_out, grad_lse, q, k, v, out, lse, scale, spec, backend):  # type: ignore[no-untyped-def]
        return tuple(torch.empty_like(t) for t in (q, k, v))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        q, k, v, ctx.scale, ctx.spec, ctx.backend = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.set_materialize_grads(False)
        ctx.kept = keep(ctx.spec) if keep else None

    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = op_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.scale, ctx.spec, ctx.backend)
        return *grads, None, None, None

    op.register_autograd(backward, setup_context=setup_context)
    return op  # type: ignore[return-value]


def _empty(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        return triton.run_forward(q, k, v, plan, scale)
    return dense_forward(q, k, v, scale) if plan.is_dense else cpu.forward(q, k, v, plan, scale)


def _backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale, backend):  # type: ignore[no-untyped-def]
    if backend == "triton":
        return triton.run_backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
    if plan.is_dense:
        return dense_backward(grad_out, grad_lse, q, k, v, out, lse, scale)
    return cpu.backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
