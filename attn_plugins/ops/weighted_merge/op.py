"""`attn_plugins::reference_weights` and `attn_plugins::merge_references`: `torch.library` ops over both backends."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.weighted_merge import cpu

_TENSORS = "Tensor image_k, Tensor image_v, Tensor strengths, Tensor? image_lengths, float scale"


@torch.library.custom_op(
    "attn_plugins::reference_weights",
    mutates_args=(),
    schema="(Tensor q, Tensor phrase_k, Tensor phrase_lengths, Tensor? masks, float scale, float temperature, "
    "float? null_bias, bool kernels) -> Tensor",
)
def reference_weights(q, phrase_k, phrase_lengths, masks, scale, temperature, null_bias, kernels):  # type: ignore[no-untyped-def]
    """w (B, R, S). It has no backward: the paper detaches it."""
    return _backend(kernels).weights(q, phrase_k, phrase_lengths, masks, scale, temperature, null_bias)


@torch.library.custom_op(
    "attn_plugins::merge_references",
    mutates_args=(),
    schema=f"(Tensor q, Tensor text_out, {_TENSORS}, bool kernels) -> Tensor",
)
def merge(q, text_out, image_k, image_v, strengths, image_lengths, scale, kernels):  # type: ignore[no-untyped-def]
    """text_out + sum_i strengths_i Z_i; strengths (B, R, S)."""
    return _backend(kernels).forward(q, text_out, image_k, image_v, strengths, image_lengths, scale)


@torch.library.custom_op(
    "attn_plugins::merge_references_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def merge_backward(grad, q, image_k, image_v, strengths, image_lengths, scale):  # type: ignore[no-untyped-def]
    return cpu.backward(grad, q, image_k, image_v, strengths, image_lengths, scale)


def _backend(kernels: bool) -> Any:
    if not kernels:
        return cpu
    from attn_plugins.ops.weighted_merge.triton import launch

    return launch


@reference_weights.register_fake
def _(q, phrase_k, *rest):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], phrase_k.shape[1], q.shape[2], dtype=wide)


@merge.register_fake
def _(q, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@merge_backward.register_fake
def _(grad, q, image_k, image_v, strengths, image_lengths, scale):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (q, image_k, image_v, strengths))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, _, image_k, image_v, strengths, image_lengths, ctx.scale, _ = inputs
    ctx.save_for_backward(q, image_k, image_v, strengths, image_lengths)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    wants = ctx.needs_input_grad
    found: tuple[Any, ...] = (None,) * 4
    if wants[0] or any(wants[2:5]):
        q, image_k, image_v, strengths, image_lengths = ctx.saved_tensors
        found = merge_backward(grad, q, image_k, image_v, strengths, image_lengths, ctx.scale)
    return found[0], grad, *found[1:], None, None, None


merge.register_autograd(_backward, setup_context=_setup_context)
