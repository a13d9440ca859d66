"""A case's pictures beside each other: dense, each method, dense again, and how far each is from dense."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins.pipelines.comparing.page import Picture
from attn_plugins.pipelines.comparing.pictures import GAP, GREY, LABEL, as_bytes, enlarged, sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from attn_plugins.pipelines.comparing.comparison import Comparison

GAIN = 4  # of |difference|, so that one sees it
WIDEST = 512, 256, 160  # px of a picture, of a video's moving frame, of a frame on a sheet
Lane = tuple[str, torch.Tensor]  # a name, and (F, C, H, W) in 0..1


def strips(comparisons: Sequence[Comparison], case: int, fps: int = 8) -> list[Picture]:
    """Of one case that pictures were kept of, for each item of its batch: single pictures; of videos the moving frames
    (GIF), and a sheet of them (PNG)."""
    found: list[Picture] = []
    name = comparisons[0].cases[case]
    for item in range(len(comparisons[0].frames[case][0])):
        lanes = _lanes(comparisons, case, item)
        if len(lanes[0][1]) == 1:
            found += [_still(label, frames, name) for label, frames in lanes]
        else:
            labels = ", ".join(label for label, _ in lanes)
            found.append(Picture(_animation(lanes, fps), f"{name}: {labels}, moving", f"{name}, from left: {labels}"))
            found.append(Picture(_sheet(lanes), f"{name}: {labels}, time to the right"))
    return found


def _lanes(comparisons: Sequence[Comparison], case: int, item: int) -> list[Lane]:
    dense, again = comparisons[0].frames[case][0][item], comparisons[0].again[case][item]
    patched = [(one.method, one.frames[case][1][item]) for one in comparisons]
    gaps = [(f"|{label} - dense| x {GAIN}", _gap(frames, dense)) for label, frames in patched]
    return [
        ("dense", dense),
        *patched,
        ("dense again", again),
        *gaps,
        (f"|again - dense| x {GAIN}", _gap(again, dense)),
    ]


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - b).abs() * GAIN).clamp(0, 1)


def _still(label: str, frames: torch.Tensor, case: str) -> Picture:
    from PIL import Image

    pixels = enlarged(as_bytes(_at_most(frames, WIDEST[0])))
    return Picture(_png(Image.fromarray(pixels[0].numpy())), f"{label}, {case}", label, small=True)


def _animation(lanes: Sequence[Lane], fps: int) -> bytes:
    """All lanes in a row, in step, their names above."""
    from PIL import Image, ImageDraw

    shown = [enlarged(as_bytes(_at_most(frames, WIDEST[1]))) for _, frames in lanes]
    count, height, width, _ = shown[0].shape
    moments = []
    for moment in range(count):
        image = Image.new("RGB", (len(lanes) * (width + GAP) - GAP, height + LABEL), (GREY,) * 3)
        draw = ImageDraw.Draw(image)
        for place, ((label, _), video) in enumerate(zip(lanes, shown, strict=True)):
            draw.text((place * (width + GAP) + 2, 1), _fitted(draw, label, width), fill=(255, 255, 255))
            image.paste(Image.fromarray(video[moment].numpy()), (place * (width + GAP), LABEL))
        moments.append(image)
    buffer = io.BytesIO()
    moments[0].save(
        buffer, "GIF", save_all=True, append_images=moments[1:], duration=round(1000 / fps), loop=0, optimize=True
    )
    return buffer.getvalue()


def _sheet(lanes: Sequence[Lane]) -> bytes:
    shown = [enlarged(as_bytes(_at_most(frames, WIDEST[2]))) for _, frames in lanes]
    return _png(sheet(shown, [label for label, _ in lanes]))


def _fitted(draw: Any, text: str, width: int) -> str:
    """The text, cut to what fits."""
    while len(text) > 3 and draw.textlength(text) > width - 4:
        text = f"{text.removesuffix('..')[:-1]}.."
    return text


def _at_most(frames: torch.Tensor, side: int) -> torch.Tensor:
    """(F, C, H, W), made smaller where it is wider than `side`."""
    height, width = frames.shape[-2:]
    if width <= side:
        return frames
    size = (max(1, round(height * side / width)), side)
    return torch.nn.functional.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
