"""MoH in models of both libraries, against unpatched ones whose heads are multiplied by the gates."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.runtime import Refused
from tests.support import tiny_vision
from tests.support.moh import by_query_norms, by_routers, gated, patch, scrambled
from tests.support.snapshot import snapshot
from tests.support.tiny_language import check, positions, prompt, tiny

LANGUAGE = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "GptOss", "GPTNeoX", "Phi3"]
ROUTED = {"router": "learned", "active": 0.75}


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions(mask), **more).logits


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral", "Gemma"])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_the_papers_rule_for_llama(architecture: str, granularity: str) -> None:
    grouped = granularity == "group"
    model, plain = tiny(architecture), tiny(architecture)
    ids, mask = prompt(left=(0, 4))
    handle = patch(model, active=0.5 if grouped else 0.75, granularity=granularity)
    assert handle.patches[0].config.router == "query_norm" and not list(handle.named_weights())
    rule = by_query_norms(1, 0, 4, 2) if grouped else by_query_norms(3, 2, 4)
    with gated(plain, rule):
        want = logits(plain, ids, mask)
    check(logits(model, ids, mask), want, mask)


@pytest.mark.parametrize("architecture", LANGUAGE)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_is_generation_without_a_cache(architecture: str, cache: str) -> None:
    model = tiny(architecture)
    model.generation_config.eos_token_id = None
    ids, mask = prompt(tokens=11, left=(0, 4))
    scrambled(patch(model, **ROUTED))
    more = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    kept = model.generate(ids, attention_mask=mask, cache_implementation=cache, **more)
    new = model.generate(ids, attention_mask=mask, use_cache=False, **more)
    assert torch.equal(kept.sequences, new.sequences)
    check(torch.stack(kept.logits), torch.stack(new.logits))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2", "Qwen3"])
def test_in_chunks_behind_a_cache(architecture: str) -> None:
    from transformers import DynamicCache

    model = tiny(architecture)
    scrambled(patch(model, **ROUTED))
    for padding in ({}, {"left": (3, 5)}):
        ids, mask = prompt(**padding)
        want = logits(model, ids, mask)
        cache, done, pieces = DynamicCache(config=model.config), 0, []
        for size in (7, 1, 2, 13):
            here = slice(done, done + size)
            done += size
            at = positions(mask)[:, here]
            with torch.no_grad():
                out = model(ids[:, here], attention_mask=mask[:, :done], position_ids=at, past_key_values=cache)
            pieces.append(out.logits)
        check(torch.cat(pieces, dim=1), want, mask)


@pytest.mark.parametrize("options", [{"router": "query_norm"}, {"router": "ridge"}, {"router": "learned"}])
def test_with_all_heads_language_models_are_dense(options: dict[str, Any]) -> None:
    model = tiny("Llama")
    ids, mask = prompt(left=(0, 4))
    dense, plain = logits(model, ids, mask), logits(model, ids, torch.ones_like(mask))
    handle = patch(model, active=1.0, shared=1, **options)
    zeroed(model)
    check(logits(model, ids, mask), dense, mask)
    assert torch.equal(logits(model, ids, torch.ones_like(mask)), plain)
    handle.remove()
    assert torch.equal(logits(model, ids, mask), dense)


def test_with_all_heads_vision_and_diffusion_models_are_dense(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    model, given = tiny_vision.build("ViT"), tiny_vision.inputs("ViT", 2)
    dense = tiny_vision.features("ViT", model, given)
    patch(model, active=1.0)
    zeroed(model)
    assert torch.equal(tiny_vision.features("ViT", model, given), dense)
    model, given = MODELS["pixart"].build(), MODELS["pixart"].inputs(2, 0)
    dense = forward(model, given)
    patch(model, active=1.0)
    zeroed(model)
    assert torch.equal(forward(model, given), dense)


def zeroed(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".moh." in name:
            parameter.data.zero_()


@pytest.mark.parametrize("options", [{"router": "auto"}, {"router": "learned"}, {"router": "ridge"}])
def test_exact_undo_and_twice_is_once(options: dict[str, Any]) -> None:
    patch(tiny("Llama"), **options)  # what is registered once stays (patching.GLOBALS)
    model = tiny("Llama")
    ids, mask = prompt(left=(0, 4))
    dense = logits(model, ids, mask)
    before, keys, config = snapshot(model), list(model.state_dict()), dict(vars(model.config))
    state = torch.get_rng_state()
    handle = patch(model, active=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert patch(model, active=0.75, **options) is handle
    assert not torch.allclose(logits(model, ids, mask)[mask.bool()], dense[mask.bool()], atol=1e-2)
    attn_plugins.unpatch(model)
    assert snapshot(model) == before and list(model.state_dict()) == keys and vars(model.config) == config
    assert torch.equal(logits(model, ids, mask), dense)


def test_exact_undo_in_diffusers(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    patch(MODELS["wan"].build())
    model, given = MODELS["wan"].build(), MODELS["wan"].inputs(1, 0)
    dense, before, keys = forward(model, given), snapshot(model), list(model.state_dict())
    handle = scrambled(patch(model, active=0.5))
    assert [layer.name for layer in handle.patches[0].layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    routed = forward(model, given)
    assert not torch.equal(routed, dense)
    twin = copy.deepcopy(model)
    attn_plugins.unpatch(model)
    assert snapshot(model) == before and list(model.state_dict()) == keys
    assert torch.equal(forward(model, given), dense) and torch.equal(forward(twin, given), routed)
    attn_plugins.unpatch(twin)
    assert torch.equal(forward(twin, given), dense)


def test_two_models_and_a_copy_have_settings_of_their_own() -> None:
    one, two = tiny("Llama"), tiny("Llama")
    ids, mask = prompt()
    scrambled(patch(one, **ROUTED))
    first = logits(one, ids, mask)
    scrambled(patch(two, router="ridge", active=0.5))
    second, twin = logits(two, ids, mask), copy.deepcopy(one)
    assert not torch.equal(first, second)
    zeroed(one)
    assert torch.equal(logits(twin, ids, mask), first) and not torch.equal(logits(one, ids, mask), first)
    attn_plugins.unpatch(one)
    assert torch.equal(logits(two, ids, mask), second) and torch.equal(logits(twin, ids, mask), first)


def test_a_batch_gives_what_its_items_give() -> None:
    model = tiny("Qwen3")
    ids, mask = prompt(left=(6, 0))
    scrambled(patch(model, **ROUTED))
    both = logits(model, ids, mask)
    check(both[:1, 6:], logits(model, ids[:1, 6:], mask[:1, 6:]))
    check(both[1:], logits(model, ids[1:], mask[1:]))


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_a_patched_llama_compiles(router: str) -> None:
    model = tiny("Llama")
    ids, _ = prompt()
    scrambled(patch(model, router=router, active=0.75))
    with torch.no_grad():
        want = model(ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            check(compiled(ids).logits, want)


def test_patched_vit_and_wan_compile(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS, forward

    model, given = tiny_vision.build("ViT"), tiny_vision.inputs("ViT", 2)
    scrambled(patch(model, active=0.5))
    want = tiny_vision.features("ViT", model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(tiny_vision.features("ViT", compiled, given), want, rtol=1e-4, atol=5e-5)
    model, given = MODELS["wan"].build(), MODELS["wan"].inputs(1, 0)
    scrambled(patch(model, active=0.5))
    want = forward(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(forward(compiled, given), want, rtol=1e-4, atol=1e-5)


def test_joint_attention_is_refused_in_a_sentence(quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS

    with pytest.raises(ValueError, match="'moh' is for attention of kind causal, self, and this .* has joint"):
        attn_plugins.patch(MODELS["flux"].build(), "moh")


def test_models_that_tell_no_sizes_are_refused() -> None:
    model = tiny_vision.build("Qwen2-VL")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'moh' brings weights for each layer: .* does not tell the sizes"):
        attn_plugins.patch(model, "moh")
    assert snapshot(model) == before


def test_what_cannot_be_honoured_runs_dense_with_one_warning() -> None:
    model, given = tiny_vision.build("ViT"), tiny_vision.inputs("ViT", 1)
    dense = tiny_vision.features("ViT", model, given)
    patch(model, active=0.5)
    for block in model.layers:
        del block.attention.moh
    with pytest.warns(UserWarning, match="lost its router") as said:
        for _ in range(2):
            assert torch.equal(tiny_vision.features("ViT", model, given), dense)
    assert len(said) == 1
    strict = tiny("Llama", attention_dropout=0.1).train()
    patch(strict, strict=True)
    with pytest.raises(Refused, match="dropout is on"):
        strict(prompt()[0])


def test_patching_says_that_routers_are_not_trained(tmp_path: Any) -> None:
    model = tiny("Llama")
    for router, words in (
        ("learned", "choose heads at random"),
        ("ridge", "not calibrated"),
        ("auto", "norms of their"),
    ):
        with pytest.warns(UserWarning, match=f"attn_plugins: moh: .*{words}") as said:
            handle = attn_plugins.patch(model, "moh", router=router)
            attn_plugins.patch(model, "moh", router=router)  # changes nothing: says nothing
        assert len(said) == 1
        handle.save_weights(tmp_path / router)
        handle.remove()
        attn_plugins.load(model, tmp_path / router).remove()  # nor of weights from a file
    attn_plugins.patch(model, "moh", active=1.0).remove()


def test_the_report_tells_the_share_of_heads() -> None:
    model = tiny("Llama")
    handle = patch(model, **ROUTED)
    with torch.no_grad():
        model(prompt()[0])
    assert "75.0%" in handle.summary() and "at this share of heads at most" in handle.summary()
    assert f"weights of its own: {2 * (3 * 32 + 2 * 32)}" in handle.summary()


def test_the_gates_are_there_before_the_projections_run() -> None:
    """What skipping projections will read: in the call of the layer, and nowhere else."""
    model = tiny("Llama")
    handle = scrambled(patch(model, **ROUTED))
    layer, attention = handle.patches[0].layers[0], model.model.layers[0].self_attn
    seen: list[Any] = []
    hook = attention.q_proj.register_forward_pre_hook(lambda module, args: seen.append((args[0], layer.prepared)))
    ids, _ = prompt()
    with torch.no_grad():
        model(ids)
    hook.remove()
    ((x, routing),) = seen
    assert torch.equal(attention.moh(x).gates, routing.gates) and layer.prepared is None


def test_query_norms_of_vision_models() -> None:
    model, plain = tiny_vision.build("ViT"), tiny_vision.build("ViT")
    given = tiny_vision.inputs("ViT", 2)
    patch(model, router="query_norm", active=1)
    with gated(plain, by_query_norms(1, 0, 2)):
        want = tiny_vision.features("ViT", plain, given)
    torch.testing.assert_close(tiny_vision.features("ViT", model, given), want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No further from the float32 result of the same gates than twice plain attention in that precision is."""
    exact, model, plain = (tiny("Llama").to(dtype).to(t) for t in (torch.float32, dtype, dtype))
    ids, mask = prompt(left=(0, 4))
    scrambled(patch(model, router="ridge"))
    routers = by_routers(model)
    kept: dict[str, torch.Tensor] = {}

    def first(name: str, x: torch.Tensor, module: Any) -> torch.Tensor:
        return kept.setdefault(name, routers(name, x.to(dtype), module))

    with gated(plain, first):  # the choices of all three
        theirs = logits(plain, ids, mask)
    with gated(exact, first):
        want = logits(exact, ids, mask)
    for (name, gates), layer in zip(kept.items(), model.model.layers, strict=True):
        assert name.endswith("self_attn")
        router = layer.self_attn.moh
        router.register_forward_hook(lambda r, a, routing, g=gates: dataclasses.replace(routing, gates=g))
    ours = logits(model, ids, mask)
    real = mask.bool()
    error, allowed = ((found.float() - want)[real].pow(2).mean() for found in (ours, theirs))
    assert ours.dtype == dtype and error <= 4 * allowed
