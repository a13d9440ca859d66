"""Where the two objects are in a picture that a model has drawn: by their outlines alone, whatever their colours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from attn_plugins.training.two_objects import SIZE, coverage, radius_of

APART = 0.12  # of a channel from the ground, at least
LEAST = 0.03  # of the picture, of an object; smaller things are no objects
SPECK = 0.01  # a third thing that large makes a picture unreadable
ALIKE = 0.6  # intersection over union with an object's outline, at least, as a mean of both


def find(picture: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor] | None:
    """Masks (H, W) bool of two objects in a picture (3, H, W) in 0..1, in the order of their names.

    The ground is the median colour. None unless there are exactly two things, and they look like the two names.
    """
    from scipy import ndimage

    ground = picture.flatten(1).median(dim=1).values
    thing = ((picture - ground[:, None, None]).abs().amax(0) > APART).numpy()
    labels, count = ndimage.label(thing)
    masks = [torch.from_numpy(labels == number) for number in range(1, count + 1)]
    masks = sorted((mask for mask in masks if float(mask.float().mean()) >= SPECK), key=lambda mask: -int(mask.sum()))
    if len(masks) != 2 or float(masks[1].float().mean()) < LEAST:
        return None
    alike = torch.tensor([[likeness(mask, name) for mask in masks] for name in names])
    order = max(itertools.permutations(range(2)), key=lambda places: float(alike[0, places[0]] + alike[1, places[1]]))
    if float(alike[0, order[0]] + alike[1, order[1]]) / 2 < ALIKE:
        return None
    return [masks[place] for place in order]


def likeness(mask: torch.Tensor, name: str) -> float:
    """Intersection over union of a mask with the outline of a name, as large, in the same place."""
    size = mask.shape[0]
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    middle = (float(columns[0] + columns[-1] + 1) / 2 * SIZE / size, float(rows[0] + rows[-1] + 1) / 2 * SIZE / size)
    outline = coverage(name, radius_of(name, float(mask.float().mean())), middle, size) > 0.5
    return float((outline & mask).sum() / (outline | mask).sum())


def colour_of(picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """RGB of an object: the mean of the brighter half of its px, for the others are at its edge."""
    inside = picture[:, mask]
    bright = inside.amax(0)
    return inside[:, bright >= bright.median()].mean(1)
