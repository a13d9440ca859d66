"""A block plan as PyTorch's flex attention takes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.rules import BitRule, WindowRule

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def block_mask(plan: BlockPlan) -> BlockMask:
    """The `BlockMask` of `plan`. q and k must stand in the plan's orders: `q[:, :, plan.q_order]`, k and v alike.

    Compiled, flex attention asks its mask function in partial blocks only; uncompiled, everywhere. The one given here
    is right everywhere.

    Raises:
        ValueError: blocks that are not of one size (but for the last, which may be shorter) or leave gaps, or a rule
            that is none of ours. Flex attention can express neither.
    """
    sizes = (
        _block_size("query", plan.q_start, plan.q_size, plan.q_length),
        _block_size("KV", plan.kv_start, plan.kv_size, plan.kv_length),
    )
    columns = len(plan.kv_start)
    lists = torch.nn.functional.pad(plan.lists, (0, columns - plan.lists.shape[-1]), value=-1)
    behind_full = (plan.full[..., None] + torch.arange(columns)).clamp(max=columns - 1)
    return BlockMask.from_kv_blocks(
        plan.count - plan.full,
        torch.take_along_dim(lists, behind_full.long(), dim=-1).clamp(min=0),
        plan.full,
        lists.clamp(min=0),
        BLOCK_SIZE=sizes,
        mask_mod=_mask_mod(plan, sizes),
        seq_lengths=(plan.q_length, plan.kv_length),
    )


def _block_size(name: str, start: torch.Tensor, size: torch.Tensor, length: int) -> int:
    """The one size of blocks that follow each other from 0 to `length`."""
    block = int(size[0]) if len(size) else 1
    places = torch.arange(len(size)) * block
    even = torch.equal(start.long(), places) and torch.equal(size.long(), (length - places).clamp(max=block))
    if not even or int(size.sum()) != length:
        raise ValueError(
            f"{name} blocks of {sorted(set(size.tolist()))} tokens over {length}: flex attention needs blocks of one "
            "size that cover the sequence in order, only the last of them shorter; choose tiles that divide the grid"
        )
    return block


def _mask_mod(plan: BlockPlan, sizes: tuple[int, int]) -> MaskMod:
    """mask_mod(batch, head, q, kv) for places in the plan's orders."""
    every_q, every_kv = torch.arange(plan.q_length), torch.arange(plan.kv_length)
    q_order = every_q if plan.q_order is None else plan.q_order
    kv_order = every_kv if plan.kv_order is None else plan.kv_order
    if plan.rule is None:
        batch, heads, rows, _ = plan.lists.shape
        visited = torch.zeros(batch, heads, rows, len(plan.kv_start) + 1, dtype=torch.bool)
        visited.scatter_(-1, plan.lists.long() % visited.shape[-1], True)  # -1 falls on the column too many
        return _lookup(visited, every_q // sizes[0], every_kv // sizes[1])
    if isinstance(plan.rule, BitRule):
        return _lookup(plan.rule.bits, q_order, kv_order)
    if isinstance(plan.rule, WindowRule):
        return _window_mod(plan.rule, q_order, kv_order)
    raise ValueError(f"a plan with a {type(plan.rule).__name__}: flex attention is given windows and bit masks only")


def _lookup(table: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> MaskMod:
    """A bool table (B or 1, H or 1, rows, columns), read at the row and column of each place."""
    items, heads = int(table.shape[0] > 1), int(table.shape[1] > 1)
    return lambda b, h, q, kv: table[b * items, h * heads, row[q], column[kv]]


def _window_mod(rule: WindowRule, q_order: torch.Tensor, kv_order: torch.Tensor) -> MaskMod:
    """Row intervals per axis, looked up by place; text sees and is seen."""
    axes = []
    tokens = stride = int(np.prod([axis.window.size for axis in rule.axes]))
    q_text, kv_text = ((t < rule.grid_start) | (t >= rule.grid_start + tokens) for t in (q_order, kv_order))
    for window in (axis.window for axis in rule.axes):
        stride //= window.size
        tables = np.zeros((2, window.size), dtype=np.int64)
        for residue in range(window.dilation):
            tables[:, residue :: window.dilation] = window.intervals(window.class_length(residue))
        q, kv = ((order - rule.grid_start) // stride % window.size for order in (q_order, kv_order))
        start, end = (torch.from_numpy(table)[q] for table in tables)
        axes.append((start, end, q % window.dilation, kv // window.dilation, kv % window.dilation))

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        seen = torch.ones_like(q + kv, dtype=torch.bool)
        for start, end, q_class, index, kv_class in axes:
            seen = seen & (start[q] <= index[kv]) & (index[kv] < end[q]) & (q_class[q] == kv_class[kv])
        return seen | q_text[q] | kv_text[kv]

    return mask_mod
