"""MoA in every causal language model of the registry: prompt, padding, decoding with rings, against mask matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.moa import SpanPlan
from tests.support.moa import generated, greedy
from tests.support.tiny_language import ARCHITECTURES, check, prompt, tiny

ALPHAS, BETAS = ((3, 9, 5, 20), (8, 8, 0, 4)), ((0, 0, 0.1, 0), (0, 0, 1, 0.3))


def plan_for(model: Any) -> SpanPlan:
    """For four query heads, over as many KV heads as the model has."""
    from attn_plugins.methods.moa.plan import shape_of

    _, query_heads, kv_heads = shape_of(model.config)
    return SpanPlan(ALPHAS, BETAS, "query", query_heads, kv_heads, sink=2, block=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_left_padded(architecture: str) -> None:
    model = tiny(architecture)
    ids, mask = prompt(tokens=25, left=(0, 4))
    plan = plan_for(model)
    tokens, scores = greedy(model, ids, mask, 4, plan)
    dense = torch.stack(generated(model, ids, mask, 4).logits, 1)
    handle = attn_plugins.patch(model, "moa", plan=plan)
    out = generated(model, ids, mask, 4)
    assert torch.equal(out.sequences, tokens)
    check(torch.stack(out.logits, 1), scores)
    assert not torch.allclose(scores, dense, atol=1e-3)
    rings = [type(layer).__name__ == "RingLayer" for layer in out.past_key_values.layers]
    own = getattr(model.config, "layer_types", None)
    if own is None:
        own = ["sliding_attention" if getattr(model.config, "sliding_window", None) else "full_attention"] * 2
    assert rings == [kind == "full_attention" for kind in own]  # the others keep no more than their window anyway
    handle.remove()
    assert torch.equal(torch.stack(generated(model, ids, mask, 4).logits, 1), dense)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GptOss", "Mixtral", "Phi"])
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 7}, {"cache_implementation": "static"}], ids=str)
def test_in_other_ways(architecture: str, options: dict[str, Any]) -> None:
    """Capped scores, learned sinks, windows of the model's own: in chunks, and with a static cache."""
    model = tiny(architecture)
    ids, mask = prompt(tokens=25, left=(0, 4))
    plan = plan_for(model)
    tokens, scores = greedy(model, ids, mask, 4, plan)
    attn_plugins.patch(model, "moa", plan=plan)
    out = generated(model, ids, mask, 4, **options)
    check(torch.stack(out.logits, 1), scores)
    assert torch.equal(out.sequences, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No further from the float32 result than twice the model's own plain attention is, in that precision."""
    from tests.support.moa import expected_logits
    from tests.support.tiny_language import positions

    model = tiny()
    ids, mask = prompt(tokens=40, left=(0, 4))
    plan = plan_for(model)
    exact = expected_logits(model, ids, mask, plan, 40)
    model.to(dtype)
    theirs = expected_logits(model, ids, mask, plan, 40)
    attn_plugins.patch(model, "moa", plan=plan)
    from attn_plugins.patches.caches import ring_cache

    cache, at, pieces = ring_cache(model, 40), positions(mask), []
    with torch.no_grad():
        for here in (slice(0, 30), slice(30, 39), slice(39, 40)):
            given = {"attention_mask": mask[:, : here.stop], "position_ids": at[:, here], "past_key_values": cache}
            pieces.append(model(ids[:, here], **given).logits)
    ours = torch.cat(pieces, dim=1)
    assert ours.dtype == dtype
    real = mask.bool()
    error, allowed = ((found.float() - exact)[real].pow(2).mean() for found in (ours, theirs))
    assert error <= 4 * allowed  # of squares
