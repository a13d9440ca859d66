"""Agent attention with weights, as a layer: the authors' four forms by their formulas, state dicts, other sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.methods.trained_agent import AgentAttention, AgentWeights
from attn_plugins.methods.trained_agent.method import TrainedAgentConfig
from tests.support.agent_layers import layer, state_dict, stripes
from tests.support.tiny import randn

WIDTH, HEADS = 24, 3
# form, tokens per axis, agents, own tokens, reduction
FORMS = [
    ("deit", (6, 6), 9, 1, 1),
    ("deit", (7, 7), 16, 2, 1),
    ("deit", (5, 8), 4, 0, 1),
    ("pvt", (8, 8), 9, 0, 1),
    ("pvt", (8, 8), 9, 0, 2),
    ("pvt", (6, 10), 4, 0, 2),
    ("swin", (7, 7), 9, 0, 1),
    ("swin", (7, 7), 49, 0, 1),
]
AS_AUTHORS = pytest.mark.parametrize(("form", "grid", "agents", "own", "reduction"), FORMS)


def tokens(grid: tuple[int, int], own: int = 0, seed: int = 50) -> torch.Tensor:
    return randn(2, own + grid[0] * grid[1], WIDTH, seed=seed)


@AS_AUTHORS
def test_a_layer_of_the_authors_loads_by_key_and_is_their_formula(form, grid, agents, own, reduction):
    state = state_dict(form, WIDTH, HEADS, grid, agents, own, reduction)
    made = AgentAttention.from_authors(
        {f"blocks.3.attn.{name}": t for name, t in state.items()}, prefix="blocks.3.attn."
    )
    x = tokens(grid, own)
    want = layer(state, x, HEADS, grid)
    assert (made(x).double() - want).abs().max() <= 1e-5 * want.abs().max()
    assert set(made.state_dict()) == set(state)
    torch.testing.assert_close(made.double()(x.double()), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("split", [(8, 2), (2, 8), (8, 1), (8, 8)])
def test_the_stripes_of_cswin(split):
    state = state_dict("cswin", WIDTH, HEADS, split, 4)
    made = AgentAttention.from_authors(state, grid=(8, 8)).double()
    q, k, v = (tokens((8, 8), seed=seed).double() for seed in (1, 2, 3))
    want = stripes(state, q, k, v, HEADS, 8)
    torch.testing.assert_close(made((q, k, v)), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made(torch.stack([q, k, v])), want, rtol=1e-10, atol=1e-10)


def test_windows_that_are_cut_here_are_windows_that_come_as_batch_items():
    state = state_dict("swin", WIDTH, HEADS, (4, 4), 4)
    inside, batched = (
        AgentAttention.from_authors(state, grid=(8, 12), window=(4, 4)),
        AgentAttention.from_authors(state),
    )
    x = tokens((8, 12))
    image = x.reshape(2, 2, 4, 3, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(12, 16, WIDTH)
    back = batched(image).reshape(2, 2, 3, 4, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(2, 96, WIDTH)
    torch.testing.assert_close(inside(x), back)


def test_another_resolution_resizes_lines_and_blocks_between_the_middles_of_cells():
    state = state_dict("deit", WIDTH, HEADS, (6, 6), 9, 1)
    x = tokens((9, 12), 1)
    there = dict(state)
    for name, size in (("ah_bias", (9, 1)), ("aw_bias", (1, 12))):
        there[name] = F.interpolate(state[name][0], size=size, mode="bilinear")[None]
    for name, size in (("ha_bias", (9, 1)), ("wa_bias", (1, 12))):
        there[name] = F.interpolate(state[name][0].permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)[
            None
        ]
    want = layer(there, x, HEADS, (9, 12))
    loaded = AgentAttention.from_authors(state, grid=(9, 12)).double()
    torch.testing.assert_close(loaded(x.double()), want, rtol=1e-6, atol=1e-6)  # biases are resized in float32
    called = AgentAttention.from_authors(state).double()
    torch.testing.assert_close(called(x.double(), (9, 12)), want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(want, layer({**there, "ah_bias": 0 * there["ah_bias"]}, x, HEADS, (9, 12)), atol=1e-3)


def test_another_number_of_agents_resizes_the_square_they_stand_in():
    state = state_dict("deit", WIDTH, HEADS, (6, 6), 16, 1)
    made = AgentAttention.from_authors(state, agents=9)
    square = F.interpolate(state["ac_bias"][..., 0].reshape(1, HEADS, 4, 4), size=(3, 3), mode="bilinear")
    torch.testing.assert_close(made.ac_bias[..., 0].detach(), square.reshape(1, HEADS, 9))
    block = state["na_bias"].permute(0, 2, 3, 1).reshape(1, HEADS * 49, 4, 4)
    block = F.interpolate(block, size=(3, 3), mode="bilinear").reshape(HEADS, 7, 7, 9).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.na_bias.detach(), block)
    assert made(tokens((6, 6), 1)).shape == (2, 37, WIDTH)


def test_saved_and_loaded_at_another_size_keeps_what_it_can():
    small = AgentAttention(WIDTH, HEADS, grid=(6, 6), agents=9, own_tokens=1)
    large = AgentAttention(WIDTH, HEADS, grid=(12, 12), agents=9, own_tokens=1)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.an_bias, small.an_bias) and large.ah_bias.shape == (1, HEADS, 9, 12, 1)
    other = AgentAttention(WIDTH, HEADS, grid=(6, 6), agents=9, own_tokens=2)
    with pytest.raises(RuntimeError, match="ac_bias"):
        other.load_state_dict(small.state_dict())


@pytest.mark.parametrize("grid", [(12,), (3, 4, 5)])
def test_one_axis_and_three(grid):
    torch.manual_seed(1)
    made = AgentAttention(WIDTH, HEADS, grid=grid, agents=(2,) * len(grid)).double()
    x = randn(2, torch.Size(grid).numel(), WIDTH, seed=9).double()
    alone = torch.cat([made(x[:1]), made(x[1:])])
    torch.testing.assert_close(made(x), alone, rtol=1e-12, atol=1e-12)
    flat = made(x.unflatten(1, grid).flip(1).flatten(1, len(grid)))
    assert (flat.unflatten(1, grid).flip(1).flatten(1, len(grid)) - made(x)).abs().max() > 1e-3  # places matter


def test_without_biases_and_convolution_it_is_the_operator():
    from attn_plugins.ops import agent_attention
    from attn_plugins.ops.agent import pool_tokens

    bare = AgentWeights(HEADS, 8, grid=(6, 6), agents=(3, 3), own_tokens=1, bias=False, kernel=0)
    assert not list(bare.parameters())
    q, k, v = (randn(2, HEADS, 37, 8, seed=seed) for seed in (1, 2, 3))
    agents = pool_tokens(q, (6, 6), (3, 3), 1)
    assert torch.equal(bare(q, k, v), agent_attention(q, k, v, agents))
    assert torch.equal(AgentWeights(HEADS, 8, grid=(6, 6), agents=(3, 3), own_tokens=1)(q, k, v), bare(q, k, v))


def test_gradients_reach_every_weight():
    torch.manual_seed(2)
    made = AgentAttention(8, 2, grid=(3, 4), agents=(2, 2), own_tokens=1, block=3).double()
    x = randn(1, 13, 8, seed=3).double().requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))

    weights = [parameter.detach().clone().requires_grad_() for parameter in made.parameters()]
    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)
    call(x, *weights).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """No further from float64 than twice the plain formula in that precision."""
    state = state_dict("deit", WIDTH, HEADS, (6, 6), 9, 1)
    x = tokens((6, 6), 1).to(dtype)
    state = {name: t.to(dtype) for name, t in state.items()}
    made = AgentAttention.from_authors(state).to(dtype)
    plain = copy.deepcopy(made)
    want = layer(state, x, HEADS, (6, 6))
    theirs = (plain(x, backend="reference").double() - want).abs().max()
    assert (made(x).double() - want).abs().max() <= 2 * theirs


def test_a_layer_that_is_made_draws_no_random_number():
    before = torch.get_rng_state()
    made = AgentWeights(HEADS, 8, grid=(6, 6), agents=(3, 3), own_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not parameter.any() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 25}, "multiple of heads=3"),
        ({"projections": "kv"}, "legal are 'qkv', 'q_kv', 'none'"),
        ({"reduction": 2}, "projections='q_kv'"),
        ({"window": (3, 3), "own_tokens": 1}, "stand in no window"),
        ({"kernel": 2}, "odd side"),
        ({"agents": (3,)}, "per axis of the grid"),
        ({"grid": (2, 2, 2, 2)}, "1 to 3 axes"),
    ],
)
def test_sizes_that_make_no_layer(options: dict[str, Any], words: str):
    given = {"width": WIDTH, "heads": HEADS, "grid": (6, 6), "agents": 9, **options}
    with pytest.raises(ValueError, match=words):
        AgentAttention(**given)


def test_tokens_that_are_not_the_grid_are_told():
    made = AgentAttention(WIDTH, HEADS, grid=(6, 6), agents=9, own_tokens=1)
    with pytest.raises(ValueError, match=r"x has 36 tokens, and 1 own tokens and grid=\(6, 6\) make 37"):
        made(tokens((6, 6)))
    windows = AgentAttention(WIDTH, HEADS, grid=(6, 6), agents=4, window=(4, 4))
    with pytest.raises(ValueError, match="does not divide"):
        windows(tokens((6, 6)))
    with pytest.raises(ValueError, match="no agent attention there"):
        AgentAttention.from_authors({"qkv.weight": torch.zeros(3, 1)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"agents": 0}, "agents=0"),
        ({"agents": (2, 2.0)}, "agents="),
        ({"block": 0}, "block=0"),
        ({"kernel": 4}, "kernel=4"),
        ({"kernel": 0, "shortcut": 0.1}, "without one"),
    ],
)
def test_options_that_make_no_method(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        TrainedAgentConfig(**options)
