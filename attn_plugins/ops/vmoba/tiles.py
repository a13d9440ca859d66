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
FEWEST = 4  # tiles in a call, where as many threads run: the slices of one tile alone would leave some of them idle
SLAB_KEYS = 1 << 19  # keys whose places are worked out together: 4 MB

Runs = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Slab:
    """R tiles, of one number of queries T and one of keys E.

    Attributes:
        heads, kv_heads: (R, 1) int64.
        q, kv: (R, T) and (R, E) int64, their tokens.
        runs: of each tile (KV head, start, length) of the blocks that its keys are, by place in the order of keys.
    """

    heads: torch.Tensor
    kv_heads: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    runs: list[Runs]

    def queries(self, t: Flat) -> torch.Tensor:
        """(R, T): the rows of `t` that are the tiles' queries."""
        return t.index(self.heads, self.q)

    def keys(self, t: Flat) -> torch.Tensor:
        """(R, E): the rows of `t` that are the tiles' keys."""
        return t.index(self.kv_heads, self.kv)

    def chunks(self, key_bytes: int) -> list[slice]:
        """So many tiles at a time that what is gathered for them stays in the caches, and all threads have work."""
        step = max(min(torch.get_num_threads(), FEWEST), CHUNK_BYTES // (2 * key_bytes * self.kv.shape[1]))
        return [slice(at, min(at + step, len(self.q))) for at in range(0, len(self.q), step)]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N, D) to the output, in q's memory layout, and the LSE (B, H, N).

    `plan` has lists on the host and no masks.
    """
    group, key_bytes = q.shape[1] // k.shape[1], k.shape[-1] * k.element_size()
    out = torch.zeros_like(q) if int(plan.q_size.sum()) < plan.q_length else torch.empty_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for b in range(q.shape[0]):
        query, key, value, found, found_lse = (Flat(t) for t in (q[b], k[b], v[b], out[b], lse[b][..., None]))
        for slab in _slabs(plan, b, q, group):
            at_query, at_found, at_lse = (slab.queries(t) for t in (query, found, found_lse))
            at_key, at_value = slab.keys(key), slab.keys(value)
            chunks = slab.chunks(key_bytes)
            room = _room(k, slab, chunks)
            for some in chunks:
                keys, values = key.read(at_key[some], room[0]), value.read(at_value[some], room[1])
                result, result_lse = attend(query.read(at_query[some]), keys, values, None, scale)
                found.write(at_found[some], result)
                found_lse.write(at_lse[some], result_lse.to(lse.dtype))
        if found.rows.data_ptr() != out[b].data_ptr():  # q's layout is neither by heads nor by tokens
            out[b] = found.rows.view(q.shape[1:])
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, plan: BlockPlan, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v, in their own layouts; summed in one fixed order."""
    group, key_bytes = q.shape[1] // k.shape[1], k.shape[-1] * k.element_size()
    grads = tuple(torch.zeros_like(t) for t in (q, k, v))
    for b in range(q.shape[0]):
        flats = [Flat(t) for t in (q[b], grad_out[b], out[b], lse[b][..., None])]
        grad_lse_flat = None if grad_lse is None else Flat(grad_lse[b][..., None])
        key, value, found = Flat(k[b]), Flat(v[b]), Flat(grads[0][b])
        sums = [torch.zeros(k.shape[1:], dtype=lse.dtype, device=q.device) for _ in range(2)]
        for slab in _slabs(plan, b, q, group):
            rows = [(t, slab.queries(t)) for t in flats]
            at_found, at_key, at_value = slab.queries(found), slab.keys(key), slab.keys(value)
            at_grad_lse = None if grad_lse_flat is None else slab.queries(grad_lse_flat)
            chunks = slab.chunks(key_bytes)
            room = _room(k, slab, chunks)
            for some in chunks:
                query, of_out, tile_out, tile_lse = (t.read(at[some]) for t, at in rows)
                of_lse = None
                if grad_lse_flat is not None and at_grad_lse is not None:
                    of_lse = grad_lse_flat.read(at_grad_lse[some])[..., 0]
                grad = attend_backward(
                    of_out, of_lse, query, key.read(at_key[some], room[0]), value.read(at_value[some], room[1]),
                    tile_out, tile_lse[..., 0], None, scale,
                )  # fmt: skip
                found.write(at_found[some], grad[0])
                runs = [run for tile in slab.runs[some] for run in tile]
                for whole, part in zip(sums, grad[1:], strict=True):
                    _add_runs(whole, runs, part.reshape(-1, q.shape[-1]))
        if found.rows.data_ptr() != grads[0][b].data_ptr():
            grads[0][b] = found.rows.view(q.shape[1:])
        for grad_of, whole in zip(grads[1:], sums, strict=True):
            if plan.kv_order is None:
                grad_of[b] = whole
            else:
                grad_of[b].index_copy_(1, plan.kv_order.to(q.device), whole.to(grad_of.dtype))
    return grads  # type: ignore[return-value]


def _room(k: torch.Tensor, slab: Slab, chunks: list[slice]) -> list[torch.Tensor]:
    """Two buffers for what a chunk of a slab gathers."""
    rows = chunks[0].stop * slab.kv.shape[1]
    return [k.new_empty(rows, k.shape[-1]) for _ in range(2)]


def _add_runs(whole: torch.Tensor, runs: Runs, part: torch.Tensor) -> None:
    """Adds keys' gradients block by block: index_add_ would go key by key."""
    at = 0
    for head, start, length in runs:
        whole[head, start : start + length] += part[at : at + length]
        at += length


def _slabs(plan: BlockPlan, item: int, q: torch.Tensor, group: int) -> Iterator[Slab]:
    """All tiles of all heads of a batch item that see something."""
    heads, blocks = q.shape[1], len(plan.q_start)
    lists = plan.lists[item if plan.batch > 1 else 0].expand(heads, -1, -1).flatten(0, 1).long()  # (H * Q, L)
    sizes = torch.where(lists >= 0, plan.kv_size.long()[lists], 0)  # -1 reads the last one, and is left out
    starts = plan.kv_start.long()[lists]
    queries = plan.q_size.long().repeat(heads)
    kinds, kind = torch.unique(queries * (plan.kv_length + 1) + sizes.sum(-1), return_inverse=True)
    for number, mixed in enumerate(kinds.tolist()):
        length, seen = divmod(mixed, plan.kv_length + 1)
        if not length or not seen:
            continue
        for rows in torch.nonzero(kind == number)[:, 0].split(max(1, SLAB_KEYS // seen)):
            head, block = torch.div(rows, blocks, rounding_mode="floor"), rows % blocks
            there = sizes[rows] > 0
            size, start = sizes[rows][there], starts[rows][there]
            ends = size.cumsum(0)
            places = torch.repeat_interleave(start - (ends - size), size) + torch.arange(len(rows) * seen)
            tokens = plan.q_start.long()[block][:, None] + torch.arange(length)
            keys = places.view(len(rows), -1)
            tokens = tokens if plan.q_order is None else plan.q_order[tokens]
            keys = keys if plan.kv_order is None else plan.kv_order[keys]
            of_query, of_key = head[:, None], torch.div(head, group, rounding_mode="floor")[:, None]
            runs = zip(of_key.expand_as(there)[there].tolist(), start.tolist(), size.tolist(), strict=True)
            of_tile = [[next(runs) for _ in range(n)] for n in there.sum(-1).tolist()]
            yield Slab(of_query.to(q.device), of_key.to(q.device), tokens.to(q.device), keys.to(q.device), of_tile)
