"""The tolerance rule in each precision, forward and backward: at most twice PyTorch's own error, plus rounding."""

import math

import pytest
import torch

from attn_plugins.ops import neighborhood_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from tests.support.problems import Problem
from tests.support.tolerance import allowance, sdpa, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [  # of some hundred tokens: the largest error of a few numbers is chance
    {"grid": (300,), "window": (64,), "stride": (16,)},
    {"grid": (301,), "window": (40,), "dilation": (3,)},
    {"grid": (256,), "window": (100,), "causal": (True,)},
    {"grid": (20, 24), "window": (7, 8), "stride": (1, 2)},
    {"grid": (16, 16), "window": (8, 8), "stride": (8, 8)},
    {"grid": (19, 29), "window": (8, 8), "dilation": (2, 3)},
    {"grid": (6, 8, 10), "window": (3, 5, 4), "stride": (1, 2, 2), "causal": (True, False, False)},
    {"grid": (4, 9, 9), "window": (-1, 5, -1)},
    {"grid": (18, 18), "window": (18, 18)},
]
IDS = [" ".join(f"{name} {value}" for name, value in setting.items()) for setting in SETTINGS]
BEFORE, AFTER = [[5, 5], [5, 2]], 7


def problem(setting, dtype):
    axes = len(setting["grid"])
    row = {"stride": (1,) * axes, "dilation": (1,) * axes, "causal": (False,) * axes, **setting}
    grid = row.pop("grid")
    tensors = [torch.randn(2, h, math.prod(grid) + 12, 32, dtype=torch.float64).to(dtype) for h in (4, 2, 2)]
    return Problem(*tensors, grid, [row], BEFORE, AFTER)


def three_ways(one, dtype, scale):
    """(name, ours, PyTorch's in `dtype`, exact) for the output and the gradients of q, k, v."""
    mask = one.mask()
    upstream = torch.randn(one.q.shape, dtype=torch.float64).to(dtype)
    ways = []
    for attend, kind in (
        (lambda *qkv: neighborhood_attention(*qkv, **one.options, scale=scale), dtype),
        (lambda *qkv: sdpa(*qkv, mask, scale), dtype),
        (lambda *qkv: masked_attention(*qkv, mask, scale)[0], torch.float64),
    ):
        inputs = [t.detach().to(kind).requires_grad_() for t in (one.q, one.k, one.v)]
        out = attend(*inputs)
        ways.append([out.detach(), *torch.autograd.grad(out, inputs, upstream.to(kind))])
    return list(zip(("out", "grad q", "grad k", "grad v"), *ways, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_as_good_as_pytorch_in_the_same_precision(setting, dtype):
    for name, ours, theirs, exact in three_ways(problem(setting, dtype), dtype, 32**-0.5):
        assert within(ours, theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_with_scores_that_would_overflow_an_exponential(dtype):
    """Scores of some hundred: exp of them is inf, and the softmax is nearly a choice."""
    for name, ours, theirs, exact in three_ways(problem(SETTINGS[3], dtype), dtype, 8.0):
        assert within(ours, theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_sees_an_error_of_twice_the_tolerance(dtype):
    """One element, wrong by twice the tolerance in either direction, in each of the results."""
    for name, ours, theirs, exact in three_ways(problem(SETTINGS[3], dtype), dtype, 32**-0.5):
        at = int(exact.abs().argmax())
        for sign in (-1, 1):
            wrong = ours.contiguous().view(-1).clone()
            wrong[at] = exact.reshape(-1)[at] + sign * 2 * allowance(theirs, exact)
            assert not within(wrong.view(ours.shape), theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_the_lse_is_float32_and_as_good_as_pytorchs_scores(setting, dtype):
    """PyTorch's own: scores in `dtype`, as a model that computes attention by hand has them, then their logsumexp."""
    one = problem(setting, dtype)
    mask, scale = one.mask(), 32**-0.5
    _, lse = neighborhood_attention(one.q, one.k, one.v, **one.options, return_lse=True)
    assert lse.dtype == torch.float32
    exact = masked_attention(one.q.double(), one.k.double(), one.v.double(), mask, scale)[1]
    scores = (one.q @ one.k.repeat_interleave(2, dim=1).transpose(-1, -2)) * scale
    theirs = scores.float().masked_fill(~mask, float("-inf")).logsumexp(-1)
    seen = exact.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert within(lse[seen], theirs[seen], exact[seen])
