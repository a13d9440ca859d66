"""What the tokens of a video transformer are, where text is in the same sequence."""

from __future__ import annotations

from typing import Any

from attn_plugins.patches.grids.arguments import (
    Args,
    Kwargs,
    TensorReading,
    argument,
    prompt_lengths,
    text_lengths,
)
from attn_plugins.patches.grids.video import latent_grid
from attn_plugins.sequence import Sequence


def _length(root: Any, args: Args, kwargs: Kwargs, name: str) -> int:
    """Tokens of an argument (B, L, C); 0 where it was not given."""
    tokens = argument(root, args, kwargs, name)
    return 0 if tokens is None else tokens.shape[1]


def _added(lengths: tuple[int, ...], more: int) -> tuple[int, ...]:
    return tuple(length + more for length in lengths)


def hunyuan_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Video, then text whose padding is at the tail, per item, in encoder_attention_mask.

    The model itself attends the first `mask.sum()` text tokens of an item, wherever the mask's ones are. Mochi gathers
    the tokens of the mask and attends item by item (`Sequence.without_padding`).
    """
    text = _length(root, args, kwargs, "encoder_hidden_states")
    mask = argument(root, args, kwargs, "encoder_attention_mask")
    return Sequence(latent_grid(root, args, kwargs), text_after=text, valid_after=text_lengths(mask))


_all_zero = TensorReading(lambda tensor: not bool(tensor.any()))


def hunyuan_video15(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Video, then what is real of the picture's, ByT5's and the language model's tokens, then what is not.

    The tokens of a picture that is all zeros (text to video) are none.
    """
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    text = sum(_length(root, args, kwargs, name) for name in names)
    picture = argument(root, args, kwargs, "image_embeds")
    masks = [argument(root, args, kwargs, name) for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    lengths = zip(*(text_lengths(mask) for mask in masks), strict=True)
    shown = 0 if _all_zero(picture) else picture.shape[1]
    valid = _added(tuple(sum(item) for item in lengths), shown)
    return Sequence(latent_grid(root, args, kwargs), text_after=text, valid_after=valid)


def motif_video(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Video, then a picture's tokens, then text, masked wherever encoder_attention_mask is zero."""
    picture = _length(root, args, kwargs, "image_embeds")
    text = picture + _length(root, args, kwargs, "encoder_hidden_states")
    valid = prompt_lengths(argument(root, args, kwargs, "encoder_attention_mask"), text - picture)
    if isinstance(valid, str):
        return valid
    valid = valid + picture if isinstance(valid, int) else _added(valid, picture)
    return Sequence(latent_grid(root, args, kwargs), text_after=text, valid_after=valid)


def cogvideox(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, then hidden_states (B, T, C, H, W); CogVideoX 1.5 patches time too, and pads its last patch."""
    _, frames, _, height, width = argument(root, args, kwargs, "hidden_states").shape
    patch, patch_t = root.config.patch_size, getattr(root.config, "patch_size_t", None) or 1
    grid = (-(-frames // patch_t), height // patch, width // patch)
    return Sequence(grid, text_before=_length(root, args, kwargs, "encoder_hidden_states"))


def easyanimate(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The tokens of one or two text encoders, padding among them, then video."""
    names = ("encoder_hidden_states", "encoder_hidden_states_t5")
    text = sum(_length(root, args, kwargs, name) for name in names)
    return Sequence(latent_grid(root, args, kwargs), text_before=text)
