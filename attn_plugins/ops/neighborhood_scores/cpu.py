"""Plain PyTorch, any device: one gather per slot of the window, so nothing is larger than inputs and output.

Three linear maps that are each other's derivatives: `scores` (a product per slot), `aggregate` (a sum over slots) and
`spread` (its transpose: what each key gets from the queries that see it). Every backward is made of the same three, so
they differentiate any number of times, and all of them only gather: results do not depend on thread order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from attn_plugins.ops.neighborhood_scores.tables import flat_index, keys_of_queries, queries_of_keys
from attn_plugins.plan.windows import AxisWindow, axis_windows


def scores(q: torch.Tensor, k: torch.Tensor, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    return _scores(q, k, *_setting(axes))


def aggregate(weights: torch.Tensor, v: torch.Tensor, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    return _aggregate(weights, v, *_setting(axes))


def _setting(axes: tuple[AxisWindow, ...]) -> tuple[list[int], list[int], list[int]]:
    return [a.window for a in axes], [a.stride for a in axes], [a.dilation for a in axes]


def _axes(grid: torch.Size, window: list[int], stride: list[int], dilation: list[int]) -> tuple[AxisWindow, ...]:
    return axis_windows(tuple(grid), tuple(window), tuple(stride), tuple(dilation))


def _slots(axes: tuple[AxisWindow, ...], device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, flat key of each flat query) for every slot of the window."""
    tables = [keys_of_queries(axis) for axis in axes]
    sizes = tuple(axis.size for axis in axes)
    for slot, choice in enumerate(itertools.product(*(range(axis.window) for axis in axes))):
        yield slot, flat_index(tuple(t[c] for t, c in zip(tables, choice, strict=True)), sizes, device)


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens flattened, in at least float32: half-precision products would be rounded before they are summed."""
    return tuple(t.flatten(2, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


@torch.library.custom_op("attn_plugins::neighborhood_scores", mutates_args=())
def _scores(
    q: torch.Tensor, k: torch.Tensor, window: list[int], stride: list[int], dilation: list[int]
) -> torch.Tensor:
    axes = _axes(q.shape[2:-1], window, stride, dilation)
    flat_q, flat_k = _wide(q, k)
    out = q.new_empty(*flat_q.shape[:3], math.prod(window))
    for slot, keys in _slots(axes, q.device):
        out[..., slot] = (flat_q * flat_k.index_select(2, keys)).sum(-1)
    return out.reshape(*q.shape[:-1], -1)


@torch.library.custom_op("attn_plugins::neighborhood_aggregate", mutates_args=())
def _aggregate(
    weights: torch.Tensor, v: torch.Tensor, window: list[int], stride: list[int], dilation: list[int]
) -> torch.Tensor:
    axes = _axes(v.shape[2:-1], window, stride, dilation)
    flat_w, flat_v = _wide(weights, v)
    out = torch.zeros_like(flat_v, memory_format=torch.contiguous_format)
    for slot, keys in _slots(axes, v.device):
        out.addcmul_(flat_w[..., slot, None], flat_v.index_select(2, keys))
    return out.to(v.dtype).reshape(v.shape)


@torch.library.custom_op("attn_plugins::neighborhood_spread", mutates_args=())
def _spread(
    weights: torch.Tensor, x: torch.Tensor, window: list[int], stride: list[int], dilation: list[int]
) -> torch.Tensor:
    """Per key: the sum of x over the queries that see it, times that query's weight for it. Transpose of aggregate."""
    axes = _axes(x.shape[2:-1], window, stride, dilation)
    flat_w, flat_x = _wide(weights, x)
    flat_w = flat_w.flatten(2)
    tables = [queries_of_keys(axis) for axis in axes]
    sizes, windows = tuple(axis.size for axis in axes), tuple(window)
    out = torch.zeros_like(flat_x, memory_format=torch.contiguous_format)
    for choice in itertools.product(*(range(len(table[0])) for table in tables)):
        queries, slots, seen = (tuple(t[kind][c] for t, c in zip(tables, choice, strict=True)) for kind in range(3))
        query = flat_index(queries, sizes, x.device)
        weight = flat_w.index_select(2, query * math.prod(window) + flat_index(slots, windows, x.device))
        # counted on how many axes this is a real entry: on all of them, or the weight is another's
        real = flat_index(seen, (1,) * len(axes), x.device) == len(axes)
        out.addcmul_(torch.where(real, weight, 0.0)[..., None], flat_x.index_select(2, query))
    return out.to(x.dtype).reshape(x.shape)


@_scores.register_fake
def _(q, k, window, stride, dilation):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], math.prod(window))


@_aggregate.register_fake
@_spread.register_fake
def _(weights, x, window, stride, dilation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, b, *ctx.setting = inputs
    ctx.save_for_backward(a, b)


def _derivatives(of_first, of_second):  # type: ignore[no-untyped-def]
    """The backward of a bilinear map of two tensors, each gradient only where it is wanted."""

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        first = of_first(a, b, grad, ctx.setting) if ctx.needs_input_grad[0] else None
        second = of_second(a, b, grad, ctx.setting) if ctx.needs_input_grad[1] else None
        return first, second, None, None, None

    return backward


_scores.register_autograd(
    _derivatives(lambda q, k, g, s: _aggregate(g, k, *s), lambda q, k, g, s: _spread(g, q, *s)),
    setup_context=_remember,
)
_aggregate.register_autograd(
    _derivatives(lambda w, v, g, s: _scores(g, v, *s), lambda w, v, g, s: _spread(w, g, *s)),
    setup_context=_remember,
)
_spread.register_autograd(
    _derivatives(lambda w, x, g, s: _scores(x, g, *s), lambda w, x, g, s: _aggregate(w, g, *s)),
    setup_context=_remember,
)
