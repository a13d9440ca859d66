"""Compiled generation: a static cache, one graph per step, prompts padded on the left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from tests.support.tiny_language import check, greedy, patch, prompt, tiny

# groups and classes; a sliding window of its own in some layers, with sinks, with capped scores
CASES = [
    ("Llama", (6, 3, 2)),
    ("Gemma3Text", (5,)),
    ("GptOss", (5,)),
    ("Gemma2", (5,)),
]


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, compiled: bool, steps: int = 5) -> Any:
    from transformers import CompileConfig

    options: dict[str, Any] = {"disable_compile": True}
    if compiled:
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
        options = {"compile_config": config}
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, cache_implementation="static",
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def compiled_generation(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, int]:
    """(what was generated, how many graphs that took)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = generate(model, ids, mask, compiled=True)
    return out, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("architecture", "rule"), CASES)
def test_compiled_generation(architecture: str, rule: tuple[int, ...]) -> None:
    model = tiny(architecture)
    ids, mask = prompt(tokens=11, left=(0, 4))
    expected_ids, expected = greedy(model, ids, mask, 5, *rule)
    dense = generate(model, ids, mask, compiled=False)
    patch(model, *rule)
    found, graphs = compiled_generation(model, ids, mask)
    check(torch.stack(found.logits, 1), expected)
    assert torch.equal(found.sequences, expected_ids)
    attn_plugins.unpatch(model)
    again = generate(model, ids, mask, compiled=True)  # the graph that was made under the patch is not used
    check(torch.stack(again.logits, 1), torch.stack(dense.logits, 1))
    assert graphs == compiled_generation(model, ids, mask)[1]
