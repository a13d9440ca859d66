"""The CPU backend: gather the keys of a few query blocks, run one dense attention over them, put the result back.

Plain PyTorch, so it runs on any device; on a CPU it is faster than dense attention because the keys that no query of a
block sees are never touched. The backward gathers again instead of keeping what the forward gathered: memory beyond
q, k, v and the results is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.jobs import Chunk, Part, plan_chunks
from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.merge import merge_attention_states
from attn_plugins.plan.block_plan import BlockPlan

CHUNK_BYTES = 1 << 20  # of gathered keys and values, per thread: they are read again at once, from a core's own cache


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D) to the output, in q's memory layout, and the LSE (B, H, N)."""
    out = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for chunk, b, kv, heads in _work(q, k, plan):
        keys = [(part.keys.read(k[b, kv]), part.keys.read(v[b, kv])) for part in chunk.parts]
        for h in heads:
            tiles = chunk.q.read(q[b, h])
            found = [_attend(tiles, *one, part, scale) for one, part in zip(keys, chunk.parts, strict=True)]
            merged, merged_lse = found[0] if len(found) == 1 else merge_attention_states(*zip(*found, strict=True))
            chunk.q.write(out[b, h], merged)
            chunk.q.write(lse[b, h], merged_lse)
    return out, lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = attend(q, k, v, part.bias, scale)
    if part.blind is not None:
        out, lse = out.masked_fill(part.blind[..., None], 0.0), lse.masked_fill(part.blind, float("-inf"))
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
        keys = [(part.keys.read(k[b, kv]), part.keys.read(v[b, kv])) for part in chunk.parts]
        for h in heads:
            rows = [None if t is None else chunk.q.read(t[b, h]) for t in (grad_out, grad_lse, q, out, lse)]
            tile_grad_q = None
            for (tile_k, tile_v), part in zip(keys, chunk.parts, strict=True):
                # With the LSE over all parts, each part's gradient is its share of the whole. delta belongs to all keys
                # at once, so grad_lse is given to each part.
                grads = attend_backward(*rows[:3], tile_k, tile_v, *rows[3:], part.bias, scale)  # type: ignore[arg-type]
                tile_grad_q = grads[0] if tile_grad_q is None else tile_grad_q + grads[0]
                part.keys.add(grad_k[b, kv], grads[1])
                part.keys.add(grad_v[b, kv], grads[2])
            assert tile_grad_q is not None  # a chunk has at least one part
            chunk.q.write(grad_q[b, h], tile_grad_q)
    return grad_q, *(torch.empty_like(t).copy_(grad) for grad, t in ((grad_k, k), (grad_v, v)))


def _work(q: torch.Tensor, k: torch.Tensor, plan: BlockPlan) -> Iterator[tuple[Chunk, int, int, range]]:
    """(chunk, batch item, KV head, query heads): keys are gathered once for the query heads of a group."""
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


def _leaves_rows(plan: BlockPlan) -> bool:
    """Whether some query rows are in no block, or in a block that sees nothing."""
    if "leaves_rows" not in plan.prepared:
        plan.prepared["leaves_rows"] = int(plan.q_size.sum()) < plan.q_length or bool((plan.count == 0).any())
    return plan.prepared["leaves_rows"]
