"""Agents of a grid: their number, their means and where they stand."""

import math

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops.agent import agent_centres, agent_grid, pool_tokens, pooled_grid
from tests.support.tolerance import within

POOLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
CASES = [
    ((8, 8), (2, 2)), ((24, 40), (6, 10)), ((25, 25), (7, 7)), ((33, 47), (8, 12)), ((14, 14), (7, 7)),
    ((7, 7), (7, 7)), ((50,), (7,)), ((40,), (2,)), ((5, 6, 7), (2, 6, 3)), ((1, 9), (1, 4)),
]  # fmt: skip


def theirs(x, grid, to, before):
    """PyTorch's pooling of (B, H, N, D)."""
    image = x[:, :, before : before + math.prod(grid)].transpose(-1, -2).reshape(x.shape[0], -1, *grid)
    return POOLS[len(grid) - 1](image, to).reshape(*x.shape[:2], x.shape[3], -1).transpose(-1, -2)


@pytest.mark.parametrize(("grid", "to"), CASES)
@pytest.mark.parametrize("before", [0, 2])
def test_as_pytorch_pools(grid, to, before):
    x = torch.randn(2, 3, before + math.prod(grid) + 1, 4, dtype=torch.float64, requires_grad=True)
    found, expected = pool_tokens(x, grid, to, before), theirs(x, grid, to, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    upstream = torch.randn_like(found)
    grads = [torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)
    assert not grads[0][:, :, :before].any() and not grads[0][:, :, -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("grid", "to"), CASES)
def test_as_good_as_pytorch_in_the_same_precision(grid, to, dtype):
    x = (3 + torch.randn(2, 3, math.prod(grid), 4, dtype=torch.float64)).to(dtype)
    assert within(pool_tokens(x, grid, to), theirs(x, grid, to, 0), theirs(x.double(), grid, to, 0))


def fused(x):
    """As one of three that a fused projection gave: the tokens lie three times as far apart."""
    return torch.stack([x, x, x], dim=2).transpose(1, 3).contiguous().transpose(1, 3)[:, :, 1]


LAYOUTS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels outside": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "fused": fused,
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grid", "to"), CASES)
def test_any_memory_layout(grid, to, layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 1 + math.prod(grid), 4, dtype=torch.float64)).requires_grad_()
    found, expected = pool_tokens(x, grid, to, 1), theirs(x, grid, to, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    upstream = torch.randn_like(found)
    grads = [torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


def test_any_layout_of_features():
    x = torch.randn(2, 30, 3, 8)
    heads = pool_tokens(x.transpose(1, 2), (5, 6), (2, 3))
    torch.testing.assert_close(pool_tokens(x.flatten(2), (5, 6), (2, 3)).unflatten(-1, (3, 8)).transpose(1, 2), heads)


def test_a_projection_and_pooling_commute():
    x, project = torch.randn(1, 33 * 47, 16, dtype=torch.float64), torch.nn.Linear(16, 24, dtype=torch.float64)
    one, other = pool_tokens(project(x), (33, 47), (8, 12)), project(pool_tokens(x, (33, 47), (8, 12)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("grid", "agents", "expected"),
    [
        ((64, 64), 256, (16, 16)), ((128, 128), 1024, (32, 32)), ((24, 40), 60, (6, 10)), ((25, 25), 39, (6, 6)),
        ((14, 14), 49, (7, 7)), ((33, 47), 97, (8, 12)),
        ((1, 64, 64), 256, (1, 16, 16)), ((21, 30, 52), 4095, (10, 15, 27)),
        ((4096,), 256, (256,)), ((8, 8), 1, (1, 1)), ((8, 8), 1000, (8, 8)), ((2, 512), 16, (1, 16)),
    ],
)  # fmt: skip
def test_the_agents_of_a_grid(grid, agents, expected):
    assert agent_grid(grid, agents) == expected


def test_about_as_many_agents_as_asked_for():
    for height in range(16, 70, 3):
        for width in range(16, 70, 5):
            wanted = max(4, height * width // 16)
            assert abs(math.prod(agent_grid((height, width), wanted)) / wanted - 1) < 0.15


def test_pooled_by_factors():
    assert pooled_grid((64, 64), (2, 2)) == (32, 32) and pooled_grid((25, 33, 3), (2, 4, 1)) == (13, 9, 3)


def test_centres_are_the_means_of_positions():
    positions = torch.cartesian_prod(torch.arange(25.0), torch.arange(40.0))
    expected = pool_tokens(positions, (25, 40), (7, 10))
    torch.testing.assert_close(agent_centres((25, 40), (7, 10)), expected)
    assert agent_centres((8,), (2,)).flatten().tolist() == [1.5, 5.5]


def test_the_pooling_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(pool_tokens, fullgraph=True, backend="aot_eager")
    for grid, to in (((8, 8), (2, 2)), ((25, 25), (7, 7))):
        x = torch.randn(1, 2, math.prod(grid) + 3, 4)
        assert torch.equal(compiled(x, grid, to, 3), pool_tokens(x, grid, to, 3))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: agent_grid((4, 0), 2), r"grid=\(4, 0\)"),
        (lambda: agent_grid((4, 4), 0), "agents=0: legal is 1 or more"),
        (lambda: pooled_grid((4, 4), (2,)), r"factors=\(2,\) of grid=\(4, 4\)"),
        (lambda: pool_tokens(torch.zeros(15, 3), (4, 4), (2, 2)), "is 16 tokens, x has 15"),
        (lambda: pool_tokens(torch.zeros(16, 3), (4, 4), (5, 2)), r"to=\(5, 2\): .* from 1 to the grid's"),
        (lambda: pool_tokens(torch.zeros(16, 3), (2, 2, 2, 2), (1, 1, 1, 1)), "legal are 1 to 3 axes"),
        (lambda: agent_centres((4, 4), (2,)), r"to=\(2,\)"),
    ],
)
def test_errors(call, named):
    with pytest.raises(ValueError, match=named):
        call()
