"""Regions in one layer against their definition in float64; guidance, gradients, large scores, memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attn_plugins.method import AttentionCall
from attn_plugins.methods.regions import RegionsConfig
from attn_plugins.methods.regions.method import Regions, _layout
from attn_plugins.prompts import TextParts
from attn_plugins.sequence import Sequence
from tests.support.live_bytes import LiveBytes
from tests.support.regions import definition, unconditional
from tests.support.tolerance import within

GRID, LENGTHS, OTHERS = (3, 4), (5, 2, 3), 2
SOFT = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
HARD = [((0, 0, 0.5, 1), "a"), ((0.5, 0, 1, 2 / 3), "b")]
BLENDED = [((0, 0, 0.6, 1), "a", 2.0), (SOFT, "b")]
FLOAT = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def call(
    kind: str, dtype: torch.dtype, before: bool = True, rows: tuple[int, int] = (0, 2), **more: Any
) -> AttentionCall:
    """A call of 2 batch items and 2 heads on GRID, with the text of all prompts."""
    tokens = {"self": 12, "cross": 12, "joint": 12 + sum(LENGTHS) + OTHERS * before}[kind]
    keys = sum(LENGTHS) if kind == "cross" else tokens
    shapes = [(2, 2, count, 8) for count in (tokens, keys, keys)]
    q, k, v = (torch.randn(*s, generator=torch.Generator().manual_seed(n)).to(dtype) for n, s in enumerate(shapes))
    sides = {"text_before": sum(LENGTHS), "text_after": OTHERS} if before else {"text_after": sum(LENGTHS)}
    sequence = Sequence(GRID, **(sides if kind == "joint" else {}))
    return AttentionCall(q, k, v, kind, sequence, parts=TextParts(LENGTHS, rows), **more)  # type: ignore[arg-type]


def run(given: AttentionCall, regions: list[Any], **options: Any) -> torch.Tensor:
    config = RegionsConfig.from_options(regions=regions, **options)
    processor = Regions().processor(config, 0, 1, given.kind)
    assert processor is not None and processor.refuses(given) is None
    return processor(given)


def expected(given: AttentionCall, regions: list[Any], dtype: torch.dtype, **options: Any) -> torch.Tensor:
    config = RegionsConfig.from_options(regions=regions, **options)
    return definition(given, config, _layout(config), dtype)


CASES = list(itertools.product(("cross", "joint-", "joint+", "self"), ("couple", "masked"), ("full", "masked")))


@pytest.mark.parametrize("regions", [HARD, BLENDED], ids=["hard", "soft"])
@pytest.mark.parametrize(("kind", "mode", "self_attention"), [c for c in CASES if c[0] != "self" or c[2] == "masked"])
def test_the_rule(kind: str, mode: str, self_attention: str, regions: list[Any]) -> None:
    options = {"mode": mode, "self_attention": self_attention}
    before = not kind.endswith("-")
    for dtype in FLOAT.values():
        given = call(kind.rstrip("+-"), dtype, before)
        exact, theirs = (expected(given, regions, d, **options) for d in (torch.float64, dtype))
        assert within(run(given, regions, **options), theirs, exact)
        assert within(run(given, regions, backend="reference", **options), theirs, exact)


def test_the_base_prompt_weighs_everywhere() -> None:
    given = call("cross", torch.float32)
    exact, theirs = (expected(given, BLENDED, dtype, base=0.5) for dtype in (torch.float64, torch.float32))
    out = run(given, BLENDED, base=0.5)
    assert within(out, theirs, exact)
    assert not torch.allclose(out, run(given, BLENDED), atol=1e-3)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_hard_masks_make_both_modes_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = call(kind, torch.float64)
    layout = _layout(RegionsConfig.from_options(regions=HARD))
    assert layout.is_hard(GRID)
    couple, masked = (run(given, HARD, mode=mode) for mode in ("couple", "masked"))
    assert torch.equal(couple, masked)
    # and so they do where the sum is run, not the one plan that takes its place
    monkeypatch.setitem(layout._kept, ("hard", GRID), False)
    torch.testing.assert_close(run(given, HARD), masked)


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
@pytest.mark.parametrize("mode", ["couple", "masked"])
def test_the_unconditional_half_sees_what_it_saw(kind: str, mode: str) -> None:
    guided, alone = call(kind, torch.float32, rows=(1, 2)), call(kind, torch.float32)
    out, all_of_it = (run(one, BLENDED, mode=mode, self_attention="masked") for one in (guided, alone))
    assert torch.equal(out[1], all_of_it[1])
    exact, theirs = (unconditional(guided, slice(0, 1), dtype) for dtype in (torch.float64, torch.float32))
    assert within(out[:1], theirs, exact)


@pytest.mark.parametrize("mode", ["couple", "masked"])
def test_swapping_prompts_is_swapping_masks(mode: str) -> None:
    given = call("cross", torch.float32)
    k, v = ([t[:, :, :5], t[:, :, 5:7], t[:, :, 7:]] for t in (given.k, given.v))
    swapped = call("cross", torch.float32)
    swapped.k, swapped.v = (torch.cat([rows[0], rows[2], rows[1]], dim=2) for rows in (k, v))
    swapped.parts = TextParts((5, 3, 2), (0, 2))
    one = run(given, [((0, 0, 0.5, 1), "a"), (SOFT, "b")], mode=mode)
    other = run(swapped, [(SOFT, "b"), ((0, 0, 0.5, 1), "a")], mode=mode)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, run(given, [(SOFT, "b"), ((0, 0, 0.5, 1), "a")], mode=mode), atol=1e-2)


@pytest.mark.parametrize("dtype", FLOAT.values(), ids=FLOAT)
@pytest.mark.parametrize("mode", ["couple", "masked"])
def test_large_scores_make_no_nan(mode: str, dtype: torch.dtype) -> None:
    for kind in ("cross", "joint"):
        given = call(kind, dtype)
        given.q = given.q * 200
        assert run(given, BLENDED, mode=mode, self_attention="masked").isfinite().all()


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
def test_gradients(kind: str) -> None:
    """As those of the definition, in float64; those of what nobody sees are 0."""
    for mode in ("couple", "masked"):
        options = {"mode": mode, "self_attention": "masked"}
        grads = []
        for ours in (True, False):
            given = call(kind, torch.float64)
            leaves = [t.requires_grad_() for t in (given.q, given.k, given.v)]
            out = run(given, BLENDED, **options) if ours else expected(given, BLENDED, torch.float64, **options)
            out.square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_batch_items_are_alone() -> None:
    given = call("joint", torch.float32)
    whole = run(given, BLENDED)
    for item in range(2):
        one = call("joint", torch.float32, rows=(0, 1))
        one.q, one.k, one.v = (t[item : item + 1] for t in (given.q, given.k, given.v))
        torch.testing.assert_close(run(one, BLENDED)[0], whole[item])


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    grid = (64, 64)
    q = torch.randn(1, 1, 4096, 8)
    given = AttentionCall(q, q, q, "self", Sequence(grid), parts=TextParts((4, 4, 4), (0, 1)))
    with LiveBytes([q]) as live:
        run(given, [((0, 0, 0.51, 1), "a"), ((0.49, 0, 1, 0.7), "b")], mode="masked", self_attention="masked")
    assert live.peak < 4096 * 4096 / 8  # the bits of a matrix of all pairs


def test_one_graph_forward_and_backward() -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        given = call("joint", torch.float32, rows=(1, 2))
        processor = Regions().processor(RegionsConfig.from_options(regions=BLENDED, base=0.1), 0, 1, given.kind)
        leaves = [t.requires_grad_() for t in (given.q, given.k, given.v)]
        attend = torch.compile(processor, fullgraph=True, backend="aot_eager") if compiled else processor
        out = attend(given)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()
