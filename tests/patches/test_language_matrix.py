"""Every causal language model of the registry: what Llama's tests say in depth (test_language.py), of each of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.patches.families import language
from tests.support.snapshot import snapshot
from tests.support.tiny_language import ARCHITECTURES, check, expected_logits, greedy, patch, positions, prompt, tiny

ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)
PADDINGS = [{}, {"left": (0, 4)}, {"right": (3, 0)}, {"left": (2, 0), "right": (1, 4)}]


def test_every_class_of_every_row_has_a_tiny_model() -> None:
    wanted = {name for row in language.FAMILIES for name in row.classes}
    found = {base.__name__ for name in ARCHITECTURES for base in type(tiny(name)).__mro__}
    assert wanted <= found


@ALL
def test_all_layers_are_sites_and_the_report_can_be_read(architecture: str) -> None:
    model = tiny(architecture)
    handle = patch(model)
    assert len(handle.patches[0].layers) == model.config.num_hidden_layers == 2
    ids, _ = prompt()
    with torch.no_grad():
        model(ids)
    assert "2 of 2 sites" in handle.summary()


@ALL
@pytest.mark.parametrize("padding", PADDINGS)
def test_prefill_and_padding(architecture: str, padding: dict[str, Any]) -> None:
    model = tiny(architecture)
    ids, mask = prompt(**padding)
    expected = expected_logits(model, ids, mask, 5)
    dense = expected_logits(model, ids, mask, 64)
    assert (dense - expected)[mask.bool()].abs().max() > 0.05
    patch(model)
    for use_cache in (False, True):
        with torch.no_grad():
            found = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache).logits
        check(found, expected, mask)


@ALL
def test_in_chunks_behind_a_cache(architecture: str) -> None:
    from transformers import DynamicCache

    model = tiny(architecture)
    for padding in ({}, {"left": (3, 5)}):
        ids, mask = prompt(**padding)
        expected = expected_logits(model, ids, mask, 5)
        with attn_plugins.patched(model, "gna", window=5), torch.no_grad():
            cache, done, pieces = DynamicCache(config=model.config), 0, []
            for size in (7, 1, 2, 13):
                here = slice(done, done + size)
                done += size
                at = positions(mask)[:, here]
                out = model(ids[:, here], attention_mask=mask[:, :done], position_ids=at, past_key_values=cache)
                pieces.append(out.logits)
        check(torch.cat(pieces, dim=1), expected, mask)


@ALL
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_left_padded(architecture: str, cache: str) -> None:
    model = tiny(architecture)
    ids, mask = prompt(tokens=11, left=(0, 4))
    model.generation_config.eos_token_id = None
    expected_ids, expected_scores = greedy(model, ids, mask, 4, 5)
    patch(model)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        cache_implementation=cache,
    )  # fmt: skip
    check(torch.stack(out.logits, 1), expected_scores)
    assert torch.equal(out.sequences, expected_ids)


@ALL
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_exact_undo(architecture: str, implementation: str | None) -> None:
    patch(tiny(architecture))  # what is registered once stays (patching.GLOBALS)
    model = tiny(architecture)
    if implementation:
        model.set_attn_implementation(implementation)
    ids, mask = prompt(left=(0, 4))
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits
        before, config, hidden = snapshot(model), model.config.to_dict(), dict(vars(model.config))
        patch(model)
        assert not torch.equal(model(ids, attention_mask=mask).logits, dense)
        assert model.config.to_dict() == config
        attn_plugins.unpatch(model)
        assert snapshot(model) == before
        assert vars(model.config) == hidden
        assert torch.equal(model(ids, attention_mask=mask).logits, dense)


@ALL
def test_a_window_over_everything_is_dense_attention(architecture: str) -> None:
    model = tiny(architecture)
    ids, mask = prompt(left=(0, 4))
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        plain = model(ids).logits
        patch(model, -1)
        check(model(ids, attention_mask=mask, position_ids=positions(mask)).logits, dense, mask)
        check(model(ids).logits, plain)


@ALL
def test_a_batch_gives_what_its_items_give(architecture: str) -> None:
    model = tiny(architecture)
    ids, mask = prompt(left=(6, 0))
    patch(model)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        check(batch[:1, 6:], model(ids[:1, 6:]).logits)
        check(batch[1:], model(ids[1:]).logits)


@ALL
def test_a_copy_is_patched_on_its_own(architecture: str) -> None:
    model = tiny(architecture)
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids).logits
        patch(model)
        sparse = model(ids).logits
        twin = copy.deepcopy(model)
        attn_plugins.unpatch(model)
        assert torch.equal(twin(ids).logits, sparse)
        assert torch.equal(model(ids).logits, dense)
        attn_plugins.unpatch(twin)
        assert torch.equal(twin(ids).logits, dense)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(architecture: str, dtype: torch.dtype) -> None:
    """No further from the float32 result than twice the model's own plain attention is, in that precision."""
    model = tiny(architecture)
    ids, mask = prompt(left=(0, 4))
    exact = expected_logits(model, ids, mask, 5)
    model.to(dtype)
    theirs = expected_logits(model, ids, mask, 5)
    patch(model)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert ours.dtype == dtype
    real = mask.bool()
    error, allowed = ((found.float() - exact)[real].pow(2).mean() for found in (ours, theirs))
    assert error <= 4 * allowed  # of squares; the mean, for experts that are chosen otherwise move single logits far
