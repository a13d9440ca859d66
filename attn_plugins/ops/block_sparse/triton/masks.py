"""Which keys a query sees inside the pieces that are not seen whole.

A rule is three small functions: what it needs of queries and of keys, read once per tile, and the test of a pair. The
variant is chosen by which tables are given, so it costs nothing where it is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_side(intervals, bits, length, places, tokens, inside, bits_row):
    """Two columns of numbers for these queries: packed lows and highs, or where their rows of bits begin."""
    if intervals is not None:
        one = tl.load(intervals + places, mask=inside, other=0)
        other = tl.load(intervals + length + places, mask=inside, other=0)
    elif bits is not None:
        one = tokens.to(tl.int64) * bits_row
        other = inside
    else:
        one = inside
        other = inside
    return one, other


@triton.jit
def key_side(intervals, bits, length, places, tokens, inside, bits_column):
    """Two columns of numbers for these keys: packed positions with guards and without, or columns of bits."""
    if intervals is not None:
        one = tl.load(intervals + length + places, mask=inside, other=0)
        other = tl.load(intervals + places, mask=inside, other=0)
    elif bits is not None:
        one = tokens.to(tl.int64) * bits_column
        other = inside
    else:
        one = inside
        other = inside
    return one, other


@triton.jit
def sees(intervals, bits, guards, q_one, q_other, k_one, k_other):
    """Of broadcastable sides: whether each query sees each key."""
    if intervals is not None:
        seen = ((k_other - q_one) & (q_other - k_one) & guards) == guards
    elif bits is not None:
        seen = tl.load(bits + q_one + k_one, mask=q_other & k_other, other=0) != 0
    else:
        seen = q_other & k_other
    return seen
