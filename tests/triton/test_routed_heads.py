"""The kernel over gathered rows, interpreted: against masked and gated attention in float64, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import routed_head_attention  # noqa: E402
from attn_plugins.ops.routed_heads.triton import launch, tables  # noqa: E402
from tests.support.routed_heads import NAMES, Problem, random_problem  # noqa: E402
from tests.support.tolerance import allowance, within  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(problem):
    found, theirs = problem.results(problem.ours(backend="triton")), problem.results(problem.pytorchs)
    exact = problem.results(problem.pytorchs, torch.float64)
    for name in NAMES:
        if exact[name].any():
            assert within(found[name], theirs[name], exact[name]), name
        else:  # of a single key, or a scale of 0: what is left is rounding, where PyTorch may have none
            assert found[name].abs().max() <= torch.finfo(found[name].dtype).eps, name
    assert found["out"].stride() == torch.empty_like(problem.q).stride()
    skipped = ~problem.computed()
    assert (found["out"][skipped] == 0).all() and (found["q"][skipped] == 0).all()
    with torch.no_grad():  # nothing kept for a backward
        out = problem.ours(backend="triton")(*problem.tensors)
    assert torch.equal(out, found["out"])


@pytest.mark.parametrize("seed", range(15))
def test_random_problems(seed):
    check(random_problem(seed, longest=50).to(DTYPES[seed % 3]))


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 256])
def test_head_sizes(dim):
    check(random_problem(11, head_dim=dim, longest=24).to(DTYPES[dim // 8 % 3]))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_head_without_a_token_one_with_all_and_uneven_ones(causal):
    q, k, v = (torch.randn(2, heads, 45, 16) for heads in (4, 2, 2))
    active = torch.rand(2, 45, 4) < torch.linspace(0, 1, 4)
    active[0, :, 0], active[1, :, 3] = False, True
    options = {"active": active, "causal": causal, "dense_backward": False}
    check(Problem(q, k, v, torch.rand(2, 45, 4) + 0.1, options))


@pytest.mark.parametrize("gates", DTYPES, ids=str)
def test_gates_of_another_precision(gates):
    q, k = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16), torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
    weights = torch.rand(1, 40, 2).to(gates)
    out, other = (routed_head_attention(q, k, k, weights, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(out, other, rtol=2**-7, atol=1e-3)


def test_any_strides():
    problem = random_problem(2, head_dim=16, longest=30).to(torch.float32)
    k, v = (torch.stack([t, t], dim=-1)[..., 0] for t in (problem.k, problem.v))
    q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    check(Problem(q, k, v, problem.gates.transpose(0, 2).contiguous().transpose(0, 2), problem.options))


def test_the_lists_are_ascending_and_the_tiles_cover_them_once():
    mask = torch.rand(2, 70, 3) < 0.5
    mask[0, :, 1], mask[1, :, 2] = False, True
    lists, counts = tables.row_lists(mask)
    assert counts.tolist() == mask.sum(1).flatten().tolist()
    seen = []
    table = tables.tile_table(counts, 70, 16)
    assert len(table) == 6 * 5
    for head, first in table.tolist():
        if first < 0:
            continue
        seen += [(head, row) for row in lists[head, first : min(first + 16, int(counts[head]))].tolist()]
    right = [(b * 3 + h, row) for b in range(2) for h in range(3) for row in mask[b, :, h].nonzero()[:, 0].tolist()]
    assert sorted(seen) == right  # each once
    there = (table[:, 1] >= 0).tolist()
    assert there == sorted(there, reverse=True)  # what there is comes first


def test_lengths_that_leave_k_are_cut_and_never_read_beyond():
    """The device checks nothing, so the kernel must not trust it; the sanitizer would see the load."""
    q = torch.randn(2, 2, 20, 16)
    gates = torch.rand(2, 20, 2) + 0.1
    wild, tame = torch.tensor([[-3, 12], [5, 99]]), torch.tensor([[0, 9], [5, 15]])
    one, other = (routed_head_attention(q, q, q, gates, lengths=n, backend="triton") for n in (wild, tame))
    assert torch.equal(one, other)


def test_scores_that_would_overflow_an_exponential():
    q = 30 * torch.randn(1, 2, 50, 16)
    check(Problem(q, q.clone(), torch.randn(1, 2, 50, 16), torch.rand(1, 50, 2), {"dense_backward": False}))


def test_the_rule_sees_an_error_of_twice_the_tolerance():
    problem = random_problem(13, head_dim=32, longest=30).to(torch.bfloat16)
    out = problem.ours(backend="triton")(*problem.tensors)
    theirs, exact = problem.pytorchs(*problem.tensors), problem.pytorchs(*problem.to(torch.float64).tensors)
    assert within(out, theirs, exact)
    wrong, at = out.contiguous().view(-1).clone(), int(exact.abs().argmax())
    wrong[at] = exact.reshape(-1)[at] + 2 * allowance(theirs, exact)
    assert not within(wrong.view(out.shape), theirs, exact)


def test_the_same_call_gives_the_same_bits():
    problem = random_problem(13, longest=30).to(torch.float16)
    one, other = (problem.results(problem.ours(backend="triton")) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


def test_one_graph_with_gradients():
    problem = random_problem(13, longest=30).to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(problem.ours(backend="triton"), fullgraph=True, backend="aot_eager")
    found, expected = problem.results(compiled), problem.results(problem.ours(backend="triton"))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_the_host_reads_no_value(monkeypatch):
    """A launch from meta tensors, which have none: lists and grid come from shapes."""
    grids = []
    monkeypatch.setattr(launch, "attend_rows", _Recorder(grids))
    monkeypatch.setattr(launch, "triton_target", lambda: "sm_90")
    q, k = (torch.empty(2, n, 1000, 64, dtype=torch.float16, device="meta") for n in (8, 2))
    mask = torch.empty(2, 1000, 8, dtype=torch.bool, device="meta")
    bounds = torch.empty(2, 2, dtype=torch.int64, device="meta")
    launch.forward(q, k, k, mask.half(), mask, bounds, True, 0.1, True)
    assert grids == [(2 * 8 * 8,)]


class _Recorder:
    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


def test_what_the_kernels_do_not_take_is_refused():
    q, gates = torch.zeros(1, 1, 4, 512), torch.ones(1, 4, 1)
    for t, named in ((q, "head sizes of up to 256, not 512"), (q[..., :8].double(), "not float64")):
        with pytest.raises(ValueError, match=named):
            routed_head_attention(t, t, t, gates, backend="triton")
