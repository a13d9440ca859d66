"""Routed-head attention in plain PyTorch: against masked and gated attention, in every form that the backend has."""

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import routed_head_attention
from attn_plugins.ops.routed_heads import cost, cpu, jobs
from tests.support.routed_heads import NAMES, Problem, random_problem
from tests.support.tolerance import allowance, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["as it chooses", "gathered", "gathered, two parts", "dense"])
def form(request, monkeypatch):
    """The backend made to take one form wherever it can: small problems would all be dense."""
    if request.param.startswith("gathered"):
        for name, value in (("SURE", 1e30), ("SURE_CAUSAL", 1e30), ("NEARLY_ALL", 0.999), ("CHUNK_ROWS", (23, 40))):
            monkeypatch.setattr(jobs, name, value)
    if request.param == "gathered, two parts":
        monkeypatch.setattr(cost, "MASKED_KEYS", -1)
    if request.param == "dense":
        monkeypatch.setattr(jobs, "NEARLY_ALL", -1)
    return request.param


@pytest.fixture
def taken(monkeypatch):
    """All jobs that were made."""
    made = []
    monkeypatch.setattr(cpu, "jobs_of", lambda *args: made.extend(found := jobs.jobs_of(*args)) or found)
    return made


def check(problem, **more):
    found, exact = problem.results(problem.ours(**more)), problem.results(problem.pytorchs)
    for name in NAMES:
        torch.testing.assert_close(
            found[name], exact[name], rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found["out"].stride() == torch.empty_like(problem.q).stride()
    skipped = ~problem.computed()
    assert (found["out"][skipped] == 0).all() and (found["q"][skipped] == 0).all()
    if not problem.options["dense_backward"]:
        assert (found["gates"].transpose(1, 2)[skipped] == 0).all()
    with torch.no_grad():  # gated where the rows are, and nothing kept
        inference = problem.ours(**more)(*problem.tensors)
    torch.testing.assert_close(inference, exact["out"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed, form):
    check(random_problem(seed))


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_the_reference_backend(seed):
    check(random_problem(seed), backend="reference")


def test_every_form_is_among_those_tested(form, taken):
    for seed in range(60):
        problem = random_problem(seed)
        problem.ours()(*problem.tensors)
    gathered = [job for job in taken if job.starts is not None]
    dense = [job for job in taken if job.starts is None]
    if form == "dense":
        assert not gathered and any(job.partial for job in dense) and any(len(job.parts) == 2 for job in dense)
    elif form != "as it chooses":
        assert any(len(job.kv) > 1 for job in gathered) and any(not job.partial for job in dense)
        assert any(len(set(job.sizes)) > 1 for job in gathered)
        assert (form == "gathered, two parts") == any(len(job.parts) == 2 for job in gathered)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_pytorch_in_the_same_precision(seed, dtype, form):
    problem = random_problem(seed, head_dim=32).to(dtype)
    ours, theirs = problem.results(problem.ours()), problem.results(problem.pytorchs)
    exact = problem.results(problem.pytorchs, torch.float64)
    for name, one in ours.items():
        assert within(one, theirs[name], exact[name]), name


def test_the_rule_sees_an_error_of_twice_the_tolerance():
    problem = random_problem(13, head_dim=32).to(torch.bfloat16)
    ours, theirs = problem.results(problem.ours()), problem.results(problem.pytorchs)
    exact = problem.results(problem.pytorchs, torch.float64)
    for name, one in ours.items():
        assert within(one, theirs[name], exact[name])
        wrong, at = one.contiguous().view(-1).clone(), int(exact[name].abs().argmax())
        wrong[at] = exact[name].reshape(-1)[at] + 2 * allowance(theirs[name], exact[name])
        assert not within(wrong.view(one.shape), theirs[name], exact[name]), name


@pytest.mark.parametrize("change", ["one more row", "one row less", "another gate", "one key more"])
def test_the_comparison_sees_a_row_a_gate_and_a_key(change):
    """What `check` compares differs by far more than it lets pass when one decision of many is another."""
    problem = random_problem(13, poison=False)
    options = {"causal": True, "dense_backward": False, "lengths": torch.tensor([90] * len(problem.q))}
    n = 100
    q, k, v, gates = (t[:, :, :n] if t is not problem.gates else t[:, :n] for t in problem.tensors)
    problem = Problem(q, k[:, :, :n], v[:, :, :n], gates.clamp(min=0.2), options)
    right = problem.ours()(*problem.tensors)
    active = torch.ones(gates.shape, dtype=torch.bool)
    changed = problem.gates.clone()
    if change == "one key more":
        wrong = problem.ours(lengths=torch.tensor([91] * len(q)), causal=False)(*problem.tensors)
        right = problem.ours(causal=False)(*problem.tensors)
    elif change == "another gate":
        changed[-1, 50, -1] += 0.01
        wrong = problem.ours()(*problem.tensors[:3], changed)
    elif change == "one row less":
        active[-1, 50, -1] = False
        wrong = problem.ours(active=active)(*problem.tensors)
    else:
        active[-1, 50, -1] = False
        right, wrong = problem.ours(active=active)(*problem.tensors), right
    assert (right - wrong).abs().max() > 1e-6


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_all_heads_with_gates_of_one_are_dense_attention_to_the_bit(dtype, causal, kv_heads):
    q, k, v = (torch.randn(2, 300, heads, 32).to(dtype).transpose(1, 2) for heads in (8, kv_heads, kv_heads))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads < 8)
    out = routed_head_attention(q, k, v, torch.ones(2, 300, 8, dtype=dtype), causal=causal)
    assert torch.equal(out, expected) and out.stride() == q.stride()
    graded = routed_head_attention(q.requires_grad_(), k, v, torch.ones(2, 300, 8), causal=causal)
    assert torch.equal(graded, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_head_without_a_token_one_with_all_and_uneven_ones(causal, form):
    q, k, v = (torch.randn(2, heads, 333, 16, dtype=torch.float64) for heads in (8, 2, 2))
    active = torch.rand(2, 333, 8) < torch.linspace(0, 1, 8)
    active[0, :, 0], active[1, :, 7] = False, True
    active[0, :200, 3], active[1, 5:, 4] = False, False  # only late ones, only early ones
    check(Problem(q, k, v, torch.rand(2, 333, 8, dtype=torch.float64) + 0.1,
                  {"active": active, "causal": causal, "dense_backward": False}))  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_nothing_active_is_zeros(causal):
    q, k = torch.randn(1, 4, 30, 8).requires_grad_(), torch.randn(1, 4, 30, 8)
    out = routed_head_attention(q, k, k, torch.zeros(1, 30, 4), causal=causal)
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 0, 5, 8)], ids=str)
def test_empty(shape):
    q = torch.randn(shape).requires_grad_()
    k = torch.randn(shape[0], 3, 5, 8).requires_grad_()
    gates = torch.ones(shape[0], shape[2], shape[1])
    for backend in ("cpu", "reference"):
        out = routed_head_attention(q, k, k, gates, backend=backend)
        grads = torch.autograd.grad(out.sum(), (q, k))
        assert out.shape == q.shape and (grads[1] == 0).all()


def test_no_keys_at_all():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    assert (routed_head_attention(q, k, k, torch.ones(1, 5, 2)) == 0).all()


@pytest.mark.parametrize("name", ["transposed", "sliced", "expanded", "channels first"])
def test_any_strides(name, form):
    problem = random_problem(2, poison=False)
    q = problem.q
    q = {
        "transposed": lambda: q.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda: torch.cat([q, q], dim=-1)[..., : q.shape[-1]],
        "expanded": lambda: q[:1].expand(len(q), -1, -1, -1),
        "channels first": lambda: q.transpose(-1, -2).contiguous().transpose(-1, -2),
    }[name]()
    k, v = (torch.stack([t, t], dim=-1)[..., 0] for t in (problem.k, problem.v))
    check(Problem(q, k, v, problem.gates, problem.options))
