"""What the tokens of a running forward are, read from its arguments: one reader per way of saying it.

A reader gets (root, args, kwargs) of the root's forward and returns a `Sequence`, or a sentence that says why it cannot
tell. Readers look at shapes; the two that need values (Flux's position ids, HunyuanVideo's text mask) read them once
per tensor, not once per layer or step.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch

from attn_plugins.sequence import Sequence

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@functools.cache
def _positions(cls: Any) -> dict[str, int]:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


def argument(root: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """The argument `name` of the root's forward, by keyword or by position; None where it was not given."""
    if name in kwargs:
        return kwargs[name]
    position = _positions(cast(Hashable, type(root))).get(name)
    return args[position] if position is not None and position < len(args) else None


class TensorReading:
    """Remembers what was read from the values of a tensor, as long as it is that tensor and nobody has written to it.

    The key is the object (weakly) and its version: an address may be reused by a later tensor of the same shape.
    """

    def __init__(self, read: Callable[[torch.Tensor], Any], limit: int = 8) -> None:
        self.read = read
        self.limit = limit
        self.rows: list[tuple[weakref.ref[torch.Tensor], int, Any]] = []

    def __call__(self, tensor: torch.Tensor) -> Any:
        if tensor.is_inference():  # has no version to tell whether it was written to
            return self.read(tensor)
        for ref, version, value in self.rows:
            if ref() is tensor and version == tensor._version:
                return value
        value = self.read(tensor)
        others = [row for row in self.rows if row[0]() is not None and row[0]() is not tensor]
        self.rows = [*others[-self.limit + 1 :], (weakref.ref(tensor), tensor._version, value)]
        return value


def patched_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, C, T, H, W) and config.patch_size of three ints (Wan, Cosmos): no text."""
    frames, height, width = argument(root, args, kwargs, "hidden_states").shape[-3:]
    patch = root.config.patch_size
    return Sequence((frames // patch[0], height // patch[1], width // patch[2]))


def _lengths(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(length) for length in mask.sum(dim=1).tolist())


_text_lengths = TensorReading(_lengths)


def hunyuan_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, C, T, H, W), then text whose padding is at the tail, per item, in encoder_attention_mask.

    The model itself attends the first `mask.sum()` text tokens of an item, wherever the mask's ones are.
    """
    frames, height, width = argument(root, args, kwargs, "hidden_states").shape[-3:]
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    patch, patch_t = root.config.patch_size, root.config.patch_size_t
    mask = argument(root, args, kwargs, "encoder_attention_mask")
    return Sequence(
        (frames // patch_t, height // patch, width // patch), text_after=text, valid_after=_text_lengths(mask)
    )


def cogvideox(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, then hidden_states (B, T, C, H, W); CogVideoX 1.5 patches time too, and pads its last patch."""
    _, frames, _, height, width = argument(root, args, kwargs, "hidden_states").shape
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    patch, patch_t = root.config.patch_size, root.config.patch_size_t or 1
    return Sequence((-(-frames // patch_t), height // patch, width // patch), text_before=text)


def ltx_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Packed tokens (B, N, C); the grid is in num_frames, height, width."""
    sizes = [argument(root, args, kwargs, name) for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return "num_frames, height and width were not given to the model (conditioning by video_coords alone)"
    return Sequence(tuple(int(size) for size in sizes))


def _raster(ids: torch.Tensor) -> tuple[int, int] | str:
    """(H, W) of position ids (N, 3) = (time, row, column), if they are one picture in raster order."""
    ids = ids[0] if ids.ndim == 3 else ids
    rows, columns = ids[:, 1].long(), ids[:, 2].long()
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    index = torch.arange(ids.shape[0], device=ids.device)
    plain = height * width == ids.shape[0] and bool(
        ((ids[:, 0] == ids[0, 0]) & (rows == index // width) & (columns == index % width)).all()
    )
    return (height, width) if plain else "img_ids are not one picture in raster order (reference images?)"


_flux_grid = TensorReading(_raster)


def flux(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, then packed tokens (B, N, C) whose grid is in the values of img_ids."""
    ids = argument(root, args, kwargs, "img_ids")
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    grid = _flux_grid(ids)
    return grid if isinstance(grid, str) else Sequence(grid, text_before=text)


def sd3(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """hidden_states (B, C, H, W), then text."""
    height, width = argument(root, args, kwargs, "hidden_states").shape[-2:]
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    patch = root.config.patch_size
    return Sequence((height // patch, width // patch), text_after=text)


def by_level(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """A UNet has one grid per level: they are read where a level begins (`feature_map`)."""
    return "this attention runs outside the UNet's transformer blocks"


def feature_map(level: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The grid of a UNet level, from the (B, C, H, W) that enters its Transformer2DModel. Runs inside compiled code."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if hidden_states.ndim != 4:
        return f"a level's input has {hidden_states.ndim} axes, not (B, C, H, W)"
    return Sequence((hidden_states.shape[2], hidden_states.shape[3]))
