"""Language models that see: the language model under a causal window, the tower by itself, one without the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins import registry
from attn_plugins.patches.families import vision_language
from tests.support.snapshot import snapshot
from tests.support.tiny_language import check, visible
from tests.support.tiny_vision import masked
from tests.support.tiny_vision_language import MODELS, build, inputs, language_model, tower

CAUSAL = [name for name in MODELS if name != "Gemma3"]  # whose pictures see both ways
ALL = pytest.mark.parametrize("name", CAUSAL)


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given).logits


def patch(model: Any, **more: Any) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "gna", **{"window": 5, "stride": 1, **more})


def forgetful_snapshot(model: Any) -> dict[str, Any]:
    """Without what Qwen-VL remembers of its last prompt."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    return snapshot(model)


def test_every_class_of_every_row_has_a_tiny_model() -> None:
    wanted = {name for row in vision_language.FAMILIES for name in row.classes}
    assert wanted == {f"{name}PreTrainedModel" for name in CAUSAL}


@ALL
def test_a_prompt_with_a_picture(name: str) -> None:
    model, given = build(name), inputs(name)
    dense = logits(model, given)
    with masked(language_model(model), visible(given["attention_mask"], 5)[0, 0]):
        expected = logits(model, given)
    assert (expected - dense).abs().max() > 0.1
    handle = patch(model)
    assert [layer.kind for layer in handle.patches[0].layers] == ["causal", "causal"]
    assert "vision" not in handle.patches[0].layers[0].name
    check(logits(model, given), expected)
    assert "2 of 2 sites" in handle.summary()
    with torch.no_grad():
        cached = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=False))


@ALL
def test_exact_undo(name: str) -> None:
    patch(build(name))  # what is registered once stays (patching.GLOBALS)
    model, given = build(name), inputs(name)
    dense = logits(model, given)
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before, hidden = forgetful_snapshot(model), [dict(vars(config)) for config in configs]
    patch(model)
    assert [config._attn_implementation for config in configs] == ["sdpa", "attn_plugins", "sdpa"]
    assert not torch.equal(logits(model, given), dense)
    twin = copy.deepcopy(model)
    attn_plugins.unpatch(model)
    assert forgetful_snapshot(model) == before
    assert [dict(vars(config)) for config in configs] == hidden
    assert torch.equal(logits(model, given), dense)
    assert not torch.equal(logits(twin, given), dense)
    attn_plugins.unpatch(twin)
    assert torch.equal(logits(twin, given), dense)


@ALL
def test_a_window_over_everything_is_dense_attention(name: str) -> None:
    model, given = build(name), inputs(name)
    dense = logits(model, given)
    patch(model, window=-1)
    check(logits(model, given), dense)


def test_which_towers_have_a_row() -> None:
    rows = {name: registry.family_of(tower(build(name))) for name in MODELS}
    own = {name: row.name for name, row in rows.items() if row is not None and row.sites[0][1] == "self"}
    assert own == {
        **dict.fromkeys(("Llava", "LlavaNext", "VipLlava"), "clip_vision"),
        **dict.fromkeys(("LlavaOnevision", "AyaVision", "Gemma3"), "siglip_vision"),
        **dict.fromkeys(("Qwen2VL", "Qwen3VL", "Qwen3VLMoe"), "qwen_vl_vision"),
        "InternVL": "internvl_vision",
    }


@pytest.mark.parametrize("name", ["Llava", "InternVL", "Qwen3VL"])
@pytest.mark.parametrize("first", ["tower", "language"])
def test_the_tower_is_patched_by_itself(name: str, first: str) -> None:
    model, given = build(name), inputs(name)
    dense, before = logits(model, given), forgetful_snapshot(model)
    patch(tower(model), window=2)
    seen = logits(model, given)
    assert not torch.equal(seen, dense)
    patch(model)
    both = logits(model, given)
    assert not torch.equal(both, seen)
    order = [tower(model), model] if first == "tower" else [model, tower(model)]
    attn_plugins.unpatch(order[0])
    left = logits(model, given)
    assert not torch.equal(left, dense) and not torch.equal(left, both)
    assert torch.equal(left, seen) == (first == "language")
    attn_plugins.unpatch(order[1])
    assert torch.equal(logits(model, given), dense)
    assert forgetful_snapshot(model) == before


def test_pictures_that_see_both_ways_are_dense_and_text_is_not() -> None:
    model, given = build("Gemma3"), inputs("Gemma3")
    dense = logits(model, given)
    words = {"input_ids": given["input_ids"][:, -6:]}
    plain = logits(model, words)
    patch(model, window=2)
    with pytest.warns(UserWarning, match="of its own making"):
        assert torch.equal(logits(model, given), dense)
    assert not torch.equal(logits(model, words), plain)
