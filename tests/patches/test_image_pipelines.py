"""Pipelines that begin in mid-schedule, with a ControlNet, with references, few steps, lists of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.tiny_controlnets import flux_controlnet
from tests.support.tiny_image_pipelines import from_sd15, sd15_controlnet
from tests.support.tiny_pipelines import PIPELINES, build, run

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
GNA: dict[str, Any] = {"stride": 1, "min_tokens": 0, "dense_steps": 0}
SIZE = {"height": 32, "width": 32}
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(1, 1, 32, 32).index_fill(3, torch.arange(16), 1.0)
BEGUN = {"image": PICTURE, "strength": 0.5}


def other(name: str, kind: str, **more: Any) -> Any:
    """The pipeline of class `kind` over the parts of another."""
    import diffusers

    pipe = getattr(diffusers, kind)(**build(name).components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# (build, what it is called with)
MID_SCHEDULE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd15 img2img": (lambda: from_sd15("StableDiffusionImg2ImgPipeline"), BEGUN),
    "sd15 inpaint": (lambda: from_sd15("StableDiffusionInpaintPipeline"), {**BEGUN, **SIZE, "mask_image": MASK}),
    "sdxl img2img": (lambda: other("sdxl", "StableDiffusionXLImg2ImgPipeline"), BEGUN),
    "sd3 img2img": (
        lambda: other("sd3", "StableDiffusion3Img2ImgPipeline"),
        {**BEGUN, **SIZE, "max_sequence_length": 16},
    ),
    "flux img2img": (lambda: other("flux", "FluxImg2ImgPipeline"), {**BEGUN, **SIZE, "max_sequence_length": 16}),
    "qwen img2img": (lambda: other("qwen_image", "QwenImageImg2ImgPipeline"), {**BEGUN, **SIZE}),
    "z img2img": (lambda: other("z_image", "ZImageImg2ImgPipeline"), {**BEGUN, **SIZE, "max_sequence_length": 48}),
}
WHOLE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd15 controlnet": (sd15_controlnet, {**SIZE, "image": PICTURE}),
    "flux controlnet": (
        lambda: other("flux", "FluxControlNetPipeline", controlnet=flux_controlnet()),
        {**SIZE, "control_image": PICTURE, "max_sequence_length": 16},
    ),
    "flux kontext": (
        lambda: other("flux", "FluxKontextPipeline"),
        {**SIZE, "image": PICTURE, "max_sequence_length": 16, "max_area": 1024, "_auto_resize": False},
    ),
}


def call(pipe: Any, given: dict[str, Any], steps: int = 4, prompt: Any = "a cat") -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    return pipe(prompt=prompt, generator=seed, num_inference_steps=steps, output_type="latent", **given)[0]


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def positions(handle: attn_plugins.PatchHandle) -> list[tuple[int, int | None]]:
    """What the clock says from now on."""
    clock = handle.patches[0].state.clock
    seen: list[tuple[int, int | None]] = []
    position = clock.position

    def spying(*args: Any) -> tuple[int, int | None]:
        seen.append(position(*args))
        return seen[-1]

    clock.position = spying
    return seen


@pytest.mark.parametrize("name", [*MID_SCHEDULE, *WHOLE])
def test_a_full_window_is_the_dense_pipeline(name: str) -> None:
    make, given = {**MID_SCHEDULE, **WHOLE}[name]
    pipe = make()
    dense = call(pipe, given)
    handle = attn_plugins.patch(pipe, "gna", window=-1, **GNA)
    assert handle.roots == [denoiser(pipe)]  # a ControlNet beside it stays as it is
    torch.testing.assert_close(call(pipe, given), dense, atol=2e-5, rtol=1e-4)
    attn_plugins.unpatch(pipe)
    attn_plugins.patch(pipe, "gna", window=2, **GNA)
    assert not torch.allclose(call(pipe, given), dense, atol=1e-4)
    attn_plugins.unpatch(pipe)
    assert torch.equal(call(pipe, given), dense)


@pytest.mark.parametrize("name", MID_SCHEDULE)
def test_half_of_the_way_is_behind_when_it_begins(name: str) -> None:
    """strength=0.5 of four steps: the first two, which are to stay dense, never run."""
    make, given = MID_SCHEDULE[name]
    pipe = make()
    with attn_plugins.patched(pipe, "gna", window=2, **GNA):
        sparse = call(pipe, given)
    handle = attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5})
    seen = positions(handle)
    assert torch.equal(call(pipe, given), sparse)
    assert sorted(set(seen)) == [(2, 4), (3, 4)]


def test_the_reference_of_kontext_is_beside_the_grid() -> None:
    make, given = WHOLE["flux kontext"]
    pipe = make()
    handle = attn_plugins.patch(pipe, "gna", window=2, **GNA)
    call(pipe, given)
    sequence = handle.patches[0].state.last_sequence
    assert (sequence.grid, sequence.text_before, sequence.text_after) == ((8, 8), 16, 64)


@pytest.mark.parametrize("name", ["sd15 controlnet", "flux controlnet"])
def test_a_controlnet_given_by_itself(name: str) -> None:
    make, given = WHOLE[name]
    pipe = make()
    with torch.no_grad():  # as it is made, it adds nothing
        dense = call(pipe, given)
    handle = attn_plugins.patch([pipe, pipe.controlnet], "gna", window=-1, **GNA)
    assert handle.roots == [denoiser(pipe), pipe.controlnet]
    torch.testing.assert_close(call(pipe, given), dense, atol=2e-5, rtol=1e-4)
    attn_plugins.unpatch(pipe)
    attn_plugins.unpatch(pipe.controlnet)
    attn_plugins.patch(pipe.controlnet, "gna", window=2, **GNA)
    assert not torch.equal(call(pipe, given), dense)


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_of_a_consistency_model(steps: int) -> None:
    from diffusers import LCMScheduler

    pipe = build("sd15")
    pipe.scheduler = LCMScheduler()
    dense = run("sd15", pipe, steps=steps)
    handle = attn_plugins.patch(pipe, "gna", window=2, **{**GNA, "dense_steps": 0.5})
    seen = positions(handle)
    out = run("sd15", pipe, steps=steps)
    assert [step for step, _ in dict.fromkeys(seen)] == list(range(steps))
    assert not torch.equal(out, dense)  # of one step, no half is dense


@pytest.mark.parametrize("name", ["z_image", "qwen_image", "sd3", "pixart"])
def test_lists_of_prompts_of_different_lengths(name: str) -> None:
    """With guidance, in one call or two; each picture as it comes out alone."""
    prompts = ["a", "an astronaut riding a horse"]
    pipe = build(name)
    if name == "pixart":  # a solver of the second order makes much of little
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler(clip_sample=False)

    def batch(**more: Any) -> torch.Tensor:
        if name in ("z_image", "qwen_image"):
            more["negative_prompt"] = ["bad", "bad"]
        return run(name, pipe, prompt=list(prompts), **more)  # new lists: Z-Image writes into them

    noise = torch.randn(2, *batch().shape[1:], generator=torch.Generator().manual_seed(3))
    dense = batch(latents=noise)
    with attn_plugins.patched(pipe, "gna", window=-1, **GNA):
        torch.testing.assert_close(batch(latents=noise), dense, atol=2e-5, rtol=1e-4)
    with attn_plugins.patched(pipe, "gna", window=2, **GNA):
        both = batch(latents=noise)
        assert not torch.allclose(both, dense, atol=1e-4)
        for index, prompt in enumerate(prompts):
            negative = {"negative_prompt": "bad"} if name == "qwen_image" else {}
            alone = run(name, pipe, prompt=prompt, latents=noise[index : index + 1], **negative)
            torch.testing.assert_close(both[index : index + 1], alone, atol=2e-5, rtol=1e-4)


def test_two_pictures_of_a_prompt_and_another_size() -> None:
    pipe = build("z_image")
    handle = attn_plugins.patch(pipe, "gna", window=2, **GNA)
    assert run("z_image", pipe, num_images_per_prompt=2).shape[0] == 2
    assert handle.patches[0].state.last_sequence.grid == PIPELINES["z_image"].grid
    run("z_image", pipe, height=40, width=24)
    assert handle.patches[0].state.last_sequence.grid == (10, 6)
