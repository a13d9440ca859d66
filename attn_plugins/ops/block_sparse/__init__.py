"""`block_sparse_attention`: exact attention over a block plan, the operator that every sparse method stands on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.block_sparse.reference import block_sparse_reference
from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.tables import rule_refusal


def _plans_of(spec: Sequence[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    return [(slice(None), BlockPlan.by_key(spec[0]))]


def _keep(spec: Sequence[int]) -> BlockPlan | None:
    """A caller may drop its plan before the backward; a compiled graph has no ctx, so there the caller keeps it."""
    return BlockPlan.by_key(spec[0]) if isinstance(spec[0], int) else None


_op = register_sparse_op("block_sparse", _plans_of, _keep)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each query block sees the KV blocks that `plan` lists for it.

    Args:
        q: (B, H, N, D), any strides.
        k, v: (B, H_kv, N_kv, D); H is a multiple of H_kv.
        plan: for N queries and N_kv keys; its lists are shared or per batch item, shared or per query head.
        scale: of the scores; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device), "reference" (dense, by definition).
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, N), natural log, at least float32. Its
            gradient is right.

    Returns:
        (B, H, N, D) in q's memory layout. Queries that see no key give 0, and an LSE of -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or do not fit the plan.
    """
    check_qkv(q, k, v)
    for name, have, want in (("query tokens", q.shape[2], plan.q_length), ("keys", k.shape[2], plan.kv_length)):
        if have != want:
            raise ValueError(f"{have} {name}, but the plan is for {want}: make a plan for this sequence")
    for name, have, want in (("batch items", q.shape[0], plan.batch), ("query heads", q.shape[1], plan.heads)):
        if want not in (1, have):
            raise ValueError(f"{have} {name}, but the plan has lists for {want}: it must be that many, or 1 (shared)")
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q) or rule_refusal(plan))
    if chosen == "reference":
        out, lse = block_sparse_reference(q, k, v, plan, factor)
    else:
        out, lse = _op(q, k, v, factor, [plan.key], chosen)
    return (out, lse) if return_lse else out
