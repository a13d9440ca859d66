"""MIP on FLUX with its IP-Adapter: diffusers' own facts first, then the method's exact facts, from end to end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.flux_adapters import TOKENS, embeds, latents, pipeline
from tests.support.tiny import randn

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
TWO = {"phrases": ["cat", "big dog"]}
GUIDED = {"negative_prompt": "bad quality", "true_cfg_scale": 2.0}
HALVES = torch.cat([torch.ones(1, 2, 32, 20), torch.zeros(1, 2, 32, 20)], dim=3)
HALVES[:, 1] = 1 - HALVES[:, 0]


@pytest.fixture(scope="module")
def flux() -> Any:
    """One adapter; tests take back what they do."""
    return pipeline()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding over two steps."""
    assert (found - expected).abs().max() <= 4e-6 * expected.abs().max()


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3 * other.abs().max())


def masked(*masks: torch.Tensor) -> dict[str, Any]:
    return {"joint_attention_kwargs": {"ip_adapter_masks": list(masks)}}


def test_what_stock_does_with_two_images(flux: Any) -> None:
    """An image is 4 tokens; two of one adapter are 8 under one softmax, whatever their order; masks are not looked at.
    Scales are one an adapter in each double block, and the single blocks have none."""
    images = embeds(1, 2)
    projected = flux.transformer.encoder_hid_proj([images])
    assert projected[0].shape == (1, 2, TOKENS, 32)
    attn = flux.transformer.transformer_blocks[0].attn
    x, text = randn(1, 6, 32), randn(1, 5, 32, seed=1)
    apart = attn(x, text, ip_hidden_states=projected)[2]
    together = attn(x, text, ip_hidden_states=[projected[0].flatten(1, 2)[:, None]])[2]
    assert torch.equal(apart, together) and apart.abs().max() > 0
    close(attn(x, text, ip_hidden_states=[projected[0].flip(1)])[2], apart)
    assert torch.equal(attn(x, text, ip_hidden_states=projected, ip_adapter_masks=[HALVES])[2], apart)
    assert attn.processor.scale == [0.8]
    assert not hasattr(flux.transformer.single_transformer_blocks[0].attn.processor, "scale")


@pytest.mark.parametrize("more", [{}, GUIDED], ids=["embedded", "true"])
def test_one_reference_is_the_stock_adapter(flux: Any, more: dict[str, Any]) -> None:
    stock = latents(flux, embeds(1), **more)
    with attn_plugins.patched(flux, "mip", phrases="cat"):
        close(latents(flux, embeds(1), **more), stock)


def test_swapped_phrases_change_the_picture_where_stock_does_not(flux: Any) -> None:
    close(latents(flux, embeds(2, 1)), latents(flux, embeds(1, 2)))
    with attn_plugins.patched(flux, "mip", **TWO):
        found, swapped = latents(flux, embeds(1, 2)), latents(flux, embeds(2, 1))
    assert differs(found, swapped)
    with attn_plugins.patched(flux, "mip", phrases=TWO["phrases"][::-1]):
        close(latents(flux, embeds(2, 1)), found)  # permuted together


def test_one_name_for_all_is_the_mean_as_an_infinite_temperature_is(flux: Any) -> None:
    with attn_plugins.patched(flux, "mip", phrases=["cat", "cat"]):
        same = latents(flux, embeds(1, 2))
        close(latents(flux, embeds(2, 1)), same)
    with attn_plugins.patched(flux, "mip", temperature=math.inf, **TWO):
        close(latents(flux, embeds(1, 2)), same)


@pytest.mark.parametrize("more", [{}, GUIDED], ids=["embedded", "true"])
def test_one_adapter_with_two_images_is_two_adapters_with_one_each(flux: Any, more: dict[str, Any]) -> None:
    """Under true guidance, too, where each adapter has one black image."""
    two = pipeline(2, scale=[0.8, 0.8])
    for pipe in (flux, two):
        attn_plugins.patch(pipe, "mip", **TWO)
    close(latents(two, embeds(1), embeds(2), **more), latents(flux, embeds(1, 2), **more))
    attn_plugins.unpatch(flux)


def test_what_guides_does_not_depend_on_the_names(flux: Any) -> None:
    """The one image of no picture stands for each reference, and two of it are the same."""
    nothing = {"negative_ip_adapter_image_embeds": [embeds(7, 7)]}
    once = {"negative_ip_adapter_image_embeds": [embeds(7)]}
    with attn_plugins.patched(flux, "mip", scales=[1.0, 0.5], **TWO):
        close(latents(flux, embeds(1, 2), **GUIDED, **nothing), latents(flux, embeds(1, 2), **GUIDED, **once))
    seen = []
    for names in (["cat", "big dog"], ["mat", "cat"]):
        with attn_plugins.patched(flux, "mip", **{"phrases": names}):
            hook = flux.transformer.register_forward_hook(lambda *a: seen.append(a[-1][0]))
            latents(flux, embeds(1, 2), **GUIDED, **once, steps=1)
            hook.remove()
    assert torch.equal(seen[1], seen[3]) and differs(seen[0], seen[2])


def test_masks(flux: Any) -> None:
    images = embeds(1, 2)
    with attn_plugins.patched(flux, "mip", phrases="cat"):
        first = latents(flux, embeds(1))
    with attn_plugins.patched(flux, "mip", **TWO):
        free = latents(flux, images)
        close(latents(flux, images, **masked(torch.ones(1, 2, 32, 40))), free)
        only = torch.stack([torch.ones(32, 40), torch.zeros(32, 40)])[None]
        close(latents(flux, images, **masked(only)), first)
        assert differs(latents(flux, images, **masked(HALVES)), free)
        close(latents(flux, embeds(2, 1), **masked(HALVES.flip(1)), steps=1),
              latents(flux, images, **masked(HALVES), steps=1))  # fmt: skip
        with pytest.raises(ValueError, match=r"has \(1, 3, 32, 40\) for an adapter with 2 references"):
            latents(flux, images, **masked(torch.ones(1, 3, 32, 40)))


def test_several_photos_of_one_object(flux: Any) -> None:
    with attn_plugins.patched(flux, "mip", **TWO):
        expected = latents(flux, embeds(1, 2), **GUIDED)
    with attn_plugins.patched(flux, "mip", photos=[2, 1], **TWO):
        close(latents(flux, embeds(1, 1, 2), **GUIDED), expected)
        assert differs(latents(flux, embeds(1, 3, 2), **GUIDED), expected)


def test_scales(flux: Any) -> None:
    images = embeds(1, 2)
    try:
        with attn_plugins.patched(flux, "mip", **TWO):
            full = latents(flux, images)
            flux.set_ip_adapter_scale([0.8, 0.0])  # by double block
            first = latents(flux, images)
            flux.set_ip_adapter_scale(0.0)
            nothing = latents(flux, images)
        assert differs(first, full) and differs(first, nothing)
        assert torch.equal(latents(flux, images), nothing)
        flux.set_ip_adapter_scale(0.8)
        with attn_plugins.patched(flux, "mip", scales=[1.0, 0.5], **TWO):
            assert differs(latents(flux, images), full)
        with attn_plugins.patched(flux, "mip", scales=0.5, **TWO):
            half = latents(flux, images)
        flux.set_ip_adapter_scale(0.4)
        with attn_plugins.patched(flux, "mip", **TWO):
            close(latents(flux, images), half)
        with attn_plugins.patched(flux, "mip", null_bias=40.0, **TWO):
            close(latents(flux, images), nothing)
    finally:
        flux.set_ip_adapter_scale(0.8)


def test_several_prompts_pictures_and_any_size(flux: Any) -> None:
    prompts = ["a cat and a big dog", "hello big dog, a cat", "a big dog on a cat on a mat"]
    images = embeds(1, 2)
    sizes = {"height": 24, "width": 40, **GUIDED}
    noise = randn(6, 60, 4)
    with attn_plugins.patched(flux, "mip", **TWO):
        batch = latents(
            flux, images, prompt=prompts, latents=noise, num_images_per_prompt=2,
            **{**sizes, "negative_prompt": ["bad"] * 3},
        )  # fmt: skip
        for index in range(6):
            alone = latents(
                flux, images, prompt=prompts[index // 2], latents=noise[index : index + 1],
                **{**sizes, "negative_prompt": "bad"},
            )  # fmt: skip
            close(batch[index : index + 1], alone)


def test_dense_steps_are_the_stock_adapters(flux: Any) -> None:
    stock = latents(flux, embeds(1, 2), **GUIDED)
    with attn_plugins.patched(flux, "mip", dense_steps=1.0, **TWO):
        assert torch.equal(latents(flux, embeds(1, 2), **GUIDED), stock)


def test_maps_and_measures_change_nothing(flux: Any) -> None:
    from attn_plugins.methods.mip import ReferenceMaps

    with attn_plugins.patched(flux, "mip", **TWO) as handle:
        plain = latents(flux, embeds(1, 2), **GUIDED)
        with ReferenceMaps(handle) as maps:
            assert torch.equal(latents(flux, embeds(1, 2), **GUIDED), plain)
        assert maps.counts == {(8, 10): 4}  # two layers, two steps: the passes of the negative prompt have no map
        shares = maps.mean()
        assert shares.shape == (1, 2, 8, 10) and shares.std() > 0.01
        torch.testing.assert_close(shares.sum(1), torch.ones(1, 8, 10))
        with handle.measure() as measures:
            assert torch.equal(latents(flux, embeds(1, 2), **GUIDED), plain)
        assert measures.table()


def test_encodings_that_come_back_are_known(flux: Any) -> None:
    images = embeds(1, 2)
    with attn_plugins.patched(flux, "mip", **TWO) as handle:
        expected = latents(flux, images)
        with torch.no_grad():
            made, pooled, _ = flux.encode_prompt("a cat and a big dog on a mat", max_sequence_length=32)
        kept = {"prompt": None, "prompt_embeds": made.clone(), "pooled_prompt_embeds": pooled}
        assert torch.equal(latents(flux, images, **kept), expected)
        phrases = handle.patches[0].layers[0].references.phrases
        rows, lengths = phrases.find(made)
        assert [[made_of(flux, row[:n]) for row, n in zip(rows[0], lengths[0], strict=True)]] == [["cat", "bigdog"]]
        close(latents(flux, images, **{**kept, "prompt_embeds": made.double().float()}), expected)
        assert torch.equal(phrases.find(made.bfloat16())[0], rows)  # cast, it is still itself
        kept["prompt_embeds"] = made + 0.01
        with pytest.raises(ValueError, match="the words of this prompt are not known: its encoding is none that"):
            latents(flux, images, **kept)
        phrases.set(rows, lengths)
        changed = latents(flux, images, **kept)
        assert changed.isfinite().all() and differs(changed, latents(flux, embeds(2, 1), **kept))
        assert torch.equal(latents(flux, images), expected)
        given = {"steps": 1, "latents": randn(1, 80, 4)}  # the first step's are this tensor itself
        assert torch.equal(latents(flux, images, **kept, **given), latents(flux, images, **kept, **given))
        with pytest.raises(ValueError, match="said to stand in 1 prompts, up to token 15; the call has 1 of 8 tokens"):
            latents(flux, images, **{**kept, "prompt_embeds": made[:, :8]})
        with pytest.raises(ValueError, match=r"rows from -1, lengths"):
            phrases.set(rows - 1 - int(rows.min()), lengths)
        phrases.set(None)
        with pytest.raises(ValueError, match=r"rows \(1, 1, 2\), lengths None: give \(1 or B, 2, L\)"):
            phrases.set(rows[:, :1, :2])


def made_of(pipe: Any, rows: torch.Tensor) -> str:
    ids = pipe.tokenizer_2("a cat and a big dog on a mat").input_ids
    return "".join(pipe.tokenizer_2.convert_ids_to_tokens([ids[row] for row in rows.tolist()])).replace("\u2581", "")


def test_half_precision() -> None:
    pipe, images = pipeline(), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO)
    full = latents(pipe, images)
    pipe.to(dtype=torch.bfloat16)
    half = latents(pipe, images.bfloat16(), negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 8).bfloat16()])
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_backends_agree(flux: Any) -> None:
    found = []
    for backend in ("reference", "cpu"):
        with attn_plugins.patched(flux, "mip", backend=backend, **TWO):
            found.append(latents(flux, embeds(1, 2)))
    close(*found)


@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxKontextPipeline"])
def test_its_other_pipelines(flux: Any, kind: str) -> None:
    """They share model and text encoder, and so the patch. Kontext's picture to edit stands behind the one that is
    made, and is merged into like it, but has no map."""
    import diffusers

    from attn_plugins.methods.mip import ReferenceMaps

    other = getattr(diffusers, kind)(**flux.components)
    other.set_progress_bar_config(disable=True)
    picture = randn(1, 3, 32, 40).sigmoid()
    more = {"strength": 1.0} if "Img2Img" in kind else {"_auto_resize": False, "max_area": 32 * 40}
    call = {"image": picture, **GUIDED, **more, "height": 32, "width": 40}
    with attn_plugins.patched(flux, "mip", **TWO) as handle:
        with ReferenceMaps(handle) as maps:
            found = latents(other, embeds(1, 2), **call)
        assert differs(found, latents(other, embeds(2, 1), **call))
        assert maps.mean().shape == (1, 2, 8, 10)
        masks = masked(torch.ones(1, 2, 32, 40))
        close(latents(other, embeds(1, 2), **call, **masks), found)
