"""Neighborhood attention by the kernels, interpreted: windows as packed intervals, text, padding, every option."""

import math

import pytest
import torch

from attn_plugins.ops import neighborhood_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from tests.support.problems import Problem, random_problem
from tests.support.tolerance import sdpa, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {
    "1-D": {"grid": (150,), "window": (31,), "stride": (4,)},
    "dilated": {"grid": (101,), "window": (16,), "dilation": (3,)},
    "causal": {"grid": (130,), "window": (40,), "causal": (True,)},
    "2-D": {"grid": (12, 13), "window": (5, 6), "stride": (1, 3)},
    "2-D dilated": {"grid": (9, 16), "window": (3, 4), "dilation": (2, 3)},
    "3-D": {"grid": (4, 6, 7), "window": (3, 3, 4), "stride": (1, 2, 2), "causal": (True, False, False)},
    "whole": {"grid": (6, 10), "window": (6, 10)},
}


def problem(setting, dtype, before=0, after=0):
    axes = len(setting["grid"])
    row = {"stride": (1,) * axes, "dilation": (1,) * axes, "causal": (False,) * axes, **setting}
    grid = row.pop("grid")
    text = sum(t if isinstance(t, int) else t[0][0] for t in (before, after))
    batch = 1 if isinstance(before, int) else len(before)
    shape = (batch, math.prod(grid) + text, 2, 16)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2) for _ in range(3)]
    return Problem(tensors[0], tensors[1][:, :1], tensors[2][:, :1], grid, [row], before, after)


def check(one):
    """Output and gradients by the tolerance rule; padding rows 0."""
    mask, dtype, scale = one.mask(), one.q.dtype, one.q.shape[-1] ** -0.5
    upstream = torch.randn(one.q.shape, dtype=torch.float64).to(dtype)
    ways = []
    for attend, kind in (
        (lambda *qkv: neighborhood_attention(*qkv, **one.options, backend="triton"), dtype),
        (lambda *qkv: sdpa(*qkv, mask, scale), dtype),
        (lambda *qkv: masked_attention(*qkv, mask, scale)[0], torch.float64),
    ):
        inputs = [t.detach().to(kind).requires_grad_() for t in (one.q, one.k, one.v)]
        out = attend(*inputs)
        ways.append([out.detach(), *torch.autograd.grad(out, inputs, upstream.to(kind))])
    for name, ours, theirs, exact in zip(("out", "grad q", "grad k", "grad v"), *ways, strict=True):
        assert within(ours, theirs, exact), name
    assert (ways[0][0][~mask.any(-1).expand(one.q.shape[:3])] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_as_good_as_pytorch_in_the_same_precision(setting, dtype):
    check(problem(SETTINGS[setting], dtype))


@pytest.mark.parametrize(
    ("before", "after"),
    [(0, 40), (7, 3), ([[9, 9], [9, 4]], [[5, 0], [5, 5]])],
    ids=["after", "both", "padded by item"],
)
def test_text(before, after):
    check(problem(SETTINGS["2-D"], torch.float32, before, after))


@pytest.mark.parametrize("seed", [2, 5, 7, 10, 12])
def test_random_problems(seed):
    check(random_problem(seed, torch.float32))
