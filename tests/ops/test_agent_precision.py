"""Agent attention in each precision by the tolerance rule, in compiled graphs, and as its authors wrote it."""

import math

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import cpu, depthwise, pool_tokens
from tests.support.agents import pytorchs, random_problem, upsampled
from tests.support.tolerance import within


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_pytorch_in_the_same_precision(seed, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CUT_KEYS", 20)
    problem = random_problem(seed, head_dim=32, longest=90, generic=True).to(dtype)
    ours, theirs, exact = problem.results(), problem.results(pytorchs), problem.to(torch.float64).results(pytorchs)
    for name, one in ours.items():
        assert within(one, theirs[name], exact[name]), name


@pytest.mark.parametrize("seed", [0, 2, 3, 5])
def test_one_graph_with_gradients(seed):
    problem = random_problem(seed)
    compiled = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    found, expected = problem.results(compiled), problem.results()
    for name, one in found.items():
        assert torch.equal(one, expected[name]) and one.stride() == expected[name].stride(), name


def test_images_of_other_sizes_need_few_graphs():
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(agent_attention, fullgraph=True, backend=count)
    for tokens in range(20, 30):
        q, a = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens // 4, 8)
        options = {"shortcut": 0.1, "exact_after": tokens % 3}
        assert torch.equal(compiled(q, q, q, a, **options), agent_attention(q, q, q, a, **options))
    assert graphs <= 5  # exact_after is an int of its own: 0, 1 and any


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_the_ops_are_sound_for_torch_library(seed):
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checks."""
    problem = random_problem(seed)
    names = ("q", "k", "v", "agents", "bias_aggregate", "bias_broadcast")
    tensors = [problem.tensors.get(name) for name in names]
    setting = ([0.3, 0.2], 0.0, [problem.options["exact_before"], problem.options["exact_after"]], False)
    wanting = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.attn_plugins.agent.default, (*wanting, *setting))
    results = torch.ops.attn_plugins.agent(*tensors, *setting)
    for wants in ([False, False], [t is not None for t in tensors[4:]]):
        arguments = (torch.randn_like(results[0]), *tensors, *results, *setting, wants)
        torch.library.opcheck(torch.ops.attn_plugins.agent_backward.default, arguments)


# The authors' modules: queries pooled to agents, biases of blocks, rows and columns, convolved values. All in products.
HEADS, DIM = 3, 16
PARTS = ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")


def biases_of(agents, grid, kv_grid):
    """The state of one block by the authors' names, random instead of zero."""
    (height, width), (kv_height, kv_width), h, n = grid, kv_grid, HEADS, agents
    shapes = ((h, n, 7, 7), (h, n, 7, 7), (1, h, n, kv_height, 1), (1, h, n, 1, kv_width), (1, h, height, 1, n),
              (1, h, 1, width, n), (1, h, n, 1), (1, h, 1, n))  # fmt: skip
    return dict(zip(PARTS, (torch.randn(shape) for shape in shapes), strict=True))


def summed(state, grid, kv_grid, prefix):
    """B1 (1, h, n, Nk) and B2 (1, h, Nq, n)."""
    first = upsampled(state["an"], kv_grid) + (state["ah"] + state["aw"]).flatten(-2)
    second = upsampled(state["na"], grid).transpose(-1, -2) + (state["ha"] + state["wa"]).flatten(2, 3)
    if prefix:
        first = torch.cat([state["ac"].expand(-1, -1, -1, prefix), first], dim=3)
        second = torch.cat([state["ca"].expand(-1, -1, prefix, -1), second], dim=2)
    return first, second


def authors(q, k, v, agents, first, second):
    """softmax(Q A^T + B2) (softmax(A K^T + B1) V), scaled, in plain products."""
    scale = q.shape[-1] ** -0.5
    gather = torch.softmax(torch.einsum("bhad,bhkd->bhak", scale * agents, k) + first, dim=-1)
    spread = torch.softmax(torch.einsum("bhqd,bhad->bhqa", scale * q, agents) + second, dim=-1)
    return torch.einsum("bhqa,bhak,bhkd->bhqd", spread, gather, v)


def image_of(t, grid):
    """(B, h, N, d) to (B, h * d, H, W)."""
    return t.transpose(-1, -2).reshape(len(t), -1, *grid)


def tokens_of(image):
    return image.reshape(len(image), HEADS, DIM, -1).transpose(-1, -2)


SHAPES = {
    # grid of the queries, of the keys, agents, prefix tokens
    "DeiT": ((14, 14), (14, 14), (7, 7), 1),
    "DeiT, distilled": ((14, 14), (14, 14), (7, 7), 2),
    "DeiT, wide": ((12, 20), (12, 20), (6, 8), 1),
    "PVT, sr 1": ((14, 14), (14, 14), (7, 7), 0),
    "PVT, sr 2": ((28, 28), (14, 14), (4, 4), 0),
    "Swin, a window": ((7, 7), (7, 7), (3, 3), 0),
    "Swin, the whole stage": ((28, 28), (28, 28), (4, 4), 0),
    "CSWin, a stripe": ((28, 2), (28, 2), (7, 1), 0),
    "CSWin, the whole stage": ((14, 14), (14, 14), (7, 7), 0),
}


@pytest.mark.parametrize(("grid", "kv_grid", "to", "prefix"), SHAPES.values(), ids=SHAPES)
def test_the_authors_formula(grid, kv_grid, to, prefix):
    q, k, v = (torch.randn(2, HEADS, prefix + math.prod(g), DIM) for g in (grid, kv_grid, kv_grid))
    state = biases_of(math.prod(to), grid, kv_grid)
    weight, bias = torch.randn(HEADS * DIM, 1, 3, 3), torch.randn(HEADS * DIM)
    first, second = summed(state, grid, kv_grid, prefix)
    agents = tokens_of(F.adaptive_avg_pool2d(image_of(q[:, :, prefix:], grid), to))
    values = image_of(v[:, :, prefix:], kv_grid)
    if grid != kv_grid:
        values = F.interpolate(values, size=grid, mode="bilinear")
    texture = tokens_of(F.conv2d(values, weight, bias, padding=1, groups=len(weight)))
    expected = authors(q, k, v, agents, first, second)
    expected[:, :, prefix:] += texture

    options = {"bias_aggregate": first, "bias_broadcast": second}
    agents = pool_tokens(q, grid, to, before=prefix)
    if grid == kv_grid:
        out = agent_attention(q, k, v, agents, **options, dwc_weight=weight, dwc_bias=bias, grid=grid)
    else:
        out = agent_attention(q, k, v, agents, **options) + depthwise(tokens_of(values), grid, weight, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_the_authors_patch_of_stable_diffusion():
    """No bias and no convolution: the second scale d^-0.15, and 0.075 of the values on top."""
    q, k, v = (torch.randn(2, 8, 24 * 40, 40) for _ in range(3))
    agents = pool_tokens(q, (24, 40), (6, 10))
    gather = torch.softmax(40**-0.5 * agents @ k.transpose(-1, -2), dim=-1) @ v
    expected = torch.softmax(40**-0.15 * q @ agents.transpose(-1, -2), dim=-1) @ gather + 0.075 * v
    out = agent_attention(q, k, v, agents, scale_broadcast=40**-0.15, shortcut=0.075)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
