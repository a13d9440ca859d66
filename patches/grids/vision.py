"""What the tokens of a vision transformer are: pictures or clips cut into patches, tokens of its own before them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from attn_plugins.method import SiteShape
from attn_plugins.patches.grids.arguments import Args, Kwargs, TensorReading, argument
from attn_plugins.patches.shapes import of_attention
from attn_plugins.sequence import Sequence

# parameters of an embedding module that become tokens before the patches: (D,), or (1, tokens, D)
_BEFORE = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


def by_entry(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The grid is read where pictures enter (`patches`), for parts of a model are also called by themselves."""
    return "no picture has entered this model's embeddings"


def patches(embeddings: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """(B, C, H, W), or clips (B, T, C, H, W), through a convolution; any resolution. Runs inside compiled code."""
    pixels = args[0] if args else kwargs["pixel_values"]
    cut = _cut(embeddings)
    if cut.padding not in ("valid", (0,) * len(cut.kernel_size)):
        return f"a patch embedding with padding={cut.padding}"
    sizes = pixels.shape[-2:]
    if isinstance(cut, nn.Conv3d):
        sizes = (max(pixels.shape[1], cut.kernel_size[0]), *sizes)  # V-JEPA repeats a frame that is alone
    return Sequence(_cells(cut, sizes), text_before=_own_tokens(embeddings))


def shape(root: Any, attention: Any) -> SiteShape | str:
    """An attention of a model, and the grid if that says which size of picture it is made for (`image_size`)."""
    found, config = of_attention(root, attention), attention.config
    if isinstance(found, str):
        return found
    entries = [part for name, part in root.named_modules() if name.split(".")[-1] == "embeddings" and _cut(part)]
    side = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if not entries or side is None:
        why = f"{type(root).__name__} is made for pictures of any size, and says of none how many patches it is"
        return dataclasses.replace(found, grid=why)
    cut = _cut(entries[0])
    sizes = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    if isinstance(cut, nn.Conv3d):
        sizes = (getattr(config, "num_frames", None) or config.frames_per_clip, *sizes)
    return dataclasses.replace(found, grid=_cells(cut, sizes), own_tokens=_own_tokens(entries[0]))


def _cut(embeddings: Any) -> Any:
    """The convolution that cuts pictures into patches; None without one."""
    return next((part for part in embeddings.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))), None)


def _cells(cut: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    pairs = zip(sizes, cut.kernel_size, cut.stride, strict=True)
    return tuple((size - wide) // step + 1 for size, wide, step in pairs)


def _own_tokens(embeddings: Any) -> int:
    own = [getattr(embeddings, name, None) for name in _BEFORE]
    return sum(token.shape[1] if token.ndim == 3 else 1 for token in own if token is not None)


_rows = TensorReading(lambda values: [tuple(row) for row in values.tolist()])


def spatial_shapes(model: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Patches (B, N, C), padded at the tail; their (H, W) per item in `spatial_shapes` (B, 2) (SigLIP 2)."""
    shapes, pixels = (argument(model, args, kwargs, name) for name in ("spatial_shapes", "pixel_values"))
    mask = argument(model, args, kwargs, "pixel_attention_mask")
    if shapes is None or pixels is None:
        return "pixel_values and spatial_shapes were not given"
    sizes = set(_rows(shapes))
    if len(sizes) > 1:
        return "the pictures of this batch differ in size"
    height, width = sizes.pop()
    padding = pixels.shape[1] - height * width
    if mask is not None and set(_real(mask)) != {(height * width, True)}:
        return "pixel_attention_mask is not the padding that spatial_shapes says"
    return Sequence((height, width), text_after=padding, valid_after=padding if mask is None else 0)


def _leading(mask: torch.Tensor) -> list[tuple[int, bool]]:
    """Per item: how many are real, and whether those are the first ones."""
    counts = mask.bool().sum(1)
    first = (torch.arange(mask.shape[1], device=mask.device) < counts[:, None]) == mask.bool()
    return list(zip(counts.tolist(), first.all(1).tolist(), strict=True))


_real = TensorReading(_leading)


def frames(model: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Pictures and clips in one row of tokens, (T, H, W) of each in `grid_thw`; attention is per frame (Qwen-VL)."""
    grids = argument(model, args, kwargs, "grid_thw")
    sizes = {(height, width) for _, height, width in _rows(grids)}
    return Sequence(sizes.pop()) if len(sizes) == 1 else "the pictures of this call differ in size"
