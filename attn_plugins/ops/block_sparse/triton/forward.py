"""The forward kernel: online softmax over the pieces of a list, whole ones first and without a mask."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.masks import own_side, sees
from attn_plugins.ops.block_sparse.triton.tiles import (
    LN2,
    LOG2E,
    RUNTIME,
    entry_at,
    list_of,
    own_rows,
    own_tokens,
    power,
    read_rows,
    spread,
    tokens_at,
    write_rows,
)


@triton.jit
def soften(scores, total, top, FLOAT32: tl.constexpr):
    """One step of the online softmax where scores may be -inf, even all that a row has had so far."""
    new = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = power(scores - finite[:, None], FLOAT32)
    shrink = power(top - finite, FLOAT32)
    return p, shrink, total * shrink + tl.sum(p, 1), new


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q, k, v, out, lse,  # (B, H, N, D), (B, H_kv, N_kv, D) twice, (B, H, N, D), (B, H, N) contiguous
    work, entries, pattern, q_order, kv_order, q_intervals, k_intervals, bits,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, out_b, out_h, out_n, out_d,
    work_b, work_h, list_b, list_h, bits_b, bits_h, bits_row,
    heads, group, q_length, kv_length, rows, lead, guards, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULED: tl.constexpr, FALLING: tl.constexpr,
):  # fmt: skip
    """FALLING: the scale is negative, so that the largest score has the smallest product."""
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    if not FLOAT32:
        scale *= LOG2E
    rank, sheet = own_rows(rows, lead)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    line = work + b * work_b + h * work_h + rank * 8
    first, even, masked, whole, last = list_of(line)
    entries += b * list_b + h * list_h
    k += b * k_b + (h // group) * k_h
    v += b * v_b + (h // group) * v_h
    if bits is not None:
        bits += b * bits_b + h * bits_h

    n = tl.arange(0, BLOCK_N)
    q_places, q_tokens, q_inside = own_tokens(line, q_order, BLOCK_M)
    q_tile = read_rows(q + b * q_b + h * q_h, q_tokens, q_inside, q_n, q_d, D, WIDTH)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)

    apart = spread(pattern, BLOCK_N)
    token, place = entry_at(entries, first, even)
    for i in range(first, even):
        tokens = token + apart
        token, place = entry_at(entries, i + 1, even)
        k_tile = read_rows(k, tokens, None, k_n, k_d, D, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        new = tl.maximum(top, tl.min(scores, 1) * scale) if FALLING else tl.maximum(top, tl.max(scores, 1) * scale)
        p = power(scores * scale - new[:, None], FLOAT32)
        shrink = power(top - new, FLOAT32)
        total = total * shrink + tl.sum(p, 1)
        v_tile = read_rows(v, tokens, None, v_n, v_d, D, WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new

    if RULED:
        one, other = own_side(q_intervals, q_length, bits_row, q_places, q_inside)
        token, place = entry_at(entries, even, masked)
        for i in range(even, masked):
            tokens = token + apart
            here = place
            token, place = entry_at(entries, i + 1, masked)
            k_tile = read_rows(k, tokens, None, k_n, k_d, D, WIDTH)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            seen = sees(one, other, k_intervals, bits, guards, kv_length, bits_row, here, n >= 0, BLOCK_N, False)
            p, shrink, total, top = soften(tl.where(seen, scores, float("-inf")), total, top, FLOAT32)
            v_tile = read_rows(v, tokens, None, v_n, v_d, D, WIDTH)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")

    for i in range(masked, last):
        number, place = entry_at(entries, i, last)
        inside = n < number
        tokens = tokens_at(kv_order, place + n, inside)
        k_tile = read_rows(k, tokens, inside, k_n, k_d, D, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = inside[None, :]
        if RULED:
            ruled = sees(one, other, k_intervals, bits, guards, kv_length, bits_row, place, inside, BLOCK_N, False)
            seen = seen & (ruled | (i < whole))
        p, shrink, total, top = soften(tl.where(seen, scores, float("-inf")), total, top, FLOAT32)
        v_tile = read_rows(v, tokens, inside, v_n, v_d, D, WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    found = top + tl.log(total) if FLOAT32 else (top + tl.log2(total)) * LN2
    acc = acc / total[:, None]
    q_places, q_tokens, q_inside = own_tokens(line, q_order, BLOCK_M)
    write_rows(out + b * out_b + h * out_h, q_tokens, q_inside, out_n, out_d, acc, D, WIDTH)
    tl.store(lse + (b * heads + h) * q_length + q_tokens, tl.where(blind, float("-inf"), found), mask=q_inside)
