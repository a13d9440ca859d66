"""IP-Adapters with random weights for tiny UNets, in the layout of the published files; loaded as a person does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import randn

EMBEDDING, PATCHES = 8, 5  # channels of an image's embedding; tokens of it that plus and full adapters read
TOKENS = {"base": 4, "plus": 16, "full": PATCHES}
Checkpoint = dict[str, dict[str, torch.Tensor]]


def checkpoint(unet: Any, kind: str = "base", seed: int = 0, text_weights: bool = False) -> Checkpoint:
    """{"image_proj": ..., "ip_adapter": ...}; with `text_weights` a MIP checkpoint."""
    width = unet.config.cross_attention_dim
    crosses = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    adapter = {}
    for number, module in enumerate(crosses):
        key = 1 + 2 * number
        for part, shift in (("k", 0), ("v", 50)):
            adapter[f"{key}.to_{part}_ip.weight"] = randn(module.inner_dim, width, seed=seed + key + shift) * 0.3
        if text_weights:
            adapter[f"{key}.text_to_weight.weight"] = randn(1, module.inner_dim, seed=seed + key + 90)
    return {"image_proj": {"base": _base, "plus": _plus, "full": _full}[kind](width, seed), "ip_adapter": adapter}


def _base(width: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": randn(4 * width, EMBEDDING, seed=seed), "proj.bias": randn(4 * width, seed=seed + 1),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip


def _full(width: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "proj.0.weight": randn(EMBEDDING, EMBEDDING, seed=seed), "proj.0.bias": torch.zeros(EMBEDDING),
        "proj.2.weight": randn(width, EMBEDDING, seed=seed + 1), "proj.2.bias": torch.zeros(width),
        "proj.3.weight": torch.ones(width), "proj.3.bias": torch.zeros(width),
    }  # fmt: skip


def _plus(width: int, seed: int, hidden: int = 64) -> dict[str, torch.Tensor]:
    state = {
        "latents": randn(1, 16, hidden, seed=seed), "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width), "proj_in.weight": randn(hidden, EMBEDDING, seed=seed + 1),
        "proj_in.bias": torch.zeros(hidden), "proj_out.weight": randn(width, hidden, seed=seed + 2),
        "proj_out.bias": torch.zeros(width),
    }  # fmt: skip
    for layer in range(4):
        at, ff = f"layers.{layer}.0", f"layers.{layer}.1"
        for norm in (f"{at}.norm1", f"{at}.norm2", f"{ff}.0"):
            state |= {f"{norm}.weight": torch.ones(hidden), f"{norm}.bias": torch.zeros(hidden)}
        sizes = {
            f"{at}.to_q": (64, hidden), f"{at}.to_kv": (128, hidden), f"{at}.to_out": (hidden, 64),
            f"{ff}.1": (4 * hidden, hidden), f"{ff}.3": (hidden, 4 * hidden),
        }  # fmt: skip
        state |= {f"{name}.weight": randn(*shape, seed=seed + layer) * 0.1 for name, shape in sizes.items()}
    return state


def load(pipe: Any, *states: Checkpoint, scale: Any = 0.8) -> None:
    """By the pipeline's own `load_ip_adapter`, one adapter a state."""
    blank = [""] * len(states)
    pipe.load_ip_adapter(list(states), subfolder=blank, weight_name=blank, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)


def write(state: Checkpoint, path: Path) -> Path:
    """As .bin, or as .safetensors with the parts as prefixes."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        flat = {f"{part}.{name}": t.contiguous() for part, tensors in state.items() for name, t in tensors.items()}
        save_file(flat, path)
    else:
        torch.save(state, path)
    return path


def embeds(*seeds: int, kind: str = "base", guided: bool = True) -> torch.Tensor:
    """What `ip_adapter_image_embeds` takes of one adapter: an image a seed; guided, zeros stand for no image."""
    shape = (EMBEDDING,) if kind == "base" else (PATCHES, EMBEDDING)
    found = torch.stack([randn(*shape, seed=100 + seed) for seed in seeds])[None]
    return torch.cat([torch.zeros_like(found), found]) if guided else found


def image_encoder() -> Any:
    """A tiny CLIP vision model of 30 x 30 px."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=EMBEDDING, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=30,
        patch_size=15, projection_dim=EMBEDDING,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()
