"""transformers' DiNAT on our operators, against a model whose whole attention is written out as loops."""

import copy
import math
import sys
import types

import pytest
import torch

from attn_plugins.patches import natten

pytest.importorskip("transformers")


@pytest.fixture
def provided():
    undo = natten.provide()
    yield
    undo()


def tiny(kernel_size, dilations):
    from transformers import DinatConfig, DinatModel

    torch.manual_seed(0)
    config = DinatConfig(
        embed_dim=16, depths=[2, 1], num_heads=[2, 4], kernel_size=kernel_size, dilations=dilations, drop_path_rate=0.0
    )
    model = DinatModel(config).eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return model


def looped_attention(module, hidden):
    """NeighborhoodAttention.forward by definition: every pixel, every key of its window."""
    batch, height, width, channels = hidden.shape
    heads, depth, kernel, dilation = (
        module.num_attention_heads,
        module.attention_head_size,
        module.kernel_size,
        module.dilation,
    )
    q, k, v = (f(hidden).reshape(batch, height, width, heads, depth) for f in (module.query, module.key, module.value))
    out = torch.zeros_like(q)

    def window(position, size):
        first = position % dilation
        same = list(range(first, size, dilation))
        index = same.index(position)
        start = min(max(index - kernel // 2, 0), len(same) - kernel)
        return [(key, i - index + kernel - 1) for i, key in list(enumerate(same))[start : start + kernel]]

    for y in range(height):
        for x in range(width):
            pairs = [(a, b, i, j) for a, i in window(y, height) for b, j in window(x, width)]
            keys = torch.stack([k[:, a, b] for a, b, _, _ in pairs], 1)
            values = torch.stack([v[:, a, b] for a, b, _, _ in pairs], 1)
            bias = torch.stack([module.rpb[:, i, j] for _, _, i, j in pairs], 0)
            scores = (q[:, None, y, x] * keys).sum(-1) / math.sqrt(depth) + bias
            out[:, y, x] = (scores.softmax(1)[..., None] * values).sum(1)
    return out.reshape(batch, height, width, channels)


@pytest.mark.parametrize(
    ("kernel_size", "dilations", "pixels"),
    [
        (3, [[1, 2], [1]], (36, 52)),
        (5, [[1, 1], [1]], (40, 44)),
        (7, [[1, 1], [1]], (32, 60)),
        (3, [[1, 3], [2]], (44, 56)),
    ],
)
def test_model_equals_the_loops(provided, monkeypatch, kernel_size, dilations, pixels):
    """Sizes that the dilation does not divide; stage two is smaller than its window and padded by the model."""
    from transformers.models.dinat.modeling_dinat import NeighborhoodAttention

    model = tiny(kernel_size, dilations)
    images = torch.randn(2, 3, *pixels, dtype=torch.float64)
    ours = model(images).last_hidden_state
    monkeypatch.setattr(
        NeighborhoodAttention,
        "forward",
        lambda self, hidden, output_attentions=False: (looped_attention(self, hidden),),
    )
    torch.testing.assert_close(ours, model(images).last_hidden_state, rtol=0, atol=1e-11)


def test_attention_weights_have_their_shape(provided):
    attentions = tiny(3, [[1, 2], [1]])(
        torch.randn(1, 3, 32, 40, dtype=torch.float64), output_attentions=True
    ).attentions
    assert attentions[0].shape == (1, 2, 8, 10, 9)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 2, 8, 10, dtype=torch.float64))


def test_the_bias_learns(provided):
    model = tiny(3, [[1, 2], [1]]).train()
    model(torch.randn(1, 3, 32, 40, dtype=torch.float64)).last_hidden_state.square().sum().backward()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("rpb")]
    assert all(parameter.grad.abs().sum() > 0 for parameter in biases)


@pytest.mark.parametrize(
    ("kernel", "dilation", "size"), [(3, 1, (3, 4)), (3, 2, (7, 6)), (5, 1, (5, 6)), (7, 1, (7, 8))]
)
def test_gradients_in_float64(kernel, dilation, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, *size, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(1, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64, requires_grad=True)

    def attention(q, k, v, rpb):
        return natten.natten2dav(natten.natten2dqkrpb(q, k, rpb, kernel, dilation).softmax(-1), v, kernel, dilation)

    assert torch.autograd.gradcheck(attention, (q, k, v, rpb), fast_mode=kernel > 3)


def test_half_precision_value_with_a_float32_softmax():
    attn, value = torch.rand(1, 2, 5, 6, 9), torch.randn(1, 2, 5, 6, 4, dtype=torch.bfloat16)
    assert natten.natten2dav(attn, value, 3).dtype == torch.bfloat16


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd sizes"):
        natten.natten2dqkrpb(torch.zeros(1, 1, 6, 6, 2), torch.zeros(1, 1, 6, 6, 2), None, 4)


def test_undo_leaves_the_module_as_it_was():
    from transformers.models.dinat import modeling_dinat

    before = dict(vars(modeling_dinat))
    state = torch.get_rng_state()
    undo = natten.provide()
    again = natten.provide()
    again()
    assert modeling_dinat.natten2dav is not before["natten2dav"]  # the second one put nothing there to take away
    undo()
    assert vars(modeling_dinat) == before
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ImportError, match="natten"):
        tiny(3, [[1, 2], [1]])


def test_a_working_natten_is_left_alone(monkeypatch):
    from transformers.models.dinat import modeling_dinat

    real = types.FunctionType((lambda: None).__code__, {"__name__": "natten.functional"})
    assert real.__module__ == "natten.functional"
    for name in natten.NAMES:
        monkeypatch.setattr(modeling_dinat, name, real)
    natten.provide()()
    assert modeling_dinat.natten2dav is real
    undo = natten.provide(replace=True)
    assert modeling_dinat.natten2dav is not real
    undo()
    assert modeling_dinat.natten2dav is real


def test_a_natten_without_the_old_names_does_not_stop_the_import(monkeypatch):
    parent = pytest.importorskip("transformers.models.dinat")
    monkeypatch.setattr(parent, "modeling_dinat", parent.modeling_dinat)  # importing anew replaces it
    package, functional = types.ModuleType("natten"), types.ModuleType("natten.functional")
    package.__path__, package.functional = [], functional
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    monkeypatch.delitem(sys.modules, natten.MODELING)
    names = copy.copy(vars(functional))
    monkeypatch.setattr("transformers.utils.is_natten_available", lambda: True)
    modeling = natten._import_modeling()
    assert vars(functional) == names
    with pytest.raises(ImportError, match="provide"):
        modeling.natten2dav()
