"""MoA in a language model, against the unpatched one with a mask matrix for each layer: in depth, on few."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.moa.patterns import uniform
from tests.support.moa import EVEN, UNEVEN, expected_logits, generated, greedy
from tests.support.tiny_language import check, positions, prompt, tiny

PLANS = {"uneven": UNEVEN, "even": EVEN}
PADDINGS: list[dict[str, Any]] = [{}, {"left": (3, 5)}, {"right": (0, 4)}, {"left": (2, 0), "right": (1, 4)}]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_prefill(plan: Any, padding: dict[str, Any]) -> None:
    model = tiny().double()
    ids, mask = prompt(tokens=40, **padding)
    expected = expected_logits(model, ids, mask, plan, 40)
    attn_plugins.patch(model, "moa", plan=plan)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("padding", [{}, {"left": (0, 7)}, {"batch": 1, "left": (7,)}], ids=["", "two", "one"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 1},
        {"use_cache": False},
    ],
    ids=["dynamic", "static", "static chunks", "chunks", "ones", "none"],
)
def test_generate_is_the_masked_model(plan: Any, padding: dict[str, Any], options: dict[str, Any]) -> None:
    """In float64, so that a key too many or too few cannot hide; rings wrap in the prompt and while decoding."""
    model = tiny().double()
    ids, mask = prompt(tokens=31, **padding)
    tokens, scores = greedy(model, ids, mask, 9, plan)
    attn_plugins.patch(model, "moa", plan=plan)
    out = generated(model, ids, mask, 9, **options)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), scores, rtol=0, atol=1e-5)  # generate's are float32
    assert torch.equal(out.sequences, tokens)
    if options.get("use_cache", True):
        assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"RingLayer"}


@pytest.mark.parametrize("sink", [0, 1, 4])
@pytest.mark.parametrize("padding", [{}, {"left": (3, 0)}])
def test_chunks_and_steps_of_any_size(sink: int, padding: dict[str, Any]) -> None:
    """Wraps at exactly the edges: each split of the text gives the same rows."""
    from dataclasses import replace

    from attn_plugins.patches.caches import ring_cache

    model = tiny().double()
    plan = replace(UNEVEN, sink=sink)
    ids, mask = prompt(tokens=30, **padding)
    expected = expected_logits(model, ids, mask, plan, 30)
    attn_plugins.patch(model, "moa", plan=plan)
    at = positions(mask)
    for sizes in ((1,) * 30, (7, 1, 2, 20), (3, 5, 22), (2, 27, 1), (15, 15), (13, 4, 4, 4, 5)):
        cache, done, pieces = ring_cache(model, 30), 0, []
        for size in sizes:
            here = slice(done, done + size)
            done += size
            with torch.no_grad():
                out = model(
                    ids[:, here], attention_mask=mask[:, :done], position_ids=at[:, here], past_key_values=cache
                )
            pieces.append(out.logits)
        found = torch.cat(pieces, dim=1)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)
        assert found.isfinite().all()


def test_padding_between_tokens_is_never_seen() -> None:
    """A first turn padded on the right, a second behind it, in pieces: the hole stays one."""
    from attn_plugins.patches.caches import ring_cache

    model = tiny().double()
    ids, mask = prompt(tokens=30)
    mask[0, 9:12] = 0
    mask[1, 17:19] = 0
    expected = expected_logits(model, ids, mask, UNEVEN, 30)
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    at = positions(mask)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=at).logits
        for sizes in ((12, 7, 11), (10, 20), (12, 1, 5, 1, 1, 10), (30,)):
            cache, done, pieces = ring_cache(model, 30), 0, []
            for size in sizes:
                here = slice(done, done + size)
                done += size
                given = {"attention_mask": mask[:, :done], "position_ids": at[:, here], "past_key_values": cache}
                pieces.append(model(ids[:, here], **given).logits)
            for found in (torch.cat(pieces, dim=1), whole):
                torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


def test_a_row_of_padding_alone_is_finite() -> None:
    model = tiny()
    ids, mask = prompt(tokens=12)
    mask[0] = 0
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    out = generated(model, ids, mask, 6)
    assert torch.stack(out.logits).isfinite().all()
    alone = generated(model, ids[1:], mask[1:], 6)
    check(torch.stack(out.logits, 1)[1:], torch.stack(alone.logits, 1))


def test_spans_of_everything_are_dense_attention() -> None:
    model = tiny()
    ids, mask = prompt(tokens=30, left=(0, 4))
    dense = generated(model, ids, mask, 8)
    attn_plugins.patch(model, "moa", plan=uniform(2, 4, 2, beta=1.0))
    found = generated(model, ids, mask, 8)
    check(torch.stack(found.logits, 1), torch.stack(dense.logits, 1))
    assert torch.equal(found.sequences, dense.sequences)


def test_a_batch_gives_what_its_items_give() -> None:
    model = tiny()
    ids, mask = prompt(tokens=30, left=(6, 0))
    attn_plugins.patch(model, "moa", plan=UNEVEN, length=40)  # else the padding would be part of N
    both = torch.stack(generated(model, ids, mask, 8).logits, 1)
    first = generated(model, ids[:1, 6:], mask[:1, 6:], 8)
    second = generated(model, ids[1:], mask[1:], 8)
    check(both, torch.cat([torch.stack(out.logits, 1) for out in (first, second)]))


def test_beam_search_and_sampling() -> None:
    model = tiny()
    ids, mask = prompt(tokens=21, left=(3, 0))
    model.generation_config.eos_token_id = None
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False)
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            given = {"attention_mask": mask, "max_new_tokens": 8, "use_cache": use_cache, **settings}
            found.append(model.generate(ids, **given))
        assert torch.equal(*found)
        assert not torch.equal(found[0], dense)


@pytest.mark.parametrize("whole", [True, False], ids=["the whole text", "the new tokens"])
def test_a_second_turn_with_the_same_cache(whole: bool) -> None:
    """Rules of fixed spans and of all tokens mean the same at any length: the cache grows, and nothing is lost."""
    from attn_plugins.methods.moa import SpanPlan

    plan = SpanPlan(((5, 9), (0, 12)), ((0, 0), (1, 0)), "kv", 4, 2, sink=2, block=1)
    model = tiny().double()
    ids, mask = prompt(tokens=20, left=(0, 3))
    more = torch.randint(3, 64, (2, 15), generator=torch.Generator().manual_seed(4))
    attn_plugins.patch(model, "moa", plan=plan)
    first = generated(model, ids, mask, 5)
    text = torch.cat([first.sequences, more], dim=1)
    seen = torch.cat([mask, torch.ones(2, 20, dtype=mask.dtype)], dim=1)
    given = text if whole else torch.cat([first.sequences[:, -1:], more], dim=1)  # the last one was not read yet
    second = generated(model, given, seen, 6, past_key_values=first.past_key_values)
    attn_plugins.unpatch(model)
    tokens, scores = greedy(model, text, seen, 6, plan)
    torch.testing.assert_close(torch.stack(second.logits, 1).double(), scores, rtol=0, atol=1e-5)
    assert torch.equal(second.sequences[:, -6:], tokens[:, -6:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_of_ones_own_keeps_the_rule_and_says_that_it_saves_nothing(cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    model = tiny()
    ids, mask = prompt(tokens=21, left=(3, 0))
    tokens, scores = greedy(model, ids, mask, 6, UNEVEN)
    attn_plugins.patch(model, "moa", plan=UNEVEN)
    given = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=40)
    with pytest.warns(UserWarning, match="no memory is saved") as said:
        out = generated(model, ids, mask, 6, past_key_values=given)
    assert sum("no memory" in str(one.message) for one in said) == 1
    check(torch.stack(out.logits, 1), scores)
    assert torch.equal(out.sequences, tokens)


def test_blocks_as_published() -> None:
    """A prefill by blocks of 64; chunks of it see the same; decoding goes by tokens."""
    from attn_plugins.methods.moa import SpanPlan
    from attn_plugins.patches.caches import ring_cache

    plan = SpanPlan(((128, 192), (0, 256)), ((0, 0), (1, 0)), "kv", 4, 2)
    model = tiny().double()
    for padding in ({}, {"left": (0, 70)}):
        ids, mask = prompt(tokens=400, **padding)
        expected = expected_logits(model, ids, mask, plan, 400, grain=64)
        at = positions(mask)
        with attn_plugins.patched(model, "moa", plan=plan, granularity="block"), torch.no_grad():
            pieces, cache = [], ring_cache(model, 400)
            for here in (slice(0, 301), slice(301, 400)):
                given = {"attention_mask": mask[:, : here.stop], "position_ids": at[:, here]}
                pieces.append(model(ids[:, here], past_key_values=cache, **given).logits)
        found = torch.cat(pieces, dim=1)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)
