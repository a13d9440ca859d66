"""Telling photographs apart by small parts of them: real pictures that come with scikit-image and scikit-learn.

A photograph is cut into 4 x 4 cells, of which four, one in each row and column, are held out. A picture is a square
within one cell, in grey, turned and mirrored at random, with its own brightness and contrast taken off: what is left to
go by is what it shows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attn_plugins.training.pictures import Item
from attn_plugins.training.seeds import seeded

FROM_SKIMAGE = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "moon")
FROM_SKLEARN = ("china", "flower")
CELLS = 4  # a side
KEPT = (1, 3, 0, 2)  # the column that is held out of each row of cells
SIDE = (0.5, 1.0)  # of a picture, as a share of its cell's shorter side


@functools.cache
def photographs() -> tuple[torch.Tensor, ...]:
    """Each in grey, (height, width) in [0, 1], in the order of `FROM_SKIMAGE` and `FROM_SKLEARN`.

    Raises:
        ImportError: one of the two packages is missing.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError("the photographs come with two packages: pip install scikit-image scikit-learn") from error
    found = [getattr(skimage.data, name)() for name in FROM_SKIMAGE]
    found += [load_sample_image(f"{name}.jpg") for name in FROM_SKLEARN]
    pixels = [torch.tensor(photograph).float() / 255 for photograph in found]
    return tuple(one.mean(-1) if one.ndim == 3 else one for one in pixels)


@dataclass(frozen=True)
class PhotographParts:
    """Parts of ten photographs, the label says of which; a `PictureData`.

    Raises:
        ValueError: a size below 16 px.
        ImportError: a package is missing.
    """

    size: int = 224
    seed: int = 0
    classes: tuple[str, ...] = FROM_SKIMAGE + FROM_SKLEARN

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"size={self.size}: give pictures of 16 px or more")
        photographs()  # no package: say so now

    def item(self, number: int) -> Item:
        return self._cut("train", number)

    def held_out(self, number: int) -> Item:
        return self._cut("test", number)

    def _cut(self, split: str, number: int) -> Item:
        generator = seeded(self.seed, "part of a photograph", split, number)

        def choose(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        label, row = choose(len(self.classes)), choose(CELLS)
        others = [column for column in range(CELLS) if column != KEPT[row]]
        column = KEPT[row] if split == "test" else others[choose(len(others))]
        photograph = photographs()[label]
        height, width = (extent // CELLS for extent in photograph.shape)
        cell = photograph[row * height : (row + 1) * height, column * width : (column + 1) * width]
        share = SIDE[0] + (SIDE[1] - SIDE[0]) * torch.rand((), generator=generator).item()
        side = int(share * min(height, width))
        top, left = choose(height - side + 1), choose(width - side + 1)
        part = cell[top : top + side, left : left + side][None, None]
        if choose(2):
            part = part.flip(-1)
        part = part.rot90(choose(4), (-2, -1))
        big = F.interpolate(part, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)[0]
        return ((big - big.mean()) / big.std().clamp(min=0.01)).expand(3, -1, -1).contiguous(), label
