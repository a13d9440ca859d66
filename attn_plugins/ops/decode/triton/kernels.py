"""The two kernels: attention of a share of a KV head's keys, and the merge of the shares.

Scores are in base 2 (the scale brings log2(e) along), so LSEs between the kernels are too.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUNTIME = ["splits", "range_count", "total", "kv_heads", "group", "queries", "sink"]


@triton.jit(do_not_specialize=RUNTIME)
def attend_share(
    Q,
    K,
    V,
    Ranges,
    KeyPositions,
    QueryPositions,
    Spans,
    Partial,
    PartialLse,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vd,
    stride_rb,
    stride_jb,
    stride_jn,
    stride_ib,
    stride_in,
    kv_heads,
    group,
    queries,
    total,
    range_count,
    splits,
    sink,
    HAS_POSITIONS: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (batch item and KV head, share of its keys, block of its query rows).

    Writes output and LSE (base 2) of the share to Partial (B, H, Nq, splits, D) and PartialLse (B, H, Nq, splits); of a
    share without keys only the LSE, -inf.
    """
    item = tl.program_id(0) // kv_heads
    kv = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    head = kv * group + row // queries
    query = row % queries
    real = row < group * queries

    bounds = Ranges + item.to(tl.int64) * stride_rb + kv * range_count * 2
    length = 0
    for r in range(range_count):
        start, end = _range(bounds, r, total)
        length += tl.maximum(end - start, 0)
    share = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    first = split * share
    last = tl.minimum(first + share, length)

    base = item.to(tl.int64)
    q = _rows(Q + base * stride_qb, head.to(tl.int64) * stride_qh + query * stride_qn, real, stride_qd, D, WIDTH)
    if HAS_POSITIONS:
        i = tl.load(QueryPositions + base * stride_ib + query * stride_in, mask=real, other=-1).to(tl.int32)
    if HAS_SPANS:
        span = tl.load(Spans + head, mask=real, other=0).to(tl.int32)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    lane = tl.arange(0, KEYS)
    before = 0
    for r in range(range_count):
        start, end = _range(bounds, r, total)
        size = tl.maximum(end - start, 0)
        low = start + tl.maximum(first - before, 0)
        high = start + tl.minimum(last - before, size)
        for n in range(low, high, KEYS):
            inside = lane < high - n
            far = tl.cast(n, tl.int64)
            k = _rows(K + base * stride_kb + far * stride_kn, lane * stride_kn, inside, stride_kd, D, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = inside[None, :] & real[:, None]
            if HAS_POSITIONS:
                j_at = base * stride_jb + (far + lane) * stride_jn
                j = tl.load(KeyPositions + j_at, mask=inside, other=-1).to(tl.int32)
                age = i[:, None] - j[None, :]
                seen = seen & (j >= 0)[None, :] & (age >= 0)
                if HAS_SPANS:
                    seen = seen & ((j < sink)[None, :] | (age < span[:, None]))
            scores = tl.where(seen, scores, float("-inf"))
            more = tl.maximum(most, tl.max(scores, 1))
            finite = tl.where(more == float("-inf"), 0.0, more)
            p = tl.exp2(scores - finite[:, None])
            fade = tl.exp2(most - finite)
            sums = sums * fade + tl.sum(p, 1)
            v = _rows(V + base * stride_vb + far * stride_vn, lane * stride_vn, inside, stride_vd, D, WIDTH)
            if HAS_POSITIONS:
                # An empty slot may hold NaN, and 0 times NaN is NaN. A mask on the load would wait for the positions.
                v = tl.where((j >= 0)[:, None], v, 0.0)
            out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
            most = more
        before += size

    some = sums > 0.0
    kept = tl.where(some, sums, 1.0)
    heads = kv_heads * group
    to = ((base * heads + head) * queries + query) * splits + split
    tl.store(PartialLse + to, tl.where(some, most + tl.log2(kept), float("-inf")), mask=real)
    dim = tl.arange(0, WIDTH)
    stored = (real & some)[:, None] & (dim < D)[None, :]
    tl.store(Partial + to[:, None] * D + dim[None, :], out / kept[:, None], mask=stored)


@triton.jit
def _rows(base, at, inside, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) at these offsets; 0 beyond D and where not inside. A mask over D would keep loads narrow."""
    dim = tl.arange(0, WIDTH)
    where = base + at[:, None] + dim[None, :] * stride
    if D == WIDTH:
        tile = tl.load(where, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(where, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    return tile


@triton.jit
def _range(bounds, r, total):
    """[start, end) of a head's r-th range, cut to the tokens that there are."""
    start = tl.maximum(tl.load(bounds + 2 * r).to(tl.int32), 0)
    end = tl.minimum(tl.load(bounds + 2 * r + 1).to(tl.int32), total)
    return start, end


@triton.jit(do_not_specialize=RUNTIME)
def combine_shares(
    Partial,
    PartialLse,
    Out,
    Lse,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    queries,
    splits,
    SHARES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (batch item, query head, query): its shares, weighted by 2 ** (their LSE - the LSE of all)."""
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    head = row // queries % heads
    item = row // queries // heads
    dim = tl.arange(0, WIDTH)
    inside_dim = dim < D
    most = float("-inf")
    sums = 0.0
    out = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, SHARES):
        share = first + tl.arange(0, SHARES)
        lse = tl.load(PartialLse + row * splits + share, mask=share < splits, other=float("-inf"))
        at = (row * splits + share)[:, None] * D + dim[None, :]
        part = tl.load(Partial + at, mask=(lse > float("-inf"))[:, None] & inside_dim[None, :], other=0.0)
        more = tl.maximum(most, tl.max(lse, 0))
        finite = tl.where(more == float("-inf"), 0.0, more)
        weight = tl.exp2(lse - finite)
        fade = tl.exp2(most - finite)
        sums = sums * fade + tl.sum(weight, 0)
        out = out * fade + tl.sum(part * weight[:, None], 0)
        most = more
    some = sums > 0.0
    kept = tl.where(some, sums, 1.0)
    tl.store(Lse + row, tl.where(some, (most + tl.log2(kept)) * 0.6931471805599453, float("-inf")))
    to = item * stride_ob + head * stride_oh + query * stride_on + dim * stride_od
    tl.store(Out + to, (out / kept).to(Out.dtype.element_ty), mask=inside_dim)
