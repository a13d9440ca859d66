"""The backward kernels: delta, then the gradient of q over the lists, then those of k and v over the inverted lists.

Every element is written by one program, which adds in one fixed order: no atomics, and the same call gives the same
bits. Rows that saw no key have an LSE of -inf; as +inf it makes their probabilities 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.masks import own_side, sees
from attn_plugins.ops.block_sparse.triton.tiles import (
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


@triton.jit(do_not_specialize=["length", "glse_b", "glse_h", "glse_n"])
def delta_kernel(
    grad_out, out, grad_lse, delta,
    grad_b, grad_h, grad_n, grad_d, out_b, out_h, out_n, out_d, glse_b, glse_h, glse_n,
    heads, length,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad_out * out) - grad_lse, (B, H, N) float32."""
    sheet = tl.program_id(1)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < length
    one = read_rows(grad_out + b * grad_b + h * grad_h, tokens, inside, grad_n, grad_d, D, WIDTH)
    other = read_rows(out + b * out_b + h * out_h, tokens, inside, out_n, out_d, D, WIDTH)
    found = tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    if grad_lse is not None:
        at = grad_lse + b * glse_b + h * glse_h + tokens.to(tl.int64) * glse_n
        found -= tl.load(at, mask=inside, other=0.0)
    tl.store(delta + (b * heads + h) * length + tokens, found, mask=inside)


@triton.jit
def statistics(lse, delta, tokens, inside):
    """LSE and delta of these rows; +inf and 0 where a row saw nothing, or is none."""
    row_lse = tl.load(lse + tokens, mask=inside, other=float("-inf"))
    blind = row_lse == float("-inf")
    row_delta = tl.load(delta + tokens, mask=inside, other=0.0)
    return tl.where(blind, float("inf"), row_lse), tl.where(blind, 0.0, row_delta)


@triton.jit
def probabilities(scores, row_lse, scale, FLOAT32: tl.constexpr):
    if FLOAT32:
        p = power(scores * scale - row_lse, FLOAT32)
    else:
        p = power(scores * (scale * LOG2E) - row_lse * LOG2E, FLOAT32)
    return p


@triton.jit(do_not_specialize=RUNTIME)
def grad_q_kernel(
    grad_out, q, k, v, lse, delta, grad_q,
    work, entries, pattern, q_order, kv_order, q_intervals, k_intervals, bits,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    gq_b, gq_h, gq_n, gq_d,
    work_b, work_h, list_b, list_h, bits_b, bits_h, bits_row,
    heads, group, q_length, kv_length, rows, lead, guards, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULED: tl.constexpr,
):  # fmt: skip
    """A program owns some queries and walks over the keys they see. `scale` is the plain one."""
    rank, sheet = own_rows(rows, lead)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    line = work + b * work_b + h * work_h + rank * 8
    first, even, masked, whole, last = list_of(line)
    entries += b * list_b + h * list_h
    k += b * k_b + (h // group) * k_h
    v += b * v_b + (h // group) * v_h
    if bits is not None:
        bits += b * bits_b + h * bits_h
    at = (b * heads + h) * q_length

    n = tl.arange(0, BLOCK_N)
    q_places, q_tokens, q_inside = own_tokens(line, q_order, BLOCK_M)
    q_tile = read_rows(q + b * q_b + h * q_h, q_tokens, q_inside, q_n, q_d, D, WIDTH)
    grad_tile = read_rows(grad_out + b * grad_b + h * grad_h, q_tokens, q_inside, grad_n, grad_d, D, WIDTH)
    row_lse, row_delta = statistics(lse + at, delta + at, q_tokens, q_inside)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32

    apart = spread(pattern, BLOCK_N)
    token, place = entry_at(entries, first, even)
    for i in range(first, even):
        tokens = token + apart
        token, place = entry_at(entries, i + 1, even)
        k_tile = read_rows(k, tokens, None, k_n, k_d, D, WIDTH)
        v_tile = read_rows(v, tokens, None, v_n, v_d, D, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p = probabilities(scores, row_lse[:, None], scale, FLOAT32)
        grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        grad_s = p * (grad_p - row_delta[:, None])
        acc = tl.dot(grad_s.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    if RULED:
        one, other = own_side(q_intervals, q_length, bits_row, q_places, q_inside)
        token, place = entry_at(entries, even, masked)
        for i in range(even, masked):
            tokens = token + apart
            here = place
            token, place = entry_at(entries, i + 1, masked)
            k_tile = read_rows(k, tokens, None, k_n, k_d, D, WIDTH)
            v_tile = read_rows(v, tokens, None, v_n, v_d, D, WIDTH)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            seen = sees(one, other, k_intervals, bits, guards, kv_length, bits_row, here, n >= 0, BLOCK_N, False)
            p = tl.where(seen, probabilities(scores, row_lse[:, None], scale, FLOAT32), 0.0)
            grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
            grad_s = p * (grad_p - row_delta[:, None])
            acc = tl.dot(grad_s.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    for i in range(masked, last):
        number, place = entry_at(entries, i, last)
        inside = n < number
        tokens = tokens_at(kv_order, place + n, inside)
        k_tile = read_rows(k, tokens, inside, k_n, k_d, D, WIDTH)
        v_tile = read_rows(v, tokens, inside, v_n, v_d, D, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = inside[None, :]
        if RULED:
            ruled = sees(one, other, k_intervals, bits, guards, kv_length, bits_row, place, inside, BLOCK_N, False)
            seen = seen & (ruled | (i < whole))
        p = tl.where(seen, probabilities(scores, row_lse[:, None], scale, FLOAT32), 0.0)
        grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        grad_s = p * (grad_p - row_delta[:, None])
        acc = tl.dot(grad_s.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    q_places, q_tokens, q_inside = own_tokens(line, q_order, BLOCK_M)
    write_rows(grad_q + b * gq_b + h * gq_h, q_tokens, q_inside, gq_n, gq_d, acc * scale, D, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def grad_kv_kernel(
    grad_out, q, k, v, lse, delta, grad_k, grad_v,
    work, entries, pattern, q_order, kv_order, q_intervals, k_intervals, bits,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    gk_b, gk_h, gk_n, gk_d, gv_b, gv_h, gv_n, gv_d,
    work_b, work_h, list_b, list_h, bits_b, bits_h, bits_row,
    kv_heads, group, q_length, kv_length, rows, lead, guards, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULED: tl.constexpr,
):  # fmt: skip
    """A program owns some keys of one KV head and walks over the queries, of every head of its group, that see them.

    Tiles of scores stand with keys as rows.
    """
    rank, sheet = own_rows(rows, lead)
    b, kv_head = (sheet // kv_heads).to(tl.int64), (sheet % kv_heads).to(tl.int64)
    work += b * work_b + rank * 8
    entries += b * list_b
    q += b * q_b
    grad_out += b * grad_b
    if bits is not None:
        bits += b * bits_b

    m = tl.arange(0, BLOCK_M)
    line = work + kv_head * group * work_h
    k_places, k_tokens, k_inside = own_tokens(line, kv_order, BLOCK_N)
    k_tile = read_rows(k + b * k_b + kv_head * k_h, k_tokens, k_inside, k_n, k_d, D, WIDTH)
    v_tile = read_rows(v + b * v_b + kv_head * v_h, k_tokens, k_inside, v_n, v_d, D, WIDTH)
    if RULED:
        one, other = own_side(k_intervals, kv_length, bits_row, k_places, k_inside)
    acc_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    acc_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    apart = spread(pattern, BLOCK_M)

    for h in range(kv_head * group, kv_head * group + group):
        first, even, masked, whole, last = list_of(work + h * work_h)
        listed = entries + h * list_h
        rule = bits
        if bits is not None:
            rule += h * bits_h
        at = (b * kv_heads * group + h) * q_length
        token, place = entry_at(listed, first, even)
        for i in range(first, even):
            tokens = token + apart
            token, place = entry_at(listed, i + 1, even)
            q_tile = read_rows(q + h * q_h, tokens, None, q_n, q_d, D, WIDTH)
            grad_tile = read_rows(grad_out + h * grad_h, tokens, None, grad_n, grad_d, D, WIDTH)
            row_lse, row_delta = statistics(lse + at, delta + at, tokens, m >= 0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = probabilities(scores, row_lse[None, :], scale, FLOAT32)
            acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
            grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            grad_s = p * (grad_p - row_delta[None, :])
            acc_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")

        if RULED:
            token, place = entry_at(listed, even, masked)
            for i in range(even, masked):
                tokens = token + apart
                here = place
                token, place = entry_at(listed, i + 1, masked)
                q_tile = read_rows(q + h * q_h, tokens, None, q_n, q_d, D, WIDTH)
                grad_tile = read_rows(grad_out + h * grad_h, tokens, None, grad_n, grad_d, D, WIDTH)
                row_lse, row_delta = statistics(lse + at, delta + at, tokens, m >= 0)
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                seen = sees(one, other, q_intervals, rule, guards, q_length, bits_row, here, m >= 0, BLOCK_M, True)
                p = tl.where(seen, probabilities(scores, row_lse[None, :], scale, FLOAT32), 0.0)
                acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
                grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
                grad_s = p * (grad_p - row_delta[None, :])
                acc_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")

        for i in range(masked, last):
            number, place = entry_at(listed, i, last)
            inside = m < number
            tokens = tokens_at(q_order, place + m, inside)
            q_tile = read_rows(q + h * q_h, tokens, inside, q_n, q_d, D, WIDTH)
            grad_tile = read_rows(grad_out + h * grad_h, tokens, inside, grad_n, grad_d, D, WIDTH)
            row_lse, row_delta = statistics(lse + at, delta + at, tokens, inside)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = probabilities(scores, row_lse[None, :], scale, FLOAT32)  # 0 in rows that are not inside
            if RULED:
                seen = sees(one, other, q_intervals, rule, guards, q_length, bits_row, place, inside, BLOCK_M, True)
                p = tl.where(seen | (i < whole), p, 0.0)
            acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
            grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            grad_s = p * (grad_p - row_delta[None, :])
            acc_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")

    k_places, k_tokens, k_inside = own_tokens(line, kv_order, BLOCK_N)
    write_rows(grad_k + b * gk_b + kv_head * gk_h, k_tokens, k_inside, gk_n, gk_d, acc_k * scale, D, WIDTH)
    write_rows(grad_v + b * gv_b + kv_head * gv_h, k_tokens, k_inside, gv_n, gv_d, acc_v, D, WIDTH)
