"""The kernel: a tile of gathered rows of one head over that head's keys, times the gate, back to its place."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.agent.triton.tiles import head_of
from attn_plugins.ops.block_sparse.triton.tiles import LN2, LOG2E, power, read_rows, write_rows

# Numbers of which no kernel needs a version of its own where they are 0, 1 or a multiple of 16.
RUNTIME = [
    "heads", "group", "queries", "keys", "offset", "list_row", "gates_b", "gates_n", "gates_h",
    *(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out", "attention") for axis in "bhn"),
]  # fmt: skip


@triton.jit
def _take_in(
    q_tile, k, v, at, n, inside, own, k_n, k_d, v_n, v_d, scale, top, total, acc,
    D: tl.constexpr, WIDTH: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over these keys. inside None: all are seen; own: by each row up to its own."""
    far = tl.multiple_of(tl.cast(at, tl.int64), n.shape[0])
    k_tile = read_rows(k + far * k_n, n, inside, k_n, k_d, D, WIDTH)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    if inside is not None:
        seen = inside[None, :]
        if own is not None:
            seen = seen & (n[None, :] <= (own - at)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = power(scores - finite[:, None], FLOAT32)
    shrink = power(top - finite, FLOAT32)
    v_tile = read_rows(v + far * v_n, n, inside, v_n, v_d, D, WIDTH)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=RUNTIME)
def attend_rows(
    q, k, v, gates, out, attention, lse,  # (B, H, N, D), (B, H_kv, N_kv, D) twice, (B, N, H), as q twice, (B, H, N)
    table, lists, counts, bounds,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, out_b, out_h, out_n, out_d,
    attention_b, attention_h, attention_n, attention_d, gates_b, gates_n, gates_h,
    list_row, heads, group, queries, keys, offset, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Program: an entry of `table`. `attention` without gates and `lse` (natural) are for the backward, or None."""
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    if not FLOAT32:
        scale *= LOG2E
    sheet = tl.load(table + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(table + 2 * tl.program_id(0) + 1)
    b, h = sheet // heads, sheet % heads
    mine = lists + sheet * list_row
    count = tl.where(start < 0, 0, tl.load(counts + sheet))  # none: not a return, behind which registers spill
    start = tl.maximum(start, 0)
    there = start + tl.arange(0, BLOCK_M) < count
    rows = tl.load(mine + start + tl.arange(0, BLOCK_M), mask=there, other=0, volatile=True)
    first, last = 0, keys
    if bounds is not None:
        first = tl.maximum(tl.load(bounds + 2 * b).to(tl.int32), 0)
        last = tl.minimum(tl.load(bounds + 2 * b + 1).to(tl.int32), keys)
    whole = last
    if CAUSAL:
        whole = tl.maximum(tl.load(mine + start) + offset + 1, first)
        last = tl.minimum(tl.load(mine + tl.maximum(tl.minimum(start + BLOCK_M, count), 1) - 1) + offset + 1, last)
        own = tl.load(mine + start + tl.arange(0, BLOCK_M), mask=there, other=0, volatile=True) + offset
    else:
        own = None
    last = tl.where(start < count, last, first)
    whole = tl.minimum(whole, last)
    even = first + (whole - first) // BLOCK_N * BLOCK_N
    if FLOAT32:  # products by single numbers hold so many of them that a second loop would spill
        even = first

    k = head_of(k, b, h // group, k_b, k_h, UNIT)
    v = head_of(v, b, h // group, v_b, v_h, UNIT)
    k_n *= UNIT
    v_n *= UNIT
    q_tile = read_rows(head_of(q, b, h, q_b, q_h, UNIT), rows, there, q_n * UNIT, q_d, D, WIDTH)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for at in range(first, even, BLOCK_N):
        top, total, acc = _take_in(
            q_tile, k, v, at, n, None, None, k_n, k_d, v_n, v_d, scale, top, total, acc, D, WIDTH, FLOAT32
        )
    for at in tl.range(even, last, BLOCK_N, num_stages=1):
        top, total, acc = _take_in(
            q_tile, k, v, at, n, at + n < last, own, k_n, k_d, v_n, v_d, scale, top, total, acc, D, WIDTH, FLOAT32
        )

    some = total > 0.0
    kept = tl.where(some, total, 1.0)
    acc = acc / kept[:, None]
    # Read anew (volatile): held until here they would be spilled.
    rows = tl.load(mine + start + tl.arange(0, BLOCK_M), mask=there, other=0, volatile=True)
    if attention is not None:
        found = top + tl.log(kept) if FLOAT32 else (top + tl.log2(kept)) * LN2
        tl.store(lse + sheet * queries + rows, tl.where(some, found, float("inf")), mask=there)
        base = head_of(attention, b, h, attention_b, attention_h, UNIT)
        write_rows(base, rows, there, attention_n * UNIT, attention_d, acc, D, WIDTH)
    gate = tl.load(gates + b * gates_b + h * gates_h + rows.to(tl.int64) * gates_n, mask=there, other=0.0)
    acc *= gate.to(tl.float32)[:, None]
    write_rows(head_of(out, b, h, out_b, out_h, UNIT), rows, there, out_n * UNIT, out_d, acc, D, WIDTH)
