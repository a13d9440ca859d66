"""A plan in a model for whole sequences without a cache: what prefill and decoding with the plan's caches compute.

One rule says which keys a query sees, in prefill and in decoding, so a forward over prompt and answer gives the same
predictions as generation does, token by token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from attn_plugins import ops
from attn_plugins.methods.moa import SpanPlan
from attn_plugins.patches.attention_probe import dense_attention, replaced_attention


@contextlib.contextmanager
def spans_in_place(model: Any, plan: SpanPlan | None) -> Iterator[None]:
    """Every forward inside runs the plan's spans at its own length; with None it is dense.

    Raises:
        ValueError: a plan for another shape of model; a model that `replaced_attention` refuses.
    """
    if plan is not None:
        plan = plan.fitted(model.config)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if plan is None:
            return dense_attention(layer, q, k, v, scale)
        spans = plan.spans(q.shape[2])[layer].tolist()
        out = ops.span_attention(q, k, v, spans=spans, sink=plan.sink, scale=scale)
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out

    with replaced_attention(model, attend):
        yield
