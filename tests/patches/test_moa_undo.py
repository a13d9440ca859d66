"""A model patched with spans: taken back, copied, pickled, shared, refused; exact, and each on its own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.moa import SpanPlan
from attn_plugins.methods.moa.patterns import uniform
from attn_plugins.patches.caches import ring_cache
from tests.support.moa import EVEN, UNEVEN, generated
from tests.support.snapshot import snapshot
from tests.support.tiny_language import check, prompt, tiny


def test_exact_undo_and_patching_twice_is_once() -> None:
    attn_plugins.patch(tiny(), "moa", plan=UNEVEN)  # what is registered once stays (patching.GLOBALS)
    model = tiny()
    ids, mask = prompt(left=(0, 4))
    dense = generated(model, ids, mask, 4)
    before, config, hidden = snapshot(model), model.config.to_dict(), dict(vars(model.config))
    handle = attn_plugins.patch(model, "moa", plan=UNEVEN)
    assert attn_plugins.patch(model, "moa", plan=UNEVEN) is handle
    sparse = generated(model, ids, mask, 4)
    assert not torch.equal(sparse.logits[0], dense.logits[0])
    assert model.config.to_dict() == config
    attn_plugins.unpatch(model)
    assert snapshot(model) == before and vars(model.config) == hidden
    assert not {"generate", "_prepare_cache_for_generation"} & model.__dict__.keys()
    again = generated(model, ids, mask, 4)
    assert all(torch.equal(*pair) for pair in zip(again.logits, dense.logits, strict=True))
    assert type(again.past_key_values.layers[0]).__name__ == "DynamicLayer"


def test_two_plans_on_different_layers_and_either_undone_first() -> None:
    model = tiny()
    ids, mask = prompt()
    dense = generated(model, ids, mask, 4)
    first = attn_plugins.patch(model, "moa", plan=UNEVEN, layers=[0])
    alone = generated(model, ids, mask, 4)
    assert [type(layer).__name__ for layer in alone.past_key_values.layers] == ["RingLayer", "DynamicLayer"]
    second = attn_plugins.patch(model, "moa", plan=EVEN, layers=[1])
    both = generated(model, ids, mask, 4)
    assert [type(layer).__name__ for layer in both.past_key_values.layers] == ["RingLayer", "RingLayer"]
    uncached = generated(model, ids, mask, 4, use_cache=False)
    check(torch.stack(both.logits), torch.stack(uncached.logits))
    first.remove()
    last = generated(model, ids, mask, 4)
    assert [type(layer).__name__ for layer in last.past_key_values.layers] == ["DynamicLayer", "RingLayer"]
    second.remove()
    assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits), torch.stack(dense.logits))


def test_copies_and_pickles_are_patched_on_their_own() -> None:
    model = tiny()
    ids, mask = prompt(left=(0, 4))
    dense = torch.stack(generated(model, ids, mask, 4).logits)
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    sparse = torch.stack(generated(model, ids, mask, 4).logits)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        out = generated(twin, ids, mask, 4)
        assert torch.equal(torch.stack(out.logits), sparse)
        assert type(out.past_key_values.layers[0]).__name__ == "RingLayer"
        attn_plugins.unpatch(twin)
        assert torch.equal(torch.stack(generated(twin, ids, mask, 4).logits), dense)
        assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits), sparse)


def test_two_models_with_two_plans_at_once() -> None:
    ids, mask = prompt()
    alone = {}
    models = {name: tiny() for name in ("uneven", "even")}
    for (name, model), plan in zip(models.items(), (UNEVEN, EVEN), strict=True):
        with attn_plugins.patched(model, "moa", plan=plan):
            alone[name] = torch.stack(generated(model, ids, mask, 4).logits)
    assert not torch.allclose(*alone.values())
    for (_, model), plan in zip(models.items(), (UNEVEN, EVEN), strict=True):
        attn_plugins.patch(model, "moa", plan=plan)
    for name, model in models.items():
        assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits), alone[name])


def test_a_plan_of_another_shape_names_both_and_changes_nothing() -> None:
    model = tiny()
    before = snapshot(model)
    for plan, words in (
        (uniform(3, 4, 2, beta=0.5), "3 layers of 4 query and 2 KV heads; the model has 2 layers of 4 query and 2 KV"),
        (uniform(2, 8, 4, beta=0.5), "2 layers of 8 query and 4 KV heads; the model has 2 layers of 4 query and 2 KV"),
        (SpanPlan(((1,) * 3,) * 2, ((1,) * 3,) * 2, "query", 3, 3), "3 query heads"),
    ):
        with pytest.raises(ValueError, match=words):
            attn_plugins.patch(model, "moa", plan=plan)
        assert snapshot(model) == before


def test_a_recipe_brings_its_plan(tmp_path: Any) -> None:
    model = tiny()
    ids, mask = prompt()
    handle = attn_plugins.patch(model, "moa", plan=UNEVEN)
    sparse = torch.stack(generated(model, ids, mask, 4).logits)
    recipe = handle.save(tmp_path / "recipe.yaml")
    handle.remove()
    attn_plugins.patch(model, recipe)
    assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits), sparse)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ids: {"attention_mask": torch.ones(2, 1, 23, 23).tril().bool()}, "of its own making"),
        (lambda ids: {"output_attentions": True}, "output_attentions"),
    ],
    ids=["a mask matrix", "weights"],
)
def test_what_cannot_be_honoured_is_dense_or_refused(make: Any, words: str) -> None:
    model = tiny()
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids, **make(ids)).logits
        attn_plugins.patch(model, "moa", plan=UNEVEN)
        with pytest.warns(UserWarning, match=words):
            assert torch.equal(model(ids, **make(ids)).logits, dense)
        with pytest.raises(ValueError, match=f"{words}.*ring cache keeps too little"):
            model(ids, past_key_values=ring_cache(model, 30), **make(ids))


def test_training_takes_no_ring_cache_and_has_gradients_without() -> None:
    model = tiny()
    ids, _ = prompt()
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model(ids, past_key_values=ring_cache(model, 30))
    model(ids, use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_cache_of_another_patch_is_refused() -> None:
    model = tiny()
    ids, _ = prompt()
    with attn_plugins.patched(model, "moa", plan=UNEVEN):
        cache = ring_cache(model, 30)
    with torch.no_grad():
        with pytest.raises((ValueError, TypeError), match="another one"):
            model(ids, past_key_values=cache)
        with attn_plugins.patched(model, "moa", plan=EVEN), pytest.raises(ValueError, match="another one"):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="patched with spans"):
        ring_cache(model, 30)


def test_assisted_decoding_keeps_a_cache_that_can_be_cropped() -> None:
    model = tiny()
    ids, mask = prompt(batch=1)
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    plain = generated(model, ids, mask, 6, use_cache=False)
    with pytest.warns(UserWarning, match="no memory is saved"):
        found = generated(model, ids, mask, 6, prompt_lookup_num_tokens=2)
    assert torch.equal(found.sequences, plain.sequences)


def test_measuring_sees_the_prompt_and_leaves_the_steps_alone() -> None:
    model = tiny()
    ids, mask = prompt()
    handle = attn_plugins.patch(model, "moa", plan=UNEVEN)
    plain = torch.stack(generated(model, ids, mask, 4).logits)
    with handle.measure(rows=8) as measures:
        assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits), plain)
    steps = measures.layer_steps
    assert {step.layer for step in steps} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(step.calls == 1 and 0 < step.recall < 1 for step in steps)
    assert "moa on LlamaForCausalLM" in handle.summary()


def test_gradients_are_those_of_the_masked_model() -> None:
    from tests.support.moa import masked_layers
    from tests.support.tiny_language import positions

    for padding in ({}, {"left": (0, 4)}):
        found = []
        for patched in (False, True):
            model = tiny().double()
            ids, mask = prompt(**padding)
            given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
            if patched:
                attn_plugins.patch(model, "moa", plan=UNEVEN)
                logits = model(ids, **given).logits
            else:
                with masked_layers(model, mask, UNEVEN, ids.shape[1]):
                    logits = model(ids, **given).logits
            (logits.sin() * mask[..., None]).sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_two_threads_generate_to_two_lengths() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = tiny()
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    ids, mask = prompt()
    jobs = [(steps, use_cache) for steps in (3, 30) for use_cache in (True, False)]

    def run(job: tuple[int, bool]) -> torch.Tensor:
        return torch.stack(generated(model, ids, mask, job[0], use_cache=job[1]).logits)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        for want, found in zip(alone * 2, pool.map(run, jobs * 2), strict=True):
            assert torch.equal(found, want)
    assert model.__dict__["generate"].patches[0][0].moment.length is None
