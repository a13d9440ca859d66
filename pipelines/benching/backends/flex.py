"""Compiled flex attention with the same mask. Its block mask is made here in pieces: PyTorch's maker writes N x N."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attn_plugins.pipelines.benching.sides import Built, Cannot

BLOCK = 128  # flex attention's own default
Seen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (query tokens, key tokens) to bool, broadcasting
Blocks = tuple[torch.Tensor, torch.Tensor]  # visited, whole: (H or 1, Q, K) bool


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    # A graph for each mask: whoever measures resets dynamo between cases, and past its limit this raises, where it
    # would else run uncompiled without a word.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def build(
    blocks: Blocks,
    seen: Callable[..., torch.Tensor],
    length: int,
    order: torch.Tensor | None,
    gqa: bool = False,
    compiled: bool | None = None,
) -> Built:
    """Flex attention over a block mask, q, k, v put into `order` and the result back inside the run.

    Args:
        seen: a mask function of (batch, head, query place, key place).
        compiled: None is on a GPU; a dry run on a CPU would compile for longer than all else takes.
    """
    visited, whole = blocks
    mask = block_mask(visited, whole, seen, length)
    density = table_density(visited, length)
    back = None if order is None else torch.argsort(order)
    attend = _compiled() if (visited.device.type == "cuda" if compiled is None else compiled) else _uncompiled

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.requires_grad and q.device.type == "cpu":
            raise Cannot("no backward on a CPU")
        if order is not None:
            q, k, v = (t.index_select(2, order) for t in (q, k, v))
        out = attend(q, k, v, block_mask=mask, enable_gqa=gqa)
        return out if back is None else out.index_select(2, back)

    return Built(run, density)


def block_mask(visited: torch.Tensor, whole: torch.Tensor, seen: Callable[..., torch.Tensor], length: int) -> BlockMask:
    """Tables (H or 1, Q, K) of blocks seen in part or whole, and of those seen whole, as flex attention takes them."""
    partial = visited & ~whole
    count, lists = _lists(partial[None])
    return BlockMask.from_kv_blocks(
        count, lists, *_lists(whole[None]), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def block_tables(seen: Seen, order: torch.Tensor, pieces: int = 8) -> Blocks:
    """Which blocks of tokens in `order` (N,) see each other: some pair of them, every pair of them.

    `pieces` query blocks at a time, so that the largest tensor is pieces * BLOCK rows of the mask.
    """
    length = len(order)
    edge = -length % BLOCK
    rows = []
    for first in range(0, length, pieces * BLOCK):
        mask = seen(order[first : first + pieces * BLOCK, None], order[None])
        tables = []
        for table, fill in ((mask, False), (mask, True)):  # what lies behind the end is in no block
            padded = torch.nn.functional.pad(table, (0, edge, 0, -len(table) % BLOCK), value=fill)
            tables.append(padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)))
        rows.append((tables[0].any(-1).any(1), tables[1].all(-1).all(1)))
    visited, whole = (torch.cat(columns)[None] for columns in zip(*rows, strict=True))
    return visited, whole


def _lists(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count of true columns, and all column numbers with the true ones first."""
    count = table.sum(-1, dtype=torch.int32)
    return count, torch.sort(~table, dim=-1, stable=True).indices.to(torch.int32)


def table_density(visited: torch.Tensor, length: int) -> float:
    """Share of all pairs that lie in the visited blocks (H or 1, Q, K); the last block is as long as it is."""
    sizes = (length - torch.arange(0, length, BLOCK, device=visited.device)).clamp(max=BLOCK).double()
    return float((visited * sizes[:, None] * sizes).sum((1, 2)).mean()) / length**2


def _uncompiled(*qkv: torch.Tensor, **options: object) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(*qkv, **options)  # type: ignore[call-overload]


__all__ = ["BLOCK", "block_mask", "block_tables", "build", "table_density"]
