"""The CPU backend: gather the keys of a few query blocks, run one dense attention over them, put the result back.

Plain PyTorch, so it runs on any device; on a CPU it is faster than dense attention because the keys that no query of a
block sees are never touched. The backward gathers again instead of keeping what the forward gathered: memory beyond
q, k, v and the results is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.jobs import Chunk, chunks, plan_jobs
from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.plan.block_plan import BlockPlan

CHUNK_BYTES = 8 << 20  # of gathered keys and values: what stays in a core's share of the caches, many calls' worth


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in q's memory layout and LSE (B, H, N) over the pairs of `plan`; q (B, H, N, D), k, v (B, H_kv, N_kv, D)."""
    out = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for chunk, heads in _work(q, k, plan):
        for b, kv, group in heads:
            tiles = _tiles(q[b, group], chunk.q_tokens, chunk.rows)
            keys, values = (_tiles(t[b, kv : kv + 1], chunk.kv_tokens, chunk.rows) for t in (k, v))
            found, found_lse = attend(tiles, *(_shared(t, tiles) for t in (keys, values)), chunk.bias, scale)
            if plan.rule is not None and plan.rule.empty_rows and chunk.bias is not None:
                blind = (chunk.bias == float("-inf")).all(-1)
                found_lse = found_lse.masked_fill(blind, float("-inf"))
                found = found.masked_fill(blind[..., None], 0.0)
            _put(out[b, group], chunk.q_tokens, found)
            _put(lse[b, group], chunk.q_tokens, found_lse)
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
    """Gradients of q, k, v, in their own layouts. Keys are visited in one fixed order: the same call gives the same bits."""
    grad_q = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for chunk, heads in _work(q, k, plan):
        for b, kv, group in heads:
            tiles, tile_out, tile_grad = (_tiles(t[b, group], chunk.q_tokens, chunk.rows) for t in (q, out, grad_out))
            rows = [None if t is None else _tiles(t[b, group], chunk.q_tokens, chunk.rows) for t in (lse, grad_lse)]
            keys, values = (_tiles(t[b, kv : kv + 1], chunk.kv_tokens, chunk.rows) for t in (k, v))
            dq, dk, dv = attend_backward(
                tile_grad,
                rows[1],
                tiles,
                *(_shared(t, tiles) for t in (keys, values)),
                tile_out,
                rows[0],  # type: ignore[arg-type]
                chunk.bias,
                scale,
            )
            _put(grad_q[b, group], chunk.q_tokens, dq)
            _add(grad_k[b, kv], chunk.kv_tokens, dk)
            _add(grad_v[b, kv], chunk.kv_tokens, dv)
    return grad_q, *(_like(grad, t) for grad, t in ((grad_k, k), (grad_v, v)))


def _work(
    q: torch.Tensor, k: torch.Tensor, plan: BlockPlan
) -> Iterator[tuple[Chunk, list[tuple[int, int, slice]]]]:
    """Every chunk, with the (batch item, KV head, query heads) that it serves. Query heads of a group share keys."""
    batch, kv_heads, groups = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    longest = CHUNK_BYTES // (2 * q.shape[-1] * q.element_size())
    for item in range(plan.batch):
        items = range(batch) if plan.batch == 1 else (item,)
        for head in range(plan.heads):
            if plan.heads == 1:
                served = [(b, kv, slice(kv * groups, (kv + 1) * groups)) for b in items for kv in range(kv_heads)]
            else:
                served = [(b, head // groups, slice(head, head + 1)) for b in items]
            for job in plan_jobs(plan, item, head):
                for chunk in chunks(plan, item, head, job, longest, q.dtype):
                    yield _on(chunk, q.device), served


def _tiles(t: torch.Tensor, tokens: torch.Tensor | None, rows: int) -> torch.Tensor:
    """(H, N, ...) to (H, rows, tokens per row, ...)."""
    if tokens is not None:
        # One head at a time: index_select copies whole tokens only along the first axis.
        t = torch.stack([head.index_select(0, tokens) for head in t]) if len(t) > 1 else t[0].index_select(0, tokens)[None]
    return t.unflatten(1, (rows, -1))


def _shared(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The keys of a KV head, seen by each query head of its group."""
    return t if t.shape[0] == q.shape[0] else t.expand(q.shape[0], *t.shape[1:])


def _put(target: torch.Tensor, tokens: torch.Tensor | None, tiles: torch.Tensor) -> None:
    for head, tile in zip(target, tiles.flatten(1, 2), strict=True):
        if tokens is None:
            head.copy_(tile)
        else:
            head.index_copy_(0, tokens, tile)


def _add(target: torch.Tensor, tokens: torch.Tensor | None, tiles: torch.Tensor) -> None:
    """Add (group heads, rows, E, D) gradients of gathered keys to their tokens (N, D)."""
    for tile in tiles.flatten(1, 2):
        if tokens is None:
            target.add_(tile)
        else:
            target.index_add_(0, tokens, tile.to(target.dtype))


def _on(chunk: Chunk, device: torch.device) -> Chunk:
    if device.type == "cpu":
        return chunk
    moved = (None if t is None else t.to(device) for t in (chunk.q_tokens, chunk.kv_tokens, chunk.bias))
    q_tokens, kv_tokens, bias = moved
    return Chunk(q_tokens, kv_tokens, chunk.rows, bias)


def _leaves_rows(plan: BlockPlan) -> bool:
    """Whether some query rows are in no block, or in a block that sees nothing."""
    return int(plan.q_size.sum()) < plan.q_length or bool((plan.count == 0).any())


def _like(grad: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t).copy_(grad)
