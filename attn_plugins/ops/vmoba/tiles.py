"""The CPU backend for lists that are new in each call: query tiles of all heads side by side, keys a few at a time.

`block_sparse` prepares a plan for many calls. Here nothing outlives one, so little is prepared: tiles with as many
queries and keys go together, whatever their heads, and their keys go through two buffers that stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.vmoba.flat import Flat
from attn_plugins.plan.block_plan import BlockPlan

CHUNK_BYTES = 4 << 20  # of gathered keys and values


@dataclass(frozen=True)
class Chunk:
    """Some tiles, of one number of queries T and one of keys E.

    Attributes:
        heads: (R, 1) int64, their query heads.
        q, kv: (R, T) and (R, E) int64, their tokens.
        runs: (KV head, start, length) of the blocks that the keys are, in order, by place in the order of keys.
    """

    heads: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    runs: list[tuple[int, int, int]]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N, D) to the output, in q's memory layout, and the LSE (B, H, N).

    `plan` has lists on the host and no masks.
    """
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q) if int(plan.q_size.sum()) < plan.q_length else torch.empty_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    room = _room(k)
    for b in range(q.shape[0]):
        query, key, value, found, found_lse = (Flat(t) for t in (q[b], k[b], v[b], out[b], lse[b][..., None]))
        for chunk in _chunks(plan, b, q, group):
            keys, values = _keys(key, chunk, group, room[0]), _keys(value, chunk, group, room[1])
            result, result_lse = attend(_queries(query, chunk), keys, values, None, scale)
            found.write(found.index(chunk.heads, chunk.q), result)
            found_lse.write(found_lse.index(chunk.heads, chunk.q), result_lse[..., None].to(lse.dtype))
        if found.rows.data_ptr() != out[b].data_ptr():  # q's layout is neither by heads nor by tokens
            out[b] = found.rows.view(q.shape[1:])
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, plan: BlockPlan, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v, in their own layouts; summed in one fixed order."""
    group = q.shape[1] // k.shape[1]
    grads = tuple(torch.zeros_like(t) for t in (q, k, v))
    room = _room(k)
    grad_lse_column, lse_column = None if grad_lse is None else grad_lse[..., None], lse[..., None]
    for b in range(q.shape[0]):
        flats = [None if t is None else Flat(t[b]) for t in (grad_lse_column, q, grad_out, out, lse_column)]
        key, value, found = Flat(k[b]), Flat(v[b]), Flat(grads[0][b])
        sums = [torch.zeros(k.shape[1:], dtype=lse.dtype, device=q.device) for _ in range(2)]
        for chunk in _chunks(plan, b, q, group):
            of_lse, *tiles = [None if t is None else _queries(t, chunk) for t in flats]
            query, of_out, tile_out, tile_lse = (t for t in tiles if t is not None)
            grad = attend_backward(
                of_out, None if of_lse is None else of_lse[..., 0], query, _keys(key, chunk, group, room[0]),
                _keys(value, chunk, group, room[1]), tile_out, tile_lse[..., 0], None, scale,
            )  # fmt: skip
            found.write(found.index(chunk.heads, chunk.q), grad[0])
            for whole, part in zip(sums, grad[1:], strict=True):
                _add_runs(whole, chunk.runs, part.reshape(-1, q.shape[-1]))
        if found.rows.data_ptr() != grads[0][b].data_ptr():
            grads[0][b] = found.rows.view(q.shape[1:])
        for grad_of, whole in zip(grads[1:], sums, strict=True):
            if plan.kv_order is None:
                grad_of[b] = whole
            else:
                grad_of[b].index_copy_(1, plan.kv_order.to(q.device), whole.to(grad_of.dtype))
    return grads  # type: ignore[return-value]


def _room(k: torch.Tensor) -> list[torch.Tensor]:
    """Two buffers for what a chunk gathers, at most."""
    rows = max(CHUNK_BYTES // (2 * k.shape[-1] * k.element_size()), k.shape[2])
    return [k.new_empty(rows, k.shape[-1]) for _ in range(2)]


def _queries(t: Flat, chunk: Chunk) -> torch.Tensor:
    return t.read(t.index(chunk.heads, chunk.q), len(chunk.q))


def _keys(t: Flat, chunk: Chunk, group: int, into: torch.Tensor) -> torch.Tensor:
    return t.read(t.index(chunk.heads // group, chunk.kv), len(chunk.kv), into)


def _add_runs(whole: torch.Tensor, runs: list[tuple[int, int, int]], part: torch.Tensor) -> None:
    """Adds keys' gradients block by block: index_add_ would go key by key."""
    at = 0
    for head, start, length in runs:
        whole[head, start : start + length] += part[at : at + length]
        at += length


def _chunks(plan: BlockPlan, item: int, q: torch.Tensor, group: int) -> Iterator[Chunk]:
    """All tiles of all heads of a batch item that see something."""
    heads, blocks = q.shape[1], len(plan.q_start)
    lists = plan.lists[item if plan.batch > 1 else 0].expand(heads, -1, -1).flatten(0, 1).long()  # (H * Q, L)
    sizes = torch.where(lists >= 0, plan.kv_size.long()[lists], 0)  # -1 reads the last one, and is left out
    starts = plan.kv_start.long()[lists]
    queries = plan.q_size.long().repeat(heads)
    kinds, kind = torch.unique(queries * (plan.kv_length + 1) + sizes.sum(-1), return_inverse=True)
    longest = CHUNK_BYTES // (2 * q.shape[-1] * q.element_size())
    for number, mixed in enumerate(kinds.tolist()):
        length, seen = divmod(mixed, plan.kv_length + 1)
        members = torch.nonzero(kind == number)[:, 0]
        if not length or not seen:
            continue
        for rows in members.split(max(1, longest // seen)):
            head, block = torch.div(rows, blocks, rounding_mode="floor"), rows % blocks
            places = plan.q_start.long()[block][:, None] + torch.arange(length)
            there = sizes[rows] > 0
            size, start = sizes[rows][there], starts[rows][there]
            ends = size.cumsum(0)
            keys = torch.repeat_interleave(start - (ends - size), size) + torch.arange(len(rows) * seen)
            of_run = (head[:, None] // group).expand(there.shape)[there]
            runs = list(zip(of_run.tolist(), start.tolist(), size.tolist(), strict=True))
            keys = keys.view(len(rows), -1)
            places = places if plan.q_order is None else plan.q_order[places]
            keys = keys if plan.kv_order is None else plan.kv_order[keys]
            yield Chunk(head[:, None].to(q.device), places.to(q.device), keys.to(q.device), runs)
