"""Span attention on the block-sparse kernels, interpreted: against masked attention, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import span_attention  # noqa: E402
from attn_plugins.ops.block_sparse.reference import masked_attention  # noqa: E402
from tests.support.spans import Problem, draw, draw_qkv  # noqa: E402
from tests.support.tolerance import sdpa, within  # noqa: E402

SETTINGS = [
    ({"spans": [70, 20], "sink": 4}, 150, torch.float32),
    ({"spans": [1, 64, 64, 40], "sink": 64, "granularity": "block"}, 40, torch.bfloat16),
    ({"spans": 33, "sink": 3, "lengths": [[20, 60], [0, 90]]}, 150, torch.bfloat16),
    ({"spans": [100, 10], "lengths": [0, 150]}, 40, torch.float16),
]


@pytest.mark.parametrize(("options", "queries", "dtype"), SETTINGS, ids=str)
def test_as_good_as_pytorch_in_the_same_precision(options, queries, dtype):
    problem = Problem(*draw_qkv(2, 4, 2, queries, 150, 16, dtype), options)
    mask, scale = problem.mask(), 0.25
    upstream = [draw(shape, 7, torch.float32) for shape in ((2, 4, queries, 16), (2, 4, queries))]
    ways = []
    for attend, kind in (
        (lambda *t: span_attention(*t, **options, return_lse=True, backend="triton"), dtype),
        (lambda *t: (sdpa(*t, mask, scale), masked_attention(*t, mask, scale)[1]), dtype),
        (lambda *t: masked_attention(*t, mask, scale), torch.float64),
    ):
        inputs = [t.detach().to(kind).requires_grad_() for t in (problem.q, problem.k, problem.v)]
        out, lse = attend(*inputs)
        finite = lse.masked_fill(lse.isneginf(), 0.0)
        given = [t.to(one.dtype) for t, one in zip(upstream, (out, finite), strict=True)]
        grads = torch.autograd.grad((out, finite), inputs, given)
        ways.append([out.detach(), finite.detach(), *grads])
    for name, one, theirs, exact in zip(("out", "lse", "grad q", "grad k", "grad v"), *ways, strict=True):
        assert within(one, theirs, exact), name
