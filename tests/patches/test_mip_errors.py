"""What goes wrong with reference images is said with its cause, when it is asked for or when the pipeline is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from tests.patches.test_mip import TWO, latents, pipeline
from tests.support.ip_adapters import checkpoint, embeds, write
from tests.support.tiny_models import MODELS
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")

OPTIONS = {
    "none": ({}, r"phrases=\(\): give a name for each reference image"),
    "empty": ({"phrases": ["cat", " "]}, r"phrases=\['cat', ' '\]: a phrase is empty"),
    "long": ({"phrases": ["cat", "word " * 80]}, "tokens, the text encoder takes 75: shorten it"),
    "photos": (
        {"phrases": ["cat", "dog"], "photos": [1]},
        r"photos=\(1,\): give the number of images of each of the 2",
    ),
    "scales": (
        {"phrases": ["cat", "dog"], "scales": [1, 2, 3]},
        r"scales=\(1, 2, 3\): give one number, or one for each",
    ),
    "temperature": ({"phrases": ["cat"], "temperature": 0}, "temperature=0: give a positive number"),
    "null": ({"phrases": ["cat"], "null_bias": "weak"}, "null_bias='weak': give a number, or None"),
    "backend": ({"phrases": ["cat"], "backend": "gpu"}, "backend='gpu': legal are"),
    "file": ({"phrases": ["cat"], "checkpoint": "nowhere.bin"}, "no checkpoint at nowhere.bin"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], message: str) -> None:
    pipe = pipeline("sd15")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attn_plugins.patch(pipe, "mip", **options)


def test_no_adapter() -> None:
    with pytest.raises(ValueError, match="has no IP-Adapter: call pipe.load_ip_adapter"):
        attn_plugins.patch(build("sd15"), "mip", **TWO)


def test_a_bare_unet_has_no_text_encoder() -> None:
    with pytest.raises(ValueError, match=r"phrases \['cat', 'a big dog'\] are encoded by .*: patch the pipeline"):
        attn_plugins.patch(pipeline("sd15").unet, "mip", **TWO)


@pytest.mark.parametrize("family", ["flux2", "wan", "pixart", "kandinsky3"])
def test_other_models(family: str) -> None:
    with pytest.raises(ValueError, match="'mip' merges the reference images of an IP-Adapter, which is not known for"):
        attn_plugins.patch(MODELS[family].build(), "mip", **TWO)


def test_images_that_are_missing() -> None:
    for name in ("sd15", "sdxl"):
        pipe = pipeline(name)
        attn_plugins.patch(pipe, "mip", **TWO)
        with pytest.raises(ValueError, match=r"the call has no reference images for \['cat', 'a big dog'\]"):
            run(name, pipe)


def test_images_that_are_not_as_many_as_the_phrases() -> None:
    pipe = pipeline("sdxl")
    with attn_plugins.patched(pipe, "mip", **TWO), pytest.raises(ValueError, match="name 2 reference images.*has 3"):
        latents(pipe, "sdxl", embeds(1, 2, 3))
    pipe = pipeline("sdxl", "base", "base", scale=[0.8, 0.8])
    with (
        attn_plugins.patched(pipe, "mip", photos=[2, 1], **TWO),
        pytest.raises(ValueError, match="one reference would have photos in two"),
    ):
        latents(pipe, "sdxl", embeds(1), embeds(2, 3))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("act", ["slicing", "fusion"])
def test_processors_that_were_replaced(act: str, before: bool) -> None:
    pipe = pipeline("sd15")
    if not before:
        attn_plugins.patch(pipe, "mip", **TWO)
    if act == "slicing":
        pipe.enable_attention_slicing(1)
    else:
        pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="processors were replaced by (Sliced|Fused)Attn.* knows no reference images"):
        if before:
            attn_plugins.patch(pipe, "mip", **TWO)
        latents(pipe, "sd15", embeds(1, 2))


def test_masks_that_do_not_fit() -> None:
    pipe = pipeline("sd15")
    attn_plugins.patch(pipe, "mip", **TWO)
    for masks, message in (
        ([torch.ones(1, 3, 32, 32)], r"has \(1, 3, 32, 32\) for an adapter with 2 references"),
        ([torch.ones(1, 2, 32, 32)] * 2, "has 2 entries for 1 IP-Adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            latents(pipe, "sd15", embeds(1, 2), cross_attention_kwargs={"ip_adapter_masks": masks})


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_checkpoints(suffix: str, tmp_path: Any) -> None:
    pipe = pipeline("sd15")
    state = checkpoint(pipe.unet, text_weights=True)

    def refused(name: str, changed: Any, message: str) -> None:
        path = write(changed, tmp_path / f"{name}{suffix}")
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match=message):
            attn_plugins.patch(pipe, "mip", checkpoint=path, **TWO)

    refused("plain", checkpoint(pipe.unet), "has no text_to_weight: it is a plain IP-Adapter. Leave checkpoint=")
    refused("cut", state, r"cannot be read: is it truncated, or not a checkpoint\?")
    few = {name: t for name, t in state["ip_adapter"].items() if not name.startswith("1.text")}
    refused("few", {**state, "ip_adapter": few}, "text_to_weight for 3 layers, this model has 4")
    wide = state["ip_adapter"] | {"3.text_to_weight.weight": torch.randn(1, 640)}
    refused("wide", {**state, "ip_adapter": wide}, "3.text_to_weight has 640 channels, the layer 16")


def test_strict_does_not_take_an_unloaded_adapter() -> None:
    from attn_plugins.runtime import Refused

    pipe = pipeline("sd15")
    attn_plugins.patch(pipe, "mip", strict=True, **TWO)
    pipe.unload_ip_adapter()
    with pytest.raises(Refused, match="the IP-Adapter was unloaded"):
        run("sd15", pipe)
