"""The backward kernels: gradients of the rows, of the keys and values, and of a bias.

Every element is written by one program, which adds in one fixed order; shares of a long axis are summed afterwards: no
atomics, and the same call gives the same bits. Rows without keys have an LSE of -inf; as +inf it makes their
probabilities 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.agent.triton.tiles import RUNTIME, biased, head_of, room_of, share_of, sheet_of
from attn_plugins.ops.block_sparse.triton.backward import statistics
from attn_plugins.ops.block_sparse.triton.tiles import LOG2E, power, read_rows, write_rows


@triton.jit
def _against(
    q_tile, grad_tile, row_lse, k, v, bias, rows, at, n, inside, room, k_n, k_d, v_n, v_d, bias_q, bias_k, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Rows against these keys, from `at` on: probabilities, their gradients, and the keys."""
    far = tl.multiple_of(tl.cast(at, tl.int64), n.shape[0])
    k_tile = read_rows(k + far * k_n, n, inside, k_n, k_d, D, WIDTH)
    v_tile = read_rows(v + far * v_n, n, inside, v_n, v_d, D, WIDTH)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if bias is not None and bias_k is not None:
        bias += far * bias_k
    left = room - tl.multiple_of(at, n.shape[0])
    scores = biased(scores, bias, rows[:, None], n[None, :], inside, left, bias_q, bias_k, scale, FLOAT32)
    p = power(scores - row_lse[:, None], FLOAT32)
    return p, tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee"), k_tile


@triton.jit(do_not_specialize=RUNTIME)
def grad_rows_kernel(
    grad, q, k, v, bias, values, out, lse, delta, grad_q,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_q, bias_k, values_b, values_h, values_n, values_d, out_b, out_h, out_n, out_d,
    gq_b, gq_h, gq_n, gq_d, gq_split,
    heads, group, values_group, queries, keys, splits, scale, shortcut,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, share of the keys): its part of q's gradient, to grad_q (..., splits, D).

    The first share also writes delta, (B, H, Nq) float32: rowsum(grad * (out - shortcut * values)). In half precision
    that has the rounding of out, alike for all keys of a row, and a bias's gradient would sum it up. EXACT, for one
    share: the sum of probabilities times their gradients instead, by a pass over the keys, divided by their sum, which
    the rounding of the LSE keeps from being 1.
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
    grad_tile = read_rows(head_of(grad, b, h, grad_b, grad_h, UNIT), rows, real, grad_n * UNIT, grad_d, D, WIDTH)
    q_tile = read_rows(head_of(q, b, h, q_b, q_h, UNIT), rows, real, q_n * UNIT, q_d, D, WIDTH)
    line = (b * heads + h) * queries
    row_lse = tl.load(lse + line + rows, mask=real, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    if not FLOAT32:
        row_lse *= LOG2E
    first, even, last = share_of(keys, splits, BLOCK_N)
    if FLOAT32:  # as `attend_kernel`
        even = first
    known = tl.minimum(rows, queries - 1)
    n = tl.arange(0, BLOCK_N)
    room = room_of(keys)

    if EXACT:
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for at in range(first, last, BLOCK_N):
            p, grad_p, _ = _against(
                q_tile, grad_tile, row_lse, k, v, bias, known, at, n, at + n < last, room, k_n, k_d, v_n, v_d,
                bias_q, bias_k, scale, D, WIDTH, FLOAT32,
            )  # fmt: skip
            row_delta += tl.sum(p * grad_p, 1)
            total += tl.sum(p, 1)
        total = tl.where(total == 0.0, 1.0, total)
        row_delta = row_delta / total
    else:
        base = head_of(out, b, h, out_b, out_h, UNIT)
        found = read_rows(base, rows, real, out_n * UNIT, out_d, D, WIDTH).to(tl.float32)
        if values is not None:
            base = head_of(values, b, h // values_group, values_b, values_h, UNIT)
            found -= shortcut * read_rows(base, rows, real, values_n * UNIT, values_d, D, WIDTH).to(tl.float32)
        row_delta = tl.sum(grad_tile.to(tl.float32) * found, 1)
    if tl.program_id(1) == 0:
        tl.store(delta + line + rows, row_delta, mask=real)

    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for at in range(first, even, BLOCK_N):
        p, grad_p, k_tile = _against(
            q_tile, grad_tile, row_lse, k, v, bias, known, at, n, None, room, k_n, k_d, v_n, v_d,
            bias_q, bias_k, scale, D, WIDTH, FLOAT32,
        )  # fmt: skip
        grad_s = p * (grad_p - row_delta[:, None])
        acc = tl.dot(grad_s.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    for at in tl.range(even, last, BLOCK_N, num_stages=1):
        p, grad_p, k_tile = _against(
            q_tile, grad_tile, row_lse, k, v, bias, known, at, n, at + n < last, room, k_n, k_d, v_n, v_d,
            bias_q, bias_k, scale, D, WIDTH, FLOAT32,
        )  # fmt: skip
        grad_s = p * (grad_p - row_delta[:, None])
        acc = tl.dot(grad_s.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    if EXACT:
        acc = acc / total[:, None]
    grad_q += tl.program_id(1) * (gq_split * UNIT)
    write_rows(head_of(grad_q, b, h, gq_b, gq_h, UNIT), rows, real, gq_n * UNIT, gq_d, acc * scale, D, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def grad_keys_kernel(
    grad, q, k, v, bias, lse, delta, grad_k, grad_v,
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_q, bias_k, gk_b, gk_h, gk_n, gk_d, gk_split, gv_b, gv_h, gv_n, gv_d, gv_split,
    kv_heads, group, queries, keys, splits, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Program (block of keys of a KV head, share of the rows): its part of the gradients of k and v, (..., splits, D).

    It walks over the rows of every query head of its group. Tiles of scores stand with keys as rows.
    """
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    b, kv, start = sheet_of(keys, kv_heads, BLOCK_N)
    tokens = start + tl.arange(0, BLOCK_N)
    real = tokens < keys
    k_tile = read_rows(head_of(k, b, kv, k_b, k_h, UNIT), tokens, real, k_n * UNIT, k_d, D, WIDTH)
    v_tile = read_rows(head_of(v, b, kv, v_b, v_h, UNIT), tokens, real, v_n * UNIT, v_d, D, WIDTH)
    acc_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    acc_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    there = None if bias is None else real
    room = room_of(keys)
    first, _, last = share_of(queries, splits, BLOCK_M)
    q_n *= UNIT
    grad_n *= UNIT
    rows = tl.arange(0, BLOCK_M)
    for h in range(kv * group, kv * group + group):
        line = (b * kv_heads * group + h) * queries
        head = head_of(q, b, h, q_b, q_h, UNIT)
        grad_head = head_of(grad, b, h, grad_b, grad_h, UNIT)
        for at in range(first, last, BLOCK_M):
            far = tl.cast(at, tl.int64)
            inside = at + rows < last
            q_tile = read_rows(head + far * q_n, rows, inside, q_n, q_d, D, WIDTH)
            grad_tile = read_rows(grad_head + far * grad_n, rows, inside, grad_n, grad_d, D, WIDTH)
            row_lse, row_delta = statistics(lse + line + at, delta + line + at, rows, inside)
            if not FLOAT32:
                row_lse *= LOG2E
            rule = bias
            if bias is not None:
                rule += b * bias_b + h * bias_h + far * bias_q
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            here = tl.minimum(rows, queries - 1 - at)
            scores = biased(scores, rule, here[None, :], tokens[:, None], there, room, bias_q, bias_k, scale, FLOAT32)
            p = power(scores - row_lse[None, :], FLOAT32)
            acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
            grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            grad_s = p * (grad_p - row_delta[None, :])
            acc_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")
    share = tl.program_id(1)
    grad_k = head_of(grad_k, b, kv, gk_b, gk_h, UNIT) + share * (gk_split * UNIT)
    grad_v = head_of(grad_v, b, kv, gv_b, gv_h, UNIT) + share * (gv_split * UNIT)
    write_rows(grad_k, tokens, real, gk_n * UNIT, gk_d, acc_k * scale, D, WIDTH)
    write_rows(grad_v, tokens, real, gv_n * UNIT, gv_d, acc_v, D, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def grad_bias_kernel(
    grad, q, k, v, bias, lse, delta, grad_bias,  # grad_bias (shares, 1 or B, 1 or H, Nq, room) float32
    grad_b, grad_h, grad_n, grad_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_q, bias_k,
    heads, group, queries, keys, own_items, own_heads, batches, summed_heads, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Program (block of rows of a batch item and head that the bias has of its own, block of keys, share).

    The scores' gradients of the `batches` items and `summed_heads` heads that have one bias are added one by one, a
    share of them by each program.
    """
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    own_b, own_h, start = sheet_of(queries, own_heads, BLOCK_M)
    rows = start + tl.arange(0, BLOCK_M)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real, inside = rows < queries, tokens < keys
    known = tl.minimum(rows, queries - 1)
    room = room_of(keys)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sheets = batches * summed_heads
    share = tl.program_id(2)
    each = tl.cdiv(sheets, tl.num_programs(2))
    for i in range(share * each, tl.minimum(share * each + each, sheets)):
        b = own_b + i // summed_heads
        h = own_h + i % summed_heads
        line = (b * heads + h) * queries
        kv = h // group
        q_tile = read_rows(head_of(q, b, h, q_b, q_h, UNIT), rows, real, q_n * UNIT, q_d, D, WIDTH)
        k_tile = read_rows(head_of(k, b, kv, k_b, k_h, UNIT), tokens, inside, k_n * UNIT, k_d, D, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        rule = bias + b * bias_b + h * bias_h
        scores = biased(scores, rule, known[:, None], tokens[None, :], inside, room, bias_q, bias_k, scale, FLOAT32)
        row_lse, row_delta = statistics(lse + line, delta + line, rows, real)
        if not FLOAT32:
            row_lse *= LOG2E
        p = power(scores - row_lse[:, None], FLOAT32)
        grad_tile = read_rows(head_of(grad, b, h, grad_b, grad_h, UNIT), rows, real, grad_n * UNIT, grad_d, D, WIDTH)
        v_tile = read_rows(head_of(v, b, kv, v_b, v_h, UNIT), tokens, inside, v_n * UNIT, v_d, D, WIDTH)
        grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        acc += p * (grad_p - row_delta[:, None])
    sheet = (share * own_items + own_b) * own_heads + own_h
    at = (sheet * queries + rows[:, None]) * room + tokens[None, :]
    tl.store(grad_bias + at, acc, mask=real[:, None] & (tokens[None, :] < room))
