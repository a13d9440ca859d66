"""Shares of a picture as heat maps over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, LABEL = 4, 14  # px: between pictures, and the height of a line of text
COLD, HOT = (0.10, 0.15, 0.45), (1.0, 0.85, 0.1)  # RGB of a share of 0 and of 1
STRENGTH = 0.6  # of the colour over the grey picture


def overlay(picture: Image, share: torch.Tensor) -> Image:
    """A share (height, width) in 0..1 as a colour over the picture in grey."""
    import numpy
    from PIL import Image as pil

    grey = torch.from_numpy(numpy.asarray(picture.convert("L")).copy()).float()[..., None] / 255
    cold, hot = torch.tensor(COLD), torch.tensor(HOT)
    heat = cold + (hot - cold) * share.float().clamp(0, 1)[..., None]
    mixed = (1 - STRENGTH) * grey + STRENGTH * heat
    return pil.fromarray(mixed.mul(255).round().to(torch.uint8).numpy())


def sheet(picture: Image, shares: Mapping[str, torch.Tensor]) -> Image:
    """The picture, and beside it the map of each name, with its mean share of the picture."""
    from PIL import Image as pil
    from PIL import ImageDraw

    width, height = picture.size
    panels = [("picture", picture.convert("RGB"))]
    panels += [(f"{name} {float(share.mean()):.0%}", overlay(picture, share)) for name, share in shares.items()]
    page = pil.new("RGB", (len(panels) * (width + GAP) - GAP, height + LABEL), (0, 0, 0))
    draw = ImageDraw.Draw(page)
    for index, (label, panel) in enumerate(panels):
        draw.text((index * (width + GAP) + 2, 1), label, fill=(255, 255, 255))
        page.paste(panel, (index * (width + GAP), LABEL))
    return page
