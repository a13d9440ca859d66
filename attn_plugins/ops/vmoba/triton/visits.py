"""Who visits which block: the choice, a table of rows by blocks, as one list of tokens for each block and slab of rows.

A slab is `SLAB` places of the order of blocks, so that its tokens are neighbours and choose alike. Text queries visit
every block, and every query visits the blocks of text; padding visits none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attn_plugins.ops.block_sparse.triton.tiles import tokens_at
from attn_plugins.ops.target import OPTIONS, on_device
from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.ops.vmoba.tables import Boxes


@dataclass(frozen=True, eq=False)
class Visits:
    """Lists of a fixed room, so that nobody has to know how long they are.

    Attributes:
        tokens: (B, H, slabs, blocks, SLAB) int32; the first of each are filled.
        counts: (B, H, slabs, blocks) int32.
    """

    tokens: torch.Tensor
    counts: torch.Tensor

    @property
    def slabs(self) -> int:
        return self.counts.shape[2]


@triton.jit(
    do_not_specialize=["length", "before", "valid_before", "grid_tokens", "valid_after", "blocks", "grid_blocks"]
)
def list_kernel(
    selected, order, tokens_of, counts,  # (B, H, grid tokens, grid blocks) uint8, (N,), and the two of `Visits`
    selected_b, selected_h, selected_n, selected_c,
    heads, length, before, valid_before, grid_tokens, valid_after, blocks, grid_blocks,
    SLAB: tl.constexpr,
):  # fmt: skip
    """A program makes one list."""
    slab, block, sheet = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (sheet // heads).to(tl.int64), (sheet % heads).to(tl.int64)
    places = slab * SLAB + tl.arange(0, SLAB)
    inside = places < length
    tokens = tokens_at(order, places, inside)
    cell = tokens - before
    of_grid = inside & (cell >= 0) & (cell < grid_tokens)
    of_text = inside & ((tokens < valid_before) | ((cell >= grid_tokens) & (cell - grid_tokens < valid_after)))
    asked = tl.where(block < grid_blocks, grid_tokens, 0)  # of so many cells; the others visit a block of text
    at = selected + b * selected_b + h * selected_h + cell.to(tl.int64) * selected_n + block * selected_c
    chosen = tl.load(at, mask=of_grid & (cell < asked), other=0) != 0
    visits = (chosen | of_text | (of_grid & (cell >= asked))).to(tl.int32)
    line = (sheet.to(tl.int64) * tl.num_programs(0) + slab) * blocks + block
    tl.store(tokens_of + line * SLAB + tl.cumsum(visits, 0) - visits, tokens, mask=visits > 0)
    tl.store(counts + line, tl.sum(visits, 0))


def list_visits(selected: torch.Tensor, one: Layout, boxes: Boxes, slab: int) -> Visits:
    """From (B, H, grid tokens, grid blocks) bool, of `slab` rows each; `boxes`: the blocks of `one`."""
    batch, heads = selected.shape[:2]
    sequence = one.sequence
    slabs = triton.cdiv(sequence.length, slab)
    counts = torch.empty(batch, heads, slabs, boxes.count, dtype=torch.int32, device=selected.device)
    tokens = torch.empty(*counts.shape, slab, dtype=torch.int32, device=selected.device)
    with on_device(selected):
        list_kernel[slabs, boxes.count, batch * heads](
            selected.view(torch.uint8), boxes.order, tokens, counts, *selected.stride(),
            heads, sequence.length, sequence.text_before, sequence.valid_before, sequence.tokens, sequence.valid_after,
            boxes.count, boxes.grid, SLAB=slab, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return Visits(tokens, counts)
