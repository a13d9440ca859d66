"""`attn_plugins::decode`: one `torch.library` op over both backends, with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.decode import cpu
from attn_plugins.ops.decode.inputs import Positions

_RULE = "Tensor? key_positions, Tensor? query_positions, Tensor? spans, int sink, float scale"


@torch.library.custom_op(
    "attn_plugins::decode",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor ranges, {_RULE}, bool kernels) -> (Tensor, Tensor)",
)
def decode(q, k, v, ranges, key_positions, query_positions, spans, sink, scale, kernels):  # type: ignore[no-untyped-def]
    positions = _positions(key_positions, query_positions, spans, sink)
    if not kernels:
        return cpu.forward(q, k, v, ranges, positions, scale)
    from attn_plugins.ops.decode.triton.launch import forward

    return forward(q, k, v, ranges, positions, scale)


@torch.library.custom_op(
    "attn_plugins::decode_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor ranges, "
    f"{_RULE}) -> (Tensor, Tensor, Tensor)",
)
def decode_backward(  # type: ignore[no-untyped-def]
    grad_out, grad_lse, q, k, v, out, lse, ranges, key_positions, query_positions, spans, sink, scale
):
    positions = _positions(key_positions, query_positions, spans, sink)
    return cpu.backward(grad_out, grad_lse, q, k, v, out, lse, ranges, positions, scale)


def _positions(
    keys: torch.Tensor | None, queries: torch.Tensor | None, spans: torch.Tensor | None, sink: int
) -> Positions | None:
    return None if keys is None or queries is None else Positions(keys, queries, spans, sink)


@decode.register_fake
def _(q, k, v, ranges, key_positions, query_positions, spans, sink, scale, kernels):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)


@decode_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_out, grad_lse, q, k, v, out, lse, ranges, key_positions, query_positions, spans, sink, scale
):
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.sink, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, ranges, keys, queries, spans, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = decode_backward(grad_out, grad_lse, q, k, v, out, lse, ranges, keys, queries, spans, ctx.sink, ctx.scale)
    return (*grads, *[None] * 7)


decode.register_autograd(_backward, setup_context=_setup_context)
