"""Ragged ranges as tiles: the cache seen as rows of equally long tiles, all of them in one attention call.

A tile lies inside one range, so it has one KV head, whose queries are its rows. What the tiles leave of a range at
either end is copied, and takes a second, smaller call. Each head's tiles are merged by their LSE, all heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, bias_of
from attn_plugins.ops.decode.inputs import Positions

Segment = tuple[int, int, int]  # KV head, start, end
Segments = tuple[tuple[Segment, ...], ...]  # of each batch item, or of all

TILES = {512: 1.0, 256: 1.03, 128: 1.12, 64: 1.35}  # tokens -> what one costs, by the fitted time of long ones
CALL_BYTES = 1 << 20  # what a call costs besides, in bytes that it could have read
COPIED = 3  # an end is read, written and read again


@dataclass(frozen=True)
class Tiling:
    """Tensors on the device of the keys; b is 1 or the number of items.

    Args:
        first, tile: the tiles begin at token `first` and are `tile` long.
        owner: (b, T) the KV head of a tile, 0 where none has it.
        ends: (b, E, W) the tokens of what is left of the ranges, the last one again and again up to W; or None.
        end_owner: (b, E).
        end_bias: (b, E, 1, W) -inf where a token is there again; None if none is.
        among: (b, 1, H_kv, T + E) 0 where a head has the tile or end, else -inf.
        nobodys: (b, T + E) bool, the tiles and ends that are of no head; None if there are none.
        bare: some head has neither.
    """

    first: int
    tile: int
    owner: torch.Tensor
    ends: torch.Tensor | None
    end_owner: torch.Tensor | None
    end_bias: torch.Tensor | None
    among: torch.Tensor
    nobodys: torch.Tensor | None
    bare: bool


def attend_tiles(
    rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiling: Tiling, positions: Positions | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (B, H_kv, R, D), k and v (B, total, D) to the output, like rows, in the LSE's dtype, and the LSE."""
    count = tiling.owner.shape[1]
    outs, lses = [], []
    if count:
        keys, values = (_view(t, tiling) for t in (k, v))
        where = None if positions is None else _view(positions.keys[..., None], tiling)[..., 0]
        out, lse = _one_call(rows, tiling.owner, keys, values, None, positions, where, scale)
        outs.append(out)
        lses.append(lse)
    if tiling.ends is not None and tiling.end_owner is not None:
        keys, values = (_take(t, tiling.ends) for t in (k, v))
        where = None if positions is None else _take(positions.keys[..., None], tiling.ends)[..., 0]
        out, lse = _one_call(rows, tiling.end_owner, keys, values, tiling.end_bias, positions, where, scale)
        outs.append(out)
        lses.append(lse)
    out, lse = (found[0] if len(found) == 1 else torch.cat(found, dim=1) for found in (outs, lses))
    if tiling.nobodys is not None:  # what stands there may be anything
        out = out.masked_fill(tiling.nobodys[:, :, None, None], 0.0)
        lse = lse.masked_fill(tiling.nobodys[:, :, None], float("-inf"))
    scores = lse.transpose(1, 2)[:, :, None] + tiling.among  # (B, R, H_kv, T + E)
    # Their softmax times the outputs, and its LSE, are attention again, of queries that are 0 under a bias: one call.
    out = out.transpose(1, 2).to(scores.dtype)
    merged, total = attend(out.new_zeros(()).expand(*scores.shape[:3], out.shape[3]), out, out, scores, 1.0)
    if tiling.bare or positions is not None:
        blind = scores.amax(-1) == float("-inf")
        merged, total = merged.masked_fill(blind[..., None], 0.0), total.masked_fill(blind, float("-inf"))
    return merged.transpose(1, 2), total.transpose(1, 2)


def _one_call(
    rows: torch.Tensor,
    owner: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    positions: Positions | None,
    where: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, T, C, D), at positions `where` (b, T, C), each by the rows of its owner: (B, T, R, D) and (B, T, R)."""
    q = _of_owners(rows, owner)
    if positions is None or where is None:
        return attend(q, keys, values, None if bias is None else bias.to(q.dtype), scale)
    seen = _seen(positions, where, owner, rows.shape[1], rows.shape[2] // positions.queries.shape[1])
    mask = bias_of(seen, q.dtype)
    out, lse = attend(q, keys, values, mask if bias is None else mask + bias.to(q.dtype), scale)
    blind = ~seen.any(-1)  # without the copies of the last token, which are seen where it is
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))


def _seen(positions: Positions, where: torch.Tensor, owner: torch.Tensor, kv_heads: int, group: int) -> torch.Tensor:
    """The rule of positions, (b, T, R, C), or (b, T, 1, C) where all rows see alike."""
    spans = positions.spans
    if spans is not None:  # rows are the query heads of a KV head, each with all its queries
        spans = spans.view(kv_heads, -1)[owner][..., None, None]
    seen = positions.sees(positions.queries[:, None, None, :, None], where[:, :, None, None], spans)
    if seen.shape[3] > 1:
        seen = seen.expand(-1, -1, group, -1, -1)
    return seen.flatten(2, 3)


def _of_owners(rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """(B, H_kv, R, D) to (B, T, R, D)."""
    if owner.shape[0] == 1:
        return rows.index_select(1, owner[0])
    return rows.gather(1, owner[..., None, None].expand(-1, -1, *rows.shape[2:]))


def _view(t: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """(1 or B, total, D) to (1 or B, T, tile, D)."""
    count = tiling.owner.shape[1]
    return t.narrow(1, tiling.first, count * tiling.tile).unflatten(1, (count, tiling.tile))


def _take(t: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(1 or B, total, D) at slots (b, E, W): (1 or B, E, W, D), a copy."""
    flat = slots.flatten(1)
    if flat.shape[0] == 1:
        return t.index_select(1, flat[0]).unflatten(1, slots.shape[1:])
    index = flat[..., None].expand(-1, -1, t.shape[2])
    return t.expand(flat.shape[0], -1, -1).gather(1, index).unflatten(1, slots.shape[1:])


def tiling_of(segments: Segments, kv_heads: int, row_bytes: int, other: int, device: torch.device) -> Tiling | None:
    """The best tiling, or None where none costs less than `other`, in bytes.

    Args:
        segments: the non-empty ranges; with several entries those of each item, else of all.
        row_bytes: of the key and the value of a token.
    """
    best, tile = min((_cost(segments, tile, row_bytes), tile) for tile in TILES)
    return _made(segments, kv_heads, tile, device) if best < other else None


def _cost(segments: Segments, tile: int, row_bytes: int) -> float:
    bounds = [_bounds(segment, tile) for item in segments for segment in item]
    inner = [(low, high) for low, high in bounds if low < high]
    span = max(high for _, high in inner) - min(low for low, _ in inner) if inner else 0
    whole = sum(high - low for low, high in inner)
    left = sum(end - start for item in segments for _, start, end in item) - whole * tile
    return (span * len(segments) * tile * TILES[tile] + COPIED * left) * row_bytes + (2 + (left > 0)) * CALL_BYTES


def _bounds(segment: Segment, tile: int) -> tuple[int, int]:
    """The tiles that lie inside of a range."""
    _, start, end = segment
    return -(-start // tile), end // tile


def _made(segments: Segments, kv_heads: int, tile: int, device: torch.device) -> Tiling:
    inner = [[(head, *_bounds((head, start, end), tile)) for head, start, end in item] for item in segments]
    some = [(low, high) for item in inner for _, low, high in item if low < high]
    first = min((low for low, _ in some), default=0)
    count = max((high for _, high in some), default=0) - first
    owner = torch.full((len(segments), count), -1)
    ends: list[list[tuple[int, int, int]]] = []
    for item, (ranges, tiles) in enumerate(zip(segments, inner, strict=True)):
        ends.append([])
        for (head, start, end), (_, low, high) in zip(ranges, tiles, strict=True):
            if low < high:
                owner[item, low - first : high - first] = head
            left = [(start, low * tile), (high * tile, end)] if low < high else [(start, end)]
            ends[-1] += [(head, a, b) for a, b in left if a < b]
    most = max(map(len, ends))
    width = max((b - a for item in ends for _, a, b in item), default=0)
    table = torch.tensor([[*item, *[(-1, 0, 1)] * (most - len(item))] for item in ends]).view(len(ends), most, 3)
    end_owner, begin, stop = table.unbind(-1)
    slots = begin[..., None] + torch.arange(width)
    again = slots >= stop[..., None]
    slots = torch.minimum(slots, stop[..., None] - 1)
    owners = torch.cat([owner, end_owner], dim=1)
    mine = owners[:, None, None] == torch.arange(kv_heads)[:, None]
    nobodys = owners < 0
    return Tiling(
        first * tile, tile, owner.clamp(min=0).to(device),
        slots.to(device) if most else None, end_owner.clamp(min=0).to(device) if most else None,
        bias_of(~again, torch.float32)[:, :, None].to(device) if bool(again.any()) else None,
        bias_of(mine, torch.float32).to(device), nobodys.to(device) if bool(nobodys.any()) else None,
        not bool(mine.any(-1).all()),
    )  # fmt: skip
