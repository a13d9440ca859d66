"""Where labelled pictures come from: handwritten digits on a canvas, or folders of a person's own, one a class."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from attn_plugins.training.moving_digits import TEST_FROM, digit_images
from attn_plugins.training.seeds import in_epochs, seeded

HELD_OUT_SHARE = 10  # one in so many files of a class is never trained on
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DIGIT = (0.7, 0.95)  # side of the digit that is asked for, as a share of the canvas
SCRAPS, SCRAP, PALE = 3, 0.25, 0.5  # pieces of other digits around it: how many, their side, their ink
NOISE = 0.05
Item = tuple[torch.Tensor, int]


class PictureData(Protocol):
    """Pictures by number: the same number gives the same picture, whoever asks and whenever."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What a label names."""

    def item(self, number: int) -> Item:
        """Pixels (3, size, size), normalised, and the label of the training picture `number` (without end)."""

    def held_out(self, number: int) -> Item:
        """The same of pictures that are never trained on."""


@dataclass(frozen=True)
class DigitPictures:
    """One of scikit-learn's handwritten digits, enlarged to any size and put anywhere, among scraps of other digits.

    The last 360 digits are the held-out ones; scraps are of the same split.

    Raises:
        ValueError: a canvas below 16 px.
        ImportError: no scikit-learn.
    """

    size: int = 224
    seed: int = 0
    classes: tuple[str, ...] = tuple("0123456789")

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"size={self.size}: give a canvas of 16 px or more")
        digit_images()  # no scikit-learn: say so now

    def item(self, number: int) -> Item:
        return self._draw("train", number)

    def held_out(self, number: int) -> Item:
        return self._draw("test", number)

    def _draw(self, split: str, number: int) -> Item:
        generator = seeded(self.seed, "digit picture", split, number)
        images, labels = digit_images()
        first, last = (0, TEST_FROM) if split == "train" else (TEST_FROM, len(images))
        canvas = torch.zeros(self.size, self.size)

        def draw() -> float:
            return torch.rand((), generator=generator).item()

        def choose() -> int:
            return int(torch.randint(first, last, (), generator=generator))

        def put(image: torch.Tensor, share: float, ink: float) -> None:
            side = max(1, round(share * self.size))
            big = F.interpolate(image[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0]
            top, left = (int(draw() * (self.size - side + 1)) for _ in range(2))
            place = canvas[top : top + side, left : left + side]
            place.copy_(torch.maximum(place, ink * big.clamp(0, 1)))

        for _ in range(SCRAPS):
            scrap = images[choose()]
            half = scrap.shape[-1] // 2
            row, column = (half * (draw() < 0.5) for _ in range(2))
            put(scrap[row : row + half, column : column + half], SCRAP, PALE)
        which = choose()
        put(images[which], DIGIT[0] + (DIGIT[1] - DIGIT[0]) * draw(), 1.0)
        canvas += NOISE * torch.randn(canvas.shape, generator=generator)
        return (2 * canvas).expand(3, -1, -1).contiguous(), int(labels[which])


@dataclass(frozen=True)
class PictureFolder:
    """A folder of folders of pictures, a class each: the shorter side is scaled to `size`, the middle cut out.

    The last tenth of each class by name is held out. mean, std: of each channel, of pixels in [0, 1].

    Raises:
        ValueError: not a folder, fewer than two classes, or a class of fewer than two pictures.
    """

    folder: Path
    size: int = 224
    seed: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give one of folders of pictures, a class each")
        if len(self.classes) < 2:
            raise ValueError(f"{self.folder}: {len(self.classes)} folders of pictures; give two classes or more")
        for name, files in self._files.items():
            if len(files) < 2:
                raise ValueError(f"{self.folder / name}: {len(files)} pictures; give two or more of every class")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._files)

    def item(self, number: int) -> Item:
        return self._read(*in_epochs(self._split[0], number, self.seed))

    def held_out(self, number: int) -> Item:
        rows = self._split[1]
        return self._read(*rows[number % len(rows)])

    @functools.cached_property
    def _files(self) -> dict[str, list[Path]]:
        found = {
            folder.name: sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
            for folder in sorted(self.folder.iterdir())
            if folder.is_dir()
        }
        return {name: files for name, files in found.items() if files}

    @functools.cached_property
    def _split(self) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        train, held_out = [], []
        for label, files in enumerate(self._files.values()):
            kept = max(1, len(files) // HELD_OUT_SHARE)
            train += [(file, label) for file in files[:-kept]]
            held_out += [(file, label) for file in files[-kept:]]
        order = torch.randperm(len(held_out), generator=seeded(self.seed, "held out")).tolist()
        return train, [held_out[place] for place in order]  # so that a part of them has all classes

    def _read(self, file: Path, label: int) -> Item:
        import numpy as np
        from PIL import Image, ImageOps

        with Image.open(file) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std, label


def picture_batch(
    data: PictureData, step: int, size: int, *, rank: int = 0, processes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's share, `size` pictures, of a step's batch: pixels (B, 3, H, W), labels (B,)."""
    first = step * size * processes + rank * size
    items = [data.item(number) for number in range(first, first + size)]
    return torch.stack([pixels for pixels, _ in items]), torch.tensor([label for _, label in items])
