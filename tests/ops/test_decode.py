"""Decode attention in plain PyTorch: against masked attention, in a ring, in a graph, its gradients and its memory."""

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import decode_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.block_sparse.tile_attention import attend
from attn_plugins.ops.decode import cpu, tiles, tiling
from tests.ops.test_memory import LiveBytes, nbytes
from tests.support.decoding import Problem, random_problem
from tests.support.tolerance import within

NAMES = ("out", "lse", "grad q", "grad k", "grad v")


def results(attend, problem):
    """out, lse and the gradients of q, k, v; rows that see nothing are given a gradient too."""
    tensors = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out, lse = attend(*tensors)
    rng = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    return out, lse, *torch.autograd.grad((out, lse.masked_fill(lse.isneginf(), 0.0)), tensors, upstream)


def ours(problem, **more):
    return lambda q, k, v: decode_attention(q, k, v, **problem.options, return_lse=True, **more)


def masked(problem):
    mask, scale = problem.mask(), problem.options.get("scale", problem.q.shape[-1] ** -0.5)
    return lambda q, k, v: masked_attention(q, k[:, None], v[:, None], mask, scale)


def check(problem, **more):
    found, exact = results(ours(problem, **more), problem), results(masked(problem), problem)
    for name, one, other in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    blind = ~problem.mask().any(-1)
    assert (found[0][blind] == 0).all() and found[1][blind].isneginf().all() and (found[2][blind] == 0).all()
    if not more:
        assert found[0].stride() == torch.empty_like(problem.q).stride()


@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed):
    check(random_problem(seed))


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_the_reference_backend(seed):
    check(random_problem(seed), backend="reference")


@pytest.mark.parametrize("threads", [2, 7, 64])
@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_more_threads_cut_the_keys(seed, threads, monkeypatch):
    """As it is cut for that many threads; the arithmetic itself runs on one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "CUT_KEYS", 3)
    check(random_problem(seed))


@pytest.fixture
def in_tiles(monkeypatch, request):
    """Tiles of 4 tokens, or of those given, whatever they cost; the sizes of the calls: (tiles, tokens of each)."""
    calls = []
    monkeypatch.setattr(tiling, "TILES", getattr(request, "param", (4,)))
    monkeypatch.setattr(tiling, "COPIED", 0)
    monkeypatch.setattr(tiling, "CALL_BYTES", -(1 << 30))
    monkeypatch.setattr(cpu, "FEW_PARTS", 0)
    one_call = tiles._one_call
    monkeypatch.setattr(tiles, "_one_call", lambda *t: calls.append(tuple(t[1].shape[1:3])) or one_call(*t))
    cpu._plan_of.cache_clear()
    yield calls
    cpu._plan_of.cache_clear()


@pytest.mark.parametrize("in_tiles", [(4,), (6, 2)], indirect=True, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_tiles_are_as_good_as_parts(seed, in_tiles):
    problem = random_problem(seed)
    check(problem)
    hidden = problem.options.get("key_positions") is not None and (problem.options["key_positions"] < 0).any()
    assert in_tiles or hidden or not problem.mask().any()


def test_tiles_leave_out_what_is_no_heads(in_tiles):
    """Between the ranges stands NaN; a head has no range; what is left of a range at its ends takes a second call."""
    k = torch.randn(2, 64, 8, dtype=torch.float64)
    v, q = torch.randn_like(k), torch.randn(2, 6, 2, 8, dtype=torch.float64)
    ranges = torch.tensor([[[[4, 24]], [[9, 9]], [[29, 46]]]])
    kept = torch.zeros(64, dtype=torch.bool)
    kept[4:24] = kept[29:46] = True
    k[:, ~kept] = v[:, ~kept] = float("nan")
    out = decode_attention(q, k, v, ranges=ranges)
    assert in_tiles == [(10, 4), (2, 3)]
    for heads, (start, end) in ((slice(0, 2), (4, 24)), (slice(4, 6), (29, 46))):
        want = F.scaled_dot_product_attention(q[:, heads], k[:, None, start:end], v[:, None, start:end])
        torch.testing.assert_close(out[:, heads], want, rtol=0, atol=1e-12)
    assert (out[:, 2:4] == 0).all()


def test_long_ragged_caches_go_in_two_calls(monkeypatch):
    """A call for every head, and for every cut of one, would cost more than it reads."""
    calls, one_call = [], tiles._one_call
    monkeypatch.setattr(tiles, "_one_call", lambda *t: calls.append(t[1].shape[1]) or one_call(*t))
    monkeypatch.setattr(cpu, "attend", lambda *t: pytest.fail("a part"))
    ends = torch.tensor([0, 1024, 1344, 2368, 2560, 3000, 3136, 5184, 5696])
    k = torch.randn(1, 5700, 16)
    decode_attention(torch.randn(1, 16, 1, 16), k, k, ranges=torch.stack([ends[:-1], ends[1:]], -1)[None, :, None])
    assert len(calls) == 2 and sum(calls) < 5696 / 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_lone_row_in_half_precision_is_as_exact(dtype):
    q, k, v = (torch.randn(1, 2, n, 32).to(dtype) for n in (1, 300, 300))
    out, lse = attend(q, k, v, None, 0.2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2)
    assert within(out, F.scaled_dot_product_attention(q, k, v, scale=0.2), exact) and lse.shape == (1, 2, 1)


def test_the_cuts_are_there(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    counts = []
    monkeypatch.setattr(cpu, "_attend", lambda *t, attend=cpu._attend: counts.append(t[1].shape[1]) or attend(*t))
    k = torch.randn(1, 4098, 8)
    decode_attention(torch.randn(1, 1, 1, 8), k, k, ranges=torch.tensor([[[[0, 4098]]]]))
    assert counts == [4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 7, 8])  # in problem 6 no one sees anything
def test_as_good_as_pytorch_in_the_same_precision(seed, dtype):
    problem = random_problem(seed, head_dim=32, longest=120).to(dtype)
    exact, exact_lse = masked(problem)(problem.q.double(), problem.k.double(), problem.v.double())
    out, lse = ours(problem)(problem.q, problem.k, problem.v)
    assert within(out, problem.pytorchs(), exact) and lse.dtype == torch.float32
    seen = exact_lse.isfinite()
    scores = (problem.q @ problem.k.nan_to_num(0.0)[:, None].transpose(-1, -2)).float()
    scores = scores * problem.options.get("scale", 32**-0.5)
    theirs = scores.masked_fill(~problem.mask(), float("-inf")).logsumexp(-1)
    assert torch.equal(seen, lse.isfinite()) and within(lse[seen], theirs[seen], exact_lse[seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [3, 4])
def test_gradients_as_good_as_pytorchs_in_the_same_precision(seed, dtype):
    problem = random_problem(seed, head_dim=32, longest=120)
    problem = Problem(problem.q, problem.k.nan_to_num(0.0), problem.v.nan_to_num(0.0), problem.options).to(dtype)
    wide = problem.to(torch.float64)
    upstream = torch.randn_like(wide.q).to(dtype)
    grads = []
    for one, side in (
        (problem, lambda *t: ours(problem)(*t)[0]),
        (problem, lambda *t: Problem(*t, problem.options).pytorchs()),
        (wide, lambda *t: masked(wide)(*t)[0]),
    ):
        tensors = [t.detach().clone().requires_grad_() for t in (one.q, one.k, one.v)]
        grads.append(torch.autograd.grad(side(*tensors), tensors, upstream.to(one.q.dtype)))
    for name, mine, theirs, exact in zip(NAMES[2:], *grads, strict=True):
        assert within(mine, theirs, exact), name


def test_a_dense_cache_is_dense_attention():
    q, k, v = torch.randn(2, 6, 3, 16), torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
    ends = torch.arange(0, 151, 50)
    ranges = torch.stack([ends[:-1], ends[1:]], dim=-1)[None, :, None]
    out = decode_attention(q, k.flatten(1, 2), v.flatten(1, 2), ranges=ranges)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-5, atol=1e-5)


def test_rings_give_what_a_span_mask_gives():
    """40 steps into rings of 8 and 13 slots with 3 sinks: each step equals attention over all keys under the rule."""
    sink, rings, steps, dim = 3, (8, 13), 40, 8
    starts = (0, 8)
    q, keys, values = (torch.randn(1, n, steps, dim, dtype=torch.float64) for n in (4, 2, 2))
    k, v = (torch.full((1, sum(rings), dim), float("nan"), dtype=torch.float64) for _ in range(2))
    positions = torch.full((1, sum(rings)), -1)
    ranges = torch.tensor([[[[0, 8]], [[8, 21]]]])
    spans = [ring - sink for ring in rings]
    step = torch.arange(steps)
    age = step[:, None] - step
    for p in range(steps):
        for head, (start, ring) in enumerate(zip(starts, rings, strict=True)):
            slot = start + (p if p < sink else sink + (p - sink) % (ring - sink))
            k[0, slot], v[0, slot], positions[0, slot] = keys[0, head, p], values[0, head, p], p
        options = {"key_positions": positions, "query_positions": torch.tensor([[p]]), "spans": spans, "sink": sink}
        out = decode_attention(q[:, :, p : p + 1], k, v, ranges=ranges, **options)
        mask = torch.stack([(age >= 0) & ((step < sink) | (age < span)) for span in spans for _ in range(2)])[None]
        exact, _ = masked_attention(q[:, :, p : p + 1], keys, values, mask[:, :, p : p + 1], dim**-0.5)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-13)


def test_where_all_is_seen_no_mask_is_made(monkeypatch):
    """A full ring whose sinks stand in front: positions decide, and cost two glances a head."""
    from attn_plugins.ops.decode.visibility import Visibility

    monkeypatch.setattr(Visibility, "_seen", lambda *_: pytest.fail("a mask"))
    k = torch.randn(1, 40, 8)
    positions = torch.cat([torch.arange(4), torch.arange(60, 70), torch.arange(50, 60), torch.arange(54, 70)])[None]
    options = {"key_positions": positions, "query_positions": torch.tensor([[69]]), "sink": 4}
    ranges = torch.tensor([[[[0, 24]], [[24, 40]]]])
    decode_attention(torch.randn(1, 4, 1, 8), k, k, ranges=ranges, spans=[20, 16], **options)
    with pytest.raises(BaseException, match="a mask"):
        decode_attention(torch.randn(1, 4, 1, 8), k, k, ranges=ranges, spans=[19, 16], **options)


def test_the_cache_is_not_copied():
    k, v = torch.randn(1, 20_000, 64), torch.randn(1, 20_000, 64)
    q = torch.randn(1, 8, 1, 64)
    ranges = torch.tensor([[[[0, 9000], [9001, 9500]], [[9500, 20_000], [0, 0]]]])
    with LiveBytes([q, k, v, ranges]) as live:
        decode_attention(q, k, v, ranges=ranges)
    assert 0 < live.peak < nbytes(k) / 20


def test_a_batch_gives_what_its_items_give_alone():
    for seed in range(20):
        problem = random_problem(seed)
        whole = ours(problem)(problem.q, problem.k, problem.v)
        for b in range(len(problem.q)):
            item = {
                name: value[b : b + 1] if isinstance(value, torch.Tensor) and len(value) > 1 else value
                for name, value in problem.options.items()
            }
            rows = [t[b : b + 1] for t in (problem.q, problem.k, problem.v)]
            alone = decode_attention(*rows, **item, return_lse=True)
            for one, other in zip(whole, alone, strict=True):
                torch.testing.assert_close(one[b : b + 1], other, rtol=0, atol=1e-13)


def test_the_same_call_gives_the_same_bits():
    problem = random_problem(2).to(torch.float32)
    pairs = zip(results(ours(problem), problem), results(ours(problem), problem), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_nothing_to_attend():
    q, k = torch.randn(2, 2, 1, 8), torch.randn(2, 5, 8)
    for ranges in (torch.zeros(1, 2, 0, 2, dtype=torch.int64), torch.tensor([[[[3, 3]], [[5, 1]]]])):
        out, lse = decode_attention(q, k, k, ranges=ranges, return_lse=True)
        assert (out == 0).all() and lse.isneginf().all()
    out, lse = decode_attention(q[:, :, :0], k, k, ranges=torch.tensor([[[[0, 3]], [[3, 5]]]]), return_lse=True)
    assert out.shape == (2, 2, 0, 8) and lse.shape == (2, 2, 0)


def test_any_strides():
    problem = random_problem(1)
    wide = [torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype) for t in (problem.k, problem.v)]
    for whole, t in zip(wide, (problem.k, problem.v), strict=True):
        whole[..., ::2] = t
    check(Problem(problem.q, *(t[..., ::2] for t in wide), problem.options))


@pytest.mark.parametrize("seed", [0, 3])
def test_one_graph_with_gradients(seed):
    torch._dynamo.reset()
    problem = random_problem(seed)
    compiled = torch.compile(ours(problem), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, problem), results(ours(problem), problem)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_caches_that_grow_need_few_graphs():
    torch._dynamo.reset()
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(decode_attention, fullgraph=True, backend=count)
    for total in range(10, 20):
        q, k = torch.randn(1, 2, 1, 8), torch.randn(1, total, 8)
        ranges = torch.tensor([[[[0, total // 2]], [[total // 2, total]]]])
        positions = {"key_positions": torch.arange(total)[None], "query_positions": torch.tensor([[total]])}
        options = {"ranges": ranges, **positions, "spans": torch.tensor([4, 5]), "sink": 2}
        assert torch.equal(compiled(q, k, k, **options), decode_attention(q, k, k, **options))
    assert graphs <= 2


@pytest.mark.parametrize("seed", [0, 3])
def test_the_op_is_sound_for_torch_library(seed):
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checks."""
    problem = random_problem(seed)
    tensors = [t.nan_to_num(0.0).requires_grad_() for t in (problem.q, problem.k, problem.v)]
    ranges, keys = problem.options["ranges"], problem.options.get("key_positions")
    rule = (ranges, keys, problem.options.get("query_positions"), None, 0, 0.3)
    torch.library.opcheck(torch.ops.attn_plugins.decode.default, (*tensors, *rule, False))
    detached = [t.detach() for t in tensors]
    out, lse = torch.ops.attn_plugins.decode.default(*detached, *rule, False)
    backward = torch.ops.attn_plugins.decode_backward.default
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(backward, (torch.randn_like(out), grad_lse, *detached, out, lse, *rule))


Q, K = torch.zeros(2, 4, 1, 8), torch.zeros(2, 10, 8)
RANGES = torch.tensor([[[[0, 5]], [[5, 10]]]])
AT = {"key_positions": torch.zeros(1, 10, dtype=torch.int64), "query_positions": torch.zeros(2, 1, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("tensors", "options", "error", "named"),
    [
        ((Q, K[None], K[None]), {}, ValueError, r"k and v are \(batch, total, head_dim\)"),
        ((Q, K, K[:, :9]), {}, ValueError, r"v \(2, 9, 8\)"),
        ((Q, K[:1], K[:1]), {}, ValueError, "share batch and head_dim"),
        ((Q.double(), K, K), {}, TypeError, "float64"),
        ((Q, K, K), {"ranges": RANGES.tolist()}, TypeError, "ranges are list"),
        ((Q, K, K), {"ranges": RANGES.float()}, TypeError, "torch.float32: give a tensor of int32 or int64"),
        ((Q, K, K), {"ranges": RANGES[0]}, ValueError, r"legal is \(1 or 2, KV heads, ranges, 2\)"),
        ((Q, K, K), {"ranges": RANGES.expand(3, -1, -1, -1)}, ValueError, r"ranges \(3, 2, 1, 2\)"),
        ((Q, K, K), {"ranges": torch.zeros(1, 3, 1, 2, dtype=torch.int64)}, ValueError, "multiple of the 3 KV heads"),
        ((Q, K, K), {"ranges": RANGES + 1}, ValueError, r"range \[6, 11\) of KV head 1: k has tokens \[0, 10\)"),
        ((Q, K, K), {"ranges": RANGES - 1}, ValueError, r"range \[-1, 4\) of KV head 0"),
        ((Q, K, K), {"ranges": RANGES.repeat(1, 1, 2, 1)}, ValueError, "begins before 5, where one ends"),
        ((Q, K, K), {"key_positions": AT["key_positions"]}, ValueError, "belong together"),
        ((Q, K, K), {"spans": 3}, ValueError, "spans=3, sink=0 are of positions"),
        ((Q, K, K), {"sink": 3}, ValueError, "sink=3 are of positions"),
        ((Q, K, K), AT | {"query_positions": torch.zeros(2, 3).int()}, ValueError, r"legal is \(1 or 2, 1\)"),
        ((Q, K, K), AT | {"key_positions": torch.zeros(1, 10)}, TypeError, "key_positions are torch.float32"),
        ((Q, K, K), AT | {"sink": -1}, ValueError, "sink=-1: legal is 0 or more"),
        ((Q, K, K), AT | {"spans": [1, -2]}, ValueError, r"spans=\[1, -2\]: legal is 0 or more"),
        ((Q, K, K), AT | {"spans": [1, 2, 3]}, ValueError, r"one per KV head \(2\) or per query head \(4\)"),
        ((Q, K, K), AT | {"spans": torch.ones(2)}, TypeError, "spans are torch.float32"),
        ((Q.double(), K.double(), K.double()), {"backend": "triton"}, ValueError, "not float64; use 'auto'"),
        ((Q, K, K), {"backend": "flash"}, ValueError, "backend='flash'"),
    ],
)
def test_errors(tensors, options, error, named):
    with pytest.raises(error, match=named):
        decode_attention(*tensors, **{"ranges": RANGES, **options})
