"""A tiny FLUX pipeline with IP-Adapters of random weights, loaded as a person does, and what its calls are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import built, randn
from tests.support.tiny_packed_image_models import _FLUX
from tests.support.tiny_pipelines import PIPELINES, build

EMBEDDING, TOKENS = 8, 4  # channels of an image's embedding; tokens that the projection makes of it
Checkpoint = dict[str, dict[str, torch.Tensor]]
PROMPT = "a cat and a big dog on a mat"


def pipeline(adapters: int = 1, scale: Any = 0.8, double_blocks: int = 2) -> Any:
    """With `adapters` loaded; guidance is embedded, as in FLUX.1 dev."""
    pipe = build("flux")
    pipe.transformer = built(
        "FluxTransformer2DModel", patch_size=1, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        guidance_embeds=True, **{**_FLUX, "num_layers": double_blocks},
    )  # fmt: skip
    if adapters:
        load(pipe, *(checkpoint(pipe.transformer) for _ in range(adapters)), scale=scale)
    return pipe


def checkpoint(transformer: Any, seed: int = 0) -> Checkpoint:
    """{"image_proj": ..., "ip_adapter": ...}: `load_ip_adapter` asks for this order."""
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    projection = {
        "proj.weight": randn(TOKENS * width, EMBEDDING, seed=seed), "proj.bias": randn(TOKENS * width, seed=seed + 1),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    adapter = {}
    for number in range(transformer.config.num_layers):
        for part, shift in (("k", 0), ("v", 50)):
            adapter[f"{number}.to_{part}_ip.weight"] = randn(inner, width, seed=seed + number + shift) * 0.5
            adapter[f"{number}.to_{part}_ip.bias"] = randn(inner, seed=seed + number + shift + 20) * 0.1
    return {"image_proj": projection, "ip_adapter": adapter}


def load(pipe: Any, *states: Checkpoint, scale: Any = 0.8) -> None:
    """By the pipeline's own `load_ip_adapter`, one adapter a state."""
    blank = [""] * len(states)
    pipe.load_ip_adapter(
        list(states), weight_name=blank, subfolder=blank, image_encoder_pretrained_model_name_or_path=None
    )
    pipe.set_ip_adapter_scale(scale)


def write(state: Checkpoint, path: Path) -> Path:
    """As the published .safetensors files name their tensors."""
    from safetensors.torch import save_file

    flat = {f"ip_adapter_proj_model.{name}": t.contiguous() for name, t in state["image_proj"].items()}
    for name, t in state["ip_adapter"].items():
        number, part, what = name.split(".")
        stream = f"ip_adapter_double_stream_{part[3]}_proj"
        flat[f"double_blocks.{number}.processor.{stream}.{what}"] = t.contiguous()
    save_file(flat, path)
    return path


def embeds(*seeds: int) -> torch.Tensor:
    """What `ip_adapter_image_embeds` takes of one adapter, (1, images, C): an image a seed."""
    return torch.stack([randn(EMBEDDING, seed=100 + seed) for seed in seeds])[None]


def latents(pipe: Any, *images: torch.Tensor, steps: int = 2, prompt: Any = PROMPT, **more: Any) -> torch.Tensor:
    """After `steps` steps, always from the same noise. Without negative images: one of zeros, an adapter."""
    call = {
        "num_inference_steps": steps,
        "output_type": "latent",
        **PIPELINES["flux"].call,
        "max_sequence_length": 32,
        **more,
    }
    if images:
        call["ip_adapter_image_embeds"] = list(images)
        call.setdefault("negative_ip_adapter_image_embeds", [torch.zeros(1, 1, EMBEDDING)] * len(images))
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **call)[0]
