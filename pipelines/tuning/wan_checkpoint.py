"""The transformer of a Wan text-to-video checkpoint, from a folder or the hub, and how its noise levels are shifted."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

HUB = re.compile(r"[\w.-]+/[\w.-]+")


def load_wan(source: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformer, a `WanTransformer3DModel`.

    Args:
        source: a folder in the layout of `WanPipeline`, or a repository of the hub ("org/name"), which diffusers
            downloads if it has not yet.
        dtype: of the weights.

    Raises:
        ValueError: no such folder, or another kind of checkpoint.
    """
    from diffusers import WanTransformer3DModel

    _check(source)
    with warnings.catch_warnings():
        # the name of this argument became `dtype`, which older diffusers ignore
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return WanTransformer3DModel.from_pretrained(source, subfolder="transformer", torch_dtype=dtype)


def wan_shift(source: str | Path) -> float:
    """How the checkpoint's scheduler shifts noise levels.

    Raises:
        ValueError: as for `load_wan`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    _check(source)
    config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    return float(config.get("flow_shift", config.get("shift", 1.0)))  # what UniPC calls it, and what Euler does


def _check(source: str | Path) -> None:
    from diffusers import WanPipeline

    folder = Path(source)
    if not (folder / "model_index.json").is_file() and (folder.exists() or not HUB.fullmatch(str(source))):
        raise ValueError(
            f"{source}: no model_index.json there; give a folder in the layout of WanPipeline, or org/name on the hub"
        )
    index = WanPipeline.load_config(source)
    if index.get("_class_name") != "WanPipeline":
        raise ValueError(f"{source}: a {index.get('_class_name')}; give a WanPipeline (text to video)")
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ValueError(
            f"{source}: Wan 2.2, where two transformers share the noise levels, or tokens have times of their own; "
            "give a Wan 2.1 text-to-video checkpoint"
        )
