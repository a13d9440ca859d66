"""Launches the gate's kernels. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton

from attn_plugins.ops.block_sparse.triton.launch import tile_width
from attn_plugins.ops.target import OPTIONS, on_device
from attn_plugins.ops.vmoba import tables
from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.ops.vmoba.tables import Boxes
from attn_plugins.ops.vmoba.triton.gate_kernels import best_kernel, pool_kernel, scores_kernel

POOLED_NUMBERS = 4096  # that a program reads at once
SCORES = 4096  # that a program holds
MOST_BLOCKS = 256  # of which a row's scores are held at once
COLUMNS = 16  # of rows and means, multiplied at once


def pool(t: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """(B, H, N, D) to the means over the boxes of the grid, (B, H, boxes, D) float32."""
    batch, heads, _, head_dim = t.shape
    means = torch.empty(batch, heads, boxes.grid, head_dim, dtype=torch.float32, device=t.device)
    width = tile_width(head_dim)
    with on_device(t):
        pool_kernel[boxes.grid, batch * heads](
            t, means, boxes.starts, boxes.sizes, boxes.order, *t.stride(), heads, boxes.grid,
            D=head_dim, WIDTH=width, BLOCK_N=POOLED_NUMBERS // width, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return means


def scores(q: torch.Tensor, k: torch.Tensor, one: Layout, exact: bool) -> torch.Tensor:
    """(B, H, rows, blocks) float32: of each grid query (`exact`), or of the mean of each tile of them."""
    means = pool(k, tables.blocks(one, k.device))
    rows = _grid(q, one) if exact else pool(q, tables.tiles(one, q.device))
    batch, heads, length, head_dim = rows.shape
    found = torch.empty(batch, heads, length, one.count, dtype=torch.float32, device=q.device)
    with on_device(q):
        scores_kernel[triton.cdiv(length, 64), triton.cdiv(one.count, 64), batch * heads](
            rows, means, found, *rows.stride(), heads, heads // k.shape[1], length, one.count,
            D=head_dim, BLOCK_D=COLUMNS, BLOCK_M=64, BLOCK_C=64, num_warps=4,
            **OPTIONS,
        )  # fmt: skip
    return found


def best(q: torch.Tensor, k: torch.Tensor, one: Layout, count: int, causal: bool) -> torch.Tensor | None:
    """(B, H, grid tokens, blocks) bool: the own block and the best others, `count` in all; None: too many blocks."""
    if one.count > MOST_BLOCKS:
        return None
    means = pool(k, tables.blocks(one, k.device))
    rows = _grid(q, one)
    batch, heads, length, head_dim = rows.shape
    selected = torch.empty(batch, heads, length, one.count, dtype=torch.uint8, device=q.device)
    held = max(16, triton.next_power_of_2(one.count))
    step = min(64, SCORES // held)
    with on_device(q):
        best_kernel[triton.cdiv(length, step), batch * heads](
            rows, means, tables.own_blocks(one, True, q.device), selected, *rows.stride(),
            heads, heads // k.shape[1], length, one.count, min(count, one.count) - 1,
            D=head_dim, BLOCK_D=COLUMNS, BLOCK_M=step, BLOCK_C=held, CAUSAL=causal,
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return selected.view(torch.bool)


def _grid(q: torch.Tensor, one: Layout) -> torch.Tensor:
    return q.narrow(2, one.sequence.text_before, one.sequence.tokens)
