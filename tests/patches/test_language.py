"""Causal windows in a language model, against the unpatched one with the same mask as a matrix: in depth, on few.

What holds of every language model is in test_language_matrix.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from tests.support.snapshot import snapshot
from tests.support.tiny_language import check, expected_logits, greedy, patch, positions, prompt, tiny, visible

RULES = [(1,), (5,), (6, 3), (4, 1, 2), (4, 2, 3), (7, 7)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padding", [{}, {"left": (3, 5)}, {"right": (0, 4)}])
def test_every_rule_in_one_piece_and_in_chunks(rule: tuple[int, ...], padding: dict[str, Any]) -> None:
    from transformers import DynamicCache

    model = tiny()
    ids, mask = prompt(**padding)
    expected = expected_logits(model, ids, mask, *rule)
    patch(model, *rule)
    at = positions(mask)
    with torch.no_grad():
        check(model(ids, attention_mask=mask, position_ids=at).logits, expected, mask)
        for sizes in ((23,), (1,) * 23, (7, 1, 2, 13), (2, 20, 1), (13, 10)):
            cache, done, pieces = DynamicCache(config=model.config), 0, []
            for size in sizes:
                here = slice(done, done + size)
                done += size
                pieces.append(
                    model(
                        ids[:, here], attention_mask=mask[:, :done], position_ids=at[:, here], past_key_values=cache
                    ).logits
                )
            check(torch.cat(pieces, dim=1), expected, mask)


def test_a_hole_in_the_mask_is_honoured() -> None:
    model = tiny()
    ids, mask = prompt()
    mask[0, 9:12] = 0
    expected = expected_logits(model, ids, mask, 5)
    patch(model)
    with torch.no_grad():
        check(model(ids, attention_mask=mask, position_ids=positions(mask)).logits, expected, mask)


def test_long_prompts_are_tiled() -> None:
    """More queries than a tile holds, padded, in one piece and behind a cache."""
    model = tiny()
    ids, mask = prompt(tokens=300, left=(0, 37))
    expected = expected_logits(model, ids, mask, 20)
    patch(model, 20)
    at = positions(mask)
    with torch.no_grad():
        check(model(ids, attention_mask=mask, position_ids=at).logits, expected, mask)
        cache = model(ids[:, :110], attention_mask=mask[:, :110], position_ids=at[:, :110]).past_key_values
        rest = model(ids[:, 110:], attention_mask=mask, position_ids=at[:, 110:], past_key_values=cache).logits
        check(rest, expected[:, 110:], mask[:, 110:])


@pytest.mark.parametrize("rule", [(5,), (6, 3), (4, 2, 2)])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generate_left_padded(rule: tuple[int, ...], cache: str) -> None:
    model = tiny()
    ids, mask = prompt(tokens=11, left=(0, 4))
    model.generation_config.eos_token_id = None
    expected_ids, expected_scores = greedy(model, ids, mask, 9, *rule)
    patch(model, *rule)
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip
    check(torch.stack(out.logits, 1), expected_scores)
    assert torch.equal(out.sequences, expected_ids)


def test_beam_search_with_and_without_a_cache() -> None:
    model = tiny()
    ids, mask = prompt(tokens=11, left=(3, 0))
    model.generation_config.eos_token_id = None
    settings = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    dense = model.generate(ids, **settings)
    patch(model)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert not torch.equal(cached, dense)
    assert cached.shape == (2, 19)


@pytest.mark.parametrize("window", [-1, 64])
def test_a_window_over_everything_is_dense_attention(window: int) -> None:
    model = tiny()
    ids, mask = prompt(left=(0, 4))
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        plain = model(ids).logits
        patch(model, window)
        check(model(ids, attention_mask=mask, position_ids=positions(mask)).logits, dense, mask)
        check(model(ids).logits, plain)


def test_a_batch_gives_what_its_items_give() -> None:
    model = tiny()
    ids, mask = prompt(left=(6, 0))
    patch(model, 6, 3, 2)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        check(batch[:1, 6:], model(ids[:1, 6:]).logits)


@pytest.mark.parametrize("sliding", [3, 4, 8])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_of_the_models_own_still_holds(sliding: int, cache: str) -> None:
    model = tiny("Mistral", sliding_window=sliding)
    ids, mask = prompt(tokens=12, left=(0, 4))
    model.generation_config.eos_token_id = None
    expected_ids, expected_scores = greedy(model, ids, mask, 6, 5)
    narrow = expected_logits(model, ids, mask, 3)
    assert ((narrow - expected_scores[:, :1])[:, -1].abs().max() < 1e-4) == (sliding == 3)
    patch(model)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
        cache_implementation=cache,
    )  # fmt: skip
    check(torch.stack(out.logits, 1), expected_scores)
    assert torch.equal(out.sequences, expected_ids)


def test_gradients() -> None:
    """Of a padded and an unpadded batch, against SDPA under a matrix mask, in float64 (eager has a float32 softmax)."""
    for padding in ({}, {"left": (0, 4)}):
        model = tiny().double()
        ids, mask = prompt(**padding)
        found = []
        for patched in (False, True):
            model.zero_grad()
            given = mask if patched else visible(mask, 5)
            if patched:
                patch(model)
            logits = model(ids, attention_mask=given, position_ids=positions(mask), use_cache=False).logits
            (logits.sin() * mask[..., None]).sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(architecture: str, masked: bool) -> None:
    model = tiny(architecture, **({"sliding_window": 4} if architecture == "Mistral" else {}))
    ids, mask = prompt(left=(0, 4))
    arguments = {"attention_mask": mask, "position_ids": positions(mask)} if masked else {}
    patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model(ids, **arguments).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(ids, **arguments).logits
    check(found, plain, mask if masked else None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": (3, 3)}, "one axis"),
        ({"window": 0.5}, "one int"),
        ({"window": 3, "stride": 4}, r"1\.\.3"),
        ({"window": 3, "base_size": (16,)}, "base size"),
        ({"window": 3, "per_head": ({"heads": (0,), "window": 2},)}, "per_head"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(options: dict[str, Any], words: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        attn_plugins.patch(model, "gna", **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("rule", RULES)
def test_density_counts_the_visible_pairs(rule: tuple[int, ...]) -> None:
    from attn_plugins.sequence import Sequence

    handle = patch(tiny(), *rule)
    seen = visible(torch.ones(1, 23), *rule).sum().item()
    assert handle.patches[0].layers[0].processor.density(Sequence((23,))) == pytest.approx(seen / (23 * 24 / 2))
