"""Rings of keys and values: any text, in any pieces, gives what masked dense attention over all of it gives."""

from __future__ import annotations

import random

import pytest
import torch

from attn_plugins.ops.decode import layout
from attn_plugins.ops.decode.rings import EMPTY, Rings
from tests.support.moa import seen
from tests.support.spans import draw_qkv
from tests.support.tolerance import sdpa


@pytest.fixture(autouse=True)
def parted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the seeds rings are parted, as long ones are; else each stands in one piece."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("seed", 0) // 2 % 2:
        monkeypatch.setattr(layout, "LONG", 4)


def drawn(seed: int) -> tuple[list[torch.Tensor], list[int], int, torch.Tensor]:
    """q, k, v in float64, spans per query head, sinks, and the attention mask of a batch padded in front."""
    dice = random.Random(seed)
    batch, kv_heads, group = dice.randint(1, 3), dice.randint(1, 3), dice.choice([1, 2, 3])
    tokens, sink = dice.randint(1, 40), dice.choice([0, 1, 3])
    spans = [dice.choice([1, 2, 5, tokens, tokens + 3, dice.randint(1, tokens)]) for _ in range(kv_heads * group)]
    if seed % 3 == 0:  # heads of a group alike: no masks
        spans = [spans[h // group * group] for h in range(len(spans))]
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    if seed % 2:
        for row in mask:
            row[: dice.randint(0, tokens)] = 0
    return draw_qkv(batch, kv_heads * group, kv_heads, tokens, tokens, 8), spans, sink, mask


def places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions and realness of all tokens, as `Rings.write` takes them."""
    step = torch.arange(mask.shape[1])
    if mask.all():
        return step[None], None
    first = torch.where(mask.any(-1), mask.argmax(-1), mask.shape[1])
    return step - first[:, None], mask.bool()


@pytest.mark.parametrize("seed", range(24))
def test_a_token_at_a_time(seed: int) -> None:
    (q, k, v), spans, sink, mask = drawn(seed)
    shown = seen(mask, spans, sink) & mask.bool()[:, None, :, None]
    want = sdpa(q, k, v, shown, None)
    rings = Rings(spans, sink, k, v)
    positions, real = places(mask)
    for t in range(q.shape[2]):
        here = slice(t, t + 1)
        own = positions[:, here]
        rings.write(k[:, :, here], v[:, :, here], own, None if real is None else real[:, here])
        for written in (t + 1, None):
            if written is None and real is None:
                continue  # without a row of positions of its own, only the host knows which slots are filled
            out, lse = rings.attend(q[:, :, here], own, written, None, "auto")
            torch.testing.assert_close(out, want[:, :, here], rtol=0, atol=1e-12)
            scores = (q[:, :, here] * 8**-0.5) @ k.repeat_interleave(len(spans) // k.shape[1], 1).transpose(-1, -2)
            expected = scores.masked_fill(~shown[:, :, here], float("-inf")).logsumexp(-1)
            torch.testing.assert_close(lse, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(16))
def test_in_pieces_the_same_is_kept(seed: int) -> None:
    """Whatever the pieces, the same tokens stand in the same slots; and `ordered` finds them in order."""
    (_, k, v), spans, sink, mask = drawn(seed)
    positions, real = places(mask)
    tokens, dice = k.shape[2], random.Random(seed)
    whole = Rings(spans, sink, k, v)
    whole.write(k, v, positions, real)
    parts, done = Rings(spans, sink, k, v), 0
    while done < tokens:
        here = slice(done, done + dice.randint(1, 9))
        done = here.stop
        parts.write(k[:, :, here], v[:, :, here], positions[:, here], None if real is None else real[:, here])
    assert torch.equal(whole.positions[:, :-1], parts.positions[:, :-1])
    kept = whole.positions[:, :-1] != EMPTY
    assert torch.equal(whole.keys[:, :-1][kept.expand(len(k), -1)], parts.keys[:, :-1][kept.expand(len(k), -1)])
    assert not bool(parts.gaps)
    held = parts.ordered(positions[:, -1] + 1)
    for b in range(len(k)):
        first = int(mask[b].argmax()) if mask[b].any() else tokens
        count = tokens - first
        for h, ring in enumerate(parts.sizes):
            row = held.positions[b % len(held.positions), h]
            row = row[row != EMPTY].tolist()
            assert row == [p for p in range(count) if p < sink or p >= count - ring]
            for column, p in enumerate(held.positions[b % len(held.positions), h].tolist()):
                if p != EMPTY:
                    assert torch.equal(held.keys[b, h, column], k[b, h, first + p])
                    assert torch.equal(held.values[b, h, column], v[b, h, first + p])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_growing_keeps_what_is_kept(seed: int) -> None:
    (_, k, v), spans, sink, mask = drawn(seed)
    positions, real = places(mask)
    rings = Rings(spans, sink, k, v)
    rings.write(k, v, positions, real)
    grown = rings.resized([span + 5 for span in spans])
    end = positions[:, -1] + 1
    before, after = rings.ordered(end), grown.ordered(end)
    for old, new in zip(before.positions.flatten(0, 1), after.positions.flatten(0, 1), strict=True):
        assert torch.equal(old[old != EMPTY], new[new != EMPTY])
    assert grown.total == rings.total + 5 * k.shape[1]
    with pytest.raises(ValueError, match="cannot shrink"):
        grown.resized(spans)


def test_items_are_chosen_and_forgotten() -> None:
    (q, k, v), _, _, mask = drawn(0)
    k, v = (t[:1].repeat(3, 1, 1, 1) + torch.arange(3.0).view(3, 1, 1, 1) for t in (k, v))
    rings = Rings([4] * q.shape[1], 1, k, v)
    rings.write(k, v, torch.arange(k.shape[2])[None])
    held = rings.keys.clone()
    rings.select(torch.tensor([2, 0, 0]))
    assert torch.equal(rings.keys, held[[2, 0, 0]])
    rings.clear()
    assert (rings.positions == EMPTY).all()


def test_bytes_are_those_of_the_kept_tokens() -> None:
    k = torch.zeros(2, 2, 1, 8)
    rings = Rings([6, 4, 16, 16], 2, k, k)
    assert rings.sizes == [6, 16]
    assert rings.nbytes == 2 * 2 * (8 + 18 + 1) * 8 * 4


def test_gaps_are_noticed() -> None:
    k = torch.zeros(2, 1, 4, 8)
    for real, gap in (([0, 1, 1, 1], False), ([1, 0, 1, 1], True), ([1, 1, 1, 0], True)):
        rings = Rings([3], 0, k, k)
        real = torch.tensor([real, [1, 1, 1, 1]], dtype=torch.bool)
        rings.write(k, k, torch.arange(4) - (~real).int().cumprod(-1).sum(-1, keepdim=True), real)
        assert bool(rings.gaps) == gap


def test_spans_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="3 spans for 2 KV heads"):
        Rings([1, 2, 3], 0, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
