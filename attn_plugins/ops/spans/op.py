"""`attn_plugins::span`: the CPU backend as a `torch.library` op, with fake and autograd.

Spans travel as ints, so a compiled graph carries them. Where an item's tokens stand may be a tensor: (B, 3) rows of
start, first and end, read when the op runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_plugins.ops.spans import cpu
from attn_plugins.plan.spans import Place, SpanRule

_RULE = "Tensor? bounds, SymInt[] spans, SymInt sink, SymInt grain, float scale"


@torch.library.custom_op(
    "attn_plugins::span",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor)",
)
def span(q, k, v, bounds, spans, sink, grain, scale):  # type: ignore[no-untyped-def]
    rules, places = _read(q, k, bounds, spans, sink, grain)
    return cpu.forward(q, k, v, rules, places, scale)


@torch.library.custom_op(
    "attn_plugins::span_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RULE}) -> (Tensor, Tensor, Tensor)",
)
def span_backward(grad_out, grad_lse, q, k, v, out, lse, bounds, spans, sink, grain, scale):  # type: ignore[no-untyped-def]
    rules, places = _read(q, k, bounds, spans, sink, grain)
    return cpu.backward(grad_out, grad_lse, q, k, v, out, lse, rules, places, scale)


def places_of(q: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor | None) -> list[Place]:
    """A place per item; None is all tokens, aligned at the end.

    Raises:
        ValueError: tokens outside of k.
    """
    queries, keys = q.shape[2], k.shape[2]
    if bounds is None:
        return [Place(keys - queries, 0, keys)] * q.shape[0]
    found = [Place(*row) for row in bounds.tolist()]
    for item, place in enumerate(found):
        if not 0 <= place.first <= place.end <= keys:
            raise ValueError(
                f"item {item}: tokens [{place.first}, {place.end}) are valid, but k has {keys}: lengths are 0..{keys}, "
                f"pairs [before, valid] add up to {keys} at most"
            )
        if not 0 <= place.start <= keys - queries:
            raise ValueError(
                f"item {item}: query_start {place.start}: with {queries} queries and {keys} keys it is "
                f"0..{keys - queries}; a query's own key is among the keys"
            )
    return found


def _read(q, k, bounds, spans, sink, grain):  # type: ignore[no-untyped-def]
    rules = [SpanRule(int(span), int(sink), int(grain)) for span in spans]
    return rules, places_of(q, k, bounds)


@span.register_fake
def _(q, k, v, bounds, spans, sink, grain, scale):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)


@span_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, bounds, spans, sink, grain, scale):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bounds, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, bounds = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return *span_backward(grad_out, grad_lse, q, k, v, out, lse, bounds, *ctx.rule), *[None] * 5


span.register_autograd(_backward, setup_context=_setup_context)
Pair = tuple[torch.Tensor, torch.Tensor]


def attend_spans(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor | None,
    spans: Sequence[int],
    sink: int,
    grain: int,
    scale: float,
) -> Pair:
    """The op, typed. `spans`: one per query head."""
    return span(q, k, v, bounds, list(spans), sink, grain, scale)  # type: ignore[return-value]
