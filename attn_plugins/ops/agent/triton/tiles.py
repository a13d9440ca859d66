"""What all kernels of the operator do alike: which part a program owns, and scores with their bias."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.tiles import LOG2E


@triton.jit
def sheet_of(length, heads, BLOCK: tl.constexpr):
    """(batch item, head, first row) of this program: blocks of one head lie side by side, they share its keys."""
    blocks = tl.cdiv(length, BLOCK)
    sheet = tl.program_id(0) // blocks
    return (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK


@triton.jit
def share_of(length, splits, BLOCK: tl.constexpr):
    """[first, last) of a length for this program (axis 1), whole blocks up to `even`; empty behind the length's end."""
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = tl.minimum(tl.program_id(1) * share, length)
    last = tl.minimum(first + share, length)
    return first, first + (last - first) // BLOCK * BLOCK, last


@triton.jit
def biased(products, bias, rows, keys, inside, bias_q, bias_k, scale, FLOAT32: tl.constexpr):
    """Scores of these products, in base 2 but for float32; -inf where a key is not inside (None: all are).

    `rows` and `keys` broadcast against one another, `inside` is of the keys; each row is one that exists.
    """
    unit = 1.0 if FLOAT32 else LOG2E
    scores = products * (scale * unit)
    at = keys.to(tl.int64) * bias_k + rows.to(tl.int64) * bias_q
    if inside is None:
        if bias is not None:
            scores += tl.load(bias + at).to(tl.float32) * unit
    else:
        there = tl.broadcast_to(_along(inside, keys), products.shape)
        if bias is not None:
            scores += tl.load(bias + at, mask=there, other=0.0).to(tl.float32) * unit
        scores = tl.where(there, scores, float("-inf"))
    return scores


@triton.jit
def _along(inside, keys):
    """`inside` (n,), standing as `keys` do: (1, n) or (n, 1)."""
    return tl.reshape(inside, keys.shape)
