"""What span attention promises beside its numbers: precision, memory, graphs, strides, batches, errors."""

import pytest
import torch

from attn_plugins.ops import span_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from tests.ops.test_memory import LiveBytes, nbytes
from tests.ops.test_spans import NAMES, ours, results
from tests.support.spans import Problem, draw, draw_qkv, random_problem
from tests.support.tolerance import allowance, sdpa, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [
    {"spans": 64, "sink": 4},
    {"spans": [128, 300]},
    {"spans": [40, 100, 256, 7], "sink": 64, "granularity": "block"},
    {"spans": 192, "lengths": [[40, 400], [0, 500]]},
]


def three_ways(options, dtype):
    """(name, ours, PyTorch's in `dtype`, exact) for the output and the gradients of q, k, v."""
    problem = Problem(*draw_qkv(2, 4, 2, 520, 520, 32, dtype), options)
    mask, scale = problem.mask(), 32**-0.5
    upstream = draw(tuple(problem.q.shape), 9, dtype)
    ways = []
    for attend, kind in (
        (lambda *qkv: span_attention(*qkv, **options), dtype),
        (lambda *qkv: sdpa(*qkv, mask, scale), dtype),
        (lambda *qkv: masked_attention(*qkv, mask, scale)[0], torch.float64),
    ):
        inputs = [t.detach().to(kind).requires_grad_() for t in (problem.q, problem.k, problem.v)]
        out = attend(*inputs)
        ways.append([out.detach(), *torch.autograd.grad(out, inputs, upstream.to(kind))])
    return list(zip(("out", "grad q", "grad k", "grad v"), *ways, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_as_good_as_pytorch_in_the_same_precision(options, dtype):
    for name, mine, theirs, exact in three_ways(options, dtype):
        assert within(mine, theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_sees_an_error_of_twice_the_tolerance(dtype):
    for name, mine, theirs, exact in three_ways(SETTINGS[0], dtype):
        at = int(exact.abs().argmax())
        wrong = mine.contiguous().view(-1).clone()
        wrong[at] = exact.reshape(-1)[at] + 2 * allowance(theirs, exact)
        assert not within(wrong.view(mine.shape), theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_lse_is_float32_and_as_good_as_pytorchs_scores(options, dtype):
    problem = Problem(*draw_qkv(2, 4, 2, 520, 520, 32, dtype), options)
    mask, scale = problem.mask(), 32**-0.5
    _, lse = ours(problem)(problem.q, problem.k, problem.v)
    exact = masked_attention(problem.q.double(), problem.k.double(), problem.v.double(), mask, scale)[1]
    scores = (problem.q @ problem.k.repeat_interleave(2, dim=1).transpose(-1, -2)) * scale
    theirs = scores.float().masked_fill(~mask, float("-inf")).logsumexp(-1)
    seen = exact.isfinite()
    assert lse.dtype == torch.float32 and torch.equal(seen, lse.isfinite())
    assert within(lse[seen], theirs[seen], exact[seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("options", [{"spans": 512}, {"spans": 1024, "sink": 64}, {"spans": [4096, 600, 64, 3000]}])
def test_forward_and_backward_take_at_most_twice_q_k_v(options, kv_heads, dtype):
    """Beyond what goes in and what comes out. Scores of N x N would take some 80 times q, k, v."""
    tensors = [
        torch.randn(1, 4096, h, 64, dtype=dtype).transpose(1, 2).requires_grad_() for h in (4, kv_heads, kv_heads)
    ]
    budget = 2 * nbytes(*tensors)
    with LiveBytes(tensors) as live:
        out, lse = span_attention(*tensors, **options, return_lse=True)
    assert 0 < live.peak - nbytes(out, lse) <= budget
    upstream = [torch.randn_like(out), torch.zeros_like(lse)]
    with LiveBytes([*tensors, out, lse, *upstream]) as live:
        grads = torch.autograd.grad((out, lse), tensors, upstream)
    assert 0 < live.peak - nbytes(*grads) <= budget


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state(seed):
    problem = random_problem(seed).to(torch.float32)
    state = torch.get_rng_state()
    first, second = (ours(problem)(problem.q, problem.k, problem.v) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_a_batch_gives_what_its_items_give_alone(seed, dtype):
    problem = random_problem(seed).to(dtype)
    whole = ours(problem)(problem.q, problem.k, problem.v)
    for b in range(len(problem.q)):
        items = {name: problem.options[name] for name in ("query_start", "lengths") if name in problem.options}
        one = {name: value if isinstance(value, int) else value[b : b + 1] for name, value in items.items()}
        rows = [t[b : b + 1] for t in (problem.q, problem.k, problem.v)]
        alone = span_attention(*rows, **{**problem.options, **one}, return_lse=True)
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True))


@pytest.mark.parametrize("kind", ["fused", "sliced", "expanded", "transposed"])
def test_any_strides(kind):
    if kind == "fused":
        q, k, v = draw((2, 150, 3, 3, 8), 1).permute(2, 0, 3, 1, 4)
    elif kind == "sliced":
        q, k, v = draw((3, 2, 3, 155, 16), 1)[..., 2:-3, ::2]
    elif kind == "expanded":
        q, k, v = draw((3, 1, 3, 150, 8), 1).expand(-1, 2, -1, -1, -1)
    else:
        q, k, v = draw((3, 2, 3, 8, 150), 1).transpose(-1, -2)
    options = {"spans": [20, 20, 64], "sink": 2}
    plain = Problem(*(t.contiguous() for t in (q, k, v)), options)
    exact = results(ours(plain), plain)
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = span_attention(*tensors, **options, return_lse=True)
    found = out, lse, *torch.autograd.grad((out, lse), tensors, [draw(tuple(t.shape), 5) for t in (out, lse)])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    assert out.stride() == torch.empty_like(q).stride()


def test_gradients_of_one_result_alone():
    problem = random_problem(9)
    tensors = [t.nan_to_num(0.0).requires_grad_() for t in (problem.q, problem.k, problem.v)]
    mask, scale = problem.mask(), problem.q.shape[-1] ** -0.5
    for pick in (0, 1):
        grads = []
        for attend in (ours(problem), lambda *t: masked_attention(*t, mask, scale)):
            one = attend(*tensors)[pick]
            grads.append(
                torch.autograd.grad(one.masked_fill(one.isneginf(), 0.0).sum(), tensors, materialize_grads=True)
            )
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [3, 5, 6, 10])
def test_one_graph_with_gradients(seed):
    torch._dynamo.reset()
    problem = random_problem(seed)
    problem = Problem(*(t.nan_to_num(0.0) for t in (problem.q, problem.k, problem.v)), problem.options)
    compiled = torch.compile(ours(problem), fullgraph=True, backend="aot_eager")
    for name, one, other in zip(NAMES, results(compiled, problem), results(ours(problem), problem), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride(), name


def test_lengths_are_data_of_a_graph_and_texts_that_grow_need_few():
    torch._dynamo.reset()
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(span_attention, fullgraph=True, backend=count)
    for tokens in range(70, 80):
        q, k, v = torch.randn(3, 2, 2, tokens, 8)
        lengths = torch.tensor([tokens, tokens // 2])
        options = {"spans": [20, 40], "lengths": lengths}
        assert torch.equal(compiled(q, k, v, **options), span_attention(q, k, v, **options))
    assert graphs <= 2


@pytest.mark.parametrize("bounds", [None, [[0, 0, 70], [2, 3, 60]]])
def test_the_op_is_sound_for_torch_library(bounds):
    bounds = None if bounds is None else torch.tensor(bounds)
    tensors = [t.requires_grad_() for t in draw_qkv(2, 4, 2, 66, 70, 8)]
    rule = (bounds, [5, 20, 20, 66], 2, 1, 0.3)
    torch.library.opcheck(torch.ops.attn_plugins.span.default, (*tensors, *rule))
    detached = [t.detach() for t in tensors]
    out, lse = torch.ops.attn_plugins.span.default(*detached, *rule)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, *detached, out, lse, *rule)
        torch.library.opcheck(torch.ops.attn_plugins.span_backward.default, arguments)


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 10, 8)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"spans": -1}, ValueError, r"spans=\[-1, -1, -1, -1\]: legal is 0 or more"),
        (
            {"spans": [1, 2, 3]},
            ValueError,
            r"3 spans: give one number, one per KV head \(2\) or one per query head \(4\)",
        ),
        ({"spans": torch.ones(2)}, TypeError, "spans are torch.float32"),
        ({"spans": [1.5, 2.0]}, TypeError, r"spans=\[1.5, 2.0\]: give integers"),
        ({"sink": -2}, ValueError, "sink=-2: legal is 0 or more"),
        ({"granularity": "row"}, ValueError, "granularity='row': legal are token, block"),
        ({"query_start": 8}, ValueError, "query_start 8: with 3 queries and 10 keys it is 0..7"),
        ({"query_start": [0, -1]}, ValueError, "item 1: query_start -1"),
        ({"query_start": [0, 1, 2]}, ValueError, r"query_start \(3,\): legal is one number, or \(2,\)"),
        ({"query_start": torch.ones(2)}, TypeError, "query_start is torch.float32: give integers"),
        ({"lengths": 11}, ValueError, r"tokens \[0, 11\) are valid, but k has 10"),
        ({"lengths": [[4, 3], [8, 3]]}, ValueError, r"item 1: tokens \[8, 11\) are valid"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths \(3,\): legal is one number, or \(2,\) or \(2, 2\)"),
        ({"backend": "flash"}, ValueError, "backend='flash'"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors(options, error, named, backend):
    with pytest.raises(error, match=named):
        span_attention(Q, K, K, **{"spans": 4, "backend": backend, **options})


def test_more_queries_than_keys_are_an_error():
    with pytest.raises(ValueError, match="10 queries, but 3 keys"):
        span_attention(K, Q[:, :2], Q[:, :2], spans=3)
