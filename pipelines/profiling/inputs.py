"""What a model is run on to be profiled: an embedded model's own data, or prompts, texts and pictures of yours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BATCH = 8  # pictures at once


@dataclass(frozen=True)
class Inputs:
    """obj: what to profile. run: runs it once. words: what that is. name: of the variable in code to paste."""

    obj: Any
    run: Callable[[], object]
    words: str
    name: str


@dataclass(frozen=True)
class Given:
    """What a person gave; None or nothing: a default of the model's kind.

    prompt: of a generation. call: more arguments of the pipeline's call. text: files. length: tokens of a text. texts:
    how many of them. images: files. steps: of a generation. seed: of its noise.
    """

    prompt: str = "a cat walking on a beach at sunset"
    call: Mapping[str, Any] | None = None
    text: Sequence[Path] = ()
    length: int = 1024
    texts: int = 2
    images: Sequence[Path] = ()
    steps: int = 8
    seed: int = 0


def inputs_for(model: str, given: Given, device: str | None = None, dtype: str | None = None) -> Inputs:
    """Load a model, and say what to run it on.

    Args:
        model: a folder, "moving_digits" or "small_llama".

    Raises:
        ValueError: no such folder, or of a kind that is none of these; no pictures for a vision model.
    """
    folder = Path(model).expanduser()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"), None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype}: give float32, bfloat16 or float16")
    if not folder.is_dir():
        if model == "moving_digits":
            return _moving_digits(given, device, kind)
        if model != "small_llama":
            raise ValueError(f"{model}: no such folder; give one, or moving_digits or small_llama")
        from attn_plugins.pipelines.small_llama import asset_folder

        folder = asset_folder()
    if (folder / "model_index.json").is_file():
        return _pipeline(folder, given, device, kind)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither model_index.json nor config.json there")
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    if names[0].endswith("ForCausalLM"):
        return _language(folder, given, device, kind)
    return _vision(folder, names[0], given, device, kind)


def _moving_digits(given: Given, device: str, dtype: torch.dtype) -> Inputs:
    from attn_plugins.pipelines.demo_model import load_pipeline, prompt

    pipe = load_pipeline(dtype).to(device)
    call = {**prompt("37", steps=given.steps), **dict(given.call or {})}
    words = f"digits 37, {given.steps} steps, seed {given.seed}"
    return Inputs(pipe, _generation(pipe, call, given.seed), words, "pipe")


def _pipeline(folder: Path, given: Given, device: str, dtype: torch.dtype) -> Inputs:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    call = {
        "prompt": given.prompt,
        "num_inference_steps": given.steps,
        "output_type": "latent",
        **dict(given.call or {}),
    }
    words = f"{given.prompt!r}, {given.steps} steps, seed {given.seed}"
    return Inputs(pipe, _generation(pipe, call, given.seed), words, "pipe")


def _generation(pipe: Any, call: dict[str, Any], seed: int) -> Callable[[], object]:
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(**call, generator=torch.Generator().manual_seed(seed))


def _language(folder: Path, given: Given, device: str, dtype: torch.dtype) -> Inputs:
    """Windows of texts in a row: of your files, else of Python's documents that no training of ours saw."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attn_plugins.pipelines.moa.calibration import Texts

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = Texts.of_files(tokenizer, list(given.text)) if given.text else Texts.of_python(tokenizer)
    ids = texts.test
    starts = [number * given.length for number in range(given.texts) if (number + 1) * given.length <= len(ids)]
    if not starts:
        raise ValueError(f"the text has {len(ids)} tokens to judge on: give more, or --length below {given.length}")
    windows = [torch.tensor([ids[start : start + given.length]], device=device) for start in starts]

    def run() -> None:
        for window in windows:
            model(input_ids=window, use_cache=False)

    return Inputs(model, run, f"{len(windows)} texts of {given.length:,} tokens", "model")


def _vision(folder: Path, name: str, given: Given, device: str, dtype: torch.dtype) -> Inputs:
    import transformers

    cls = getattr(transformers, name, None) or transformers.AutoModel
    model = cls.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().to(device)
    if not given.images:
        raise ValueError(f"{type(model).__name__} looks at pictures: give some, --images a.jpg --images b.jpg")
    config = getattr(model.config, "vision_config", None) or model.config
    side = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    pixels = torch.stack([_read(path, size, folder) for path in given.images]).to(device, dtype)

    def run() -> None:
        for part in pixels.split(BATCH):
            model(pixel_values=part)

    return Inputs(model, run, f"{len(pixels)} pictures of {size[0]} x {size[1]} px", "model")


def _read(path: Path, size: tuple[int, int], folder: Path) -> torch.Tensor:
    """(3, H, W): the middle of a picture at this size, normalised as the folder's preprocessor says, else by halves."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        fitted = ImageOps.fit(picture.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
    told = folder / "preprocessor_config.json"
    settings = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    mean, std = (
        torch.tensor(settings.get(key) or (0.5, 0.5, 0.5)).view(3, 1, 1) for key in ("image_mean", "image_std")
    )
    return (torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 255 - mean) / std
