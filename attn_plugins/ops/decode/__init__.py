"""`decode_attention`: one or few queries against long caches of keys, each KV head with tokens of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.checks import choose_backend, kernel_refusal, resolve_scale, runs_plainly
from attn_plugins.ops.decode import cpu
from attn_plugins.ops.decode.inputs import Positions, check_inputs, check_positions
from attn_plugins.ops.decode.op import decode
from attn_plugins.ops.decode.reference import decode_reference


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    ranges: torch.Tensor,
    key_positions: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    spans: int | Sequence[int] | torch.Tensor | None = None,
    sink: int = 0,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over the tokens that each KV head keeps (MoA, arXiv 2406.14909, section 5).

    The heads' caches lie one behind another in one tensor, as long as each head needs: nothing is padded.

    Args:
        q: (B, H, Nq, D), any strides; Nq is one or a few.
        k, v: (B, total, D), the tokens of all KV heads.
        ranges: (1 or B, H_kv, R, 2) integers, [start, end) of the axis of `total`: the tokens of a KV head; H is a
            multiple of H_kv. Where end <= start a range is empty. The ranges of a head do not overlap.
        key_positions, query_positions: (1 or B, total) and (1 or B, Nq) integers, both or neither. With them the key at
            position j is seen by the query at i iff 0 <= j <= i, and j < sink or i - j < span: slots of a negative
            position are empty, and hold anything. Without them all queries see all keys of their head's ranges.
        spans: tokens that a head looks back: one number, or one per KV head or per query head; None is no limit.
        sink: positions below it are seen by all later queries, whatever the span.
        scale: of the scores; None is D ** -0.5.
        backend: "auto", "triton" (float16, bfloat16, float32; D up to 256), "cpu" (plain PyTorch on any device),
            "reference" (dense, by definition).
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, Nq), natural log, at least float32.

    Returns:
        (B, H, Nq, D) in q's memory layout. Queries that see no key give 0, and an LSE of -inf.

    Output and LSE are differentiable in q, k and v. The backward is plain PyTorch on every device.

    On a GPU the forward reads nothing back. So ranges are not checked there: what lies outside of k is left out, and a
    token in two ranges of a head counts twice. Everywhere else both are errors. Only the backward, and the backends
    "cpu" and "reference" on a GPU, read the ranges on the host. Spans that are no tensor are copied to the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; ranges that leave k or overlap.
    """
    check_inputs(q, k, v, ranges)
    positions = check_positions(q, k, ranges.shape[1], key_positions, query_positions, spans, sink)
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    if chosen == "reference":
        out, lse = decode_reference(q, k, v, ranges, positions, factor)
    elif chosen == "cpu" and runs_plainly(q, k, v):
        out, lse = cpu.forward(q, k, v, ranges, positions, factor)
    else:
        keys, queries, looks = (positions.keys, positions.queries, positions.spans) if positions else (None, None, None)
        out, lse = decode(q, k, v, ranges, keys, queries, looks, sink, factor, chosen == "triton")
    return (out, lse) if return_lse else out


__all__ = ["Positions", "decode_attention"]
