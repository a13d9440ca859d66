"""Where the tokens of a call stand, read from its `CausalKeys`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_plugins.method import CausalKeys


@dataclass(frozen=True)
class Places:
    """Of keys that are consecutive in every item.

    lengths (B, 2): [padding before, real tokens]. start: index of the first query among the keys. whole: the first real
    key of every item is its first token (a sliding window's cache forgets it).
    """

    lengths: torch.Tensor
    start: int
    whole: bool


def places(keys: CausalKeys) -> Places | None:
    """None where padding stands between an item's tokens, and in compiled code. Waits for the device."""
    if torch.compiler.is_compiling():
        return None
    real = keys.positions >= 0
    count = real.sum(-1)
    before = torch.where(count > 0, real.int().argmax(-1), 0)
    last = real.shape[1] - real.flip(1).int().argmax(-1)
    dense = (count == 0) | (last - before == count)
    whole = (count == 0) | (keys.positions.gather(1, before[:, None])[:, 0] == 0)
    start, is_dense, is_whole = torch.stack([keys.column.reshape(()), dense.all(), whole.all()]).tolist()
    return Places(torch.stack([before, count], dim=1), start, bool(is_whole)) if is_dense else None


def new_tokens(keys: CausalKeys, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, real) of a call's own tokens, (B, count) each, real a bool."""
    step = torch.arange(count, device=keys.positions.device)
    column = (keys.column.reshape(1) + step).expand(keys.positions.shape[0], -1)
    return keys.first[:, None] + step, keys.positions.gather(1, column) >= 0
