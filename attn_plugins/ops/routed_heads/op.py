"""`attn_plugins::routed_heads`: one `torch.library` op over both backends, with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.routed_heads import cpu

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor gates, Tensor mask, Tensor? bounds"
_SETTING = "bool causal, bool dense_backward, float scale, bool kernels"


@torch.library.custom_op(
    "attn_plugins::routed_heads",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTING}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def routed_heads(q, k, v, gates, mask, bounds, causal, dense_backward, scale, kernels, keep):  # type: ignore[no-untyped-def]
    """Output; and if `keep`, for the backward, attention without gates and its LSE."""
    if not q.numel():
        lse = q.new_full(q.shape[:3], float("inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.empty_like(q), *((torch.empty_like(q), lse) if keep else (q.new_empty(0), lse.new_empty(0)))
    return _backend(kernels).forward(q, k, v, gates, mask, bounds, causal, scale, keep)


@torch.library.custom_op(
    "attn_plugins::routed_heads_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_TENSORS}, Tensor attention, Tensor lse, {_SETTING}, bool wants_gates) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def routed_heads_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, gates, mask, bounds, attention, lse, causal, dense_backward, scale, kernels, wants_gates
):
    """Gradients of q, k, v and gates; the last is empty where it is not wanted."""
    if not q.numel():
        return *(torch.zeros_like(t) for t in (q, k, v)), torch.zeros_like(gates) if wants_gates else gates.new_empty(0)
    grads = _backend(kernels).backward(grad, q, k, v, gates, attention, lse, mask, bounds, causal, scale)
    if not wants_gates:
        return *grads, gates.new_empty(0)
    grad_gates = _row_products(grad, attention)
    if dense_backward:
        ones = torch.ones_like(gates)
        rest = _backend(kernels).forward(q, k, v, ones, ~mask, bounds, causal, scale, False)[0]
        grad_gates = grad_gates + _row_products(grad, rest)
    return *grads, torch.empty_like(gates).copy_(grad_gates.transpose(1, 2))


def _row_products(grad: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """(B, H, N): what each row's gate is worth; 0 where the row was not computed, whatever its gradient is."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    products = (grad.to(wide) * attention.to(wide)).sum(-1)
    return products


def _backend(kernels: bool) -> Any:
    if not kernels:
        return cpu
    from attn_plugins.ops.routed_heads.triton import launch

    return launch


@routed_heads.register_fake
def _(q, k, v, gates, mask, bounds, causal, dense_backward, scale, kernels, keep):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    attention = torch.empty_like(q) if keep else q.new_empty(0)
    return torch.empty_like(q), attention, torch.empty(q.shape[:3] if keep else (0,), dtype=wide, device=q.device)


@routed_heads_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, q, k, v, gates, mask, bounds, attention, lse, causal, dense_backward, scale, kernels, wants_gates
):
    return *(torch.empty_like(t) for t in (q, k, v)), torch.empty_like(gates) if wants_gates else gates.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.dense_backward, ctx.scale, ctx.kernels, keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    wants = ctx.needs_input_grad[3]
    setting = ctx.causal, ctx.dense_backward, ctx.scale, ctx.kernels, wants
    *grads, grad_gates = routed_heads_backward(grad, *ctx.saved_tensors, *setting)
    return *grads, grad_gates if wants else None, *[None] * 7


routed_heads.register_autograd(_backward, setup_context=_setup_context)
