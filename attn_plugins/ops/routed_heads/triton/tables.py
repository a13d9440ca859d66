"""Which rows the programs own, worked out where the mask is: by a few PyTorch operations that wait for nothing."""

from __future__ import annotations

import torch


def row_lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From mask (B, N, H) bool: the tokens of each head (B * H, N + 1) int32, ascending, and how many, (B * H,).

    What stands behind them is not defined.
    """
    batch, length, heads = mask.shape
    computed = mask.transpose(1, 2).reshape(batch * heads, length)
    counted = computed.cumsum(1)
    at = torch.where(computed, counted - 1, length)  # the others, on top of one another, behind the end
    tokens = torch.arange(length, dtype=torch.int32, device=mask.device).expand(batch * heads, -1)
    lists = torch.zeros(batch * heads, length + 1, dtype=torch.int32, device=mask.device)
    return lists.scatter_(1, at, tokens), counted[:, -1].to(torch.int32)


def tile_table(counts: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """(tiles, 2) int32, for each program the head (of all items) and where in its list the tile begins; -1 for none.

    As many tiles as there would be if all rows were computed, so that the host need not know; those there are come
    first. A head's lie side by side, because they share its keys; the last one first, which is the longest if causal.
    """
    ends = ((counts + block - 1) // block).cumsum(0)
    program = torch.arange(len(counts) * -(-length // block), device=counts.device)
    head = torch.searchsorted(ends, program, right=True)
    there = head < len(counts)
    head = head.clamp(max=len(counts) - 1)
    first = torch.where(there, (ends[head] - 1 - program) * block, -1)
    return torch.stack([head, first], dim=1).to(torch.int32)
