"""Agents and pooled keys beside a ControlNet, an image prompt, a LoRA, and in a run that begins in mid-schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attn_plugins
from tests.beside import test_ip_adapter, test_lora
from tests.support.beside import traces
from tests.support.tiny_controlnets import flux_controlnet
from tests.support.tiny_image_pipelines import from_sd15, sd15_controlnet
from tests.support.tiny_pipelines import build

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
SIZE = {"height": 32, "width": 32}
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SETTINGS: dict[str, dict[str, Any]] = {"agent": {"ratio": 0.2}, "kv_pool": {"factor": 2}}


def flux_with_controlnet() -> Any:
    from diffusers import FluxControlNetPipeline

    pipe = FluxControlNetPipeline(**build("flux").components, controlnet=flux_controlnet())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **given: Any) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    return pipe(prompt="a cat", generator=seed, num_inference_steps=2, output_type="latent", **given)[0]


def lora(pipe: Any) -> None:
    test_lora.add(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)


def nothing(pipe: Any) -> None:
    pass


# (build, run, what is done beside)
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], Callable[[Any], None]]] = {
    "sd15 controlnet": (sd15_controlnet, functools.partial(latents, **SIZE, image=PICTURE), nothing),
    "flux controlnet": (
        flux_with_controlnet,
        functools.partial(latents, **SIZE, control_image=PICTURE, max_sequence_length=16),
        nothing,
    ),
    "sd15 img2img": (
        lambda: from_sd15("StableDiffusionImg2ImgPipeline"),
        functools.partial(latents, image=PICTURE, strength=0.5),
        nothing,
    ),
    "sdxl ip-adapter": (
        lambda: build("sdxl"),
        functools.partial(test_ip_adapter.latents, "sdxl"),
        test_ip_adapter.load,
    ),
    "flux ip-adapter": (
        lambda: build("flux"),
        functools.partial(test_ip_adapter.latents, "flux"),
        test_ip_adapter.load,
    ),
    "sd15 lora": (lambda: build("sd15"), functools.partial(latents, **SIZE), lora),
    "flux lora": (lambda: build("flux"), functools.partial(latents, **SIZE, max_sequence_length=16), lora),
}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_before_and_after_it_is_the_same_and_goes_without_a_trace(name: str, method: str) -> None:
    make, run, act = CASES[name]
    plain = make()
    act(plain)
    dense = run(plain)
    found = []
    for patched_first in (True, False):
        pipe = make()
        if not patched_first:
            act(pipe)
        handle = attn_plugins.patch(pipe, method, **SETTINGS[method], min_tokens=0, dense_steps=0, strict=True)
        if patched_first:
            act(pipe)
        found.append(run(pipe))
        handle.remove()
        assert torch.equal(run(pipe), dense)
        assert not [line for root in handle.roots for line in traces(root)]
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all() and not torch.allclose(found[0], dense, atol=1e-4)
