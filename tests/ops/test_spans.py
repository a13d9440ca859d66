"""Span attention against its rule: random problems, every form of a band, edges, and dense attention."""

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import neighborhood_attention, span_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.spans import cpu
from attn_plugins.ops.spans.cost import choose_bands
from attn_plugins.ops.spans.parts import Band, balanced, corners, edges, masked, tiles
from attn_plugins.plan.spans import SpanRule
from tests.support.spans import Problem, draw, draw_qkv, random_problem

NAMES = ("out", "lse", "grad q", "grad k", "grad v")
CHUNK, CASES = 25, 200


def results(attend, problem):
    """out, lse and the gradients of q, k, v; rows that see nothing are given a gradient too."""
    tensors = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out, lse = attend(*tensors)
    upstream = [draw(tuple(t.shape), 5, t.dtype) for t in (out, lse)]
    return out, lse, *torch.autograd.grad((out, lse.masked_fill(lse.isneginf(), 0.0)), tensors, upstream)


def ours(problem, **more):
    return lambda q, k, v: span_attention(q, k, v, **problem.options, return_lse=True, **more)


def check(problem, **more):
    mask, scale = problem.mask(), more.get("scale", problem.q.shape[-1] ** -0.5)
    exact = results(lambda q, k, v: masked_attention(q, k, v, mask, scale), problem)
    found = results(ours(problem, **more), problem)
    for name, one, other in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    blind = ~mask.any(-1)
    assert (found[0][blind] == 0).all() and found[1][blind].isneginf().all() and (found[2][blind] == 0).all()
    if not more:
        assert found[0].stride() == problem.q.stride()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("seed", range(0, CASES, 20))
def test_scales_that_are_not_above_zero(seed, scale):
    """The causal kernel by itself would make nan of them."""
    check(random_problem(seed), scale=scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_causal_calls_at_scales_that_are_not_above_zero(scale):
    q, k, v = (draw((1, 2, 600, 16), seed, torch.float64) for seed in range(3))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    found = span_attention(*tensors, spans=600, scale=scale)
    want = masked_attention(*tensors, torch.ones(600, 600, dtype=torch.bool).tril(), scale)[0]
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (found, want)]
    for one, other in zip((found, *grads[0]), (want, *grads[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_problems(first):
    for seed in range(first, first + CHUNK):
        problem = random_problem(seed)
        try:
            check(problem)
        except Exception as error:
            raise AssertionError(f"case {seed}: {problem.options}, q {problem.q.shape}") from error


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_the_reference_backend(seed):
    check(random_problem(seed), backend="reference")


@pytest.mark.parametrize("sink", [0, 3, 64])
@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("form", [tiles, edges, corners], ids=lambda form: form.__name__)
def test_every_form_of_a_band(form, chunk, granularity, sink, monkeypatch):
    """The cost model would not take most of them here; several chunks, a ragged tail, some rounds, GQA and MHA."""
    used = 0

    def forced(rule, start, rows, group, dim, itemsize, alone):
        nonlocal used
        end, step = start + rows, chunk if rule.grain == 1 else 64
        first = max(start, rule.whole)
        first = min(first + -first % rule.grain, end)
        if first == end:
            return choose_bands(rule, start, rows, group, dim, itemsize)
        bands = list(choose_bands(rule, start, first - start, group, dim, itemsize)) if first > start else []
        count, tail = divmod(end - first, step)
        for at, size, several in ((first, step, count), (end - tail, tail, 1)):
            if size and several:
                band = form(rule, at, size, several)
                used += band is not None
                bands.append(band or tiles(rule, at, size, several))
        return tuple(bands)

    monkeypatch.setattr(cpu, "choose_bands", forced)
    monkeypatch.setattr(cpu, "ROUND_BYTES", 1 << 15)
    for heads, kv_heads, span in ((2, 2, 64), (4, 2, 64), (2, 1, 128), (2, 2, 79)):
        q, k, v = draw_qkv(1, heads, kv_heads, 301, 301, 8)
        check(Problem(q, k, v, {"spans": span, "sink": sink, "granularity": granularity}))
    assert bool(used) != (form is corners and granularity == "block")


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3)])
def test_more_threads_cut_triangles(heads, threads, monkeypatch):
    """As they are cut for that many threads; the arithmetic itself runs on one."""
    monkeypatch.setattr(cpu, "_threads", lambda _: threads)
    pieces = []
    monkeypatch.setattr(cpu, "balanced", lambda band, count: pieces.append(count) or balanced(band, count))
    for queries, spans in ((700, [600, 700, 550]), (600, [500, 700, 640])):
        q, k, v = draw_qkv(1, *heads, queries, 700, 8)
        check(Problem(q, k, v, {"spans": spans[: heads[0]], "sink": 7}))
    assert max(pieces) >= threads


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (8, 8), (7, 20), (65, 130)])
@pytest.mark.parametrize("sink", [0, 1, 5])
def test_at_exactly_the_edges(queries, keys, sink):
    """Spans and sinks that just reach, or just miss, the sinks, the chunk and the first key."""
    for span in sorted({0, 1, 2, sink, keys - queries, keys - queries + 1, keys - sink, keys - 1, keys, keys + 1}):
        if span >= 0:
            q, k, v = draw_qkv(1, 2, 2, queries, keys, 4)
            check(Problem(q, k, v, {"spans": [span, max(span - 1, 0)], "sink": sink}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [4, 2])
def test_spans_of_the_whole_text_are_dense_attention_to_the_bit(heads, dtype):
    q, k, v = draw_qkv(2, 4, heads, 300, 300, 16, dtype)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != 4)
    for spans in (300, 1000, [300] * heads, [300, 301, 400, 299 + 1]):
        assert torch.equal(span_attention(q, k, v, spans=spans), dense)
    assert torch.equal(span_attention(q, k, v, spans=290, sink=10), dense)


def test_a_causal_neighborhood_is_a_span():
    q, k, v = draw_qkv(2, 4, 2, 200, 200, 8)
    for window in (1, 64, 199, 200, -1, [(20,), (20,), (30,), (200,)]):
        spans = [w[0] for w in window] if isinstance(window, list) else window % 201
        found = neighborhood_attention(q, k, v, grid=200, window=window, causal=True, return_lse=True)
        exact = span_attention(q, k, v, spans=spans, return_lse=True, backend="reference")
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)


def test_chunks_of_a_prefill_are_the_whole():
    """As a cache grows: each chunk's rows are those of the one call."""
    q, k, v = draw_qkv(2, 4, 2, 230, 230, 8)
    rule = {"spans": [64, 10, 100, 230], "sink": 5}
    whole = span_attention(q, k, v, **rule)
    for size in (1, 64, 100):
        for start in range(0, 230, size):
            end = min(start + size, 230)
            part = span_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **rule)
            torch.testing.assert_close(part, whole[:, :, start:end], rtol=0, atol=1e-13)
            later = span_attention(q[:, :, start:end], k, v, query_start=start, **rule)
            assert torch.equal(later, part)


def test_padding_in_front_is_the_text_without_it():
    q, k, v = draw_qkv(2, 2, 2, 90, 90, 8)
    rule = {"spans": [12, 40], "sink": 4}
    out = span_attention(q, k, v, lengths=torch.tensor([[30, 60], [0, 90]]), **rule)
    alone = span_attention(q[:1, :, 30:], k[:1, :, 30:], v[:1, :, 30:], **rule)
    assert torch.equal(out[:1, :, 30:], alone) and (out[0, :, :30] == 0).all()
    assert torch.equal(out[1:], span_attention(q[1:], k[1:], v[1:], **rule))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 4])
def test_bands_hold_every_query_once_and_read_only_keys_that_are_there(group, itemsize):
    for span, sink, grain, start, rows in (
        (1024, 64, 1, 0, 8192), (1024, 64, 64, 0, 8192), (1000, 0, 1, 0, 8192), (128, 64, 64, 100, 4000),
        (4096, 0, 1, 4096, 4096), (6000, 4, 1, 0, 8192), (1, 0, 1, 0, 1000), (0, 4, 1, 7, 1000), (8191, 0, 1, 0, 8192),
    ):  # fmt: skip
        bands = choose_bands(SpanRule(span, sink, grain), start, rows, group, 64, itemsize)
        at = start
        for band in bands:
            assert band.start == at and isinstance(band, Band)
            at += band.chunk * band.count
            for run in (run for part in band.parts for run in part.runs):
                first = run.offset if run.fixed else band.start + run.offset
                last = first + run.count + (0 if run.fixed else band.chunk * (band.count - 1))
                assert run.count > 0 and first >= 0 and last <= start + rows
        assert at == start + rows


def test_a_small_problem_is_one_masked_call(monkeypatch):
    bands = choose_bands(SpanRule(16, 2), 0, 64, 1, 64, 4)
    assert bands == (masked(0, 64),) or all(len(band.parts) == 1 for band in bands)
