"""IP-Adapter: loaded by the pipeline, which replaces processors, before a patch and after it, and unloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.beside import SMALL, check_beside
from tests.support.tiny import randn
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
TOKENS, EMBEDDING = 4, 8


def checkpoint(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What an IP-Adapter's file holds, with random weights."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    if hasattr(pipe, "unet"):
        crosses = [module for name, module in model.named_modules() if name.endswith("attn2")]
        width = model.config.cross_attention_dim
        sizes, first, step = [module.inner_dim for module in crosses], 1, 2
    else:
        width = model.config.joint_attention_dim
        sizes, first, step = [model.inner_dim] * len(model.transformer_blocks), 0, 1
    adapter = {}
    for number, size in enumerate(sizes):
        key = first + step * number
        adapter |= {f"{key}.to_{part}_ip.weight": randn(size, width, seed=key) for part in "kv"}
        if step == 1:
            adapter |= {f"{key}.to_{part}_ip.bias": randn(size, seed=key) for part in "kv"}
    projection = {
        "proj.weight": randn(TOKENS * width, EMBEDDING), "proj.bias": randn(TOKENS * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": adapter}


def load(pipe: Any) -> None:
    path = {"image_encoder_pretrained_model_name_or_path": None} if hasattr(pipe, "transformer") else {}
    folder = {"image_encoder_folder": None, "subfolder": ""} if hasattr(pipe, "unet") else {}
    pipe.load_ip_adapter(checkpoint(pipe), weight_name="", **path, **folder)
    pipe.set_ip_adapter_scale(0.8)


def latents(name: str, pipe: Any) -> torch.Tensor:
    model = getattr(pipe, "unet", None) or pipe.transformer
    if getattr(model, "encoder_hid_proj", None) is None:
        return run(name, pipe)
    if name == "flux":
        both = {"ip_adapter_image_embeds": [randn(1, 1, EMBEDDING)]}
        return run(name, pipe, **both, negative_ip_adapter_image_embeds=[randn(1, 1, EMBEDDING, seed=2)])
    return run(name, pipe, ip_adapter_image_embeds=[randn(2, 1, EMBEDDING)])  # without and with the prompt


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_an_image_prompt(name: str) -> None:
    check_beside(
        lambda: build(name), lambda pipe: latents(name, pipe), load, lambda pipe: pipe.unload_ip_adapter(), changes=True
    )


def test_strict_does_not_mind_the_image_prompts_own_call() -> None:
    """FLUX attends to the image prompt inside its joint attention: that call is the adapter's, not the method's."""
    pipe = build("flux")
    load(pipe)
    attn_plugins.patch(pipe, "gna", strict=True, **SMALL)
    assert torch.isfinite(latents("flux", pipe)).all()
