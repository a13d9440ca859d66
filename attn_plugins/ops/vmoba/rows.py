"""The exact form: each query has blocks of its own, and each block of keys is attended by the queries that chose it.

A visit is one head's queries at one block. Visits of about as many queries go in one attention call, and what a query
got from all its blocks is merged by log-sum-exp. The backward takes the same visits with the merged output and LSE:
each gives its share of the gradients, and all is added in one fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.vmoba.flat import Flat
from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.ops.vmoba.pairs import Chunk, Pairs

PARTS_BYTES = 8 << 20  # of what some heads and queries get from their blocks, before it is merged

Slab = tuple[slice, slice, Pairs]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N, D), selected (B, H, grid tokens, blocks) to the output and LSE (B, H, N).

    `causal`: of a query's own block, what comes after it is not seen.
    """
    wide, size, group = torch.promote_types(q.dtype, torch.float32), q.shape[-1], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for b in range(q.shape[0]):
        key, value = Flat(k[b]), Flat(v[b])
        for rows, kv, text_key, text_value in _text(q[b], k[b], v[b], one):
            found = attend(rows, text_key, text_value, None, scale)
            for whole, part in zip((out, lse), found, strict=True):
                whole[b, kv.start * group : kv.stop * group, one.text_rows] = part[0]
        for heads, tokens, pairs in _slabs(selected[b], one, size * lse.element_size(), causal):
            query = Flat(q[b, heads, tokens])
            outs = torch.empty(pairs.places, size, dtype=wide, device=q.device)
            lses = torch.empty(pairs.places, dtype=wide, device=q.device)
            for chunk in pairs.chunks:
                tile = _read(query, chunk, tokens)
                keys = _keys(key, value, chunk, one, heads.start, group)
                found = attend(tile, *keys, None, scale, chunk.own)
                outs[chunk.at] = found[0].reshape(-1, size)
                lses[chunk.at] = found[1].reshape(-1)
            merged = pairs.merge(outs, lses)
            out[b, heads, tokens] = merged[0].view(query.heads, -1, size).to(out.dtype)
            lse[b, heads, tokens] = merged[1].view(query.heads, -1)
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v, in their own layouts."""
    grads = tuple(torch.zeros_like(t) for t in (q, k, v))
    size, group = q.shape[-1], q.shape[1] // k.shape[1]
    grad_lse_column, lse_column = None if grad_lse is None else grad_lse[..., None], lse[..., None]
    order = one.columns[5].to(q.device)
    for b in range(q.shape[0]):
        key, value = Flat(k[b]), Flat(v[b])
        sums = [torch.zeros(k.shape[1:], dtype=lse.dtype, device=q.device) for _ in range(2)]
        for rows, kv, text_key, text_value in _text(q[b], k[b], v[b], one):
            heads = slice(kv.start * group, kv.stop * group)
            of_lse = None if grad_lse is None else grad_lse[b, heads, one.text_rows][None]
            of_out, text_out, text_lse = (t[b, heads, one.text_rows][None] for t in (grad_out, out, lse))
            found = attend_backward(of_out, of_lse, rows, text_key, text_value, text_out, text_lse, None, scale)
            grads[0][b, heads, one.text_rows] = found[0][0]
            for whole, part in zip(sums, found[1:], strict=True):
                whole[kv.start, one.real_places] += part[0].sum(0).to(whole.dtype)
        for heads, tokens, pairs in _slabs(selected[b], one, size * lse.element_size(), causal):
            flats = [
                None if t is None else Flat(t[b, heads, tokens])
                for t in (grad_lse_column, q, grad_out, out, lse_column)
            ]
            parts = torch.empty(pairs.places, size, dtype=lse.dtype, device=q.device)
            for chunk in pairs.chunks:
                of_lse, *tiles = [None if t is None else _read(t, chunk, tokens) for t in flats]
                query, of_out, tile_out, tile_lse = (t for t in tiles if t is not None)
                if chunk.filling is not None:  # without a gradient of its output a query gives none
                    of_out.masked_fill_(chunk.filling[None, ..., None], 0.0)
                    of_lse = None if of_lse is None else of_lse.masked_fill_(chunk.filling[None, ..., None], 0.0)
                grad = attend_backward(
                    of_out, None if of_lse is None else of_lse[..., 0], query,
                    *_keys(key, value, chunk, one, heads.start, group), tile_out, tile_lse[..., 0], None, scale,
                    chunk.own,
                )  # fmt: skip
                parts[chunk.at] = grad[0].reshape(-1, size)
                for whole, part in zip(sums, grad[1:], strict=True):
                    _add(whole, part[0], chunk, one, heads.start, group)
            grads[0][b, heads, tokens] = pairs.total(parts).view(heads.stop - heads.start, -1, size).to(q.dtype)
        for grad_of, whole in zip(grads[1:], sums, strict=True):
            grad_of[b].index_copy_(1, order, whole.to(grad_of.dtype))
    return grads  # type: ignore[return-value]


def _slabs(selected: torch.Tensor, one: Layout, row_bytes: int, causal: bool) -> Iterator[Slab]:
    """Some heads and queries at a time, so few that their parts can be kept; the text's blocks are seen by all."""
    texts = len(one.text)
    if texts:
        selected = torch.cat([selected, selected.new_ones(*selected.shape[:2], texts)], dim=-1)
    heads, count, _ = selected.shape
    first, sizes = one.sequence.text_before, one.columns[3]
    own = one.own[one.tile_of].to(selected.device) if causal else None
    share = int(selected.sum()) * row_bytes / heads / PARTS_BYTES  # of the room, that a head needs
    together = max(1, min(heads, int(1 / max(share, 1e-9))))
    unit = one.block[0] if causal else 1  # a causal slab ends where a block does
    step = min(-(-count // (unit * max(1, round(share)))) * unit, count)
    for head in range(0, heads, together):
        for start in range(0, count, step):
            some = selected[head : head + together, start : start + step]
            mine = None if own is None else own[start : start + step]
            rows = slice(first + start, first + start + some.shape[1])
            yield slice(head, head + len(some)), rows, Pairs.of(some, sizes, mine)


def _read(t: Flat, chunk: Chunk, tokens: slice) -> torch.Tensor:
    """(1, V, n, D): a chunk's queries from a slab's tensor."""
    count = tokens.stop - tokens.start
    return t.read(t.index(torch.div(chunk.rows, count, rounding_mode="floor"), chunk.rows % count))


def _keys(
    key: Flat, value: Flat, chunk: Chunk, one: Layout, first_head: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, V, E, D) each: the keys and values of a chunk's blocks."""
    starts, order = (one.columns[number].long().to(chunk.rows.device) for number in (2, 5))
    length = int(one.columns[3][int(chunk.blocks[0])])
    tokens = order[starts[chunk.blocks][:, None] + torch.arange(length, device=order.device)]
    heads = torch.div(chunk.heads + first_head, group, rounding_mode="floor")[:, None]
    return key.read(key.index(heads, tokens)), value.read(value.index(heads, tokens))


def _add(whole: torch.Tensor, part: torch.Tensor, chunk: Chunk, one: Layout, first_head: int, group: int) -> None:
    """Adds the gradients of each visit's keys, in block order."""
    starts, sizes = one.columns[2].tolist(), one.columns[3].tolist()
    for head, block, grad in zip(chunk.heads.tolist(), chunk.blocks.tolist(), part, strict=True):
        whole[(first_head + head) // group, starts[block] : starts[block] + sizes[block]] += grad


def _text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, one: Layout
) -> Iterator[tuple[torch.Tensor, slice, torch.Tensor, torch.Tensor]]:
    """The text's queries of one KV head's group, and all real keys and values, as `attend` takes them."""
    if not one.text:
        return
    group = q.shape[0] // k.shape[0]
    real = one.real_tokens.to(q.device)
    for head in range(k.shape[0]):
        rows = q[head * group : (head + 1) * group, one.text_rows][None]
        key, value = (t[head].index_select(0, real)[None, None].expand(1, group, -1, -1) for t in (k, v))
        yield rows, slice(head, head + 1), key, value
