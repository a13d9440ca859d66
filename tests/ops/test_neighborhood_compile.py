"""Neighborhood attention and block-sparse attention inside compiled graphs, and as `torch.library` ops."""

import pytest
import torch

from attn_plugins.ops import block_sparse_attention, neighborhood_attention
from attn_plugins.plan.block_plan import BlockPlan


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(tokens, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, 8, dtype=dtype).requires_grad_() for _ in range(3)]


def check(compiled, plain, tensors):
    upstream = [torch.randn(2, 3, tensors[0].shape[2], *tail, dtype=torch.float64) for tail in ((8,), ())]
    found, expected = compiled(*tensors), plain(*tensors)
    grads = [torch.autograd.grad(pair, tensors, upstream) for pair in (found, expected)]
    for one, other in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


SETTINGS = [
    {"window": (3, 4), "stride": (1, 2), "dilation": (2, 1), "causal": (False, True)},
    {"window": -1},
    {"window": [(3, 3), (5, 2), (3, 3)]},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=["window", "whole", "per head"])
@pytest.mark.parametrize("text", [0, 4], ids=["", "text"])
def test_one_graph_with_gradients(setting, text):
    def attend(q, k, v):
        return neighborhood_attention(q, k, v, grid=(6, 8), **setting, text_after=text, return_lse=True)

    check(torch.compile(attend, fullgraph=True, backend="aot_eager"), attend, inputs(48 + text))


def test_padded_text_is_part_of_the_graph():
    def attend(q, k, v):
        return neighborhood_attention(q, k, v, grid=(4, 5), window=3, text_before=[[4, 2], [4, 4]], return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = inputs(24)
    upstream = [torch.randn(2, 3, 24, 8, dtype=torch.float64), torch.zeros(2, 3, 24, dtype=torch.float64)]
    for one, other in zip(compiled(*tensors), attend(*tensors), strict=True):
        assert torch.equal(one, other)
    found, expected = (torch.autograd.grad(f(*tensors), tensors, upstream) for f in (compiled, attend))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_resolutions_change(dynamic):
    def attend(q, k, v, height, width):
        return neighborhood_attention(q, k, v, grid=(height, width), window=(3, 4), stride=(1, 2), return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height, width in ((6, 8), (5, 9), (3, 4), (6, 8)):
        size = (height, width)
        check(lambda *t, s=size: compiled(*t, *s), lambda *t, s=size: attend(*t, *s), inputs(height * width))


def test_changing_resolutions_need_few_graphs():
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def attend(q, k, v, height, width):
        return neighborhood_attention(q, k, v, grid=(height, width), window=(3, 4))

    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for height in range(4, 12):
        tensors = [t.detach() for t in inputs(height * (height + 1))]
        assert torch.equal(compiled(*tensors, height, height + 1), attend(*tensors, height, height + 1))
    assert graphs <= 3


def test_block_plans_in_a_graph():
    """Made outside, as a method makes them: one graph serves plans that come and go."""
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def attend(q, k, v, plan):
        return block_sparse_attention(q, k, v, plan, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    counted = torch.compile(attend, fullgraph=True, backend=count)
    for _ in range(5):
        plan = BlockPlan.from_mask(torch.rand(3, 20, 20) < 0.4, 4, 5)
        tensors = inputs(20)
        upstream = [torch.randn(2, 3, 20, *tail, dtype=torch.float64) for tail in ((8,), ())]
        found, expected = compiled(*tensors, plan), attend(*tensors, plan)
        grads = [torch.autograd.grad(pair, tensors, upstream) for pair in (found, expected)]
        for one, other in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
            assert torch.equal(one, other)
        counted(*(t.detach() for t in tensors), plan)
    assert graphs <= 2


@pytest.mark.parametrize("layout", ["(B, H, N, D)", "(B, N, H, D)"])
def test_the_ops_are_sound_for_torch_library(layout):
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checks."""
    plan = BlockPlan.from_lists([(0, 4), (4, 8)], [(0, 6), (6, 6)], [[0], [1, 0]])
    spec = [1, 12, 3, 1, 2, 0, 0, 0, 2, 0, 0, 0, 0]
    tensors = inputs(12)
    if layout == "(B, N, H, D)":
        tensors = [torch.randn(2, 12, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3)]
    for name, argument in (("block_sparse", [plan.key]), ("neighborhood", spec)):
        op = getattr(torch.ops.attn_plugins, name).default
        torch.library.opcheck(op, (*tensors, 0.3, argument, "cpu"))
        detached = [t.detach() for t in tensors]
        out, lse = op(*detached, 0.3, argument, "cpu")
        backward = getattr(torch.ops.attn_plugins, f"{name}_backward").default
        for grad_lse in (None, torch.randn_like(lse)):
            given = (torch.randn_like(out), grad_lse, *detached, out, lse, 0.3, argument, "cpu")
            torch.library.opcheck(backward, given)
