"""What goes wrong with reference images on FLUX is said with its cause; and where a prompt says a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.patches.phrase_places import places
from tests.patches.test_mip_flux import GUIDED, TWO
from tests.support.flux_adapters import embeds, latents, pipeline

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")

AT_PATCHING = {
    "none": ({}, r"phrases=\(\): give a name for each reference image"),
    "blank": ({"phrases": ["cat", " "]}, r"phrases=\['cat', ' '\]: a phrase is empty"),
    "unreadable": ({"phrases": ["\u732b"]}, "the text encoder knows none of its letters"),
    "train": ({**TWO, "train": True}, "text_to_weight is of Stable Diffusion's adapters: leave checkpoint and train"),
    "file": ({**TWO, "checkpoint": "nowhere.bin"}, "no checkpoint at nowhere.bin"),
    "layers": ({**TWO, "layers": "single"}, "layers='single' leaves zero sites of 2"),
}


@pytest.fixture(scope="module")
def flux() -> Any:
    return pipeline()


@pytest.mark.parametrize(("options", "message"), AT_PATCHING.values(), ids=AT_PATCHING)
def test_at_patching(flux: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attn_plugins.patch(flux, "mip", **options)
    assert not flux.text_encoder_2._forward_hooks


def test_what_patching_needs(flux: Any) -> None:
    with pytest.raises(ValueError, match=r"looked for in the prompt as T5 reads it: patch the pipeline, not its"):
        attn_plugins.patch(flux.transformer, "mip", **TWO)
    bare = pipeline(0)
    with pytest.raises(ValueError, match="has no IP-Adapter: call pipe.load_ip_adapter"):
        attn_plugins.patch(bare, "mip", **TWO)
    deaf = pipeline()
    deaf.text_encoder_2 = None
    with pytest.raises(ValueError, match="load text_encoder_2 and tokenizer_2"):
        attn_plugins.patch(deaf, "mip", **TWO)


def test_at_the_call(flux: Any) -> None:
    with attn_plugins.patched(flux, "mip", **TWO):
        with pytest.raises(ValueError, match=r"the call has no reference images for \['cat', 'big dog'\]"):
            latents(flux)
        with pytest.raises(ValueError, match="name 2 reference images, and the call has 1"):
            latents(flux, embeds(1))
        with pytest.raises(ValueError, match="the prompt 'a cats and a big dog' does not say 'cat': where a reference"):
            latents(flux, embeds(1, 2), prompt="a cats and a big dog")
        with pytest.raises(ValueError, match="does not say 'big dog'.*among the first max_sequence_length tokens"):
            latents(flux, embeds(1, 2), max_sequence_length=8)
        latents(flux, embeds(1, 2), **GUIDED)
        with pytest.raises(ValueError, match="the prompt 'bad quality' does not say 'cat'"):  # of a run's own prompt
            latents(flux, embeds(1, 2), prompt="bad quality")
        with pytest.raises(ValueError, match="name 2 reference images, and the call has 3"):
            latents(flux, embeds(1, 2), **GUIDED, negative_ip_adapter_image_embeds=[embeds(1, 2, 3)])


def test_one_reference_with_photos_in_two_adapters() -> None:
    pipe = pipeline(2, scale=[0.8, 0.8])
    with (
        attn_plugins.patched(pipe, "mip", photos=[2, 1], **TWO),
        pytest.raises(ValueError, match="one reference would have photos in two"),
    ):
        latents(pipe, embeds(1), embeds(2, 3))


@pytest.mark.parametrize("before", [True, False])
def test_processors_that_were_replaced(before: bool) -> None:
    pipe = pipeline()
    if not before:
        attn_plugins.patch(pipe, "mip", **TWO)
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    pipe.transformer.set_attn_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match="processors were replaced by FluxAttnProcessor, which knows no reference"):
        if before:
            attn_plugins.patch(pipe, "mip", **TWO)
        latents(pipe, embeds(1, 2))
    if not before:
        attn_plugins.unpatch(pipe)
    assert not pipe.text_encoder_2._forward_hooks and not pipe.transformer._forward_pre_hooks


def test_strict_does_not_take_an_unloaded_adapter() -> None:
    from attn_plugins.runtime import Refused

    pipe = pipeline()
    attn_plugins.patch(pipe, "mip", strict=True, **TWO)
    pipe.unload_ip_adapter()
    with pytest.raises(Refused, match="the IP-Adapter was unloaded"):
        latents(pipe)


def test_a_model_on_several_devices_is_left_to_the_original(flux: Any) -> None:
    """Relevance is over all positions and heads, of which each device holds a part."""
    stock = latents(flux, embeds(1, 2))
    with attn_plugins.patched(flux, "mip", **TWO) as handle:
        handle.patches[0].state.shared_heads = (0, 2)
        with pytest.warns(UserWarning, match="each device holds a part of the picture or of the heads"):
            assert torch.equal(latents(flux, embeds(1, 2)), stock)


PLACES = {
    "twice": ("▁a|▁cat|▁and|▁a|▁cat", ["▁cat"], [[1, 4]]),
    "pieces": ("▁cor|gi|,|▁a|▁cat", ["▁a|▁cat", "▁cor|gi"], [[3, 4], [0, 1]]),
    "quoted": ('▁"|cat|"', ["▁cat"], [[1]]),
    "joined": ('▁a|▁"|cat|,"', ["▁cat"], [[2]]),
    "case": ("▁The|▁Cat", ["▁cat"], [[1]]),
    "part of a word": ("▁cat|alog|▁b|cat", ["▁cat"], [[]]),
    "plural": ("▁cats", ["▁cat"], [[]]),
    "token of two words": ("▁a|▁cat.|▁b", ["▁cat"], [[1]]),
    "inside a longer one": ("▁hot|▁dog|▁dog", ["▁hot|▁dog", "▁dog"], [[0, 1], [2]]),
    "only inside a longer one": ("▁hot|▁dog", ["▁hot|▁dog", "▁dog"], [[0, 1], [1]]),
    "same twice": ("▁dog|▁dog", ["▁dog", "▁dog"], [[0, 1], [0, 1]]),
    "lone space": ("▁|c|at", ["▁cat"], [[1, 2]]),
    "sign": ("▁<|toy|>|▁x", ["▁<|toy|>"], [[0, 1, 2]]),
    "grows in lower case": ("▁\u0130|x|▁cat", ["▁cat"], [[2]]),
    "nothing": ("", ["▁cat"], [[]]),
}


@pytest.mark.parametrize(("prompt", "names", "expected"), PLACES.values(), ids=PLACES)
def test_places(prompt: str, names: list[str], expected: list[list[int]]) -> None:
    assert places(prompt.split("|"), [name.split("|") for name in names]) == expected
