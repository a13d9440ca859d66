"""From what a person says of a size (pixels, frames, tokens) to the tokens that a model's attention would see."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins import presets
from attn_plugins.sequence import Sequence
from attn_plugins.targets import Target

TEXT = 8192  # tokens of a language model, unless it has positions for fewer
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


@dataclass(frozen=True)
class Asked:
    """height, width: px. frames: of a video. tokens: of a text. text: tokens of a prompt in joint attention. grid:
    tokens per axis, which stands for all of these but `text`. None: the model's own."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    tokens: int | None = None
    text: int | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if self.text is not None and self.text < 0:
            raise ValueError(f"text={self.text}: give a number of tokens, 0 or more")


@dataclass(frozen=True)
class Sized:
    """The tokens, and in words which size they are of."""

    sequence: Sequence
    of: str


def sized(target: Target, asked: Asked) -> Sized:
    """The sequence of the largest attention of `target` at the size that was asked for.

    Raises:
        ValueError: a size that cannot be told, or one that the model has not (frames of a text).
    """
    root, family, pipe = target
    kinds = {site.kind for site in family.find_sites(root)}
    text = _text(target, asked) if "joint" in kinds else 0
    if asked.grid is not None:
        return Sized(Sequence(asked.grid, text_before=text), "as given")
    if kinds == {"causal"}:
        return _of_text(root, asked)
    if asked.tokens is not None:
        raise ValueError(f"--tokens is for language models; {family.title} has a grid: give --size, --frames or --grid")
    found = _of_pixels(root, family, asked) if family.library == "transformers" else _of_latents(target, asked)
    if found is None:
        found = _of_preset(target, asked)
    grid, of = found
    return Sized(Sequence(grid, text_before=text), of + (f", {text} tokens of text" if text else ""))


def _of_text(root: Any, asked: Asked) -> Sized:
    if asked.height or asked.width or asked.frames:
        raise ValueError(f"{type(root).__name__} is a language model: give --tokens, not a size in pixels")
    config = root.config.get_text_config() if hasattr(root.config, "get_text_config") else root.config
    most = getattr(config, "max_position_embeddings", None)
    tokens = asked.tokens or min(TEXT, most or TEXT)
    beyond = f", beyond its {most:,} positions" if most and tokens > most else ""
    return Sized(Sequence((tokens,)), f"a text{beyond}")


def _of_pixels(root: Any, family: Any, asked: Asked) -> tuple[tuple[int, ...], str] | None:
    """Of a vision transformer of transformers: what the family reads of pixels of this size."""
    config = getattr(root.config, "vision_config", None) or root.config
    side = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    own = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    height, width = asked.height or own[0], asked.width or own[1]
    frames = asked.frames or getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if not height or not width:
        return None
    for pattern, read in family.extras.get("levels", {}).items():
        for name, module in root.named_modules():
            if re.fullmatch(pattern, name):
                shape = (1, frames, 3, height, width) if frames else (1, 3, height, width)
                try:
                    found = read(module, (torch.empty(shape, device="meta"),), {})
                except (AttributeError, TypeError):  # a module of this name that takes no pixels, or packed ones
                    continue
                if not isinstance(found, str):
                    return found.grid, _pixels(height, width, frames)
    return None


def _of_latents(target: Target, asked: Asked) -> tuple[tuple[int, ...], str] | None:
    """Of a denoiser in a pipeline that says how much its VAE shrinks; None where nothing does."""
    root, _, pipe = target
    spatial = _first(pipe, _SPATIAL)
    nothing = not (asked.height or asked.width or asked.frames)
    if spatial is None or (nothing and getattr(pipe, "vae", None) is None):
        return None  # without a VAE, pixels are a manner of speaking
    defaults = _defaults(pipe)
    sizes = [_pixels_of(side, target, asked, defaults, spatial) for side in ("height", "width")]
    if None in sizes:
        return None
    height, width = (int(size) for size in sizes if size is not None)
    patch, patch_t = _patches(root, pipe)
    plane = tuple(max(-(-size // spatial) // patch, 1) for size in (height, width))
    temporal = _first(pipe, _TEMPORAL)
    if "num_frames" not in defaults or temporal is None:
        if asked.frames:
            raise ValueError(f"--frames {asked.frames}: {type(pipe).__name__} makes no videos")
        return plane, _pixels(height, width, None)
    frames = asked.frames or defaults["num_frames"] or getattr(root.config, "sample_frames", None)
    if not isinstance(frames, int):
        return None
    latent = (frames - 1) // temporal + 1
    return (-(-latent // patch_t), *plane), _pixels(height, width, frames)


def _pixels_of(side: str, target: Target, asked: Asked, defaults: Mapping[str, Any], spatial: int) -> int | None:
    """Height or width: as asked, as the pipeline's call has it, or as the model is made for."""
    given = getattr(asked, side) or defaults.get(side)
    if isinstance(given, int):
        return given
    config = target.root.config
    side_of = getattr(target.pipe, "default_sample_size", None) or getattr(config, f"sample_{side}", None)
    side_of = side_of or getattr(config, "sample_size", None)
    if isinstance(side_of, (list, tuple)):
        side_of = side_of[side == "width"]
    return side_of * spatial if isinstance(side_of, int) else None


def _patches(root: Any, pipe: Any) -> tuple[int, int]:
    """Latents per token: across each side of a picture, and over time."""
    config = root.config
    several = getattr(config, "all_patch_size", None)  # Z-Image: of which its pipeline takes the first
    patch = getattr(config, "patch_size", None) or (several[0] if several else 1)
    patch_t = getattr(config, "patch_size_t", None) or 1
    if isinstance(patch, (list, tuple)):
        patch_t, patch = (patch[0] if len(patch) == 3 else patch_t), patch[-1]
    blocks = getattr(config, "down_block_types", None)
    if blocks:  # a UNet: the first level that has attention
        first = next((level for level, kind in enumerate(blocks) if "Attn" in kind), 0)
        return 2**first, 1
    channels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
    if patch == 1 and channels and getattr(config, "in_channels", 0) == 4 * channels:
        patch = 2  # the pipeline packs 2 x 2 latents into one (FLUX)
    return patch, patch_t


def _of_preset(target: Target, asked: Asked) -> tuple[tuple[int, ...], str]:
    """The grid that a preset of this model is for."""
    root, family, _ = target
    if not (asked.height or asked.width or asked.frames):
        for row in presets.available(family=family.name):
            if row.base_size is not None and row.fits(root):
                return row.base_size, f"the grid of preset {row.name!r}"
    raise ValueError(
        f"{type(root).__name__} does not say how many tokens a size in pixels is: give --grid, tokens per axis, such "
        "as --grid 21x30x52 (frames x rows x columns)"
    )


def _text(target: Target, asked: Asked) -> int:
    if asked.text is not None:
        return asked.text
    most = _defaults(target.pipe).get("max_sequence_length")
    return most if isinstance(most, int) else 0


def _defaults(pipe: Any) -> dict[str, Any]:
    """The defaults of the pipeline's call, by argument."""
    if pipe is None:
        return {}
    call = inspect.getattr_static(getattr(pipe, "cls", type(pipe)), "__call__", None)
    return {} if call is None else {name: row.default for name, row in inspect.signature(call).parameters.items()}


def _first(pipe: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(pipe, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def _pixels(height: int, width: int, frames: int | None) -> str:
    return f"{height} x {width} px" + (f", {frames} frames" if frames else "")


def steps_of(pipe: Any) -> int:
    """Steps of the pipeline's call as it is, or 50."""
    given = _defaults(pipe).get("num_inference_steps")
    return given if isinstance(given, int) else 50


def tokens_in_words(sequence: Sequence) -> str:
    """ "21 x 30 x 52 = 32,760 tokens and 226 of text"."""
    grid = " x ".join(f"{size:,}" for size in sequence.grid)
    total = f" = {math.prod(sequence.grid):,}" if len(sequence.grid) > 1 else ""
    text = sequence.text_before + sequence.text_after
    return f"{grid}{total} tokens" + (f" and {text} of text" if text else "")
