"""Capped scores (Gemma 2) and learned sinks (GPT-OSS) under a causal window, against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.method import AttentionCall
from attn_plugins.methods.gna import GNA, GNAConfig
from tests.support.tiny_language import patch, positions, prompt, tiny, visible
from tests.support.tolerance import within

RULES = [(5, 1, 1), (6, 3, 1), (4, 2, 2), (-1, 1, 1), (64, 1, 1)]


def call(queries: int, keys: int, dtype: torch.dtype, sinks: bool, softcap: float | None) -> AttentionCall:
    made = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, heads, tokens, 8, generator=made, dtype=torch.float64).to(dtype).requires_grad_()
        for heads, tokens in ((4, queries), (2, keys), (2, keys))
    )
    learned = torch.randn(4, generator=made, dtype=torch.float64).to(dtype).requires_grad_() if sinks else None
    return AttentionCall(q, k, v, "causal", scale=0.5, causal=True, softcap=softcap, sinks=learned)


def definition(given: AttentionCall, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole matrix of scores, the sink as a column of its own."""
    q, k, v = (t.to(dtype) for t in (given.q, given.k, given.v))
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * given.scale
    if given.softcap is not None:
        scores = torch.tanh(scores / given.softcap) * given.softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if given.sinks is not None:
        scores = torch.cat([scores, given.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : v.shape[2]] @ v


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("sinks", "softcap"), [(True, None), (False, 0.8), (True, 0.8)])
@pytest.mark.parametrize("queries", [23, 9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition(
    rule: tuple[int, int, int], sinks: bool, softcap: float | None, queries: int, dtype: torch.dtype
) -> None:
    """All at once, behind a cache, one token: no further off than twice PyTorch's own matrix in that precision."""
    window, stride, dilation = rule
    given = call(queries, 23, dtype, sinks, softcap)
    processor = GNA().processor(GNAConfig(window=window, stride=stride, dilation=dilation), 0, 1, "causal")
    seen = visible(torch.ones(1, 23), 23 if window == -1 else window, stride, dilation)[:, :, 23 - queries :]
    assert processor.refuses(given) is None
    ours = processor(given)
    exact = definition(given, seen, torch.float64)
    assert within(ours, definition(given, seen, dtype), exact)
    if dtype == torch.float32:
        wanted = [t for t in (given.q, given.k, given.v, given.sinks) if t is not None]
        found = torch.autograd.grad(ours.sin().sum(), wanted)
        for gradient, expected in zip(found, torch.autograd.grad(exact.sin().sum(), wanted), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_sinks_matter_and_a_low_one_is_none() -> None:
    given = call(23, 23, torch.float32, True, None)
    processor = GNA().processor(GNAConfig(window=5, stride=1), 0, 1, "causal")
    with torch.no_grad():
        found = processor(given)
        given.sinks = torch.full((4,), -1e4)
        low = processor(given)
        given.sinks = None
        assert not torch.allclose(found, low, atol=1e-2)
        torch.testing.assert_close(low, processor(given))


def test_sinks_of_another_shape_are_refused() -> None:
    given = call(23, 23, torch.float32, True, None)
    given.sinks = torch.zeros(2)
    assert "sinks" in GNA().processor(GNAConfig(window=5, stride=1), 0, 1, "causal").refuses(given)


def test_a_method_that_knows_neither_refuses() -> None:
    given = call(23, 23, torch.float32, True, None)
    given.causal = False
    assert "sinks" in GNA().processor(GNAConfig(window=5), 0, 1, "self").refuses(given)


@pytest.mark.parametrize("architecture", ["GptOss", "Gemma2"])
def test_gradients_through_the_model(architecture: str) -> None:
    """Sinks learn: the gradients of all parameters, in float64, against the model's own attention under a matrix."""
    found: list[dict[str, torch.Tensor]] = []
    for patched in (False, True):
        model = tiny(architecture).double()
        model.set_experts_implementation("eager")  # the other one knows no float64
        ids, mask = prompt(left=(0, 4))
        given: Any = mask
        if patched:
            patch(model)
        else:
            types = {"sliding_attention": 4, "full_attention": None}
            seen = {name: visible(mask, 5, sliding=sliding) for name, sliding in types.items()}
            given = {name: torch.zeros(rows.shape).double().masked_fill(~rows, -1e300) for name, rows in seen.items()}
        logits = model(ids, attention_mask=given, position_ids=positions(mask), use_cache=False).logits
        (logits.sin() * mask[..., None]).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert architecture != "GptOss" or found[1]["model.layers.0.self_attn.sinks"].abs().max() > 1e-3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)  # eager's softmax is in float32


def test_dense_fallback_of_a_model_whose_attention_is_eager_alone() -> None:
    """What a window cannot honour runs the model's own attention, sinks and all."""
    model = tiny("GptOss")
    ids, _ = prompt()
    mask = torch.zeros(2, 1, 23, 23).masked_fill(~torch.ones(23, 23).tril().bool(), torch.finfo(torch.float32).min)
    given = {"sliding_attention": mask, "full_attention": mask}
    with torch.no_grad():
        dense = model(ids, attention_mask=given).logits
        attn_plugins.patch(model, "gna", window=5, stride=1)
        with pytest.warns(UserWarning, match="of its own making"):
            assert torch.equal(model(ids, attention_mask=given).logits, dense)
