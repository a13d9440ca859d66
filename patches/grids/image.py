"""What the tokens of an image transformer are, from latents (B, C, H, W)."""

from __future__ import annotations

import importlib
import math
from typing import Any

from attn_plugins.patches.grids.arguments import Args, Kwargs, argument, prompt_lengths, text_lengths
from attn_plugins.sequence import Sequence


def _picture(root: Any, args: Args, kwargs: Kwargs) -> tuple[int, int]:
    height, width = argument(root, args, kwargs, "hidden_states").shape[-2:]
    patch = root.config.patch_size
    return height // patch, width // patch


def _text(root: Any, args: Args, kwargs: Kwargs, name: str = "encoder_hidden_states") -> int:
    return argument(root, args, kwargs, name).shape[1]


def picture(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The picture alone (PixArt, DiT, HunyuanDiT, Lumina Next, Sana): text comes by cross-attention."""
    return Sequence(_picture(root, args, kwargs))


def text_picture(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture (CogView 3+, CogView 4)."""
    return Sequence(_picture(root, args, kwargs), text_before=_text(root, args, kwargs))


def sd3(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Picture, text."""
    return Sequence(_picture(root, args, kwargs), text_after=_text(root, args, kwargs))


def sd3_controlnet(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """As SD3, unless it gets embedded tokens (the one of SD 3.5 large)."""
    if argument(root, args, kwargs, "hidden_states").ndim != 4:
        return "hidden_states are embedded tokens, not (B, C, H, W)"
    return sd3(root, args, kwargs)


def auraflow(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Register tokens, text, picture."""
    text = root.register_tokens.shape[1] + _text(root, args, kwargs)
    return Sequence(_picture(root, args, kwargs), text_before=text)


def glm_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text, picture; with the keys of earlier pictures in a cache, something else."""
    caches = argument(root, args, kwargs, "kv_caches")
    if caches is not None and getattr(caches[0], "mode", None) == "read":
        return "the keys of condition pictures come from a cache"
    return text_picture(root, args, kwargs)


def lumina2(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The real text of each item, picture, padding: one layout only where all prompts are equally long."""
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_attention_mask"), _text(root, args, kwargs))
    if isinstance(lengths, str):
        return lengths
    if isinstance(lengths, tuple) and len(set(lengths)) > 1:
        return f"prompts of {', '.join(map(str, lengths))} tokens put the pictures of a batch at different places"
    return Sequence(_picture(root, args, kwargs), text_before=lengths[0] if isinstance(lengths, tuple) else lengths)


def hidream(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Picture, what fills it up to max_resolution (unless it is square: attended like all else), T5, Llama twice."""
    latents = argument(root, args, kwargs, "hidden_states")
    if latents.ndim != 4:
        return "hidden_states are packed tokens, not (B, C, H, W)"
    height, width = _picture(root, args, kwargs)
    filling = 0 if latents.shape[-2] == latents.shape[-1] else root.max_seq - height * width
    llama = argument(root, args, kwargs, "encoder_hidden_states_llama3")[0].shape[-2]
    text = _text(root, args, kwargs, "encoder_hidden_states_t5") + 2 * llama
    return Sequence((height, width), text_after=filling + text)


def ernie_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Picture, text with its padding at the end, lengths in text_lens."""
    text = _text(root, args, kwargs, "text_bth")
    lengths = tuple(int(length) for length in argument(root, args, kwargs, "text_lens").tolist())
    return Sequence(_picture(root, args, kwargs), text_after=text, valid_after=lengths)


def hunyuan_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Picture (or frames), then the real text of both encoders, then their padding."""
    sizes = argument(root, args, kwargs, "hidden_states").shape[2:]
    grid = tuple(size // patch for size, patch in zip(sizes, root.config.patch_size, strict=True))
    text = _text(root, args, kwargs)
    mask = argument(root, args, kwargs, "encoder_attention_mask")
    glyphs = argument(root, args, kwargs, "encoder_hidden_states_2")
    if glyphs is None or root.context_embedder_2 is None:
        lengths = prompt_lengths(mask, text)
        return lengths if isinstance(lengths, str) else Sequence(grid, text_after=text, valid_after=lengths)
    both = text_lengths(mask), text_lengths(argument(root, args, kwargs, "encoder_attention_mask_2"))
    lengths = tuple(first + second for first, second in zip(*both, strict=True))
    return Sequence(grid, text_after=text + glyphs.shape[1], valid_after=lengths)


def joy_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Pictures (B, n, C, T, H, W), of which the last is made and stands first; then the references, then text."""
    latents = argument(root, args, kwargs, "hidden_states")
    frames, height, width = (size // patch for size, patch in zip(latents.shape[-3:], root.patch_size, strict=True))
    pictures = latents.shape[1] if latents.ndim == 6 else 1
    text = _text(root, args, kwargs)
    grid = (frames, height, width) if frames > 1 else (height, width)
    return Sequence(grid, text_after=(pictures - 1) * frames * height * width + text)


def joy_image_plus(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The picture that is made, references, all told in shape_list; then text with its padding."""
    pictures, *others = argument(root, args, kwargs, "shape_list")
    if any(other != pictures for other in others):
        return "the pictures of the batch differ in size"
    text = _text(root, args, kwargs)
    lengths = prompt_lengths(argument(root, args, kwargs, "encoder_hidden_states_mask"), text)
    if isinstance(lengths, str):
        return lengths
    (frames, height, width), *references = pictures
    more = sum(map(math.prod, references))
    valid = tuple(more + length for length in lengths) if isinstance(lengths, tuple) else more + lengths
    grid = (frames, height, width) if frames > 1 else (height, width)
    return Sequence(grid, text_after=more + text, valid_after=valid)


def prx(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Text that gives keys only, picture."""
    text = _text(root, args, kwargs)
    lengths = prompt_lengths(argument(root, args, kwargs, "attention_mask"), text)
    if isinstance(lengths, str):
        return lengths
    return Sequence(_picture(root, args, kwargs), text_before=text, valid_before=lengths)


def z_image(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """Per item a picture (C, F, H, W), its filling up to a multiple of 32, the caption, its filling: all attended."""
    pictures, captions = (argument(root, args, kwargs, name) for name in ("x", "cap_feats"))
    if isinstance(pictures[0], list):
        return "pictures to edit stand before the one that is made (omni mode)"
    if len({tuple(picture.shape) for picture in pictures}) > 1:
        return "the pictures of the batch differ in size"
    patch, patch_f = (
        argument(root, args, kwargs, name) or size for name, size in (("patch_size", 2), ("f_patch_size", 1))
    )
    frames, height, width = pictures[0].shape[1:]
    grid = (frames // patch_f, height // patch, width // patch)
    tokens = grid[0] * grid[1] * grid[2]
    lengths = tuple(-tokens % 32 + len(caption) + -len(caption) % 32 for caption in captions)
    return Sequence(grid if grid[0] > 1 else grid[1:], text_after=max(lengths), valid_after=lengths)


def bria_fibo2(root: Any, args: Args, kwargs: Kwargs) -> Sequence | str:
    """The gist of the text, picture, references; or, where the gists of a batch differ, the gist last and padded."""
    embeds, mask = (argument(root, args, kwargs, name) for name in ("encoder_hidden_states", "encoder_attention_mask"))
    config = root.config
    gists = importlib.import_module(type(root).__module__).compute_gist_count(
        [embeds.shape[2]] * embeds.shape[0] if mask is None else list(text_lengths(mask)),
        min_gist=config.min_num_gist_tokens, max_gist=config.max_num_gist_tokens, gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len, max_text_len=config.gist_max_text_len,
    )  # fmt: skip
    references = sum(
        (latents.shape[2] // config.patch_size) * (latents.shape[3] // config.patch_size)
        for latents in argument(root, args, kwargs, "context_latents") or ()
    )
    grid = _picture(root, args, kwargs)
    if len(set(gists)) == 1:
        return Sequence(grid, text_before=gists[0], text_after=references)
    valid = tuple(references + gist for gist in gists)
    return Sequence(grid, text_after=max(valid), valid_after=valid)
