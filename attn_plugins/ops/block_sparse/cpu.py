"""The CPU backend: gather the keys of a few query blocks, run one dense attention over them, put the result back.

Plain PyTorch, so it runs on any device; on a CPU it is faster than dense attention because the keys that no query of a
block sees are never touched. The backward gathers again instead of keeping what the forward gathered: memory beyond
q, k, v and the results is one chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.jobs import Chunk, Part, plan_chunks
from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.merge import merge_attention_states
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.cost import CHUNK_BYTES


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D) to the output, in q's memory layout, and the LSE (B, H, N)."""
    out = torch.zeros_like(q) if _leaves_rows(plan) else torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for chunk, b, kv, members in _work(q, k, plan, range(k.shape[1])):
        keys = [(part.keys.read(k[b, kv]), part.keys.read(v[b, kv])) for part in chunk.parts]
        for h in members:
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
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    # Half precision is summed in float32, a few heads at a time, so that the sums take no more memory than k and v.
    narrow = q.element_size() < 4
    for some in torch.arange(k.shape[1]).split(max(1, k.shape[1] // 4) if narrow else k.shape[1]):
        heads = range(int(some[0]), int(some[-1]) + 1)
        mine = slice(heads.start, heads.stop)
        sums = [t[:, mine].float() if narrow else t[:, mine] for t in (grad_k, grad_v)]
        _backward_heads(grad_out, grad_lse, q, k, v, out, lse, grad_q, sums, heads, plan, scale)
        if narrow:
            grad_k[:, mine], grad_v[:, mine] = sums
    return grad_q, grad_k, grad_v


def _backward_heads(  # type: ignore[no-untyped-def]
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    grad_q,
    sums: list[torch.Tensor],
    kv_heads: range,
    plan: BlockPlan,
    scale: float,
) -> None:
    """Of some KV heads: q's gradient goes to `grad_q`, k's and v's are added to `sums` (B, len(kv_heads), N, D)."""
    for chunk, b, kv, members in _work(q, k, plan, kv_heads):
        keys = [(part.keys.read(k[b, kv]), part.keys.read(v[b, kv])) for part in chunk.parts]
        mine = slice(kv.start - kv_heads.start, kv.stop - kv_heads.start)
        for h in members:
            tiles, tile_grad, tile_out, tile_lse = (chunk.q.read(t[b, h]) for t in (q, grad_out, out, lse))
            tile_grad_lse = None if grad_lse is None else chunk.q.read(grad_lse[b, h])
            tile_grad_q = None
            for (tile_k, tile_v), part in zip(keys, chunk.parts, strict=True):
                # Output and LSE are those of all parts together: each part then gives its share of the gradients.
                grads = attend_backward(
                    tile_grad, tile_grad_lse, tiles, tile_k, tile_v, tile_out, tile_lse, part.bias, scale
                )
                tile_grad_q = grads[0] if tile_grad_q is None else tile_grad_q + grads[0]
                part.keys.add(sums[0][b, mine], grads[1])
                part.keys.add(sums[1][b, mine], grads[2])
            assert tile_grad_q is not None  # a chunk has at least one part
            chunk.q.write(grad_q[b, h], tile_grad_q)


def _work(
    q: torch.Tensor, k: torch.Tensor, plan: BlockPlan, kv_heads: range
) -> Iterator[tuple[Chunk, int, slice, list[slice]]]:
    """(chunk, batch item, KV heads, query heads in rounds): each round has one query head of each of the KV heads.

    Keys are gathered once for all rounds. Heads that share a list go together where their chunk is small.
    """
    batch, group = q.shape[0], q.shape[1] // k.shape[1]
    threads = torch.get_num_threads() if q.device.type == "cpu" else 16
    longest = threads * CHUNK_BYTES // (2 * q.shape[-1] * q.element_size())
    for item in range(plan.batch):
        items = range(batch) if plan.batch == 1 else (item,)
        for head in range(plan.heads):
            own = kv_heads if plan.heads == 1 else range(head // group, head // group + 1)
            if own[0] not in kv_heads:
                continue
            rounds = range(group) if plan.heads == 1 else range(head % group, head % group + 1)
            for chunk in plan_chunks(plan, item, head, longest, len(own), q.dtype):
                chunk = chunk.to(q.device)
                for b, first in itertools.product(items, range(own.start, own.stop, chunk.heads)):
                    kv = slice(first, min(first + chunk.heads, own.stop))
                    yield chunk, b, kv, [slice(kv.start * group + g, kv.stop * group, group) for g in rounds]


def _leaves_rows(plan: BlockPlan) -> bool:
    """Whether some query rows are in no block, or in a block that sees nothing."""
    if "leaves_rows" not in plan.prepared:
        plan.prepared["leaves_rows"] = int(plan.q_size.sum()) < plan.q_length or bool((plan.count == 0).any())
    return plan.prepared["leaves_rows"]
