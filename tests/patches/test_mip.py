"""MIP on pipelines of Stable Diffusion 1.5 and XL with every kind of IP-Adapter: its exact facts, from end to end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.ip_adapters import checkpoint, embeds, load, write
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NAMES = ["sd15", "sdxl"]
KINDS = ["base", "plus", "full"]
TWO = {"phrases": ["cat", "a big dog"]}
MASKS = [torch.cat([torch.ones(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)], dim=3)]
MASKS[0][:, 1] = 1 - MASKS[0][:, 0]


def pipeline(name: str, *kinds: str, scale: Any = 0.8) -> Any:
    pipe = build(name)
    load(pipe, *(checkpoint(pipe.unet, kind) for kind in kinds or ("base",)), scale=scale)
    return pipe


def latents(pipe: Any, name: str, *images: torch.Tensor, **more: Any) -> torch.Tensor:
    return run(name, pipe, ip_adapter_image_embeds=list(images), **more)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding over two steps: latents reach some hundreds."""
    assert (found - expected).abs().max() <= 4e-6 * expected.abs().max()


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-4 * other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_one_reference_is_the_stock_adapter(name: str, kind: str) -> None:
    pipe, image = pipeline(name, kind), embeds(1, kind=kind)
    stock = latents(pipe, name, image)
    attn_plugins.patch(pipe, "mip", phrases="cat")
    close(latents(pipe, name, image), stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_swapped_phrases_change_the_picture_where_stock_does_not(name: str, kind: str) -> None:
    pipe, images, turned = pipeline(name, kind), embeds(1, 2, kind=kind), embeds(2, 1, kind=kind)
    close(latents(pipe, name, turned), latents(pipe, name, images))
    with attn_plugins.patched(pipe, "mip", **TWO):
        found, swapped = latents(pipe, name, images), latents(pipe, name, turned)
    assert differs(found, swapped)
    with attn_plugins.patched(pipe, "mip", phrases=TWO["phrases"][::-1]):
        close(latents(pipe, name, turned), found)  # permuted together


@pytest.mark.parametrize("name", NAMES)
def test_one_name_for_all_is_the_mean_as_an_infinite_temperature_is(name: str) -> None:
    pipe, images = pipeline(name), embeds(1, 2)
    with attn_plugins.patched(pipe, "mip", phrases=["cat", "cat"]):
        same = latents(pipe, name, images)
    with attn_plugins.patched(pipe, "mip", temperature=math.inf, **TWO):
        close(latents(pipe, name, images), same)


@pytest.mark.parametrize("name", NAMES)
def test_masks_that_share_out_the_picture_are_stocks(name: str) -> None:
    pipe, images, masked = pipeline(name), embeds(1, 2), {"cross_attention_kwargs": {"ip_adapter_masks": MASKS}}
    stock = latents(pipe, name, images, **masked)
    attn_plugins.patch(pipe, "mip", **TWO)
    close(latents(pipe, name, images, **masked), stock)
    assert differs(latents(pipe, name, images), stock)


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_with_two_images_is_two_adapters_with_one_each(name: str) -> None:
    one, two = pipeline(name), pipeline(name, "base", "base", scale=[0.8, 0.8])
    for pipe in (one, two):
        attn_plugins.patch(pipe, "mip", **TWO)
    close(latents(two, name, embeds(1), embeds(2)), latents(one, name, embeds(1, 2)))


def test_adapters_of_different_kinds() -> None:
    """4 and 16 tokens: each reference has a softmax of its own."""
    pipe = pipeline("sdxl", "base", "plus", scale=[0.8, 0.0])
    images = embeds(1), embeds(2, kind="plus")
    attn_plugins.patch(pipe, "mip", **TWO)
    muted = latents(pipe, "sdxl", *images)
    pipe.set_ip_adapter_scale([0.8, 0.6])
    assert differs(latents(pipe, "sdxl", *images), muted)
    assert muted.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_several_photos_of_one_object(name: str) -> None:
    pipe = pipeline(name)
    with attn_plugins.patched(pipe, "mip", **TWO):
        expected = latents(pipe, name, embeds(1, 2))
    with attn_plugins.patched(pipe, "mip", photos=[2, 1], **TWO):
        close(latents(pipe, name, embeds(1, 1, 2)), expected)
        assert differs(latents(pipe, name, embeds(1, 3, 2)), expected)
        pipe.set_ip_adapter_scale([[0.8, 0.8, 0.8]])  # one a photo, or one a reference
        close(latents(pipe, name, embeds(1, 1, 2)), expected)
        pipe.set_ip_adapter_scale([[0.8, 0.8]])
        close(latents(pipe, name, embeds(1, 1, 2)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_scales(name: str) -> None:
    pipe, images = pipeline(name), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    full = latents(pipe, name, images)
    pipe.set_ip_adapter_scale([[0.8, 0.4]])
    uneven = latents(pipe, name, images)
    assert differs(uneven, full)
    pipe.set_ip_adapter_scale(0.0)
    nothing = latents(pipe, name, images)
    handle.remove()
    assert torch.equal(latents(pipe, name, images), nothing)
    pipe.set_ip_adapter_scale(0.8)
    attn_plugins.patch(pipe, "mip", scales=[1.0, 0.5], **TWO)
    close(latents(pipe, name, images), uneven)


def test_a_style_block_alone() -> None:
    """Scales by block: the layers whose scale is 0 merge nothing."""
    pipe, images = pipeline("sdxl"), embeds(1)
    pipe.set_ip_adapter_scale({"up": {"block_0": [1.0, 0.0]}})
    stock = latents(pipe, "sdxl", images)
    attn_plugins.patch(pipe, "mip", phrases="cat")
    close(latents(pipe, "sdxl", images), stock)


@pytest.mark.parametrize("name", NAMES)
def test_without_guidance_several_prompts_and_any_size(name: str) -> None:
    pipe, images = pipeline(name), embeds(1, 2, guided=False)
    attn_plugins.patch(pipe, "mip", **TWO)
    sizes = {"guidance_scale": 1.0, "height": 40, "width": 24}
    noise = torch.randn(3, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog and a cat", "hello"]
    batch = latents(pipe, name, images, prompt=prompts, latents=noise, **sizes)
    for index, prompt in enumerate(prompts):
        alone = latents(pipe, name, images, prompt=prompt, latents=noise[index : index + 1], **sizes)
        close(batch[index : index + 1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_background_column_weakens_the_references(name: str) -> None:
    pipe, images = pipeline(name), embeds(1, 2)
    with attn_plugins.patched(pipe, "mip", null_bias=30.0, **TWO):
        nobody = latents(pipe, name, images)
    with attn_plugins.patched(pipe, "mip", null_bias=-30.0, **TWO):
        everybody = latents(pipe, name, images)
    with attn_plugins.patched(pipe, "mip", **TWO):
        close(everybody, latents(pipe, name, images))
    pipe.set_ip_adapter_scale(0.0)
    close(nobody, latents(pipe, name, images))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_text_to_weight_is_read_from_the_checkpoint(name: str, suffix: str, tmp_path: Any) -> None:
    pipe, images = build(name), embeds(1, 2)
    path = write(checkpoint(pipe.unet, text_weights=True), tmp_path / f"mip{suffix}")
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    with attn_plugins.patched(pipe, "mip", **TWO):
        free = latents(pipe, name, images)
    with attn_plugins.patched(pipe, "mip", checkpoint=path, **TWO) as handle:
        trained = latents(pipe, name, images)
        widths = [layer.references.text_weight.numel() for layer in handle.patches[0].layers]
        handle.save(tmp_path / "recipe.yaml")
    assert differs(trained, free)
    assert widths == [m.inner_dim for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    attn_plugins.patch(pipe, tmp_path / "recipe.yaml")
    assert torch.equal(latents(pipe, name, images), trained)


def test_each_adapter_has_a_checkpoint_of_its_own(tmp_path: Any) -> None:
    pipe = pipeline("sd15", "base", "base", scale=[0.8, 0.8])
    images, found = [embeds(1), embeds(2)], {}
    paths = [
        write(checkpoint(pipe.unet, seed=seed, text_weights=True), tmp_path / f"{seed}.safetensors") for seed in (3, 4)
    ]
    for name, given in {
        "free": None, "one": paths[0], "both": [paths[0], paths[0]], "first": [paths[0], None], "two": paths,
    }.items():  # fmt: skip
        with attn_plugins.patched(pipe, "mip", checkpoint=given, **TWO) as handle:
            found[name] = latents(pipe, "sd15", *images)
            handle.save(tmp_path / "recipe.yaml")
    close(found["both"], found["one"])
    for one, other in (("first", "one"), ("first", "free"), ("two", "one"), ("two", "first")):
        assert differs(found[one], found[other]), (one, other)
    with attn_plugins.patched(pipe, tmp_path / "recipe.yaml"):
        assert torch.equal(latents(pipe, "sd15", *images), found["two"])
        load(pipe, checkpoint(pipe.unet))
        with pytest.raises(ValueError, match="checkpoint names 2 files, and there are 1 IP-Adapters"):
            latents(pipe, "sd15", embeds(1, 2))
    for given in ([paths[0]] * 3, [None, None]):
        with pytest.raises(ValueError, match="names 3 files, and there are 1|a list has a file for each adapter"):
            attn_plugins.patch(pipe, "mip", checkpoint=given, **TWO)


def test_dense_steps_and_small_grids_are_the_stock_adapters() -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    stock = latents(pipe, "sdxl", images)
    with attn_plugins.patched(pipe, "mip", dense_steps=1.0, **TWO):
        assert torch.equal(latents(pipe, "sdxl", images), stock)
    with attn_plugins.patched(pipe, "mip", min_tokens=65, **TWO), pytest.warns(UserWarning, match="min_tokens=65"):
        assert torch.equal(latents(pipe, "sdxl", images), stock)


def test_phrase_keys_are_made_once_a_layer_and_again_when_its_projection_changes() -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    calls = []
    layers = [pipe.unet.get_submodule(layer.name) for layer in handle.patches[0].layers]
    hooks = [
        one.to_k.register_forward_hook(lambda _, args, __: calls.append(1) if args[0].ndim == 4 else None)
        for one in layers
    ]
    first = latents(pipe, "sdxl", images, steps=3)
    assert len(calls) == len(layers)
    latents(pipe, "sdxl", images, steps=3)
    assert len(calls) == len(layers)
    with torch.no_grad():
        layers[0].to_k.weight.mul_(1.5)
    assert differs(latents(pipe, "sdxl", images, steps=3), first)
    assert len(calls) == len(layers) + 1
    for hook in hooks:
        hook.remove()


def test_measuring_changes_nothing() -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    plain = latents(pipe, "sdxl", images)
    with handle.measure() as measures:
        assert torch.equal(latents(pipe, "sdxl", images), plain)
    assert measures.table()


def test_half_precision() -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO)
    full = latents(pipe, "sdxl", images)
    pipe.to(dtype=torch.bfloat16)
    half = latents(pipe, "sdxl", images.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.1 * full.abs().max()
