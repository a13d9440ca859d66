"""The kernels: how a phrase's scores spread over the positions, its relevance at each, the choice, and the merge.

Scores are in base 2: the scale brings log2(e) along. A phrase's rows are described by their highest score and the log2
of the mean of 2 ** (score - highest), apart: together they would lose digits of large scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUNTIME = ["heads", "references", "positions", "rows", "tokens", "share", "splits"]


@triton.jit(do_not_specialize=RUNTIME)
def phrase_spread(
    Q,
    PhraseK,
    Top,
    Sum,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kr,
    stride_kh,
    stride_kl,
    stride_kd,
    heads,
    references,
    positions,
    rows,
    share,
    splits,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (item, reference and head; share of the positions; tile of the phrase's rows).

    Writes the highest score and the sum of 2 ** (score - highest) to Top and Sum, (B, R, H, L, splits). Rows beyond a
    phrase's length are computed and not read.
    """
    place = tl.program_id(0)
    item = (place // (references * heads)).to(tl.int64)
    reference = place // heads % references
    head = place % heads
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < rows

    key_base = PhraseK + item * stride_kb + reference.to(tl.int64) * stride_kr + head.to(tl.int64) * stride_kh
    keys = _tile(key_base, row.to(tl.int64) * stride_kl, real, stride_kd, D, WIDTH)
    query_base = Q + item * stride_qb + head.to(tl.int64) * stride_qh
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    lane = tl.arange(0, POSITIONS)
    last = tl.minimum((split + 1) * share, positions)
    for first in range(split * share, last, POSITIONS):
        at = first + lane
        inside = at < last
        queries = _tile(query_base, at.to(tl.int64) * stride_qs, inside, stride_qd, D, WIDTH)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        more = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - more) + tl.sum(tl.exp2(scores - more[:, None]), 1)
        top = more
    to = (place.to(tl.int64) * rows + row) * splits + split
    tl.store(Top + to, top, mask=real)
    tl.store(Sum + to, total, mask=real)


@triton.jit(do_not_specialize=RUNTIME)
def combine_spread(Top, Sum, Best, LogMean, positions, splits, SPLITS: tl.constexpr):
    """Program (a phrase's row in a head): its highest score, and log2 of the mean, from those of its shares."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    there = split < splits
    tops = tl.load(Top + row * splits + split, mask=there, other=float("-inf"))
    sums = tl.load(Sum + row * splits + split, mask=there, other=0.0)
    best = tl.max(tops, 0)
    tl.store(Best + row, best)
    tl.store(LogMean + row, tl.log2(tl.sum(sums * tl.exp2(tops - best), 0) / positions))


@triton.jit(do_not_specialize=RUNTIME)
def phrase_relevance(
    Q,
    PhraseK,
    Lengths,
    Top,
    LogMean,
    Out,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kr,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_nb,
    stride_nr,
    heads,
    references,
    positions,
    rows,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (item and reference, block of positions): log2(S r) to Out (B, R, S)."""
    place = tl.program_id(0)
    item = (place // references).to(tl.int64)
    reference = place % references
    at = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    inside = at < positions
    length = tl.load(Lengths + item * stride_nb + reference * stride_nr).to(tl.int32)
    length = tl.minimum(length, rows)

    top = tl.full([POSITIONS], float("-inf"), tl.float32)
    total = tl.zeros([POSITIONS], tl.float32)
    lane = tl.arange(0, ROWS)
    for head in range(heads):
        far = tl.cast(head, tl.int64)
        query_base = Q + item * stride_qb + far * stride_qh
        queries = _tile(query_base, at.to(tl.int64) * stride_qs, inside, stride_qd, D, WIDTH)
        key_base = PhraseK + item * stride_kb + reference.to(tl.int64) * stride_kr + far * stride_kh
        told = (place.to(tl.int64) * heads + head) * rows
        for first in range(0, length, ROWS):
            row = first + lane
            real = row < length
            keys = _tile(key_base, row.to(tl.int64) * stride_kl, real, stride_kd, D, WIDTH)
            highest = tl.load(Top + told + row, mask=real, other=0.0)
            spread = tl.load(LogMean + told + row, mask=real, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            scores = (scores - highest[None, :]) - spread[None, :]
            scores = tl.where(real[None, :], scores, float("-inf"))
            more = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(more == float("-inf"), 0.0, more)  # positions beyond the last, which stand at no score
            total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(scores - finite[:, None]), 1)
            top = more
    count = tl.maximum(heads * length, 1).to(tl.float32)
    some = total > 0.0
    found = tl.where(some, top + tl.log2(tl.where(some, total, 1.0) / count), float("-inf"))
    tl.store(Out + place.to(tl.int64) * positions + at, found, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def choose_references(
    Relevance,
    Masks,
    Out,
    sharpness,
    nobody,
    stride_mb,
    stride_mr,
    stride_ms,
    references,
    positions,
    HAS_MASKS: tl.constexpr,
    HAS_NULL: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Program (item, block of positions): w from log2(S r), both (B, R, S).

    sharpness is 1 / temperature, nobody the null column in base 2.
    """
    item = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    inside = at < positions
    highest = tl.full([POSITIONS], float("-inf"), tl.float32)
    total = tl.zeros([POSITIONS], tl.float32)
    cover = tl.zeros([POSITIONS], tl.float32)
    if HAS_NULL:
        highest = tl.zeros([POSITIONS], tl.float32) + nobody
        total += 1.0
    for reference in range(references):
        column, mask = _column(
            Relevance, Masks, item, reference, references, positions, at, inside, sharpness, stride_mb, stride_mr,
            stride_ms, HAS_MASKS,
        )  # fmt: skip
        cover += mask
        more = tl.maximum(highest, column)
        finite = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp2(highest - finite) + tl.exp2(column - finite)
        highest = more
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.minimum(cover, 1.0) / tl.where(total > 0.0, total, 1.0)
    for reference in range(references):
        column, mask = _column(
            Relevance, Masks, item, reference, references, positions, at, inside, sharpness, stride_mb, stride_mr,
            stride_ms, HAS_MASKS,
        )  # fmt: skip
        to = Out + (item * references + reference) * positions + at
        tl.store(to, tl.exp2(column - finite) * share, mask=inside)


@triton.jit
def _column(
    Relevance, Masks, item, reference, references, positions, at, inside, sharpness, stride_mb, stride_mr, stride_ms,
    HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """A reference's logits of the choice at these positions, and its mask there (1 without masks)."""
    which = tl.cast(reference, tl.int64)
    found = tl.load(Relevance + (item * references + which) * positions + at, mask=inside, other=float("-inf"))
    column = tl.where(found == float("-inf"), found, found * sharpness)  # at infinity, -inf times 0 would be nan
    mask = tl.full(found.shape, 1.0, tl.float32)
    if HAS_MASKS:
        mask = tl.load(Masks + item * stride_mb + which * stride_mr + at * stride_ms, mask=inside, other=0.0)
        mask = tl.minimum(tl.maximum(mask.to(tl.float32), 0.0), 1.0)
        column = tl.where(mask > 0.0, column + tl.log2(tl.where(mask > 0.0, mask, 1.0)), float("-inf"))
    return column, mask


@triton.jit(do_not_specialize=RUNTIME)
def merge_references(
    Q,
    Text,
    ImageK,
    ImageV,
    Strengths,
    Lengths,
    Out,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_tb,
    stride_th,
    stride_ts,
    stride_td,
    stride_kb,
    stride_kr,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vr,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_nb,
    stride_nr,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    heads,
    references,
    positions,
    tokens,
    HAS_LENGTHS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (block of positions, item and head): text + sum_i strength_i * attention to reference i."""
    item = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = at < positions
    far = at.to(tl.int64)
    queries = _tile(Q + item * stride_qb + head * stride_qh, far * stride_qs, inside, stride_qd, D, WIDTH)
    out = _tile(Text + item * stride_tb + head * stride_th, far * stride_ts, inside, stride_td, D, WIDTH).to(tl.float32)
    lane = tl.arange(0, ROWS)
    for reference in range(references):
        which = tl.cast(reference, tl.int64)
        length = tokens
        if HAS_LENGTHS:
            length = tl.minimum(tl.load(Lengths + item * stride_nb + which * stride_nr).to(tl.int32), tokens)
        key_base = ImageK + item * stride_kb + which * stride_kr + head * stride_kh
        value_base = ImageV + item * stride_vb + which * stride_vr + head * stride_vh
        top = tl.full([POSITIONS], float("-inf"), tl.float32)
        total = tl.zeros([POSITIONS], tl.float32)
        attended = tl.zeros([POSITIONS, WIDTH], tl.float32)
        for first in range(0, length, ROWS):
            token = first + lane
            real = token < length
            keys = _tile(key_base, token.to(tl.int64) * stride_kt, real, stride_kd, D, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            scores = tl.where(real[None, :], scores, float("-inf"))
            more = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - more[:, None])
            fade = tl.exp2(top - more)
            total = total * fade + tl.sum(p, 1)
            values = _tile(value_base, token.to(tl.int64) * stride_vt, real, stride_vd, D, WIDTH)
            attended = tl.dot(p.to(values.dtype), values, attended * fade[:, None], input_precision=PRECISION)
            top = more
        strength = tl.load(Strengths + (item * references + which) * positions + far, mask=inside, other=0.0)
        out += attended * (strength / tl.where(total > 0.0, total, 1.0))[:, None]
    dim = tl.arange(0, WIDTH)
    to = Out + item * stride_ob + head * stride_oh + far[:, None] * stride_os + dim[None, :] * stride_od
    tl.store(to, out.to(Out.dtype.element_ty), mask=inside[:, None] & (dim < D)[None, :])


@triton.jit
def _tile(base, at, inside, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) at these offsets; 0 beyond D and where not inside. A mask over D would keep loads narrow."""
    dim = tl.arange(0, WIDTH)
    where = base + at[:, None] + dim[None, :] * stride
    if D == WIDTH:
        tile = tl.load(where, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(where, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    return tile
