"""`attn_plugins::agent`: one `torch.library` op over both backends, with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.agent import cpu, steps
from attn_plugins.ops.agent.steps import Setting

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor agents, Tensor? bias_aggregate, Tensor? bias_broadcast"
_SETTING = "float[] scales, float shortcut, SymInt[] exact, bool kernels"
_RESULTS = "Tensor out, Tensor lse, Tensor gathered, Tensor gathered_lse"


@torch.library.custom_op(
    "attn_plugins::agent",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTING}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def agent(q, k, v, agents, bias_aggregate, bias_broadcast, scales, shortcut, exact, kernels):  # type: ignore[no-untyped-def]
    """Output and its LSE, and both of the agents, which the backward takes."""
    biases, setting = (bias_aggregate, bias_broadcast), Setting(scales, shortcut, exact)
    out, lse, gathered, gathered_lse = steps.forward(_backend(kernels), q, k, v, agents, biases, setting)
    return _laid_out(out, q), lse.contiguous(), _laid_out(gathered, agents), gathered_lse.contiguous()


@torch.library.custom_op(
    "attn_plugins::agent_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_TENSORS}, {_RESULTS}, {_SETTING}, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def agent_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, agents, bias_aggregate, bias_broadcast, out, lse, gathered, gathered_lse,
    scales, shortcut, exact, kernels, wants,
):  # fmt: skip
    """Gradients of q, k, v, agents and the biases; those of biases not wanted are empty."""
    biases, setting = (bias_aggregate, bias_broadcast), Setting(scales, shortcut, exact)
    results = out, lse, gathered, gathered_lse
    grads = steps.backward(_backend(kernels), grad, q, k, v, agents, biases, *results, setting, wants)
    templates = (q, k, v, agents, *biases)
    return tuple(q.new_empty(0) if g is None else _laid_out(g, t) for g, t in zip(grads, templates, strict=True))


def _backend(kernels: bool) -> Any:
    if not kernels:
        return cpu
    from attn_plugins.ops.agent.triton import launch

    return launch


def _laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same numbers in another tensor's memory layout."""
    if t.stride() == like.stride() and _without_gaps(like):
        return t  # nothing is made to ask for its strides: a large block, made and freed in each call, costs its pages
    want = torch.empty_like(like)
    return t if t.stride() == want.stride() else want.copy_(t)


def _without_gaps(t: torch.Tensor) -> bool:
    return sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1 == t.numel()


@agent.register_fake
def _(q, k, v, agents, *rest):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    lse, agents_lse = (torch.empty(t.shape[:3], dtype=wide, device=t.device) for t in (q, agents))
    return torch.empty_like(q), lse, torch.empty_like(agents), agents_lse


@agent_backward.register_fake
def _(grad, q, k, v, agents, bias_aggregate, bias_broadcast, *rest):  # type: ignore[no-untyped-def]
    pairs = zip((bias_aggregate, bias_broadcast), rest[-1], strict=True)
    biases = (torch.empty_like(bias) if wanted else q.new_empty(0) for bias, wanted in pairs)
    return *(torch.empty_like(t) for t in (q, k, v, agents)), *biases


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.setting = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    wants = list(ctx.needs_input_grad[4:6])
    grads = agent_backward(grad, *ctx.saved_tensors, *ctx.setting, wants)
    return *grads[:4], *(g if wanted else None for g, wanted in zip(grads[4:], wants, strict=True)), *[None] * 4


agent.register_autograd(_backward, setup_context=_setup_context)
