"""What a causal window cannot honour runs what the model ran before, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.support.tiny_language import additive, patch, prompt, tiny

REFUSALS = {
    "a mask matrix": (lambda ids: {"attention_mask": torch.ones(2, 1, 23, 23).tril().bool()}, "of its own making"),
    "packed sequences": (
        lambda ids: {"position_ids": torch.arange(23).remainder(10)[None].expand(2, -1), "use_cache": False},
        "of its own making",
    ),
    "weights": (lambda ids: {"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_honoured_is_dense_with_one_warning(case: str, implementation: str) -> None:
    make, words = REFUSALS[case]
    model = tiny()
    model.set_attn_implementation(implementation)
    ids, _ = prompt()
    arguments = make(ids)
    if case == "a mask matrix" and implementation == "eager":  # which adds what it is given
        arguments["attention_mask"] = additive(arguments["attention_mask"], torch.float32)
    with torch.no_grad():
        expected = model(ids, **arguments)
        patch(model)
        with pytest.warns(UserWarning, match=words) as caught:
            found = model(ids, **arguments)
            model(ids, **arguments)
    assert len([row for row in caught if "attn_plugins" in str(row.message)]) == 1
    assert torch.equal(found.logits, expected.logits)
    if case == "weights" and implementation == "eager":
        assert torch.equal(torch.stack(found.attentions), torch.stack(expected.attentions))


def test_dropout_is_dense() -> None:
    model = tiny(attention_dropout=0.5).train()
    ids, _ = prompt()
    patch(model)
    with pytest.warns(UserWarning, match="dropout"):
        model(ids)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [{}, {"left": (0, 4)}, {"right": (2, 5)}])
@pytest.mark.parametrize("sliding", [None, 6])
def test_layers_that_are_not_patched_are_bit_identical(
    implementation: str, padding: dict[str, Any], sliding: int | None
) -> None:
    """Their own implementation, given a mask in its own form: prefill, a chunk, a step."""
    model = tiny("Mistral", sliding_window=sliding)
    model.set_attn_implementation(implementation)
    ids, mask = prompt(**padding)

    def run() -> torch.Tensor:
        cache, outs = None, []
        for here in (slice(0, 14), slice(14, 20), slice(20, 21)):
            out = model.model(ids[:, here], attention_mask=mask[:, : here.stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.last_hidden_state)
        return torch.cat(outs, 1)[mask[:, :21].bool()]

    with torch.no_grad():
        dense = run()
        handle = patch(model, layers=[1])
        assert not torch.equal(run(), dense)
        for layer in handle.patches[0].layers:
            layer.processor = Dense()
        torch.testing.assert_close(run(), dense, rtol=0, atol=0)


class Dense:
    """A processor that takes nothing, by choice."""

    def refuses(self, call: Any) -> str | None:
        return None

    def __call__(self, call: Any) -> None:
        return None


@pytest.mark.parametrize("architecture", ["Gemma3Text", "GptOss"])
def test_a_stride_beside_a_sliding_window_leaves_those_layers_dense(architecture: str) -> None:
    """And only those: the other one of two has no window of its own."""
    model = tiny(architecture)
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids).logits
        handle = patch(model, 6, 3, layers=[0])
        with pytest.warns(UserWarning, match="sliding window of the model's own"):
            assert torch.equal(model(ids).logits, dense)
        handle.remove()
        patch(model, 6, 3, layers=[1])
        assert not torch.equal(model(ids).logits, dense)
