"""Which keys a query sees inside the pieces that are not seen whole.

A rule is two small functions: what it needs of the rows that a program owns, read once, and which of them go with the
tokens of a step. Rows may be queries or keys. The variant is chosen by which tables are given, so it costs nothing
where it is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_side(intervals, length, bits_row, places, inside):
    """Two columns of numbers for a program's rows: packed intervals (of `length` tokens), or where their bits begin."""
    if intervals is not None:
        one, other = _both(intervals, length, places, inside)
    else:
        one = tl.where(inside, places, 0).to(tl.int64) * bits_row
        other = one
    return one, other


@triton.jit
def sees(
    one, other, intervals, bits, guards, length, bits_row, place, inside,
    BLOCK: tl.constexpr, OWN_KEYS: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK): whether each row and each token of a step, from `place` on, see each other.

    `intervals`, of `length` tokens, are those of the other side; `inside` says which of the step's tokens are any.
    """
    if intervals is not None:
        first, second = _both(intervals, length, place + tl.arange(0, BLOCK), inside)
        if OWN_KEYS:
            above = one[:, None] - first[None, :]
            below = second[None, :] - other[:, None]
        else:
            above = first[None, :] - one[:, None]
            below = other[:, None] - second[None, :]
        seen = (above & below & guards) == guards
    else:
        n = tl.arange(0, BLOCK)
        words = _words(bits + one, bits_row, place, 0)[:, None]
        for part in tl.static_range(1, (BLOCK + 31) // 32):
            words = tl.where(n[None, :] < 32 * part, words, _words(bits + one, bits_row, place, part)[:, None])
        seen = ((words >> (n % 32).to(tl.uint32)[None, :]) & 1) != 0
    return seen


@triton.jit
def _both(intervals, length, places, inside):
    """A side's two packed numbers at these places."""
    first = tl.load(intervals + places, mask=inside, other=0)
    second = tl.load(intervals + length + places, mask=inside, other=0)
    return first, second


@triton.jit
def _words(row, width, place, part):
    """For each row its bits of the 32 tokens from `place + 32 * part` on, the first one lowest; any behind the end."""
    at = place // 32 + part
    low = tl.load(row + tl.minimum(at, width - 1)).to(tl.uint32, bitcast=True)
    high = tl.load(row + tl.minimum(at + 1, width - 1)).to(tl.uint32, bitcast=True)
    shift = (place % 32).to(tl.uint32)
    return (low >> shift) | ((high << 1) << (31 - shift))  # in two steps: a shift by 32 is undefined
