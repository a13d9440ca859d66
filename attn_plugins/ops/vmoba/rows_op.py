"""The exact form as a `torch.library` op with fake and autograd."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch

from attn_plugins.ops.vmoba import rows, triton
from attn_plugins.ops.vmoba.layout import decode
from attn_plugins.ops.vmoba.lists import empty_results

_SETTING = "Tensor selected, float scale, SymInt[] spec, bool causal, str backend)"


@torch.library.custom_op(
    "attn_plugins::block_rows", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_SETTING} -> (Tensor, Tensor)"
)
def _op(q, k, v, selected, scale, spec, causal, backend):  # type: ignore[no-untyped-def]
    forward, parts = triton.run_forward if backend == "triton" else rows.forward, decode(spec)
    if len(parts) == 1:
        return forward(q, k, v, selected, parts[0][1], scale, causal)
    out, lse = empty_results(q)
    for items, one in parts:
        out[items], lse[items] = forward(q[items], k[items], v[items], selected[items], one, scale, causal)
    return out, lse


@torch.library.custom_op(
    "attn_plugins::block_rows_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTING}"
    " -> (Tensor, Tensor, Tensor)",
)
def _op_backward(grad_out, grad_lse, q, k, v, out, lse, selected, scale, spec, causal, backend):  # type: ignore[no-untyped-def]
    backward, parts = triton.run_backward if backend == "triton" else rows.backward, decode(spec)
    if len(parts) == 1:
        return backward(grad_out, grad_lse, q, k, v, out, lse, selected, parts[0][1], scale, causal)
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    for items, one in parts:
        of_lse = None if grad_lse is None else grad_lse[items]
        mine = (grad_out[items], of_lse, q[items], k[items], v[items], out[items], lse[items], selected[items])
        for whole, part in zip(grads, backward(*mine, one, scale, causal), strict=True):
            whole[items] = part
    return grads


@_op.register_fake
def _(q, k, v, selected, scale, spec, causal, backend):  # type: ignore[no-untyped-def]
    return empty_results(q)


@_op_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, selected, scale, spec, causal, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, selected, ctx.scale, ctx.spec, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, selected)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    grad_out = torch.zeros_like(ctx.saved_tensors[3]) if grad_out is None else grad_out
    grads = _op_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.spec, ctx.causal, ctx.backend)
    return *grads, None, None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: torch.Tensor, scale: float, spec: Rows[int],
    causal: bool = False, backend: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in which each grid query sees the blocks selected for it and all text, and text sees everything.

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, N, D).
        selected: (B, H, grid tokens, blocks) bool; the own block is in it, of blocks of the layout in `spec`.
        causal: of one axis, without text: no query sees what comes after it. Later blocks must not be selected.

    Returns:
        (output in q's memory layout, LSE (B, H, N)), both with gradients.
    """
    return _op(q, k, v, selected, scale, spec, causal, backend)
