"""Attention of a block of rows over all keys or a share of them: gathering splits many keys, reading takes few at once.

The results of shares are put together by decode's `combine_shares`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.agent.triton.tiles import RUNTIME, biased, head_of, room_of, share_of, sheet_of
from attn_plugins.ops.block_sparse.triton.tiles import LN2, LOG2E, power, read_rows, write_rows


@triton.jit
def _take_in(
    q_tile, k, v, bias, rows, at, n, inside, room, k_n, k_d, v_n, v_d, bias_q, bias_k, scale, top, total, acc,
    D: tl.constexpr, WIDTH: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over these keys; inside None: all are there. A bias may be -inf."""
    far = tl.multiple_of(tl.cast(at, tl.int64), n.shape[0])
    k_tile = read_rows(k + far * k_n, n, inside, k_n, k_d, D, WIDTH)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if bias is not None and bias_k is not None:
        bias += far * bias_k
    left = room - tl.multiple_of(at, n.shape[0])
    scores = biased(scores, bias, rows[:, None], n[None, :], inside, left, bias_q, bias_k, scale, FLOAT32)
    new = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = power(scores - finite[:, None], FLOAT32)
    shrink = power(top - finite, FLOAT32)
    v_tile = read_rows(v + far * v_n, n, inside, v_n, v_d, D, WIDTH)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=RUNTIME)
def attend_kernel(
    q, k, v, bias, values, out, lse,  # (B, H, Nq, D), (B, H_kv, Nk, D) twice, (B, H, Nq, room), (B, H_kv, Nq, D)
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, bias_b, bias_h, bias_q, bias_k,
    values_b, values_h, values_n, values_d, out_b, out_h, out_n, out_d, out_split,
    heads, group, values_group, queries, keys, splits, scale, shortcut,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Program (block of rows of a batch item and head, share of the keys).

    SPLIT: output and LSE (in base 2) of a share go to out (..., splits, D) float32 and lse (B, H, Nq, splits); those of
    a share without keys are an LSE of -inf. Else out is the result, plus `shortcut` times `values`, and lse natural.
    """
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    b, h, start = sheet_of(queries, heads, BLOCK_M)
    rows = start + tl.arange(0, BLOCK_M)
    real = rows < queries
    k = head_of(k, b, h // group, k_b, k_h, UNIT)
    v = head_of(v, b, h // group, v_b, v_h, UNIT)
    k_n *= UNIT
    v_n *= UNIT
    if bias is not None:
        bias += b * bias_b + h * bias_h
    q_tile = read_rows(head_of(q, b, h, q_b, q_h, UNIT), rows, real, q_n * UNIT, q_d, D, WIDTH)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    first, even, last = share_of(keys, splits, BLOCK_N)
    if FLOAT32:  # products by single numbers hold so many of them that a second loop would spill
        even = first
    known = tl.minimum(rows, queries - 1)
    n = tl.arange(0, BLOCK_N)
    room = room_of(keys)
    for at in range(first, even, BLOCK_N):
        top, total, acc = _take_in(
            q_tile, k, v, bias, known, at, n, None, room, k_n, k_d, v_n, v_d, bias_q, bias_k, scale, top, total, acc,
            D, WIDTH, FLOAT32,
        )  # fmt: skip
    for at in tl.range(even, last, BLOCK_N, num_stages=1):
        top, total, acc = _take_in(
            q_tile, k, v, bias, known, at, n, at + n < last, room, k_n, k_d, v_n, v_d, bias_q, bias_k,
            scale, top, total, acc, D, WIDTH, FLOAT32,
        )  # fmt: skip

    some = total > 0.0
    kept = tl.where(some, total, 1.0)
    acc = acc / kept[:, None]
    line = (b * heads + h) * queries + rows
    if SPLIT:
        if FLOAT32:
            top *= LOG2E
        share = tl.program_id(1)
        tl.store(lse + line * splits + share, tl.where(some, top + tl.log2(kept), float("-inf")), mask=real)
        out += share * (out_split * UNIT)
    else:
        found = top + tl.log(kept) if FLOAT32 else (top + tl.log2(kept)) * LN2
        tl.store(lse + line, tl.where(some, found, float("-inf")), mask=real)
        if values is not None:
            base = head_of(values, b, h // values_group, values_b, values_h, UNIT)
            acc += shortcut * read_rows(base, rows, real, values_n * UNIT, values_d, D, WIDTH).to(tl.float32)
    write_rows(head_of(out, b, h, out_b, out_h, UNIT), rows, real, out_n * UNIT, out_d, acc, D, WIDTH)
