"""What routed-head attention promises besides its numbers: graphs, gradients, memory, items, errors, its choices."""

import re

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import routed_head_attention
from attn_plugins.ops.routed_heads import cost, jobs
from attn_plugins.ops.routed_heads.rows import Rows
from tests.ops.test_memory import LiveBytes, nbytes
from tests.support.routed_heads import NAMES, random_problem


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def gathering(monkeypatch):
    for name, value in (("SURE", 1e30), ("SURE_CAUSAL", 1e30), ("NEARLY_ALL", 0.999), ("CHUNK_ROWS", (4,))):
        monkeypatch.setattr(jobs, name, value)


def small(causal=True, tokens=9, dtype=torch.float64):
    q, k, v = (torch.randn(2, heads, tokens, 4, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    gates = torch.rand(2, tokens, 4, dtype=dtype) + 0.5
    active = torch.rand(2, tokens, 4) < torch.tensor([0.0, 0.5, 0.5, 1.0])
    return (q, k, v, gates.requires_grad_()), {"causal": causal, "active": active}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradients_by_finite_differences(causal, gathering):
    tensors, options = small(causal)
    assert torch.autograd.gradcheck(lambda *t: routed_head_attention(*t, **options), tensors)


def test_dense_backward_gives_skipped_gates_the_gradient_of_the_dense_formula(gathering):
    """Straight-through: gates of 0 and 1, of which a router is to learn."""
    (q, k, v, _), options = small()
    gates = options["active"].double().requires_grad_()
    out = routed_head_attention(q, k, v, gates, causal=True, dense_backward=True)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, gates), upstream)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) * gates.transpose(1, 2)[..., None]
    for one, other in zip(found, torch.autograd.grad(dense, (q, k, v, gates), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    without = routed_head_attention(q, k, v, gates, causal=True)
    grad = torch.autograd.grad(without, gates, upstream)[0]
    assert (grad[gates == 0] == 0).all() and torch.equal(grad[gates != 0], found[3][gates != 0])


def test_gates_that_want_no_gradient_and_gates_alone():
    (q, k, v, gates), options = small()
    whole = torch.autograd.grad(routed_head_attention(q, k, v, gates, **options).sum(), (q, k, v, gates))
    some = torch.autograd.grad(routed_head_attention(q, k, v, gates.detach(), **options).sum(), (q, k, v))
    alone = torch.autograd.grad(
        routed_head_attention(q.detach(), k.detach(), v.detach(), gates, **options).sum(), gates
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, (*some, *alone), strict=True))


@pytest.mark.parametrize("seed", [3, 8, 11])
def test_a_batch_gives_what_its_items_give(seed):
    problem = random_problem(seed, poison=False)
    batch = problem.ours()(*problem.tensors)
    for b in range(len(problem.q)):
        options = {
            name: value[b : b + 1] if isinstance(value, torch.Tensor) else value
            for name, value in problem.options.items()
        }
        alone = routed_head_attention(*(t[b : b + 1] for t in problem.tensors), **options)
        torch.testing.assert_close(batch[b : b + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [3, 8, 11])
def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state(seed, gathering):
    problem = random_problem(seed).to(torch.float32)
    state = torch.get_rng_state()
    one, other = (problem.results(problem.ours()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [2, 3, 8, 11])
def test_one_graph_with_gradients(seed):
    problem = random_problem(seed)
    compiled = torch.compile(problem.ours(), fullgraph=True, backend="aot_eager")
    found, expected = problem.results(compiled), problem.results(problem.ours())
    for name, one in found.items():
        assert torch.equal(one, expected[name]) and one.stride() == expected[name].stride(), name
    with torch.no_grad():
        assert torch.equal(compiled(*problem.tensors), problem.ours()(*problem.tensors))


def test_texts_of_other_lengths_need_few_graphs():
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(routed_head_attention, fullgraph=True, backend=count)
    for tokens in range(20, 26):
        q, gates = torch.randn(1, 2, tokens, 8), torch.rand(1, tokens, 2)
        assert torch.equal(compiled(q, q, q, gates, causal=True), routed_head_attention(q, q, q, gates, causal=True))
    assert graphs <= 2


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bounds", [None, torch.tensor([[1, 8], [0, 9]])], ids=["all", "lengths"])
def test_the_ops_are_sound_for_torch_library(keep, bounds):
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checks."""
    tensors, options = small()
    setting = (True, True, 0.3, False)
    mask = options["active"]
    plain = [t.detach() for t in tensors]
    given = tensors if keep else plain
    torch.library.opcheck(torch.ops.attn_plugins.routed_heads.default, (*given, mask, bounds, *setting, keep))
    if keep:
        out, attention, lse = torch.ops.attn_plugins.routed_heads(*plain, mask, bounds, *setting, True)
        for wants in (False, True):
            arguments = (torch.randn_like(out), *plain, mask, bounds, attention, lse, *setting, wants)
            torch.library.opcheck(torch.ops.attn_plugins.routed_heads_backward.default, arguments)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_memory_stays_within_twice_q_k_v(causal, kv_heads):
    """Beyond what goes in and what comes out, and what the backward is kept; scores would take 100 times as much."""
    q, k, v = (torch.randn(1, 4096, heads, 64).transpose(1, 2).requires_grad_() for heads in (4, kv_heads, kv_heads))
    gates = torch.rand(1, 4096, 4) * (torch.rand(1, 4096, 4) < 0.5)
    budget = 2 * nbytes(q, k, v)
    with LiveBytes([q, k, v, gates]) as live, torch.no_grad():
        out = routed_head_attention(q, k, v, gates, causal=causal)
    assert 0 < live.peak - nbytes(out) <= budget
    with LiveBytes([q, k, v, gates]) as live:
        out = routed_head_attention(q, k, v, gates, causal=causal)
    assert 0 < live.peak - 2 * nbytes(out) <= budget  # attention without gates is kept
    upstream = torch.randn_like(out)
    with LiveBytes([q, k, v, gates, out, upstream]) as live:
        grads = torch.autograd.grad(out, (q, k, v), upstream)
    assert 0 < live.peak - nbytes(*grads) <= budget


def chosen(share, causal, tokens=2048, heads=8):
    """Jobs and shares of one head for q of these sizes, in float32."""
    q = torch.empty(1, heads, tokens, 64)
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(1, tokens, heads, generator=rng) < torch.as_tensor(share)
    return jobs.jobs_of(Rows.of(mask, heads), [(0, tokens)], q, q, causal)


@pytest.mark.parametrize(("share", "causal"), [(0.5, False), (0.75, False), (0.5, True), (0.1, True)])
def test_it_gathers_where_that_pays(share, causal):
    assert all(job.starts is not None for job in chosen(share, causal))


@pytest.mark.parametrize(("share", "causal"), [(0.97, False), (0.9, True)])
def test_it_computes_all_where_that_costs_less(share, causal):
    assert all(job.starts is None and job.partial for job in chosen(share, causal))


def test_shared_heads_are_dense_and_the_rest_is_gathered():
    found = chosen([1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.5, 0.5], True)
    dense = [job for job in found if job.starts is None]
    assert [job.kv for job in dense] == [[0, 1]] and not dense[0].partial
    assert {kv for job in found for kv in job.kv} == {0, 1, 2, 3, 4, 6, 7}


def test_heads_go_together_where_their_lists_are_alike():
    assert max(len(job.kv) for job in chosen(0.5, True)) == 8
    share = torch.full((2048, 8), 0.1)
    share[:1024, :4], share[1024:, 4:] = 0.9, 0.9
    mixed = chosen(share, True)  # as many rows, but early ones and late ones: keys that the others do not see
    assert all(len(job.kv) == 1 for job in mixed if job.starts is not None)


def test_the_cost_of_gathering_falls_with_the_rows():
    place = cost.Place(0, 2048, 0, 2048, 0, False)
    costs = [cost.gather_cost([cost.Chunk(rows, 2048, 2048)], place, 8, 4, 2) for rows in (512, 1024, 1536, 2048)]
    assert costs == sorted(costs) and costs[1] < 0.6 * cost.dense_cost(place, 8, 4, 2) < costs[2]


Q, GATES = torch.zeros(2, 4, 6, 8), torch.ones(2, 6, 4)
WRONG = {
    "gates by head": ({"gates": torch.ones(2, 4, 6)}, ValueError, "gates (2, 4, 6)", "(2, 6, 4)"),
    "gates of integers": ({"gates": GATES.long()}, TypeError, "gates are torch.int64", "float16, bfloat16"),
    "gates that are none": ({"gates": None}, TypeError, "gates is a NoneType", "(batch, tokens, heads)"),
    "active by head": ({"active": torch.ones(2, 4, 6).bool()}, ValueError, "active (2, 4, 6)", "(2, 6, 4)"),
    "active of floats": ({"active": GATES}, TypeError, "active is torch.float32", "give bool"),
    "another device": ({"gates": GATES.to("meta")}, ValueError, "gates is on meta, q on cpu", "one device"),
    "too few keys": ({"k": Q[:, :, :5], "v": Q[:, :, :5], "causal": True}, ValueError, "6 queries, but 5 keys", "own"),
    "heads that do not divide": ({"k": Q[:, :3], "v": Q[:, :3]}, ValueError, "4 query heads", "multiple of the 3"),
    "lengths of floats": ({"lengths": torch.ones(2)}, TypeError, "lengths are torch.float32", "int32 or int64"),
    "lengths of three items": ({"lengths": [1, 2, 3]}, ValueError, "lengths (3,)", "(2, 2) [before, valid]"),
    "too long": ({"lengths": [3, 7]}, ValueError, "item 1: tokens [0, 7)", "0..6"),
    "behind the end": ({"lengths": [[0, 6], [4, 3]]}, ValueError, "item 1: tokens [4, 7)", "6 at most"),
    "a negative length": ({"lengths": -1}, ValueError, "item 0: tokens [0, -1)", "0..6"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend='cuda'", "legal are auto"),
}


@pytest.mark.parametrize(("given", "error", "named", "legal"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors_name_the_values_and_what_is_legal(given, error, named, legal, backend):
    arguments = {"q": Q, "k": Q, "v": Q, "gates": GATES, "backend": backend} | given
    with pytest.raises(error, match=f"{re.escape(named)}.*{re.escape(legal)}"):
        routed_head_attention(**arguments)
