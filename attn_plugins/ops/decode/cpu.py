"""The CPU backend: the ranges are views of the cache, attended where they lie, and merged by LSE.

All query heads and queries of a KV head are rows of one call, so that its keys are read once. A call of fewer problems
than there are threads is cut along the keys. Plain PyTorch: it runs on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward, bias_of
from attn_plugins.ops.decode.inputs import Positions
from attn_plugins.ops.decode.parts import ALL, Part, host_ranges, parts_of
from attn_plugins.ops.decode.tiles import attend_tiles
from attn_plugins.ops.decode.tiling import CALL_BYTES, TILE_BYTES, Tiling, tiling_of
from attn_plugins.ops.decode.visibility import Visibility
from attn_plugins.ops.merge import merge_attention_states

Work = list[tuple[int, Part, int]]  # (slot, part, cuts)
FEW_PARTS = 2  # are never worth a tiling
CUT_KEYS = 512  # of fewer keys a thread, the merge costs more than the thread brings


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor, positions: Positions | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Nq, D), k and v (B, total, D) to the output, in q's memory layout, and the LSE (B, H, Nq)."""
    if not q.numel():
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    rows = _rows(q, ranges.shape[1])
    work, slots, tiling = _plan(ranges, k, rows.shape[2])
    if tiling is not None and (positions is None or not bool((positions.keys < 0).any())):
        out, lse = attend_tiles(rows, k, v, tiling, positions, scale)
        out = out.reshape(q.shape)
        if out.dtype != q.dtype or out.stride() != q.stride():
            out = torch.empty_like(q).copy_(out)
        return out, lse.reshape(q.shape[:-1])
    visibility = _visibility(positions, q, ranges)
    found = [_attend(*_tiles(rows, part, k, v, visibility, count), scale) for _, part, count in work]
    if slots == 1 and sum(lse.numel() for _, lse in found) == rows.numel() // rows.shape[-1]:
        out, lse = (torch.cat(states, dim=1) for states in zip(*found, strict=True))  # each head once, and in order
    else:
        out, lse = _merged(work, slots, found, rows)
    return torch.empty_like(q).copy_(out.view(q.shape)), lse.view(q.shape[:-1])


def _plan(ranges: torch.Tensor, k: torch.Tensor, rows: int) -> tuple[Work, int, Tiling | None]:
    """A call for each part, and what is better than that, if there are many of them."""
    threads = torch.get_num_threads() if k.device.type == "cpu" else 1
    values = tuple(ranges.flatten().tolist())
    return _plan_of(values, tuple(ranges.shape), *k.shape, k.element_size(), rows, threads, k.device)


@functools.lru_cache(maxsize=512)
def _plan_of(
    values: tuple[int, ...], shape: tuple[int, ...], batch: int, total: int, dim: int, itemsize: int, rows: int,
    threads: int, device: torch.device,
) -> tuple[Work, int, Tiling | None]:  # fmt: skip
    ranges = host_ranges(values, shape, total)
    work, slots = _work(parts_of(ranges), batch, threads)
    if len(work) <= FEW_PARTS:
        return work, slots, None
    segments = tuple(tuple((head, *ends) for head, row in enumerate(heads) for ends in row) for heads in ranges)
    alike = batch // len(segments)
    row_bytes, tile_bytes = 2 * dim * itemsize * alike, TILE_BYTES[rows == 1] * alike
    tokens = sum(end - start for item in segments for _, start, end in item)
    other = tokens * row_bytes + len(work) * CALL_BYTES
    return work, slots, tiling_of(segments, shape[1], row_bytes, tile_bytes, other, device)


def _tiles(
    rows: torch.Tensor, part: Part, k: torch.Tensor, v: torch.Tensor, visibility: Visibility | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    tiles = (part.rows(rows), *_read(part, k, v, visibility))
    return tiles if count == 1 else _cut(*tiles, count)


def _merged(
    work: Work, slots: int, found: list[tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states of a head as one, of all heads at once; a slot that a head has no use for is a state without keys."""
    outs = rows.new_zeros(max(slots, 1), *rows.shape)
    lses = rows.new_full(outs.shape[:-1], float("-inf"), dtype=torch.promote_types(rows.dtype, torch.float32))
    for (slot, part, count), (out, lse) in zip(work, found, strict=True):
        if count == 1:
            outs[slot, part.items, part.kv], lses[slot, part.items, part.kv] = out, lse
        else:
            outs[slot : slot + count, part.items, part.first] = out.transpose(0, 1)
            lses[slot : slot + count, part.items, part.first] = lse.transpose(0, 1)
    return merge_attention_states(outs.unbind(), lses.unbind()) if slots > 1 else (outs[0], lses[0])


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ranges: torch.Tensor,
    positions: Positions | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. Parts come in one fixed order: the same call gives the same bits."""
    kv_heads = ranges.shape[1]
    visibility = _visibility(positions, q, ranges)
    rows, rows_grad, rows_out = (_rows(t, kv_heads) for t in (q, grad_out, out))
    rows_lse, rows_grad_lse = (None if t is None else _rows(t[..., None], kv_heads)[..., 0] for t in (lse, grad_lse))
    grad_rows = torch.zeros_like(rows, dtype=lse.dtype)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for place in parts_of(host_ranges(ranges.flatten().tolist(), ranges.shape, k.shape[1])):
        for part in place:
            at = part.items, part.kv
            keys, values, seen = _read(part, k, v, visibility)
            # Output and LSE are those of all parts together: each part gives its share of the gradients.
            grad_q, part.read(grad_k)[:], part.read(grad_v)[:] = attend_backward(
                rows_grad[at], None if rows_grad_lse is None else rows_grad_lse[at], rows[at], keys, values,
                rows_out[at], rows_lse[at], None if seen is None else bias_of(seen, q.dtype), scale,  # type: ignore[index]
            )  # fmt: skip
            grad_rows[at] += grad_q
    return torch.empty_like(q).copy_(grad_rows.view(q.shape)), grad_k, grad_v


def _rows(t: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, H, Nq, D) to (B, H_kv, H / H_kv * Nq, D)."""
    batch, heads, queries, dim = t.shape
    return t.reshape(batch, kv_heads, heads // kv_heads * queries, dim)


def _visibility(positions: Positions | None, q: torch.Tensor, ranges: torch.Tensor) -> Visibility | None:
    return None if positions is None else Visibility(positions, ranges.shape[1], q.shape[1] // ranges.shape[1])


def _work(places: list[list[Part]], batch: int, threads: int) -> tuple[Work, int]:
    """(slot, part, count): `part` in `count` equal cuts, whose results go to that many slots; and how many there are.

    Parts of one head have slots of their own; those of different heads share them.
    """
    work: Work = []
    slots = 0
    for place in places:
        last = slots
        for part in place:
            items = batch if part.items == ALL else 1
            for some in [part] if items * part.heads >= threads else part.singles():
                slot = slots
                for cut, count in _cuts(some, -(-threads // items) if some.heads == 1 else 1):
                    work.append((slot, cut, count))
                    slot += count
                last = max(last, slot)
        slots = last
    return work, slots


def _cuts(part: Part, wanted: int) -> Iterator[tuple[Part, int]]:
    """About `wanted` equal cuts, and the rest that does not divide."""
    count = max(1, min(wanted, part.length // CUT_KEYS))
    even = part.length // count * count
    yield part.piece(0, even), count
    if even < part.length:
        yield part.piece(even, part.length - even), 1


def _cut(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One head's keys as `count` heads of equal parts."""
    q = q.expand(-1, count, -1, -1)
    k, v = (t[:, 0].unflatten(1, (count, -1)) for t in (k, v))
    return q, k, v, None if seen is None else seen[:, 0].unflatten(2, (count, -1)).transpose(1, 2)


def _read(
    part: Part, k: torch.Tensor, v: torch.Tensor, visibility: Visibility | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values (b, heads, n, D), views, and which rows see which (b or 1, heads, rows, n); None is all."""
    keys, values = part.read(k), part.read(v)
    if visibility is None:
        return keys, values, None
    seen, empty = visibility.of(part)
    if empty is not None:  # whatever stands there, NaN times a probability of 0 is NaN
        keys, values = (t.masked_fill(empty[..., None], 0.0) for t in (keys, values))
    return keys, values, seen


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = attend(q, k, v, None if seen is None else bias_of(seen, q.dtype), scale)
    if seen is not None:
        blind = ~seen.any(-1)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
    return out, lse
