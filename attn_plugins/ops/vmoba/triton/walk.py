"""Kernels whose programs own a slab of queries and walk over the blocks that these visit.

The queries that visit a block are gathered, some at a time, and their running sums go to memory and back between two
blocks. Only one program touches them, so it needs no more than a barrier between its threads. `k` and `v` stand in
block order: the keys of a block follow each other. The last, ragged step of a block is not loaded ahead
(num_stages=1): it is but one, and the registers for more would be spilled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.backward import probabilities, statistics
from attn_plugins.ops.block_sparse.triton.forward import soften
from attn_plugins.ops.block_sparse.triton.tiles import LN2, LOG2E, power, read_rows, tokens_at, write_rows


@triton.jit
def _block(starts, sizes, j, slab_start, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Places of a block: where it begins, where its steps stop to be whole, where it ends."""
    first, size = tl.load(starts + j), tl.load(sizes + j)
    whole = size // BLOCK_N * BLOCK_N
    if CAUSAL:
        whole = tl.where(first + size <= slab_start, whole, 0)
    return first, first + whole, first + size


@triton.jit(do_not_specialize=["length", "blocks"])
def forward_kernel(
    q, k, v, out, lse,  # (B, H, N, D), (B, H_kv, N, D) twice, (B, H, N, D), (B, H, N) contiguous, -inf
    acc, totals,  # (B, H, N, D) and (B, H, N) float32 contiguous, with anything in them
    tokens_of, counts, starts, sizes, order,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, out_b, out_h, out_n, out_d,
    heads, group, length, blocks, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, FALLING: tl.constexpr,
):  # fmt: skip
    """FALLING: the scale is negative, so that the largest score has the smallest product.

    Until the end `lse` has the largest score so far, -inf where there was none: then the sums are not read either.
    """
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    if not FLOAT32:
        scale *= LOG2E
    slab, sheet = tl.program_id(0), tl.program_id(1)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + (h // group) * k_h
    v += b * v_b + (h // group) * v_h
    lse += (b * heads + h) * length
    totals += (b * heads + h) * length
    acc += (b * heads + h) * length * D
    line = (sheet.to(tl.int64) * tl.num_programs(0) + slab) * blocks
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)

    for j in range(blocks):
        first, even, last = _block(starts, sizes, j, slab * SLAB, BLOCK_N, CAUSAL)
        count = tl.load(counts + line + j)
        for r in range(0, count, BLOCK_M):
            inside = r + m < count
            tokens = tl.load(tokens_of + (line + j) * SLAB + r + m, mask=inside, other=0)
            q_tile = read_rows(q, tokens, inside, q_n, q_d, D, WIDTH)
            top = tl.load(lse + tokens, mask=inside, other=float("-inf"))
            begun = top > float("-inf")
            total = tl.load(totals + tokens, mask=begun, other=0.0)
            sums = read_rows(acc, tokens, begun, D, 1, D, WIDTH)
            tl.debug_barrier()
            for i in range(first, even, BLOCK_N):
                k_tile = read_rows(k, i + n, None, k_n, k_d, D, WIDTH)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                best = tl.min(scores, 1) if FALLING else tl.max(scores, 1)
                new = tl.maximum(top, best * scale)
                p = power(scores * scale - new[:, None], FLOAT32)
                shrink = power(top - new, FLOAT32)
                total = total * shrink + tl.sum(p, 1)
                v_tile = read_rows(v, i + n, None, v_n, v_d, D, WIDTH)
                sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision="ieee")
                top = new
            for i in tl.range(even, last, BLOCK_N, num_stages=1):
                there = i + n < last
                k_tile = read_rows(k, i + n, there, k_n, k_d, D, WIDTH)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
                seen = there[None, :]
                if CAUSAL:
                    seen = seen & (n[None, :] <= (tokens - i)[:, None])
                p, shrink, total, top = soften(tl.where(seen, scores, float("-inf")), total, top, FLOAT32)
                v_tile = read_rows(v, i + n, there, v_n, v_d, D, WIDTH)
                sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision="ieee")
            tl.store(lse + tokens, top, mask=inside)
            tl.store(totals + tokens, total, mask=inside)
            write_rows(acc, tokens, inside, D, 1, sums, D, WIDTH)
            tl.debug_barrier()

    for r in range(0, SLAB, BLOCK_M):
        places = slab * SLAB + r + m
        inside = places < length
        tokens = tokens_at(order, places, inside)
        top = tl.load(lse + tokens, mask=inside, other=float("-inf"))
        begun = top > float("-inf")
        total = tl.load(totals + tokens, mask=begun, other=1.0)
        sums = read_rows(acc, tokens, begun, D, 1, D, WIDTH) / total[:, None]
        write_rows(out + b * out_b + h * out_h, tokens, inside, out_n, out_d, sums, D, WIDTH)
        found = top + tl.log(total) if FLOAT32 else (top + tl.log2(total)) * LN2
        tl.debug_barrier()
        tl.store(lse + tokens, found, mask=inside)


@triton.jit(do_not_specialize=["length", "blocks"])
def grad_q_kernel(
    grad_out, q, k, v, lse, delta, grad_q,  # the last (B, H, N, D) float32 contiguous, zeros; unscaled
    tokens_of, counts, starts, sizes,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    heads, group, length, blocks, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """`scale` is the plain one."""
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    slab, sheet = tl.program_id(0), tl.program_id(1)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    grad_out += b * grad_b + h * grad_h
    q += b * q_b + h * q_h
    k += b * k_b + (h // group) * k_h
    v += b * v_b + (h // group) * v_h
    at = (b * heads + h) * length
    grad_q += at * D
    line = (sheet.to(tl.int64) * tl.num_programs(0) + slab) * blocks
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)

    for j in range(blocks):
        first, even, last = _block(starts, sizes, j, slab * SLAB, BLOCK_N, CAUSAL)
        count = tl.load(counts + line + j)
        for r in range(0, count, BLOCK_M):
            inside = r + m < count
            tokens = tl.load(tokens_of + (line + j) * SLAB + r + m, mask=inside, other=0)
            q_tile = read_rows(q, tokens, inside, q_n, q_d, D, WIDTH)
            grad_tile = read_rows(grad_out, tokens, inside, grad_n, grad_d, D, WIDTH)
            row_lse, row_delta = statistics(lse + at, delta + at, tokens, inside)
            sums = read_rows(grad_q, tokens, inside, D, 1, D, WIDTH)
            tl.debug_barrier()
            for i in range(first, even, BLOCK_N):
                k_tile = read_rows(k, i + n, None, k_n, k_d, D, WIDTH)
                v_tile = read_rows(v, i + n, None, v_n, v_d, D, WIDTH)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                p = probabilities(scores, row_lse[:, None], scale, FLOAT32)
                grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
                grad_s = p * (grad_p - row_delta[:, None])
                sums = tl.dot(grad_s.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
            for i in tl.range(even, last, BLOCK_N, num_stages=1):
                there = i + n < last
                k_tile = read_rows(k, i + n, there, k_n, k_d, D, WIDTH)
                v_tile = read_rows(v, i + n, there, v_n, v_d, D, WIDTH)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                seen = there[None, :]
                if CAUSAL:
                    seen = seen & ((i + n)[None, :] <= tokens[:, None])
                p = tl.where(seen, probabilities(scores, row_lse[:, None], scale, FLOAT32), 0.0)
                grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
                grad_s = p * (grad_p - row_delta[:, None])
                sums = tl.dot(grad_s.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
            write_rows(grad_q, tokens, inside, D, 1, sums, D, WIDTH)
            tl.debug_barrier()
