"""A comparison as pictures: dense and patched side by side, as a sheet (PNG) and, for videos, as an animation (GIF)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from attn_plugins.pipelines.comparing.comparison import Comparison

COLUMNS = 8  # frames of a video on the sheet
SMALL = 128  # px: smaller frames are enlarged to about this
GAP = 4  # px
LABEL = 14  # px, height of a line of text
GREY = 96


def write(comparison: Comparison, folder: Path, name: str, *, fps: int = 8) -> list[Path]:
    """Write `<name>.png` and, for videos, `<name>.gif` into `folder` (made if missing); returns what was written.

    Every seed and every item of the batch is one pair: dense above patched on the sheet, dense left in the animation.
    Nothing is written where the comparison has no frames.
    """
    videos = [
        video for dense, patched in comparison.frames for pair in zip(dense, patched, strict=True) for video in pair
    ]
    if not videos:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    shown = [enlarged(as_bytes(video)) for video in videos]
    labels = ["dense", comparison.method] * (len(shown) // 2)
    written = [folder / f"{name}.png"]
    sheet(shown, labels).save(written[0])
    if len(shown[0]) > 1:
        written.append(folder / f"{name}.gif")
        first, *others = [_moment(shown, index) for index in range(len(shown[0]))]
        first.save(written[1], save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return written


def as_bytes(video: torch.Tensor) -> torch.Tensor:
    """(F, C, H, W) float in 0..1 with 1 or 3 channels -> (F, H, W, 3) uint8."""
    pixels = video.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def enlarged(video: torch.Tensor) -> torch.Tensor:
    """Small frames with every pixel repeated, so that one sees the pixels that there are."""
    times = max(1, SMALL // max(video.shape[1:3]))
    return video.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


def sheet(videos: list[torch.Tensor], labels: list[str]) -> Image:
    """Videos below each other, time to the right; single pictures beside each other, two a row."""
    from PIL import Image, ImageDraw

    frames, height, width, _ = videos[0].shape
    if frames == 1:
        rows = [[videos[index][0], videos[index + 1][0]] for index in range(0, len(videos), 2)]
        texts = [f"{labels[index]} | {labels[index + 1]}" for index in range(0, len(videos), 2)]
    else:
        chosen = torch.linspace(0, frames - 1, min(COLUMNS, frames)).round().long().tolist()
        rows, texts = [[video[index] for index in chosen] for video in videos], labels
    step = height + LABEL + GAP
    image = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, len(rows) * step - GAP), (GREY,) * 3)
    draw = ImageDraw.Draw(image)
    for row, (pictures, text) in enumerate(zip(rows, texts, strict=True)):
        draw.text((2, row * step + 1), text, fill=(255, 255, 255))
        for column, picture in enumerate(pictures):
            image.paste(Image.fromarray(picture.numpy()), (column * (width + GAP), row * step + LABEL))
    return image


def _moment(videos: list[torch.Tensor], index: int) -> Image:
    """One frame of all videos: a row per pair, dense on the left."""
    from PIL import Image

    _, height, width, _ = videos[0].shape
    image = Image.new("RGB", (2 * width + GAP, len(videos) // 2 * (height + GAP) - GAP), (GREY,) * 3)
    for place, video in enumerate(videos):
        image.paste(Image.fromarray(video[index].numpy()), (place % 2 * (width + GAP), place // 2 * (height + GAP)))
    return image
