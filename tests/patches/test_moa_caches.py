"""Ring caches as transformers uses caches: reordered, reset, repeated, copied, grown; what they cannot is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.ops.decode import layout
from attn_plugins.patches.caches import RingLayer, ring_cache
from tests.support.moa import EVEN, UNEVEN, expected_logits, generated
from tests.support.tiny_language import check, prompt, tiny


@pytest.fixture(autouse=True)
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of a few tokens are parted here, as long ones are."""
    monkeypatch.setattr(layout, "LONG", 8)


@pytest.fixture
def model() -> Any:
    made = tiny()
    attn_plugins.patch(made, "moa", plan=UNEVEN)
    with torch.no_grad():
        yield made


def filled(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, length: int = 40) -> Any:
    cache = ring_cache(model, length)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def after(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("padding", [{}, {"left": (4, 0, 2)}])
def test_the_batch_is_rearranged(model: Any, padding: dict[str, Any]) -> None:
    ids, mask = prompt(batch=3, tokens=20, **padding)
    more = torch.randint(3, 64, (3, 1), generator=torch.Generator().manual_seed(3))
    longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    want = after(model, filled(model, ids, mask), more, longer)
    for order, change in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache = filled(model, ids, mask)
        change(cache)
        check(after(model, cache, more[order], longer[order]), want[order])


def test_a_reset_cache_is_as_new(model: Any) -> None:
    ids, mask = prompt(tokens=20, left=(4, 0))
    cache = filled(model, ids, mask)
    cache.reset()
    assert cache.get_seq_length() == 0
    other = ids.flip(1)
    assert torch.equal(after(model, cache, other), after(model, ring_cache(model, 40), other))


def test_copies_are_on_their_own(model: Any) -> None:
    """A prompt is read once, and continued twice."""
    ids, _ = prompt(tokens=20)
    cache = filled(model, ids)
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    want = after(model, cache, ids[:, :3])
    for twin in twins:
        assert twin.get_seq_length() == 20
        assert torch.equal(after(model, twin, ids[:, :3]), want)


def test_a_text_longer_than_told_makes_the_rings_grow(model: Any) -> None:
    """Heads that see everything go on seeing it."""
    attn_plugins.unpatch(model)
    ids, mask = prompt(tokens=40)
    expected = expected_logits(model, ids, mask, EVEN, 40)
    attn_plugins.patch(model, "moa", plan=EVEN)
    for told in (10, 39, 40):
        cache = ring_cache(model, told)
        pieces = [model(ids[:, here], past_key_values=cache).logits for here in (slice(0, 9), slice(9, 20))]
        pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)]
        check(torch.cat(pieces, dim=1), expected)
        assert cache.layers[1].length >= 40


def test_a_static_cache_says_that_it_cannot_grow(model: Any) -> None:
    ids, mask = prompt(tokens=20)
    first = generated(model, ids, mask, 4, cache_implementation="static")
    text = torch.cat([first.sequences, ids], dim=1)
    with pytest.raises(ValueError, match="static ring cache of 24 tokens"):
        generated(model, text, torch.ones_like(text), 4, past_key_values=first.past_key_values)


def test_tokens_cannot_be_given_back(model: Any) -> None:
    cache = filled(model, prompt()[0])
    assert not cache.is_croppable
    cache.layers[0].crop(0)
    with pytest.raises(RuntimeError, match="cannot give tokens back"):
        cache.crop(-1)


def test_memory_is_that_of_the_plan(model: Any) -> None:
    """To the byte: the kept tokens of every KV head, and one slot a layer that is never read."""
    ids, mask = prompt(tokens=100)
    out = generated(model, ids, mask, 28)
    kept = UNEVEN.cache_lengths(128).sum().item()
    layers = out.past_key_values.layers
    assert all(isinstance(layer, RingLayer) for layer in layers)
    assert sum(layer.nbytes for layer in layers) == 2 * (kept + 2) * 8 * 4 * 2
    dense = 2 * 2 * 2 * 127 * 8 * 4 * 2
    assert sum(layer.nbytes for layer in layers) < 0.5 * dense


def test_lengths_and_masks_are_told_like_a_dynamic_cache(model: Any) -> None:
    cache = filled(model, prompt(tokens=20)[0])
    assert cache.get_seq_length() == 20
    assert cache.get_mask_sizes(3, 0) == (23, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable


@pytest.mark.parametrize("padding", [{}, {"left": (0, 7)}])
def test_rings_grow_with_the_text(model: Any, monkeypatch: Any, padding: dict[str, Any]) -> None:
    """A text that ends early has not paid for all that it might have become; and growing changes nothing."""
    from attn_plugins.patches import caches

    ids, mask = prompt(tokens=20, **padding)
    want = torch.stack(generated(model, ids, mask, 20).logits)
    monkeypatch.setattr(caches, "SLACK", 1)
    monkeypatch.setattr(caches, "BLOCK", 1)
    out = generated(model, ids, mask, 20)
    check(torch.stack(out.logits), want)
    assert out.past_key_values.layers[1].capacity < 39 + 6
    cache = ring_cache(model, 100_000)
    model(ids, attention_mask=mask, past_key_values=cache)
    assert sum(layer.nbytes for layer in cache.layers) < 2 * 2 * 2 * 2 * 32 * 8 * 4
