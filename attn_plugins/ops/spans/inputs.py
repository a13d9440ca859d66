"""What `span_attention` is given besides q, k, v: checks, and one form for all ways to say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_plugins.ops.checks import INTEGERS
from attn_plugins.plan.spans import SpanRule

GRANULARITIES = ("token", "block")


def check_spans(
    spans: int | Sequence[int] | torch.Tensor, sink: int, granularity: str, heads: int, kv_heads: int
) -> list[SpanRule]:
    """The rule of each query head.

    Raises:
        ValueError, TypeError: negative numbers, spans of another number of heads, an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: legal are {', '.join(GRANULARITIES)}")
    if sink < 0:
        raise ValueError(f"sink={sink}: legal is 0 or more")
    if isinstance(spans, torch.Tensor):
        if spans.dtype not in INTEGERS:
            raise TypeError(f"spans are {spans.dtype}: give integers, in tokens")
        spans = spans.tolist()
    rows = [spans] * heads if isinstance(spans, int) else list(spans)
    if len(rows) not in (kv_heads, heads):
        raise ValueError(
            f"{len(rows)} spans: give one number, one per KV head ({kv_heads}) or one per query head ({heads})"
        )
    if any(isinstance(span, float) for span in rows):
        raise TypeError(f"spans={rows}: give integers, in tokens")
    if any(span < 0 for span in rows):
        raise ValueError(f"spans={rows}: legal is 0 or more")
    return [SpanRule.of(span, sink, granularity) for span in rows for _ in range(heads // len(rows))]


def check_bounds(query_start: Any, lengths: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """(B, 3) int64 on the CPU or q's device: start, first and end of each item; None where there is nothing to say.

    Raises:
        ValueError, TypeError: another shape or dtype, more queries than keys. Values are checked where they are read.
    """
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    if queries > keys:
        raise ValueError(f"{queries} queries, but {keys} keys: a query's own key is among the keys")
    if query_start is None and lengths is None:
        return None
    start = _column("query_start", keys - queries if query_start is None else query_start, batch)
    valid = _column("lengths", keys if lengths is None else lengths, batch, pairs=True)
    valid = valid.to(start.device) if start.device.type != "cpu" else valid
    start = start.to(valid.device)
    first = valid[:, 0] if valid.dim() == 2 else torch.zeros_like(valid)
    return torch.stack([start, first, first + (valid[:, 1] if valid.dim() == 2 else valid)], dim=1)


def _column(name: str, value: Any, batch: int, pairs: bool = False) -> torch.Tensor:
    """(batch,) int64, or (batch, 2) of pairs."""
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} is {value.dtype}: give integers")
    legal = f"one number, or ({batch},)" + (f" or ({batch}, 2) [before, valid]" if pairs else "")
    if value.dim() == 0:
        value = value.expand(batch)
    if tuple(value.shape) != (batch,) and not (pairs and tuple(value.shape) == (batch, 2)):
        raise ValueError(f"{name} {tuple(value.shape)}: legal is {legal}")
    return value.long()
