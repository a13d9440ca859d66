"""Whether each subject's attention stays in its own place: Dice against masks, and confusion between subjects.

MultiCrafter (arXiv 2509.21953) trains with the Dice loss between each subject's attention map and its mask, and traces
blended subjects back to maps that lie over one another. The maps may be those of `methods.mip.ReferenceMaps` or
`methods.regions.RegionMaps`, at any size: masks are brought to the maps' size, area by area.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dice(maps: torch.Tensor, masks: torch.Tensor, smooth: float = 0.0) -> torch.Tensor:
    """(B, R) in 0..1: the soft Dice coefficient of each map a and its mask m.

    (2 sum(a m) + smooth) / (sum a + sum m + smooth), over positions.

    Args:
        maps: (B, R, H, W) or (B, R, T, H, W), 0 or more; they should reach 1 where a subject is all there is, as shares
            do: a map of probabilities over positions must be divided by its largest value first.
        masks: (R, ...) or (B, R, ...) in 0..1, with as many axes, of any size.
        smooth: keeps a map of 0 from 0 / 0, and its gradient alive; a map and a mask of 0 give 0 without it.

    Returns:
        At least float32, differentiable in the maps.

    Raises:
        ValueError: shapes that do not go together.
    """
    a, m = _flat(maps, masks)
    total = a.sum(-1) + m.sum(-1) + smooth
    return torch.where(total > 0, (2 * (a * m).sum(-1) + smooth) / torch.where(total > 0, total, 1.0), 0.0)


def dice_loss(maps: torch.Tensor, masks: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - `dice`, the mean over batch and subjects: 0 where every map is its mask. For training alone."""
    return (1 - dice(maps, masks, smooth)).mean()


def confusion_matrix(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B, R, R): how much of the attention of subject i that falls into any mask falls into mask j.

    Rows add up to 1, or are 0 where a map touches no mask. Arguments as of `dice`; what lies outside all masks does not
    count, so a map need not be normalised.
    """
    a, m = _flat(maps, masks)
    mass = a @ m.mT
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / torch.where(total > 0, total, 1.0), 0.0)


def confusion_score(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B,) in 0..1: the mean over subjects of the share of attention that is in the others' masks.

    0: each subject looks at its own place alone; (R - 1) / R for R masks of one size: at all alike. A map that touches
    no mask counts as 0.

    Raises:
        ValueError: as `dice`, or fewer than two subjects.
    """
    if maps.shape[1] < 2:
        raise ValueError(f"maps {tuple(maps.shape)}: confusion is between two subjects or more")
    matrix = confusion_matrix(maps, masks)
    return (matrix.sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(-1)) / maps.shape[1]


def _flat(maps: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (B, R, positions of the maps)."""
    size = maps.shape[2:]
    if maps.ndim not in (4, 5) or not maps.numel():
        raise ValueError(f"maps {tuple(maps.shape)}: give (B, R, H, W) or (B, R, T, H, W)")
    masks = masks[None] if masks.ndim == maps.ndim - 1 else masks
    if masks.ndim != maps.ndim or masks.shape[1] != maps.shape[1] or masks.shape[0] not in (1, maps.shape[0]):
        raise ValueError(
            f"masks {tuple(masks.shape)} for maps {tuple(maps.shape)}: give (R, ...) or (B, R, ...) of them"
        )
    wide = torch.promote_types(maps.dtype, torch.float32)
    masks = F.interpolate(masks.to(maps.device, wide), size=size, mode="area")
    return maps.to(wide).flatten(2), masks.expand(maps.shape[0], *masks.shape[1:]).flatten(2)
