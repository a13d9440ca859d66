"""`skip_projections`: queries and outputs of heads that are not computed are left out, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import attn_plugins
from attn_plugins.methods.moh import calibrate
from attn_plugins.patches import routed_projections
from attn_plugins.patches.routed_projections import ROUTED, RoutedOutput, RoutedQuery
from attn_plugins.runtime import Refused
from tests.support.moh import patch, scrambled
from tests.support.tiny import randn

transformers = pytest.importorskip("transformers")
OPTIONS = {"active": 0.5, "router": "ridge", "skip_projections": True}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny inputs take several, the last one short."""
    monkeypatch.setattr(routed_projections, "CHUNK", 7)
    monkeypatch.setattr(routed_projections, "LEAST_TOKENS", 10)
    monkeypatch.setattr(routed_projections, "LEAST_WIDTH", {})


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each product of a projection that skipped."""
    rows: list[int] = []
    each = routed_projections._each

    def counted(active: torch.Tensor, width: int) -> Iterator[Any]:
        for share in each(active, width):
            rows.append(len(share.rows))
            yield share

    monkeypatch.setattr(routed_projections, "_each", counted)
    yield rows


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.LlamaConfig(**sizes, **heads, attention_bias=True, **more)
    return transformers.LlamaForCausalLM(config).eval()


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()


def dit() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=1000).eval()


def inputs(model: Any) -> dict[str, Any]:
    name = type(model).__name__
    if "Llama" in name:
        return {"input_ids": torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(3)), "use_cache": False}
    if "ViT" in name:
        return {"pixel_values": randn(2, 3, 32, 32)}
    return {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def told(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model), return_dict=False)[0]


MODELS = {"llama": llama, "vit": vit, "dit": dit}


@pytest.mark.parametrize("router", ["ridge", "learned"])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_that_of_whole_projections(name: str, router: str, skipped: list[int]) -> None:
    model, options = MODELS[name](), OPTIONS | {"router": router}
    before, state = told(model), set(model.state_dict())
    handle = scrambled(patch(model, **{**options, "skip_projections": False}))
    want, weights = told(model), {name: part.clone() for name, part in model.state_dict().items()}
    attn_plugins.unpatch(model)
    assert not skipped
    handle = patch(model, **options)
    model.load_state_dict(weights)
    found = told(model)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(want, before, atol=1e-4)
    layers = 2 * 2  # queries and outputs of two layers: half of the heads of every token
    tokens = {"llama": 22, "vit": 34, "dit": 32}[name]
    assert sum(skipped) == layers * tokens * 2 and max(skipped) <= 7
    kinds = {type(part) for part in model.modules() if isinstance(part, nn.Linear)}
    assert kinds == {nn.Linear, RoutedQuery, RoutedOutput}
    handle.remove()
    assert torch.equal(told(model), before) and set(model.state_dict()) == state
    assert not any(ROUTED in part.__dict__ or type(part) in (RoutedQuery, RoutedOutput) for part in model.modules())


def test_whole_groups_go_together(skipped: list[int]) -> None:
    model = llama()
    handle = scrambled(patch(model, **OPTIONS, granularity="group", shared=0))
    whole = handle.patches[0].config
    found = told(model)
    attn_plugins.unpatch(model)
    assert sum(skipped) == 2 * 2 * 22 and whole.active == 0.5  # one group of two for each token
    del skipped[:]
    scrambled(patch(model, **{**OPTIONS, "skip_projections": False}, granularity="group", shared=0))
    torch.testing.assert_close(told(model), found, rtol=1e-4, atol=2e-6)
    assert not skipped


def test_padding_a_cache_and_generation(skipped: list[int]) -> None:
    model = llama()
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    scrambled(patch(model, **{**OPTIONS, "skip_projections": False}))
    want = model.generate(**options)
    attn_plugins.unpatch(model)
    scrambled(patch(model, **OPTIONS))
    assert torch.equal(model.generate(**options), want) and skipped  # of the prompt; a step has too few tokens


def test_training_computes_everything(skipped: list[int]) -> None:
    model = llama()
    scrambled(patch(model, **OPTIONS))
    model(**inputs(model)).logits.square().mean().backward()
    assert not skipped
    assert all(part.grad is not None for name, part in model.named_parameters() if "q_proj" in name or "o_proj" in name)


@pytest.mark.parametrize("active", [0.5, 0.75])
def test_where_most_heads_are_active_nothing_is_gathered(active: float, skipped: list[int]) -> None:
    model = llama()
    scrambled(patch(model, **{**OPTIONS, "active": active}))
    told(model)
    assert bool(skipped) == (active < 0.7)


def test_a_call_that_must_stay_dense_is_an_error(skipped: list[int]) -> None:
    """Its queries are gone: a warning and a wrong result would be worse."""
    model = llama()
    scrambled(patch(model, **OPTIONS))
    with torch.no_grad(), pytest.warns(UserWarning), pytest.raises(Refused, match=r"skip_projections.*output_att"):
        model(**inputs(model), output_attentions=True)
    assert torch.isfinite(told(model)).all()  # and the next call is as ever


def test_dense_steps_and_small_grids_keep_their_queries(skipped: list[int]) -> None:
    model = vit()
    want = told(model)
    patch(model, **OPTIONS, min_tokens=1000)
    with pytest.warns(UserWarning, match="min_tokens=1000"):
        torch.testing.assert_close(told(model), want, rtol=0, atol=0)
        told(model)
    assert not skipped


def test_projections_that_are_not_plain_are_named_and_left_alone(skipped: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="computes all heads|not calibrated") as said:
        handle = attn_plugins.patch(model, "moh", **OPTIONS)
    first, second = (str(one.message) for one in said)  # of all layers in one; and that the routers are new
    assert "q_proj is a" in first and "lora" in first and "calibrated" in second
    scrambled(handle)
    found = told(model)
    assert sum(skipped) == 2 * 22 * 2  # outputs alone
    attn_plugins.unpatch(model)
    scrambled(patch(model, **{**OPTIONS, "skip_projections": False}))
    torch.testing.assert_close(told(model), found, rtol=1e-4, atol=2e-6)
    assert adapted is not None


def test_a_lora_that_comes_later(skipped: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    scrambled(patch(model, **OPTIONS))
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter(config)
    found = told(model)
    assert skipped
    attn_plugins.unpatch(model)
    assert not any(type(part) in (RoutedQuery, RoutedOutput) for part in model.modules())
    scrambled(patch(model, **{**OPTIONS, "skip_projections": False}))
    torch.testing.assert_close(told(model), found, rtol=1e-4, atol=2e-6)


def test_a_copy_is_patched_by_itself(skipped: list[int]) -> None:
    model = llama()
    scrambled(patch(model, **OPTIONS))
    want = told(model)
    other = copy.deepcopy(model)
    attn_plugins.unpatch(model)
    del skipped[:]
    assert torch.equal(told(other), want) and skipped
    assert all(part.__dict__[ROUTED].layer is not None for part in other.modules() if isinstance(part, RoutedQuery))


def test_in_half_precision(skipped: list[int]) -> None:
    model = llama().to(torch.bfloat16)
    batches = [inputs(model)]
    handle = patch(model, **OPTIONS)
    calibrate(handle, batches, progress=False)
    found = told(model)
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    attn_plugins.unpatch(model)
    patch(model, **{**OPTIONS, "skip_projections": False})
    model.load_state_dict(weights)
    torch.testing.assert_close(found.float(), told(model).float(), rtol=0, atol=0.02)
    assert skipped


def test_query_norms_come_too_late() -> None:
    with pytest.raises(ValueError, match="skip_projections.*query_norm"):
        patch(llama(), active=0.5, router="query_norm", skip_projections=True)


def test_a_forward_that_someone_kept_is_whole_after_unpatch() -> None:
    """accelerate's hooks hold the bound method of the class that the layer had when they came."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, ids = llama(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        want = model(ids).logits
        patch(model, **OPTIONS)
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj):
                add_hook_to_module(linear, ModelHook())
        model(ids)
        attn_plugins.unpatch(model)
        assert torch.equal(model(ids).logits, want)
