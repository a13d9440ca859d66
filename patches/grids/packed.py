"""What the tokens of an image transformer are that gets them packed (B, N, C), with their places beside them.

References (Kontext, FLUX.2, Qwen edit) stand behind the picture that is made: they count as text, which sees everything
and is seen by everything.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_plugins.patches.grids.arguments import Args, Kwargs, TensorReading, argument, prompt_lengths
from attn_plugins.sequence import Sequence


def _first_picture(ids: torch.Tensor, skip: int = 0) -> tuple[int, int, int] | str:
    """(H, W, tokens behind it) of position ids (N, axes) = (time, row, column, ...), if behind `skip` others they begin
    with a picture in raster order. The next picture begins at another time, or where rows and columns begin anew."""
    ids = (ids[0] if ids.ndim == 3 else ids)[skip:]
    places = (ids - ids[:1]).long()
    rows, columns, others = places[:, 1], places[:, 2], torch.cat([places[:, :1], places[:, 3:]], dim=1)
    first = (others == 0).all(dim=1) & (places != 0).any(dim=1)  # neither elsewhere nor back where it began
    first[0] = True
    end = len(ids) if bool(first.all()) else int((~first).nonzero()[0])
    height, width = int(rows[:end].max()) + 1, int(columns[:end].max()) + 1
    index = torch.arange(end, device=ids.device)
    raster = bool(((rows[:end] == index // width) & (columns[:end] == index % width)).all())
    if height * width != end or not raster:
        return "the position ids begin with no picture in raster order"
    return height, width, len(ids) - end


_picture = TensorReading(_first_picture)


def _by_ids(root: Any, args: Args, kwargs: Kwargs, mask: torch.Tensor | None = None) -> Sequence | str:
    found = _picture(argument(root, args, kwargs, "img_ids"))
    if isinstance(found, str):
        return found
    height, width, behind = found
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = prompt_lengths(mask, text)
    if isinstance(lengths, str):
        return lengths
    return Sequence((height, width), text_before=text, text_after=behind, valid_before=lengths)


def flux(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture, references; the grid is in the values of img_ids."""
    return _by_ids(root, args, kwargs)


def flux_controlnet(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """As FLUX; a ControlNet that serves several modes puts one token for its mode before the text."""
    found = _by_ids(root, args, kwargs)
    if isinstance(found, str) or not root.union:
        return found
    return Sequence(found.grid, text_before=found.text_before + 1, text_after=found.text_after)


def chroma(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """As FLUX; the prompt's padding is in attention_mask, over text and picture."""
    return _by_ids(root, args, kwargs, argument(root, args, kwargs, "attention_mask"))


def bria_fibo(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """As FLUX; the prompt's padding is in a mask (B, 1, 1, N) for the attention."""
    given = argument(root, args, kwargs, "joint_attention_kwargs") or {}
    return _by_ids(root, args, kwargs, given.get("attention_mask"))


def flux2(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """As FLUX; with a cache (Klein KV) the references stand between text and picture, or their keys do."""
    mode = argument(root, args, kwargs, "kv_cache_mode")
    if mode is None:
        return _by_ids(root, args, kwargs)
    given = argument(root, args, kwargs, "num_ref_tokens") or 0 if mode == "extract" else 0
    held = argument(root, args, kwargs, "kv_cache").num_ref_tokens if mode == "cached" else given
    found = _picture(argument(root, args, kwargs, "img_ids"), given)
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    return found if isinstance(found, str) else Sequence(found[:2], text_before=text + held, text_after=found[2])


def flux3(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture, references, which come as an argument of their own."""
    found = _by_ids(root, args, kwargs)
    references = argument(root, args, kwargs, "image_cond_hidden_states")
    if isinstance(found, str) or references is None:
        return found
    return Sequence(found.grid, text_before=found.text_before, text_after=references.shape[1])


def krea2(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture; position_ids (N, 3) are those of both."""
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_attention_mask"), text)
    found = _picture(argument(root, args, kwargs, "position_ids"), text)
    if isinstance(lengths, str) or isinstance(found, str):
        return lengths if isinstance(lengths, str) else str(found)
    return Sequence(found[:2], text_before=text, text_after=found[2], valid_before=lengths)


def ideogram4(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture, told apart by the values of `indicator`; segment_ids set padding apart."""
    if not _one_segment(argument(root, args, kwargs, "segment_ids")):
        return "prompts are padded, or several items are packed into one"
    text = _tokens_of_text(argument(root, args, kwargs, "indicator"))
    found = _picture(argument(root, args, kwargs, "position_ids"), text)
    return found if isinstance(found, str) else Sequence(found[:2], text_before=text, text_after=found[2])


_one_segment = TensorReading(lambda segments: bool((segments == segments[:, :1]).all()))
_tokens_of_text = TensorReading(lambda indicator: int((indicator[0] == indicator[0, 0]).sum()) % indicator.shape[1])


def _shapes(root: Any, args: Args, kwargs: Kwargs) -> tuple[tuple[int, ...], int] | str:
    """(grid of the picture that is made, tokens of the references) from img_shapes, one row of (T, H, W) per item."""
    shapes = argument(root, args, kwargs, "img_shapes")
    if any(row != shapes[0] for row in shapes):
        return "the pictures of the batch differ in size"
    first, *others = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    frames, height, width = first
    if getattr(root.config, "use_layer3d_rope", False):  # layers of one size, and the picture that they were one of
        frames, others = frames * len(others), others[-1:]
    return (frames, height, width) if frames > 1 else (height, width), sum(map(math.prod, others))


def qwen_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text with its padding, picture (or layers), references."""
    found = _shapes(root, args, kwargs)
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_hidden_states_mask"), text)
    if isinstance(lengths, str) or isinstance(found, str):
        return lengths if isinstance(lengths, str) else str(found)
    return Sequence(found[0], text_before=text, text_after=found[1], valid_before=lengths)


def qwen_image21(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text and references, block by block causal, each in a call of its own; then the picture, which sees them all."""
    latents = argument(root, args, kwargs, "hidden_states").shape[1]
    shapes = argument(root, args, kwargs, "img_shapes")
    slots = argument(root, args, kwargs, "img_mask").shape[1]  # of words, and of four tokens of a picture each
    frames, height, width = shapes[0][-1]
    picture = frames * height * width
    before = slots - latents // 4 + latents - picture
    words = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_hidden_states_mask"), words)
    if isinstance(lengths, str):
        return lengths
    valid = (lengths,) if isinstance(lengths, int) else lengths
    if latents > picture and set(valid) != {words}:
        return "prompts with references in them are padded"
    given = tuple(before - words + length for length in valid) if latents == picture else (before,)
    return Sequence((height, width), text_before=before, valid_before=given if len(given) > 1 else given[0])


def nucleus_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Picture, text that gives keys only."""
    found = _shapes(root, args, kwargs)
    text = argument(root, args, kwargs, "encoder_hidden_states").shape[1]
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_hidden_states_mask"), text)
    if isinstance(lengths, str) or isinstance(found, str):
        return lengths if isinstance(lengths, str) else str(found)
    return Sequence(found[0], text_after=text, valid_after=lengths) if not found[1] else "reference pictures are given"
