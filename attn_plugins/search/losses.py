"""The loss of a rule: the influence of all that it hides, for many rules at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def hidden_loss(maps: torch.Tensor, spans: Sequence[int] | torch.Tensor, *, sink: int = 1) -> torch.Tensor:
    """Sums of the blocks that causal windows hide: block b is shown to block a iff b < sink or a - b < span.

    Blocks of one distance a - b are shown or hidden together, so one suffix sum over distances serves all spans
    (MoA, arXiv 2406.14909, section 4.3: the loss of a head's rule).

    Args:
        maps: (..., n, n), of `block_influence`.
        spans: (S,) windows in blocks, 0 to any.
        sink: first blocks that are always shown.

    Returns:
        (..., S) in float64. A window of all n blocks hides nothing and has exactly 0.

    Raises:
        ValueError: maps that are not square, a negative span or sink.
    """
    spans = torch.as_tensor(spans, dtype=torch.int64)
    n = maps.shape[-1]
    if maps.ndim < 2 or maps.shape[-2] != n:
        raise ValueError(f"maps {tuple(maps.shape)}: give (..., n, n)")
    if sink < 0 or bool((spans < 0).any()):
        raise ValueError(f"sink={sink}, spans={spans.tolist()}: blocks, 0 or more")
    below = maps.double()
    a = torch.arange(n, device=maps.device)
    distance = a[:, None] - a
    hideable = (distance >= 0) & (a >= sink)
    by_distance = below.new_zeros(*maps.shape[:-2], n + 1)
    by_distance.index_add_(-1, distance[hideable], below[..., hideable])
    from_there_on = by_distance.flip(-1).cumsum(-1).flip(-1)
    return from_there_on[..., spans.clamp(max=n).to(maps.device)]


def grouped(per_member: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """Sums over members that must share one rule: `groups` runs of equal size along `dim`.

    Raises:
        ValueError: an axis that `groups` does not divide.
    """
    size = per_member.shape[dim]
    if groups < 1 or size % groups:
        raise ValueError(f"{size} members in {groups} groups: the groups must be of one size")
    return per_member.unflatten(dim, (groups, size // groups)).sum(dim % per_member.ndim + 1)
