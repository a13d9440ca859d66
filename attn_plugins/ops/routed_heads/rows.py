"""The computed rows of q as one list, and how tensors are read and written by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Rows:
    """All (item, head, token) to compute, by item, KV head, token, head: those of a KV head lie in one piece.

    items, heads, tokens (A,); sizes and starts of the pieces on the host, by item and KV head; `places` are the tokens
    on the host.
    """

    items: torch.Tensor
    heads: torch.Tensor
    tokens: torch.Tensor
    places: npt.NDArray[np.int64]
    sizes: list[list[int]]
    starts: list[list[int]]

    @classmethod
    def of(cls, mask: torch.Tensor, kv_heads: int) -> Rows:
        """From mask (B, N, H) bool."""
        batch, length, heads = mask.shape
        group = heads // kv_heads
        sorted_mask = mask.reshape(batch, length, kv_heads, group).transpose(1, 2).contiguous()
        at = sorted_mask.view(-1).nonzero()[:, 0]
        rest, member = at // group, at % group
        rest, token = rest // length, rest % length
        sizes = sorted_mask.sum((2, 3)).cpu()
        starts = sizes.view(-1).cumsum(0).view(sizes.shape) - sizes
        heads_at = rest % kv_heads * group + member
        return cls(rest // kv_heads, heads_at, token, token.cpu().numpy(), sizes.tolist(), starts.tolist())

    def index(self, steps: tuple[int, int, int]) -> torch.Tensor:
        """Where each row lies in a tensor that `flat` made, by its steps of item, head and token."""
        return self.items * steps[0] + self.heads * steps[1] + self.tokens * steps[2]


def flat(t: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]] | None:
    """(B, H, N, D) as a view (rows, D), and its steps of item, head and token; None where there is no such view."""
    dim = t.shape[3]
    if t.stride(3) != 1 or any(step % dim for step in t.stride()[:3]):
        return None
    steps = (t.stride(0) // dim, t.stride(1) // dim, t.stride(2) // dim)
    last = sum((size - 1) * step for size, step in zip(t.shape, steps, strict=False))
    return t.as_strided((last + 1, dim), (dim, 1), t.storage_offset()), steps


def readable(t: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """As `flat`, of a copy where there is no such view."""
    found = flat(t) or flat(t.contiguous())
    assert found is not None  # what is contiguous has one
    return found
