"""Compiled: a forward in one graph, and generation with a static ring cache, one graph for all steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.ops.decode import layout
from tests.patches.test_language_compiled import compiled_generation
from tests.patches.test_moa_models import plan_for
from tests.support.moa import greedy
from tests.support.tiny_language import check, positions, prompt, tiny


@pytest.mark.parametrize("padding", [{}, {"left": (0, 4)}], ids=["", "padded"])
def test_compiled_generation(padding: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if padding:  # and rings that are parted, as long ones are
        monkeypatch.setattr(layout, "LONG", 8)
    model = tiny()
    ids, mask = prompt(tokens=21, **padding)
    plan = plan_for(model)
    tokens, scores = greedy(model, ids, mask, 5, plan)
    attn_plugins.patch(model, "moa", plan=plan)
    found, graphs = compiled_generation(model, ids, mask)
    assert {type(layer).__name__ for layer in found.past_key_values.layers} == {"RingLayer"}
    check(torch.stack(found.logits, 1), scores)
    assert torch.equal(found.sequences, tokens)
    assert graphs == 1  # for all steps


@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_compiles_whole(masked: bool) -> None:
    model = tiny()
    ids, mask = prompt(tokens=40, left=(0, 4))
    arguments = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False} if masked else {}
    attn_plugins.patch(model, "moa", plan=plan_for(model))
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model(ids, **arguments).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(ids, **arguments).logits
    check(found, plain, mask if masked else None)
