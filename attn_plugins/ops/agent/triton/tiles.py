"""What all kernels of the operator do alike: which part a program owns, where a head's rows lie, scores with a bias."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.tiles import LOG2E

ROOM = tl.constexpr(16)  # rows of a bias are as long as the next multiple of it
# Numbers of which no kernel needs a version of its own where they are 0, 1 or a multiple of 16. Strides are among them:
# what is known of them is UNIT.
RUNTIME = [
    "queries", "keys", "splits", "own_items", "batches", "summed_heads",
    *(f"{tensor}_{axis}" for tensor in ("grad", "q", "k", "v", "values", "out", "gq", "gk", "gv") for axis in "bhn"),
    "out_split", "gq_split", "gk_split", "gv_split",
]  # fmt: skip


@triton.jit
def head_of(tensor, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    """Where a head begins. Strides are counted in UNITs of elements, so that the compiler knows what divides them.

    It asks that of each alone, and only about 16: a head size of 40 would be read by single numbers, where 8 of them
    are the 16 bytes that a load can take.
    """
    return tensor + (b * stride_b + h * stride_h) * UNIT


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
def room_of(keys):
    """How long the rows of a bias are."""
    return tl.cdiv(keys, ROOM) * ROOM


@triton.jit
def biased(products, bias, rows, keys, inside, room, bias_q, bias_k, scale, FLOAT32: tl.constexpr):
    """Scores of these products, in base 2 but for float32; -inf where a key is not inside (None: all are).

    `rows` and `keys` broadcast against one another, `inside` is of the keys; each row is one that exists. A bias is
    read up to `room`, a multiple of ROOM: behind a mask that ended elsewhere it would be read by single numbers.
    bias_k None: it is alike for all keys.
    """
    unit = 1.0 if FLOAT32 else LOG2E
    scores = products * (scale * unit)
    if bias is not None:
        at = bias + rows.to(tl.int64) * bias_q
        if bias_k is None:
            added = tl.load(at)
        elif inside is None:
            added = tl.load(at + keys.to(tl.int64) * bias_k)
        else:
            held = tl.broadcast_to(keys < room, products.shape)
            added = tl.load(at + keys.to(tl.int64) * bias_k, mask=held, other=0.0)
        scores += added.to(tl.float32) * unit
    if inside is not None:
        scores = tl.where(_along(inside, keys), scores, float("-inf"))
    return scores


@triton.jit
def _along(inside, keys):
    """`inside` (n,), standing as `keys` do: (1, n) or (n, 1)."""
    return tl.reshape(inside, keys.shape)
