"""The embedded demo: a 1.7M-parameter Wan video model of two moving handwritten digits, run by diffusers' own pipeline.

    pipe = load_pipeline()
    latents = pipe(**prompt("37"), generator=torch.Generator().manual_seed(0)).frames
    save_gif(to_frames(latents), "37.gif")

The pipeline has no VAE and no text encoder: its latents are grey pixels, its prompts are embeddings made here.
"""

from __future__ import annotations

import importlib.resources
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins.training.moving_digits import empty_prompt, prompt_embeds

if TYPE_CHECKING:
    from diffusers import WanPipeline
    from PIL.Image import Image

CANVAS = 32  # px, the size that the model was trained at
SPATIAL, TEMPORAL = 8, 4  # what WanPipeline divides sizes by when it has no VAE to ask


def asset_folder() -> Path:
    """Where the saved pipeline lies: a folder that `WanPipeline.from_pretrained` reads."""
    return Path(str(importlib.resources.files("attn_plugins") / "assets" / "moving_digits"))


def load_pipeline(dtype: torch.dtype = torch.float32) -> WanPipeline:
    """The embedded model in a stock `WanPipeline` on the CPU, progress bar off. dtype: of the weights."""
    from diffusers import WanPipeline

    absent: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    with warnings.catch_warnings():
        # the name of this argument became `dtype`, which older diffusers ignore
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = WanPipeline.from_pretrained(asset_folder(), torch_dtype=dtype, local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(
    digits: str | Sequence[str] = "37", frames: int = 16, *, steps: int = 20, guidance: float = 3.0
) -> dict[str, Any]:
    """Arguments of the pipeline call for one pair of digits, or a list of pairs (one video each).

    digits: which digits, the left one first. frames: length of the video, 1 to 64; the model was trained up to 16.
    steps, guidance: of the sampler. A video is `frames` x 16 x 16 tokens.
    Raises ValueError for anything but pairs of digits, or an impossible number of frames.
    """
    if not 1 <= frames <= 64:
        raise ValueError(f"frames={frames}: the model has positions for 1 to 64 frames")
    embeds = prompt_embeds([digits] if isinstance(digits, str) else digits)
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": empty_prompt(len(embeds)),
        "height": CANVAS * SPATIAL,
        "width": CANVAS * SPATIAL,
        "num_frames": (frames - 1) * TEMPORAL + 1,
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "output_type": "latent",
    }


def to_frames(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 1, F, H, W) in [-1, 1], clipped there, as grey frames (B, F, H, W), uint8, on the CPU.

    Raises ValueError for another number of channels or axes: such latents need a VAE.
    """
    if latents.ndim != 5 or latents.shape[1] != 1:
        raise ValueError(f"latents {tuple(latents.shape)}: expected (batch, 1, frames, height, width)")
    return latents[:, 0].detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def contact_sheet(frames: torch.Tensor, *, every: int = 1, upscale: int = 2, gap: int = 2) -> Image:
    """One row per video, time to the right.

    frames: (B, F, H, W) uint8. every: show each n-th frame. upscale: pixels per pixel. gap: grey px between frames.
    """
    from PIL import Image

    shown = frames[:, ::every].repeat_interleave(upscale, dim=2).repeat_interleave(upscale, dim=3)
    tiles = torch.nn.functional.pad(shown, (0, gap, 0, gap), value=96)
    rows, columns, height, width = tiles.shape
    return Image.fromarray(tiles.permute(0, 2, 1, 3).reshape(rows * height, columns * width).numpy())


def save_gif(frames: torch.Tensor, path: str | Path, *, upscale: int = 4, fps: int = 8, gap: int = 2) -> None:
    """Write an animation that loops for ever, videos side by side.

    frames: (B, F, H, W) uint8. path: ends in .gif. upscale: pixels per pixel. fps: frames per second.
    """
    moments = frames.transpose(0, 1)[:, None].unbind()  # each (1, B, H, W): a sheet of one row
    sheets = [contact_sheet(moment, upscale=upscale, gap=gap) for moment in moments]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=round(1000 / fps), loop=0)
