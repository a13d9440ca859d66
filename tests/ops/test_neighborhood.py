"""Neighborhood attention against the rule: random problems, tricky shapes, and what must equal dense attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.ops import neighborhood_attention
from attn_plugins.ops.block_sparse import jobs
from attn_plugins.ops.block_sparse.jobs import Chunk
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.neighborhood import spec
from attn_plugins.ops.neighborhood.reference import neighborhood_mask
from attn_plugins.plan import cost
from attn_plugins.plan.cost import choose_tiles
from attn_plugins.plan.neighborhood import cached_neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence
from tests.support.problems import Problem, random_problem

ROUNDING = 1e-11  # float64, a few hundred keys
CHUNK = 50


def pytest_generate_tests(metafunc):
    if "first_case" in metafunc.fixturenames:
        count = metafunc.config.getoption("--random-problems")
        metafunc.parametrize("first_case", range(0, count, CHUNK))


def differ(ours, exact, what):
    """The first tensor that is not what it should be, or None; infinities must agree."""
    for name, one, other in zip(what, ours, exact, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        if not torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * max(1.0, _largest(other))):
            return name
    return None


def _largest(t):
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def run(attend, tensors, upstream):
    """(out, lse, and with `upstream` the gradients of q, k, v) of attend(q, k, v) -> (out, lse)."""
    tensors = [t.detach().requires_grad_(upstream is not None) for t in tensors]
    out, lse = attend(*tensors)
    if upstream is None:
        return out, lse
    grads = torch.autograd.grad((out, lse.masked_fill(lse.isinf(), 0.0)), tensors, upstream)
    return out, lse, *grads


def check(problem, gradients=True):
    """The operator equals masked softmax attention under the rule's own mask."""
    tensors, mask = (problem.q, problem.k, problem.v), problem.mask()
    upstream = None
    if gradients:
        rng = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(shape, generator=rng, dtype=torch.float64) for shape in (problem.q.shape, problem.q.shape[:3])
        ]
    scale = problem.q.shape[-1] ** -0.5
    ours = run(lambda *qkv: neighborhood_attention(*qkv, **problem.options, return_lse=True), tensors, upstream)
    exact = run(lambda *qkv: masked_attention(*qkv, mask, scale), tensors, upstream)
    assert differ(ours, exact, ("out", "lse", "grad q", "grad k", "grad v")[: len(ours)]) is None
    assert ours[0].stride() == problem.q.stride()


def test_random_problems(first_case, pytestconfig):
    count = pytestconfig.getoption("--random-problems")
    for seed in range(first_case, min(first_case + CHUNK, count)):
        problem = random_problem(seed)
        try:
            check(problem, gradients=seed % 2 == 0)
        except Exception as error:
            raise AssertionError(f"case {seed}: {problem}") from error


def test_random_problems_whose_tiles_go_in_two_parts(monkeypatch):
    """Keys that a whole tile sees go without a mask, merged with the rest by LSE: here from 4 keys on, not hundreds."""
    caches = (choose_tiles, spec._plans_of, cached_neighborhood_plan)
    monkeypatch.setattr(cost, "WHOLE_KEYS", 4)
    monkeypatch.setattr(jobs, "WHOLE_KEYS", 4)
    parts = []
    monkeypatch.setattr(jobs, "Chunk", lambda q, made, heads: parts.append(len(made)) or Chunk(q, made, heads))
    for cache in caches:
        cache.cache_clear()
    try:
        for seed in range(100):
            check(random_problem(seed))
    finally:
        for cache in caches:
            cache.cache_clear()
    assert parts.count(2) > 50


@pytest.mark.parametrize("seed", range(30))
def test_the_reference_backend_is_the_rule(seed):
    problem = random_problem(seed)
    out, lse = neighborhood_attention(
        problem.q, problem.k, problem.v, **problem.options, return_lse=True, backend="reference"
    )
    exact = masked_attention(problem.q, problem.k, problem.v, problem.mask(), problem.q.shape[-1] ** -0.5)
    assert differ((out, lse), exact, ("out", "lse")) is None


def test_the_comparison_sees_a_difference_of_twice_the_tolerance():
    exact = torch.randn(2, 3)
    for position in range(6):
        wrong = exact.double().clone()
        wrong.view(-1)[position] += 2 * ROUNDING * (max(1.0, _largest(exact)) + abs(exact.view(-1)[position].item()))
        assert differ([wrong], [exact.double()], ["out"]) == "out"


TRICKY = [
    {"grid": (5, 25), "window": (5, 16), "stride": (1, 16)},
    {"grid": (19, 29), "window": (8, 8), "dilation": (2, 3)},
    {
        "grid": (13, 11, 9), "window": (3, 4, 3), "stride": (2, 3, 3), "dilation": (3, 2, 2),
        "causal": (False, True, True),
    },
    {"grid": (1,), "window": 1},
    {"grid": (1, 1, 1), "window": -1, "causal": True},
    {"grid": (1, 7, 1), "window": (1, 4, -1), "stride": (1, 2, 1)},
    {"grid": (6, 1, 5), "window": (2, 1, 5), "stride": (2, 1, 3), "causal": (True, True, False)},
    {"grid": (9, 9), "window": (1, 1)},
    {"grid": (9, 10), "window": (3, 5), "dilation": (3, 2)},
    {"grid": (7, 8), "window": -1, "dilation": (2, 3)},
    {"grid": (40,), "window": 39, "stride": 38},
    {"grid": (8, 8), "window": (8, 8), "causal": (True, False)},
]  # fmt: skip


@pytest.mark.parametrize("setting", TRICKY, ids=str)
@pytest.mark.parametrize("text", [0, 3])
def test_tricky_shapes(setting, text):
    axes = len(setting["grid"])
    row = {
        name: value if isinstance(value, tuple) else (value,) * axes
        for name, value in {"stride": 1, "dilation": 1, "causal": False, **setting}.items()
        if name != "grid"
    }
    tokens = text + torch.tensor(setting["grid"]).prod().item()
    q, k, v = torch.randn(3, 2, 2, tokens, 8, dtype=torch.float64)
    check(Problem(q, k, v, setting["grid"], [row], text, 0))


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize(("grid", "text"), [((30,), 0), ((5, 6), 7), ((5, 5, 6), (2, 3))])
def test_a_window_of_the_grid_is_dense_attention(grid, text, stride):
    before, after = text if isinstance(text, tuple) else (0, text)
    tokens = before + after + torch.tensor(grid).prod().item()
    q = torch.randn(2, 4, tokens, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, tokens, 16, dtype=torch.float64)
    for window in (grid, -1):
        out = neighborhood_attention(
            q, k, v, grid=grid, window=window, stride=stride, text_before=before, text_after=after
        )
        dense = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(out, dense, rtol=0, atol=ROUNDING)


def test_text_lengths_as_a_tensor_or_as_lists():
    q, k, v = torch.randn(3, 2, 2, 20, 8, dtype=torch.float64)
    rows = [[4, 1], [4, 4]]
    options = {"grid": (4, 4), "window": 3}
    out = neighborhood_attention(q, k, v, **options, text_before=rows)
    assert torch.equal(out, neighborhood_attention(q, k, v, **options, text_before=torch.tensor(rows)))
    for item, (_, valid) in enumerate(rows):
        mask = neighborhood_mask(Sequence((4, 4), 4, 0, valid, 0), axis_windows((4, 4), 3))
        exact, _ = masked_attention(q[item, None], k[item, None], v[item, None], mask, 8**-0.5)
        torch.testing.assert_close(out[item, None], exact, rtol=0, atol=ROUNDING)


Q = torch.zeros(2, 4, 20, 8)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "named"),
    [
        ((Q, Q, Q), {"grid": (4, 4)}, ValueError, "q has 20 tokens.*makes 16"),
        ((Q, Q, Q), {"grid": (4, 5), "window": 5}, ValueError, "axis 0 of grid .4, 5.: window=5"),
        ((Q, Q, Q), {"grid": (4, 5), "stride": 4}, ValueError, "stride=4: legal is 1..3"),
        ((Q, Q, Q), {"grid": (4, 5), "dilation": (1, 2)}, ValueError, "window=3 x dilation=2"),
        ((Q, Q, Q), {"grid": (4, 5), "window": (3, 3, 3)}, ValueError, "window=.3, 3, 3.: 3 values"),
        ((Q, Q, Q), {"grid": (4, 5), "window": [(3, 3)] * 3}, ValueError, "list of 3 settings for 4 query heads"),
        ((Q, Q, Q), {"grid": (4, 4), "text_before": [[4, 5]] * 2}, ValueError, "valid tokens of 4"),
        ((Q, Q, Q), {"grid": (4, 4), "text_before": [[4, 1]] * 3}, ValueError, "3 batch items, but the batch has 2"),
        ((Q, Q, Q), {"grid": (4, 4), "text_before": [[4, 1], [4, 2], [4, 3]]}, ValueError, "3 batch items"),
        ((Q, Q, Q), {"grid": (4, 4), "text_before": [[4], [4]]}, ValueError, "pair per batch item"),
        ((Q, Q, Q), {"grid": (2, 2, 1, 5)}, ValueError, "1 to 3 axes"),
        ((Q, Q[:, :3], Q[:, :3]), {"grid": (4, 5)}, ValueError, "multiple of the 3 KV heads"),
        ((Q, Q.half(), Q), {"grid": (4, 5)}, TypeError, "float16"),
        ((Q.int(), Q.int(), Q.int()), {"grid": (4, 5)}, TypeError, "floating"),
        ((Q, Q.to("meta"), Q), {"grid": (4, 5)}, ValueError, "meta"),
        ((Q, Q, Q), {"grid": (4, 5), "backend": "cuda"}, ValueError, "backend='cuda': legal are"),
    ],
)
def test_errors_name_the_value_and_what_is_legal(tensors, options, error, named):
    with pytest.raises(error, match=named):
        neighborhood_attention(*tensors, **{"window": 3, **options})
