"""Parts of a picture or video: a box or a mask, and how much of each token of a grid it covers."""

from __future__ import annotations

import hashlib
import math
import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

IN_MEMORY = "mask in memory"  # how a summary tells a mask that no file holds


@dataclass(frozen=True)
class Box:
    """left, top, right, bottom, in fractions of the picture; of a video, in all frames."""

    edges: tuple[float, float, float, float]

    def on(self, grid: tuple[int, ...]) -> torch.Tensor:
        """(tokens,) float64 in 0..1: the share of each token that the box covers."""
        left, top, right, bottom = self.edges
        plane = torch.outer(_covered(top, bottom, grid[-2]), _covered(left, right, grid[-1])).flatten()
        return plane.repeat(math.prod(grid[:-2]))

    @property
    def told(self) -> Any:
        """As one would write it."""
        return list(self.edges)


@dataclass(frozen=True)
class Mask:
    """A mask (H, W), or (T, H, W) with one for each frame; equal to any other of the same values."""

    digest: str
    values: torch.Tensor = field(compare=False, repr=False)
    path: str | None = None

    def on(self, grid: tuple[int, ...]) -> torch.Tensor:
        """(tokens,) float64 in 0..1: its mean over each token's area.

        Raises:
            ValueError: a mask for each frame, on a grid without frames.
        """
        mask = self.values.double()
        frames = math.prod(grid[:-2])
        if mask.ndim == 3 and len(grid) < 3 and len(mask) > 1:
            raise ValueError(f"a mask of {len(mask)} frames {tuple(mask.shape)} on a picture: give one (H, W)")
        mask = mask if mask.ndim == 3 else mask[None]
        rows, columns = _shrink(mask.shape[1], grid[-2]), _shrink(mask.shape[2], grid[-1])
        small = rows @ mask @ columns.T
        if len(small) > 1:
            small = torch.tensordot(_frames(len(small), frames), small, dims=1)
        return small.expand(frames, -1, -1).flatten()

    @property
    def told(self) -> Any:
        return self.path or f"{IN_MEMORY}: {'x'.join(map(str, self.values.shape))}"


Area = Box | Mask


def area_of(where: Any) -> Area:
    """The box or mask that a person gave.

    Args:
        where: four numbers (left, top, right, bottom) in fractions of the picture; a mask (H, W) or (T, H, W) as a
            tensor, array or nested list (bool, 0..1, or integers up to 255), as a PIL picture (its lightness), a list
            of them (one for each frame), or the path of one.

    Raises:
        ValueError: a box outside 0..1 or without an inside, a mask of another shape or range, or one of zeros.
        FileNotFoundError: no picture there.
        TypeError: something else.
    """
    if isinstance(where, (Box, Mask)):
        return where
    if isinstance(where, (tuple, list)) and len(where) == 4 and all(isinstance(edge, numbers.Real) for edge in where):
        return _box(tuple(float(edge) for edge in where))  # type: ignore[arg-type]
    path = str(where) if isinstance(where, (str, Path)) else None
    mask = _values(_opened(path) if path is not None else where)
    if mask.ndim not in (2, 3) or not mask.numel():
        raise ValueError(f"a mask of shape {tuple(mask.shape)}: give (H, W), or (T, H, W) with one for each frame")
    if not bool(mask.isfinite().all()) or not 0 <= float(mask.min()) <= float(mask.max()) <= 1:
        raise ValueError(f"a mask of values {float(mask.min()):g} to {float(mask.max()):g}: they lie in 0..1")
    if not bool(mask.any()):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} that covers nothing: all of it is 0")
    text = f"{tuple(mask.shape)}".encode() + mask.contiguous().numpy().tobytes()
    return Mask(hashlib.sha256(text).hexdigest(), mask, path)


def _box(edges: tuple[float, float, float, float]) -> Box:
    left, top, right, bottom = edges
    if not all(0 <= edge <= 1 for edge in edges):
        raise ValueError(f"box {edges}: left, top, right, bottom are fractions of the picture, in 0..1")
    if not (left < right and top < bottom):
        raise ValueError(f"box {edges} has no inside: left < right and top < bottom, as fractions of the picture")
    return Box(edges)


def _opened(path: str) -> Any:
    from PIL import Image

    if path.startswith(IN_MEMORY):
        raise ValueError(f"{path!r} stands for a mask that was never in a file: give the mask itself, or its path")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no mask at {path}")
    with Image.open(path) as picture:
        return picture.copy()


def _values(mask: Any) -> torch.Tensor:
    """float32 on the host, whole numbers up to 255 brought to 0..1."""
    if isinstance(mask, (tuple, list)) and mask and hasattr(mask[0], "convert"):
        return torch.stack([_values(frame) for frame in mask])
    if hasattr(mask, "convert"):  # a PIL picture
        import numpy as np

        mask = np.array(mask.convert("L"))
    try:
        values = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"a region's place is a {type(mask).__name__}: give (left, top, right, bottom), a mask, or its path"
        ) from error
    values = values.detach().cpu()
    whole = not values.is_floating_point() and values.dtype != torch.bool
    scale = 255.0 if whole and values.numel() and int(values.max()) > 1 else 1.0
    return values.to(torch.float32) / scale


def _covered(low: float, high: float, cells: int) -> torch.Tensor:
    """(cells,): how much of each of `cells` equal parts of 0..1 lies in low..high."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * cells).clamp(0.0, 1.0)


def _shrink(size: int, cells: int) -> torch.Tensor:
    """(cells, size) float64: means of `size` equal parts over `cells` equal parts of the same length."""
    ends, edges = (torch.arange(n + 1, dtype=torch.float64) / n for n in (cells, size))
    overlap = torch.minimum(ends[1:, None], edges[1:]) - torch.maximum(ends[:-1, None], edges[:-1])
    return overlap.clamp(min=0.0) * cells


def _frames(count: int, latent: int) -> torch.Tensor:
    """(latent, count) float64: which frames a latent frame is of.

    Causal video VAEs keep the first frame by itself and join the others s at a time: count = 1 + s * (latent - 1).
    """
    if latent == 1 or (count - 1) % (latent - 1) or count < latent:
        return _shrink(count, latent)
    whole = torch.zeros(latent, count, dtype=torch.float64)
    whole[0, 0] = 1.0
    whole[1:, 1:] = _shrink(count - 1, latent - 1)
    return whole
