"""Every model that MoH takes, against an unpatched one whose heads are multiplied by the gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attn_plugins import registry
from tests.support import tiny_vision
from tests.support.moh import by_routers, gated, patch, scrambled
from tests.support.tiny_language import ARCHITECTURES, check, positions, prompt, tiny

LANGUAGE = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "GptOss", "GPTNeoX", "Phi3"]
VISION = ["ViT", "DINOv2", "DINOv2 with registers", "DeiT", "CLIP", "SigLIP", "SigLIP 2"]
DIFFUSION = ["dit", "pixart", "wan", "ltx_video", "sd15"]
PADDINGS = [{}, {"left": (0, 4)}, {"right": (3, 0)}, {"left": (2, 0), "right": (1, 4)}]
# MLCD's output projection has tokens and items the other way round; those of the others are no part of their modules
NO_ORACLE = {"MLCD", "VideoMAE", "lumina_next"}
NO_SIZES = {"Qwen2-VL", "Qwen3-VL"}
FAMILIES = [
    family.name
    for family in registry.families()
    if family.library == "diffusers" and any(kind == "self" for _, kind in family.sites)
]


def agrees(build: Any, call: Any, oracle: bool = True) -> None:
    """Routed heads by definition, and nothing left of them after."""
    model, plain = build(), build()
    dense = call(plain)
    handle = scrambled(patch(model, router="ridge", active=0.5, min_tokens=0))
    found = call(model)
    if oracle:
        with gated(plain, by_routers(model)):
            want = call(plain)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=5e-5)
    assert (found - dense).abs().max() > 5e-3
    handle.remove()
    assert torch.equal(call(model), dense)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_language_model(architecture: str) -> None:
    ids, mask = prompt(left=(0, 4))
    agrees(lambda: tiny(architecture), lambda model: logits(model, ids, mask)[mask.bool()])


@pytest.mark.parametrize("name", [name for name in tiny_vision.MODELS if name not in NO_SIZES])
def test_every_vision_model(name: str) -> None:
    given = tiny_vision.inputs(name, 2)
    agrees(
        lambda: tiny_vision.build(name), lambda m: tiny_vision.features(name, m, given), oracle=name not in NO_ORACLE
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_diffusion_model_with_self_attention(family: str, quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    row = MODELS[family]
    agrees(row.build, lambda model: forward(model, row.inputs(2, 0)), oracle=family not in NO_ORACLE)


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions(mask), **more).logits


@pytest.mark.parametrize("architecture", LANGUAGE)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("router", ["learned", "ridge"])
def test_language_models(architecture: str, padding: dict[str, Any], router: str) -> None:
    model, plain = tiny(architecture), tiny(architecture)
    ids, mask = prompt(**padding)
    scrambled(patch(model, router=router, active=0.75))
    with gated(plain, by_routers(model)):
        want = logits(plain, ids, mask)
    assert (want - logits(plain, ids, mask))[mask.bool()].abs().max() > 0.05
    for use_cache in (False, True):
        check(logits(model, ids, mask, use_cache=use_cache), want, mask)


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("router", ["learned", "ridge"])
def test_vision_models(name: str, router: str) -> None:
    model, plain = tiny_vision.build(name), tiny_vision.build(name)
    scrambled(patch(model, router=router, active=0.5))
    for size in (0, 1):
        given = tiny_vision.inputs(name, 2, size)
        with gated(plain, by_routers(model)):
            want = tiny_vision.features(name, plain, given)
        assert (want - tiny_vision.features(name, plain, given)).abs().max() > 0.05
        found = tiny_vision.features(name, model, given)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("router", ["learned", "ridge"])
def test_diffusion_models(name: str, router: str, quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    tiny_model = MODELS[name]
    model, plain = tiny_model.build(), tiny_model.build()
    scrambled(patch(model, router=router, active=0.5, min_tokens=0))
    for size in (0, 1):
        given = tiny_model.inputs(2, size)
        with gated(plain, by_routers(model)):
            want = forward(plain, given)
        assert not torch.allclose(want, forward(plain, given), atol=1e-4)
        torch.testing.assert_close(forward(model, given), want, rtol=1e-4, atol=1e-5)
