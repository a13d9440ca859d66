"""The probe: the model's own numbers, gradients that are autograd's, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from attn_plugins.patches.attention_probe import dense_attention, output_gradients, replaced_attention
from attn_plugins.search import block_influence
from tests.support.tiny_language import tiny

IDS = torch.arange(3, 43)[None] % 61


def tables() -> list[set[str]]:
    return [set(t._global_mapping) for t in (transformers.AttentionInterface, transformers.AttentionMaskInterface)]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi", "GPTNeoX", "Olmo2", "Cohere"])
def test_dense_attention_in_its_place_is_the_model(name):
    model, before = tiny(name), tables()
    expected = model(IDS, use_cache=False).logits
    layers = []

    def attend(layer, *args):
        layers.append(layer)
        return dense_attention(layer, *args)

    with replaced_attention(model, attend):
        found = model(IDS, use_cache=False).logits
        assert tables() != before
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert layers == [0, 1] and tables() == before and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_an_error_inside_leaves_nothing_behind():
    model, before = tiny(), tables()
    model.set_attn_implementation("eager")
    with pytest.raises(KeyError), replaced_attention(model, dense_attention):
        raise KeyError("of the user's")
    assert tables() == before and model.config._attn_implementation == "eager"


def test_two_models_at_once_and_the_inner_one_first():
    one, other = tiny(), tiny("Qwen2")
    seen = []
    with replaced_attention(one, lambda layer, *rest: (seen.append("one"), dense_attention(layer, *rest))[1]):  # noqa: SIM117
        with replaced_attention(other, lambda layer, *rest: (seen.append("other"), dense_attention(layer, *rest))[1]):
            one(IDS, use_cache=False)
            other(IDS, use_cache=False)
    assert seen == ["one", "one", "other", "other"]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_a_zero_added_to_each_output(frozen):
    model = tiny().double().requires_grad_(not frozen)

    def loss(logits):
        return logits[0, -3:].logsumexp(-1).sum()

    got = {}
    value, layers = output_gradients(model, IDS, loss, lambda layer, q, k, v, grad, scale: got.update({layer: grad}))
    zeros = [torch.zeros(1, 4, IDS.shape[1], 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with replaced_attention(model, lambda layer, *rest: dense_attention(layer, *rest) + zeros[layer]):
        expected_value = loss(model(IDS, use_cache=False).logits)
        expected = torch.autograd.grad(expected_value, zeros)
    assert layers == 2 and value == pytest.approx(expected_value.item(), rel=1e-12)
    for layer in range(2):
        assert float(expected[layer].abs().max()) > 1e-3
        torch.testing.assert_close(got[layer], expected[layer], rtol=1e-9, atol=1e-12)
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())


def test_influence_foresees_what_hiding_one_pair_does_to_the_models_loss():
    """A pair of little weight, hidden in the model itself: the loss changes as the tile says, to first order."""
    model = tiny(num_hidden_layers=1).double()

    def loss(logits):
        return -logits[0, 20:].log_softmax(-1)[..., 7].sum()

    maps = []

    def take(layer, q, k, v, grad, scale):
        maps.append(block_influence(q[0], k[0], v[0], grad[0], scale=scale, block=1))

    plain, _ = output_gradients(model, IDS, loss, take)
    head, row = 2, 30
    checked = 0
    for column in (3, 11, 17, 29):

        def attend(layer, q, k, v, scale, column=column):
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = (q @ k.mT * scale).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf"))
            scores[:, head, row, column] = float("-inf")
            return scores.softmax(-1) @ v

        with replaced_attention(model, attend), torch.no_grad():
            change = float(loss(model(IDS, use_cache=False).logits)) - plain
        first_order = float(maps[0][head, row, column])
        if first_order < 0.02:  # beyond, second order counts
            checked += 1
            assert abs(change) == pytest.approx(first_order, rel=0.2, abs=1e-4)
    assert checked >= 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Gemma2", {}, "caps its scores|sliding window"),
        ("GptOss", {}, "learned sinks|sliding window"),
        ("Mistral", {"sliding_window": 16}, "sliding window of 16 tokens"),
    ],
)
def test_what_is_more_than_causal_attention_is_refused(name, options, message):
    model, before = tiny(name, **options), tables()
    with pytest.raises(ValueError, match=message), replaced_attention(model, dense_attention):
        model(IDS, use_cache=False)
    assert tables() == before


def test_padding_and_caches_are_refused():
    model = tiny()
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    with replaced_attention(model, dense_attention):
        with pytest.raises(ValueError, match="padding"):
            model(IDS, attention_mask=mask, use_cache=False)
        first = model(IDS, use_cache=True)
        with pytest.raises(ValueError, match="1 queries beside 41 keys"):
            model(IDS[:, :1], past_key_values=first.past_key_values)


def test_a_model_without_the_interface_is_refused():
    with (
        pytest.raises(TypeError, match="Linear does not route"),
        replaced_attention(torch.nn.Linear(2, 2), dense_attention),
    ):
        pass
