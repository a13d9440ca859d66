"""Regions on pipelines of every family that takes them: their exact facts, from end to end."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.methods.regions import RegionMaps
from attn_plugins.metrics import confusion_score
from tests.support.ip_adapters import checkpoint, embeds, load
from tests.support.regions import definition, unconditional
from tests.support.tiny_pipelines import build, run
from tests.support.tolerance import within
from tests.support.windowed import Recording

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NAMES = ["sd15", "sdxl", "flux", "sd3", "wan"]
LEFT, RIGHT, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
SOFT = torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
TWO = [(LEFT, "a dog"), (SOFT, "a horse", 0.7)]
MASKED = {"mode": "masked", "self_attention": "masked"}


@functools.cache
def pipeline(name: str) -> Any:
    """Shared by the tests: each takes its patch out, which is exact."""
    return build(name)


def options(name: str, **more: Any) -> dict[str, Any]:
    """With prompts as long as those that the tiny pipelines are called with."""
    return {**({} if name in ("sd15", "sdxl") else {"max_sequence_length": 16}), **more}


def patched(name: str, regions: list[Any] = TWO, **more: Any) -> Any:
    return attn_plugins.patched(pipeline(name), "regions", regions=regions, **options(name, **more))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 4e-6 * expected.abs().max())


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-4 * other.abs().max())


@pytest.mark.parametrize("more", [{}, MASKED], ids=["couple", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_one_region_that_is_all_with_the_prompt_itself_is_the_plain_pipeline(name: str, more: dict[str, Any]) -> None:
    pipe = pipeline(name)
    plain = run(name, pipe)
    with patched(name, [(ALL, "a cat")], **more):
        assert close(run(name, pipe), plain)
    assert torch.equal(run(name, pipe), plain)


@pytest.mark.parametrize("more", [{"base": 0.2}, MASKED], ids=["couple", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_the_rule(name: str, more: dict[str, Any]) -> None:
    """Every call that a pipeline makes under guidance, in float64, the unconditional half too."""
    pipe, guided = pipeline(name), 0
    with patched(name, **more) as handle:
        rows = [(layer, Recording(layer.processor)) for patch in handle.patches for layer in patch.layers]
        for layer, recording in rows:
            layer.processor = recording
        run(name, pipe, steps=1)
    assert {layer.kind for layer, recording in rows if recording.calls} == {layer.kind for layer, _ in rows}
    for _, recording in rows:
        ours = recording.inner
        for call, out in recording.calls:
            exact, theirs = (definition(call, ours.config, ours.layout, d) for d in (torch.float64, torch.float32))
            first, last = call.parts.rows
            assert within(out[first:last], theirs, exact)
            if first:
                guided += 1
                exact, theirs = (unconditional(call, slice(0, first), d) for d in (torch.float64, torch.float32))
                assert within(out[:first], theirs, exact)
    assert (guided > 0) == (name in ("sd15", "sdxl", "sd3"))  # the others guide in calls of their own, or not


@pytest.mark.parametrize("name", NAMES)
def test_the_order_says_nothing_and_who_is_where_does(name: str) -> None:
    pipe = pipeline(name)
    plain = run(name, pipe)
    found = []
    for regions in ([(LEFT, "a dog"), (RIGHT, "a horse")], [(RIGHT, "a horse"), (LEFT, "a dog")],
                    [(RIGHT, "a dog"), (LEFT, "a horse")]):  # fmt: skip
        with patched(name, regions, **MASKED):
            found.append(run(name, pipe))
    assert close(found[1], found[0]) and differs(found[2], found[0]) and differs(found[0], plain)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_unconditional_call_of_guidance_is_left_alone(name: str) -> None:
    """These make a call for each half: the negative one stays dense, to the bit."""
    pipe, seen = pipeline(name), {"plain": [], "regions": []}
    call = {"flux": {"true_cfg_scale": 3.0, "negative_prompt": "bad"}, "wan": {"guidance_scale": 3.0}}[name]
    for kind in seen:
        note = pipe.transformer.register_forward_hook(lambda _, a, k, out, kind=kind: seen[kind].append(out[0]),
                                                      with_kwargs=True)  # fmt: skip
        if kind == "plain":
            run(name, pipe, steps=1, **call)
        else:
            with patched(name):
                run(name, pipe, steps=1, **call)
        note.remove()
    same = [torch.equal(one, other) for one, other in zip(seen["plain"], seen["regions"], strict=True)]
    assert same == [False, True]


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_several_prompts_are_each_alone(name: str) -> None:
    pipe = pipeline(name)
    with patched(name):
        noise = torch.randn(2, *run(name, pipe, steps=1).shape[1:], generator=torch.Generator().manual_seed(3))
        prompts = ["a cat", "hello world"]
        both = run(name, pipe, prompt=prompts, latents=noise)
        for index, prompt in enumerate(prompts):
            assert close(run(name, pipe, prompt=prompt, latents=noise[index : index + 1])[0], both[index])


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_stay_dense_and_any_size(name: str) -> None:
    pipe = pipeline(name)
    size = {"height": 64, "width": 48} if name != "sd3" else {"height": 24, "width": 40}
    plain = run(name, pipe, steps=2, **size)
    with patched(name, dense_steps=1.0):
        assert torch.equal(run(name, pipe, steps=2, **size), plain)
    with patched(name, dense_steps=(0, 0.5)):  # regions in the first half alone
        half = run(name, pipe, steps=2, **size)
    with patched(name):
        whole = run(name, pipe, steps=2, **size)
    assert differs(half, plain) and not torch.equal(whole, half)  # the last step says little


def test_without_guidance_all_items_are_for_the_regions() -> None:
    pipe = pipeline("sd15")
    with patched("sd15", [(ALL, "a dog")]) as handle:
        found = run("sd15", pipe, prompt="a cat", guidance_scale=1.0)
        assert handle.patches[0].state.moment.parts.rows == (0, 1)
    assert close(found, run("sd15", pipe, prompt="a dog", guidance_scale=1.0))


@pytest.mark.parametrize("guidance", ["none", "batched"])
def test_guidance_by_hand_on_a_bare_model(guidance: str) -> None:
    """With embeddings, for there is no text encoder."""
    unet, rows = pipeline("sd15").unet, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    noise, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), rows.flip(0)
    with torch.no_grad():
        plain = unet(noise, torch.tensor(9), text).sample
        expected = unet(noise, torch.tensor(9), rows[1].expand(2, -1, -1)).sample
        with attn_plugins.patched(unet, "regions", regions=[(ALL, rows[1])], guidance=guidance):
            found = unet(noise, torch.tensor(9), encoder_hidden_states=text).sample
    assert torch.equal(found[0], plain[0]) if guidance == "batched" else close(found[0], expected[0])
    assert close(found[1], expected[1])


def test_a_mask_for_each_frame_moves_with_the_frames() -> None:
    pipe = pipeline("wan")
    moving = torch.zeros(9, 6, 8)
    for frame in range(9):
        moving[frame, :, min(frame, 4) : min(frame, 4) + 4] = 1
    with patched("wan", [(moving, "a dog")]) as handle:
        found = run("wan", pipe)
        layout = handle.patches[0].layers[0].processor.layout
    ids = layout.ids((3, 3, 4))
    assert ids.view(3, 3, 4)[:, 0].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    with patched("wan", [(moving[0], "a dog")]):
        assert differs(run("wan", pipe), found)


def test_an_image_prompt_beside_is_seen_by_all() -> None:
    pipe = build("sd15")
    load(pipe, checkpoint(pipe.unet), scale=0.8)
    stock = run("sd15", pipe, ip_adapter_image_embeds=[embeds(1)])
    with attn_plugins.patched(pipe, "regions", regions=[(ALL, "a cat")], **MASKED):
        assert close(run("sd15", pipe, ip_adapter_image_embeds=[embeds(1)]), stock)
        assert differs(run("sd15", pipe, ip_adapter_image_embeds=[embeds(2)]), stock)
    assert torch.equal(run("sd15", pipe, ip_adapter_image_embeds=[embeds(1)]), stock)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan"])
def test_maps_say_which_prompt_a_token_would_attend_to(name: str) -> None:
    pipe = pipeline(name)
    regions = [(LEFT, "a dog"), (RIGHT, "a horse")]
    with patched(name, regions) as handle:
        plain = run(name, pipe)
        with RegionMaps(handle) as maps:
            assert torch.equal(run(name, pipe), plain)
            with pytest.raises(ValueError, match="are being collected already"):
                RegionMaps(handle).__enter__()
        assert all(layer.watch is None for layer in handle.patches[0].layers)
    found = maps.mean()
    grid = next(iter(maps.sums))
    assert found.shape == (1, 2, *grid) and found.dtype == torch.float32
    assert found.min() > 0 and found.sum(1).max() < 1  # the rest is the pipeline's own prompt's
    masks = torch.zeros(2, *grid)
    masks[0, ..., : grid[-1] // 2] = masks[1, ..., grid[-1] // 2 :] = 1
    assert 0 < confusion_score(found, masks) < 1
    larger = maps.mean((2 * grid[0], *grid[1:])) if len(grid) == 3 else maps.mean((32, 40))
    torch.testing.assert_close(larger.mean((2, 3)).flatten(), found.mean((2, 3)).flatten(), atol=0.05, rtol=0)
    if name in ("sdxl", "wan"):  # one prompt twice: the same share. In joint attention each becomes its region's own
        with patched(name, [(LEFT, "a dog"), (RIGHT, "a dog")]) as handle, RegionMaps(handle) as alike:
            run(name, pipe)
        torch.testing.assert_close(alike.mean()[:, 0], alike.mean()[:, 1])
