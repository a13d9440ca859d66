"""The CPU backend: gather the keys of a few query blocks, run one dense attention over them, put the result back.

Plain PyTorch, so it runs on any device; on a CPU it is faster than dense attention because the keys that no query of a
block sees are never touched. The backward gathers again instead of keeping what the forward gathered: memory beyond
q, k, v and the results is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.jobs import Chunk, plan_chunks
from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.plan.block_plan import BlockPlan

CHUNK_BYTES = 1 << 20  # of gathered keys and values, per thread: they are read again at once, from a core's own cache


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in q's memory layout and LSE (B, H, N) over the pairs of `plan`; q (B, H, N, D), k, v (B, H_kv, N_kv, D)."""
    out = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for chunk, b, kv, heads in _work(q, k, plan):
        keys, values = _gather(k[b, kv], chunk.kv_tokens, chunk.rows), _gather(v[b, kv], chunk.kv_tokens, chunk.rows)
        for h in heads:
            tiles = _gather(q[b, h], chunk.q_tokens, chunk.rows)
            found, found_lse = attend(tiles, keys, values, chunk.bias, scale)
            if chunk.blind is not None:
                found, found_lse = found.masked_fill(chunk.blind[..., None], 0.0), found_lse.masked_fill(chunk.blind, float("-inf"))
            _put(out[b, h], chunk.q_tokens, found)
            _put(lse[b, h], chunk.q_tokens, found_lse)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, in their own layouts. Chunks come in one fixed order: the same call gives the same bits."""
    grad_q = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for chunk, b, kv, heads in _work(q, k, plan):
        keys, values = _gather(k[b, kv], chunk.kv_tokens, chunk.rows), _gather(v[b, kv], chunk.kv_tokens, chunk.rows)
        for h in heads:
            rows = [None if t is None else _gather(t[b, h], chunk.q_tokens, chunk.rows) for t in (grad_out, grad_lse, q, out, lse)]
            dq, dk, dv = attend_backward(rows[0], rows[1], rows[2], keys, values, rows[3], rows[4], chunk.bias, scale)  # type: ignore[arg-type]
            _put(grad_q[b, h], chunk.q_tokens, dq)
            _add(grad_k[b, kv], chunk.kv_tokens, dk)
            _add(grad_v[b, kv], chunk.kv_tokens, dv)
    return grad_q, *(torch.empty_like(t).copy_(grad) for grad, t in ((grad_k, k), (grad_v, v)))


def _work(q: torch.Tensor, k: torch.Tensor, plan: BlockPlan) -> Iterator[tuple[Chunk, int, int, range]]:
    """(chunk, batch item, KV head, query heads): a KV head's keys are gathered once for the query heads of its group."""
    batch, kv_heads, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    threads = torch.get_num_threads() if q.device.type == "cpu" else 16
    longest = threads * CHUNK_BYTES // (2 * q.shape[-1] * q.element_size())
    for item in range(plan.batch):
        items = range(batch) if plan.batch == 1 else (item,)
        for head in range(plan.heads):
            for chunk in plan_chunks(plan, item, head, longest, q.dtype):
                chunk = chunk.to(q.device)
                for b in items:
                    if plan.heads > 1:
                        yield chunk, b, head // group, range(head, head + 1)
                        continue
                    for kv in range(kv_heads):
                        yield chunk, b, kv, range(kv * group, (kv + 1) * group)


def _gather(t: torch.Tensor, tokens: torch.Tensor | None, rows: int) -> torch.Tensor:
    """(N, ...) to (1, rows, tokens per row, ...). One head at a time: a token is then one run of memory."""
    return (t if tokens is None else t.index_select(0, tokens)).view(1, rows, -1, *t.shape[1:])


def _put(target: torch.Tensor, tokens: torch.Tensor | None, tiles: torch.Tensor) -> None:
    """Write (1, rows, T, ...) results to their tokens (N, ...)."""
    if tokens is None:
        target.copy_(tiles.reshape(target.shape))
    else:
        target.index_copy_(0, tokens, tiles.flatten(0, 2))


def _add(target: torch.Tensor, tokens: torch.Tensor | None, tiles: torch.Tensor) -> None:
    """Add (1, rows, E, D) gradients of gathered keys to their tokens (N, D)."""
    if tokens is None:
        target.add_(tiles.reshape(target.shape))
    else:
        target.index_add_(0, tokens, tiles.flatten(0, 2).to(target.dtype))


def _leaves_rows(plan: BlockPlan) -> bool:
    """Whether some query rows are in no block, or in a block that sees nothing."""
    if "leaves_rows" not in plan.prepared:
        plan.prepared["leaves_rows"] = int(plan.q_size.sum()) < plan.q_length or bool((plan.count == 0).any())
    return plan.prepared["leaves_rows"]
