"""The kernel whose programs own some keys of a block and walk over the queries that visit it, slab after slab."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.backward import probabilities, statistics
from attn_plugins.ops.block_sparse.triton.tiles import read_rows, tokens_at, write_rows


@triton.jit(do_not_specialize=["length", "slabs", "blocks", "pieces"])
def grad_kv_kernel(
    grad_out, q, k, v, lse, delta, grad_k, grad_v,
    tokens_of, counts, starts, sizes, order,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    gk_b, gk_h, gk_n, gk_d, gv_b, gv_h, gv_n, gv_d,
    kv_heads, group, length, slabs, blocks, pieces, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """`pieces` programs a block, of one KV head; all queries of its group. Tiles of scores stand with keys as rows.

    Blocks go from the last to the first: those of text come first, which every query visits.
    """
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    sheet = tl.program_id(1)
    b, kv_head = (sheet // kv_heads).to(tl.int64), (sheet % kv_heads).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) // pieces
    skipped = tl.program_id(0) % pieces * BLOCK_N
    size = tl.load(sizes + block)
    if skipped < size:
        n, m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        there = skipped + n < size
        base = tl.load(starts + block) + skipped
        keys = tokens_at(order, base + n, there)
        k_tile = read_rows(k + b * k_b + kv_head * k_h, keys, there, k_n, k_d, D, WIDTH)
        v_tile = read_rows(v + b * v_b + kv_head * v_h, keys, there, v_n, v_d, D, WIDTH)
        acc_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        acc_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        for h in range(kv_head * group, kv_head * group + group):
            at = (b * kv_heads * group + h) * length
            queries = q + b * q_b + h * q_h
            grads = grad_out + b * grad_b + h * grad_h
            line = (b * kv_heads * group + h) * slabs * blocks + block
            for slab in range(slabs):
                count = tl.load(counts + line + slab * blocks)
                listed = tokens_of + (line + slab * blocks) * SLAB
                ahead = tl.load(listed + m, mask=m < count, other=0)
                for r in range(0, count, BLOCK_M):
                    tokens, inside = ahead, r + m < count
                    ahead = tl.load(listed + r + BLOCK_M + m, mask=r + BLOCK_M + m < count, other=0)
                    q_tile = read_rows(queries, tokens, inside, q_n, q_d, D, WIDTH)
                    grad_tile = read_rows(grads, tokens, inside, grad_n, grad_d, D, WIDTH)
                    row_lse, row_delta = statistics(lse + at, delta + at, tokens, inside)
                    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                    p = probabilities(scores, row_lse[None, :], scale, FLOAT32)  # 0 in rows that are not inside
                    if CAUSAL:
                        p = tl.where(n[:, None] <= (tokens - base)[None, :], p, 0.0)
                    acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
                    grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
                    grad_s = p * (grad_p - row_delta[None, :])
                    acc_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")
        base = tl.load(starts + block, volatile=True) + skipped  # anew: held until here the keys would be spilled
        keys = tokens_at(order, base + n, there)
        write_rows(grad_k + b * gk_b + kv_head * gk_h, keys, there, gk_n, gk_d, acc_k * scale, D, WIDTH)
        write_rows(grad_v + b * gv_b + kv_head * gv_h, keys, there, gv_n, gv_d, acc_v, D, WIDTH)
