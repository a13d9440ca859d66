"""`span_attention`: causal attention in which every head looks back over a span of its own, and to the sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.spans.blocks import attend_blocks
from attn_plugins.ops.spans.inputs import check_bounds, check_spans
from attn_plugins.ops.spans.op import attend_spans, places_of
from attn_plugins.ops.spans.reference import span_reference

Spans = int | Sequence[int] | torch.Tensor
PerItem = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spans: Spans,
    sink: int = 0,
    query_start: int | Sequence[int] | torch.Tensor | None = None,
    lengths: int | PerItem | None = None,
    granularity: str = "token",
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with a span per head and shared sinks (MoA, arXiv 2406.14909, section 3).

    The query at position i sees the key at position j iff `j <= i and (j < sink or i - j < span)`.

    Args:
        q: (B, H, N, D), any strides; N may be less than N_kv: a chunk of a prefill.
        k, v: (B, H_kv, N_kv, D); H is a multiple of H_kv.
        spans: tokens that a head looks back, itself included: one number, or one per KV head or per query head (also
            where the heads of a KV group differ). 0 leaves the sinks; N_kv and more is plain causal attention.
        sink: positions below it are seen by all later queries, whatever the span.
        query_start: index in k of the token of the first query, 0..N_kv - N: one number, or one per item, (B,). Keys
            behind a query's own are not seen. None is N_kv - N: queries and keys end together.
        lengths: valid tokens of each item, (B,): they come first, and padding follows. With padding in front, (B, 2)
            rows of [before, valid]: positions count from the first valid token, so sinks are real tokens. One number
            is of all items. Padding is seen by none, and queries that are padding give 0 and an LSE of -inf, whatever
            stands there. `query_start` is an index in k all the same.
        granularity: "token", or "block": the published prefill, by blocks of 64 positions (block j is seen by block
            i iff `j < sink / 64 or i - j < span / 64`), still causal.
        scale: of the scores; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device), "reference" (dense, by definition).
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, N), natural log, at least float32. Its
            gradient is right.

    Returns:
        (B, H, N, D) in q's memory layout. Queries that see no key give 0, and an LSE of -inf.

    Spans that are a tensor are read back at once; `query_start` and `lengths` when the operator runs, but at once by
    "triton" and "reference".

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or numbers out of range.
    """
    check_qkv(q, k, v)
    rules = check_spans(spans, sink, granularity, q.shape[1], k.shape[1])
    bounds = check_bounds(query_start, lengths, q, k)
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    if chosen == "cpu":
        rule = rules[0]
        out, lse = attend_spans(q, k, v, bounds, [one.span for one in rules], rule.sink, rule.grain, factor)
    elif chosen == "triton":
        out, lse = attend_blocks(q, k, v, rules, places_of(q, k, bounds), factor, chosen)
    else:
        out, lse = span_reference(q, k, v, rules, places_of(q, k, bounds), factor)
    return (out, lse) if return_lse else out
