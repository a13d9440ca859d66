"""A dense mask as words of 32 bits in the order of places: how a kernel reads it, one word for 32 tokens."""

from __future__ import annotations

import torch

WORD = 32


def pack(mask: torch.Tensor, own_order: torch.Tensor | None, walked_order: torch.Tensor | None) -> torch.Tensor:
    """(B, H, N, M) bool to (B, H, N, ceil(M / 32)) int32, on the mask's device: bit j of word w is token 32 w + j.

    The orders, (N,) and (M,), say which token stands at each place; None: the tokens as they are.
    """
    for axis, order in ((2, own_order), (3, walked_order)):
        if order is not None:
            mask = mask.index_select(axis, order.to(mask.device).int())
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    # Byte by byte: sums of 32 bits would take four bytes for each bit on the way. Bytes lie lowest first in a word.
    return (mask.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)
