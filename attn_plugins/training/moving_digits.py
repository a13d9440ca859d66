"""Videos of two moving handwritten digits: real pen strokes (scikit-learn's digits), synthetic motion, no download.

The embedded demo model is trained on them. Its prompt is the pair of classes: one token per digit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

DIGIT = 16  # px, side of a digit's box: the 8 x 8 originals, enlarged twice
TEXT_DIM = 16  # width of a prompt token
SPEED = (0.5, 1.6)  # px per frame
SIDEWAYS = 0.4  # share of the horizontal speed that is kept: two digits that cross all the time are hard to read
TEST_FROM = 1437  # the last 360 images are never trained on; not a random 360, as neighbours are often by one writer


@functools.cache
def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All digit images (1797, 16, 16) in [0, 1] and their classes (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the moving digits need scikit-learn for its digit images: pip install attn-plugins[train]"
        ) from error
    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None]
    images = F.interpolate(images, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False).clamp_min(0)[:, 0]
    # writers press differently hard: every digit gets the same peak, so that contrast is not one more thing to learn
    return images / images.amax(dim=(1, 2), keepdim=True), torch.from_numpy(raw.target).long()


def bounce(start: torch.Tensor, velocity: torch.Tensor, frames: int, span: float) -> torch.Tensor:
    """Positions of a point that moves at constant speed and is reflected at 0 and at `span`.

    start, velocity: (...,) in px and px per frame, start within [0, span]. Returns (..., frames) in px.
    """
    time = torch.arange(frames, dtype=start.dtype, device=start.device)
    free = (start[..., None] + velocity[..., None] * time).remainder(2 * span)
    return span - (free - span).abs()


def _placement(position: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear weights (..., size, DIGIT) that put a digit's rows (or columns) at a fractional position (...,)."""
    canvas = torch.arange(size, dtype=position.dtype)[:, None]
    digit = torch.arange(DIGIT, dtype=position.dtype)
    return (1 - (canvas - digit - position[..., None, None]).abs()).clamp_min(0)


def moving_digits(
    batch: int, frames: int, size: int = 32, generator: torch.Generator | None = None, *, split: str = "train"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw videos of two digits; the first starts at the left, the second at the right, and both bounce at the walls.

    batch, frames: how many videos, and frames in each. size: side of the canvas in px, at least 24.
    generator: a CPU generator; the same seed gives the same videos. split: "train", or "test" for unseen digits.
    Returns the videos (batch, 1, frames, size, size) in [-1, 1], background -1, and the classes (batch, 2), left first.
    Raises ValueError for an impossible size or split, ImportError (naming the extra) without scikit-learn.
    """
    if batch < 1 or frames < 1 or size < 24:
        raise ValueError(f"batch={batch}, frames={frames}, size={size}: need batch >= 1, frames >= 1, size >= 24")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: choose 'train' or 'test'")
    images, classes = digit_images()
    low, high = (0, TEST_FROM) if split == "train" else (TEST_FROM, len(images))
    index = torch.randint(low, high, (batch, 2), generator=generator)
    x0, y0, angle, speed = torch.rand(4, batch, 2, generator=generator)

    span = float(size - DIGIT)
    # far left and far right: the pair can be read in order in the first frame
    x0 = span * (0.2 * x0 + torch.tensor([0.0, 0.8]))
    angle = 2 * torch.pi * angle
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * speed
    x = bounce(x0, SIDEWAYS * speed * angle.cos(), frames, span)
    y = bounce(y0 * span, speed * angle.sin(), frames, span)

    digits = images[index][:, :, None]  # (B, 2, 1, D, D)
    placed = _placement(y, size) @ digits @ _placement(x, size).transpose(-1, -2)  # (B, 2, F, size, size)
    return placed.amax(dim=1).mul(2).sub(1).clamp(-1, 1)[:, None], classes[index]


def prompt_embeds(pairs: torch.Tensor | Sequence[str] | Sequence[Sequence[int]]) -> torch.Tensor:
    """Prompt tokens for pairs of digits, left digit first; needs no scikit-learn.

    pairs: (B, 2) integers, or a list such as ["37", "04"]. Returns (B, 2, 16): the class one-hot in 0-9 (times 3, so
    that a token has unit variance or so), the place (left, right) in 10-11, a constant in 12.
    Raises ValueError unless every item is two digits 0-9.
    """
    rows = pairs.tolist() if isinstance(pairs, torch.Tensor) else [list(pair) for pair in pairs]
    try:
        labels = [[int(str(digit)) for digit in row] for row in rows]
    except (TypeError, ValueError):
        labels = []
    if not labels or any(len(row) != 2 or min(row) < 0 or max(row) > 9 for row in labels):
        raise ValueError(f"prompt_embeds({pairs!r}): give pairs of digits 0-9, such as ['37', '04'] or a (B, 2) tensor")
    index = torch.tensor(labels)
    tokens = torch.zeros(len(labels), 2, TEXT_DIM)
    tokens[..., :10] = 3.0 * F.one_hot(index, 10)
    tokens[:, 0, 10] = tokens[:, 1, 11] = 2.0
    tokens[..., 12] = 1.0
    return tokens


def empty_prompt(batch: int) -> torch.Tensor:
    """The prompt that says nothing, for classifier-free guidance: zeros (batch, 2, 16)."""
    return torch.zeros(batch, 2, TEXT_DIM)
