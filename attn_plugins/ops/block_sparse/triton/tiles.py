"""What all kernels do alike: which rows a program owns, which tokens stand there, and reading their rows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Numbers of which no kernel needs a version of its own where they are 0, 1 or a multiple of 16.
RUNTIME = [
    "work_b", "work_h", "list_b", "list_h", "bits_b", "bits_h", "bits_row",
    "q_length", "kv_length", "rows", "lead", "guards",
]  # fmt: skip


@triton.jit
def own_rows(rows, lead):
    """(rank, sheet) of this program: rows of one sheet (item and head) run side by side, long ones of any before all.

    Neighbouring rows visit the same keys, so they should meet in the cache; a long row that began last would be waited
    for alone.
    """
    pid = tl.program_id(0)
    sheets = tl.num_programs(0) // rows
    ahead = lead * sheets
    if pid < ahead:
        rank = pid // sheets
        sheet = pid % sheets
    else:
        rest = rows - lead
        rank = lead + (pid - ahead) % rest
        sheet = (pid - ahead) // rest
    return rank, sheet


@triton.jit
def tokens_at(order, places, inside):
    """The tokens that stand at these places."""
    tokens = places if order is None else tl.load(order + places, mask=inside, other=0)
    return tokens


@triton.jit
def read_rows(base, tokens, inside, stride, step, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH), 0 beyond D and where not `inside`; None: all are."""
    d = tl.arange(0, WIDTH)
    at = base + tokens[:, None].to(tl.int64) * stride + d[None, :] * step
    if inside is None:
        tile = tl.load(at) if D == WIDTH else tl.load(at, mask=d[None, :] < D, other=0.0)
    else:
        tile = tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    return tile


@triton.jit
def write_rows(base, tokens, inside, stride, step, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store (rows, WIDTH), the first D columns of the rows inside."""
    d = tl.arange(0, WIDTH)
    at = base + tokens[:, None].to(tl.int64) * stride + d[None, :] * step
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))


@triton.jit
def spread(pattern, BLOCK: tl.constexpr):
    """Tokens of an even piece relative to its first."""
    n = tl.arange(0, BLOCK)
    apart = n if pattern is None else tl.load(pattern + n)
    return apart


@triton.jit
def entry_at(entries, i, last):
    """(first token, or number of tokens; first place) of a list's entry, 0 and 0 behind its end.

    A loop reads the entry of its next iteration and carries it along: an address that hung on a load of the same
    iteration would keep the compiler from loading rows ahead.
    """
    there = i < last
    lead = tl.load(entries + 2 * i, mask=there, other=0)
    place = tl.load(entries + 2 * i + 1, mask=there, other=0)
    return lead, place


@triton.jit
def list_of(line):
    """Where a list begins, and where its even whole, even masked, ragged whole and ragged masked entries end."""
    return tl.load(line + 2), tl.load(line + 3), tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)


@triton.jit
def own_tokens(line, order, BLOCK: tl.constexpr):
    """(place, number) of a program's rows, and the tokens there.

    Asked for again when the result is written, and read anew (volatile): held until then they would be spilled.
    """
    start = tl.load(line, volatile=True)
    inside = tl.arange(0, BLOCK) < tl.load(line + 1, volatile=True)
    places = start + tl.arange(0, BLOCK)
    return places, tokens_at(order, places, inside), inside


@triton.jit
def power(x, FLOAT32: tl.constexpr):
    """The exponential: base 2, one instruction; natural in float32, where a change of base would be seen."""
    y = tl.exp(x) if FLOAT32 else tl.exp2(x)
    return y
