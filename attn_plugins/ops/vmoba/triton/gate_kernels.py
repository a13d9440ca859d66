"""The gate's kernels: means over boxes of tokens, their products with rows, and the best of those without writing them.

Products are of float32 numbers, in full: TF32 would choose other blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.tiles import read_rows, tokens_at

LOWEST: tl.constexpr = tl.constexpr(-(2**63))
HIGHEST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit(do_not_specialize=["heads", "boxes"])
def pool_kernel(
    t, means,  # (B, H, N, D), (B, H, boxes, D) float32 contiguous
    starts, sizes, order, t_b, t_h, t_n, t_d, heads, boxes,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes the mean of one box of one head."""
    box, sheet = tl.program_id(0), tl.program_id(1)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    start, size = tl.load(starts + box), tl.load(sizes + box)
    sums = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for i in range(0, size, BLOCK_N):
        inside = i + tl.arange(0, BLOCK_N) < size
        tokens = tokens_at(order, start + i + tl.arange(0, BLOCK_N), inside)
        sums += read_rows(t + b * t_b + h * t_h, tokens, inside, t_n, t_d, D, WIDTH).to(tl.float32)
    d = tl.arange(0, WIDTH)
    tl.store(means + (sheet.to(tl.int64) * boxes + box) * D + d, tl.sum(sums, 0) / size, mask=d < D)


@triton.jit
def _products(
    rows, means, tokens, inside, boxes, count, rows_n, rows_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_C) float32: rows times the means of these boxes, a few columns of both at a time."""
    scores = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        at = rows + tokens[:, None].to(tl.int64) * rows_n + d[None, :] * rows_d
        some = tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        at = means + boxes[:, None] * D + d[None, :]
        mean = tl.load(at, mask=(boxes[:, None] < count) & (d[None, :] < D), other=0.0)
        scores = tl.dot(some, tl.trans(mean), scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["heads", "group", "length", "count"])
def scores_kernel(
    rows, means, scores,  # (B, H, R, D), (B, H_kv, boxes, D) contiguous, (B, H, R, boxes) contiguous
    rows_b, rows_h, rows_n, rows_d, heads, group, length, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some rows of one head against some boxes."""
    sheet = tl.program_id(2)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    boxes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows += b * rows_b + h * rows_h
    means += (b * (heads // group) + h // group) * count * D
    inside = tokens < length
    found = _products(rows, means, tokens, inside, boxes, count, rows_n, rows_d, D, BLOCK_D, BLOCK_M, BLOCK_C)
    at = scores + ((b * heads + h) * length + tokens[:, None]) * count + boxes[None, :]
    tl.store(at, found, mask=inside[:, None] & (boxes[None, :] < count))


@triton.jit(do_not_specialize=["heads", "group", "length", "count", "others"])
def best_kernel(
    rows, means, own, selected,  # as above; (R,) int64; (B, H, R, boxes) uint8 contiguous
    rows_b, rows_h, rows_n, rows_d, heads, group, length, count, others,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Marks the own box of each row and the `others` best; `CAUSAL`: none that come after its own.

    A score and its box's number make one whole number, larger for a better score, or for a lower number among equals:
    no two are alike, so the worst that is taken bounds them all.
    """
    sheet = tl.program_id(1)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    boxes = tl.arange(0, BLOCK_C)
    rows += b * rows_b + h * rows_h
    means += (b * (heads // group) + h // group) * count * D
    inside = tokens < length
    scores = _products(rows, means, tokens, inside, boxes, count, rows_n, rows_d, D, BLOCK_D, BLOCK_M, BLOCK_C)

    mine = tl.load(own + tokens, mask=inside, other=0)[:, None] == boxes[None, :]
    free = (boxes[None, :] < count) & (mine == 0)
    if CAUSAL:
        free = free & (boxes[None, :] < tl.load(own + tokens, mask=inside, other=0)[:, None])
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = tl.where(free, ordered * BLOCK_C + (BLOCK_C - 1 - boxes[None, :]), LOWEST)
    bound = tl.full([BLOCK_M], HIGHEST, tl.int64)
    for _ in range(others):
        bound = tl.max(tl.where(keys < bound[:, None], keys, LOWEST), 1)
    taken = mine | (free & (keys >= bound[:, None]))
    at = selected + ((b * heads + h) * length + tokens[:, None]) * count + boxes[None, :]
    tl.store(at, taken.to(tl.uint8), mask=inside[:, None] & (boxes[None, :] < count))
