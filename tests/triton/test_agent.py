"""The agent kernels, interpreted: output and gradients against float64, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import agent_attention  # noqa: E402
from attn_plugins.ops.agent.triton import configs, launch  # noqa: E402
from tests.support.agents import Problem, pytorchs, random_problem  # noqa: E402
from tests.support.tolerance import allowance, within  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_shares(monkeypatch):
    """Shares of one tile, so that small problems are split as large ones are."""
    monkeypatch.setattr(configs, "LEAST_TILES", 1)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def problem_of(heads, kv_heads, queries, keys, agents, dim, batch=1, **more):
    k, v = (rand(batch, kv_heads, keys, size)[..., :dim] for size in (dim, dim + 1))
    tensors = {"q": rand(batch, heads, queries, dim), "k": k, "v": v, "agents": rand(batch, heads, agents, dim)}
    biases = {name: t for name, t in more.items() if isinstance(t, torch.Tensor)}
    return Problem(tensors | biases, {name: t for name, t in more.items() if name not in biases})


def check(problem, dtype, gradients=True):
    problem = problem.to(dtype)
    wide = problem.to(torch.float64)
    if not gradients:
        found = {"out": problem.call(backend="triton")}
        theirs, exact = ({"out": pytorchs(**p.tensors, **p.options)} for p in (problem, wide))
    else:
        found = problem.results(backend="triton")
        theirs, exact = problem.pytorchs(), wide.results(pytorchs)
    assert found["out"].stride() == torch.empty_like(problem.tensors["q"]).stride()
    for name, one in found.items():
        assert within(one, theirs[name], exact[name]), name


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed, small_shares):
    check(random_problem(seed, head_dim=32, longest=40, generic=True), DTYPES[seed % 3])


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128])
def test_head_sizes(dim):
    biases = {"bias_aggregate": rand(1, 1, 9, 40), "bias_broadcast": rand(1, 1, 40, 9)}
    check(problem_of(1, 1, 40, 40, 9, dim, shortcut=0.075, **biases), DTYPES[dim // 8 % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("agents", [1, 2, 31, 70])
def test_numbers_of_agents(agents, dtype):
    """Of one agent only the output: its gradients are 0, and what is left of them is rounding."""
    check(problem_of(1, 1, 40, 70, agents, 16, exact_after=3), dtype, gradients=agents > 1)


def test_a_thousand_agents():
    check(problem_of(1, 1, 33, 40, 1024, 16), torch.float32, gradients=False)


@pytest.mark.parametrize("own", [(2, 2, 5, 33), (2, 1, 1, 1), (1, 2, 1, 33), (1, 1, 5, 1)], ids=str)
def test_a_bias_that_items_heads_or_rows_share_gets_their_gradients_summed(own):
    """`own`: what the biases have of their own: items, heads, agents, rows. Both query heads have one KV head."""
    biases = {"bias_aggregate": rand(*own[:3], 20), "bias_broadcast": rand(*own[:2], own[3], 5)}
    check(problem_of(2, 1, 33, 20, 5, 16, batch=2, exact_before=1, **biases), torch.float32)


def test_a_bias_may_be_expanded():
    """Strides of 0 along axes that are longer than 1."""
    problem = problem_of(2, 1, 20, 40, 5, 16).to(torch.float32)
    bias = rand(1, 1, 1, 40).float().requires_grad_()
    outs = [problem.call(bias_aggregate=one, backend="triton") for one in (bias, bias.expand(1, 2, 5, 40))]
    grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in outs]
    assert torch.equal(*outs)
    torch.testing.assert_close(*grads)


def test_an_empty_share_counts_nothing(monkeypatch):
    """70 keys in 7 shares of 32: four have none."""
    monkeypatch.setattr(configs, "split_count", lambda *_: 7)
    check(problem_of(1, 1, 20, 70, 5, 16), torch.float32)


def test_keys_that_a_bias_hides():
    problem = problem_of(2, 2, 40, 70, 5, 16)
    hidden = torch.zeros(1, 1, 1, 70, dtype=torch.float64)
    hidden[..., :40] = float("-inf")  # a whole tile
    found = Problem(problem.tensors | {"bias_aggregate": hidden}, {}).to(torch.float32).call(backend="triton")
    rest = {name: t[:, :, 40:] for name, t in problem.tensors.items() if name in "kv"}
    torch.testing.assert_close(found.double(), Problem(problem.tensors | rest, {}).call(), rtol=0, atol=2e-6)


def test_any_strides(small_shares):
    problem = random_problem(3, head_dim=16, generic=True).to(torch.float32)
    apart = {}
    for name, t in problem.tensors.items():
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0)
        wide[..., ::2] = t
        apart[name] = wide[..., ::2]
    assert torch.equal(Problem(apart, problem.options).call(backend="triton"), problem.call(backend="triton"))


def test_the_rule_sees_an_error_of_twice_the_tolerance():
    problem = problem_of(2, 2, 40, 70, 5, 16).to(torch.bfloat16)
    out, theirs = problem.call(backend="triton"), problem.call(backend="cpu")
    expected = problem.to(torch.float64).call(backend="reference")
    wrong, at = out.contiguous().view(-1).clone(), int(expected.abs().argmax())
    wrong[at] = expected.reshape(-1)[at] + 2 * allowance(theirs, expected)
    assert within(out, theirs, expected) and not within(wrong.view(out.shape), theirs, expected)


def test_the_same_call_gives_the_same_bits(small_shares):
    problem = random_problem(4, head_dim=16, generic=True).to(torch.float16)
    one, other = (problem.results(backend="triton") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_graph_with_gradients():
    torch._dynamo.reset()
    problem = random_problem(3, head_dim=16, generic=True).to(torch.float32)
    compiled = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    found, expected = problem.results(compiled, backend="triton"), problem.results(backend="triton")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_long_axes_are_split_where_blocks_are_few():
    assert configs.split_count(16, 16_384, 64) == 16  # 8 heads, 256 agents in blocks of 128
    assert configs.split_count(1024, 16_384, 64) == 1
    assert configs.split_count(1, 300, 64) == 1 and configs.split_count(1, 1024, 64) == 4


def test_the_host_reads_no_value(monkeypatch):
    """Launches from meta tensors, which have none: grids and buffers come from shapes."""
    grids = {}
    names = ("attend_kernel", "combine_shares", "grad_rows_kernel", "grad_keys_kernel", "grad_bias_kernel")
    for name in names:
        monkeypatch.setattr(launch, name, _Recorder(grids.setdefault(name, [])))
    monkeypatch.setattr(launch, "triton_target", lambda: "sm_90")
    agents, k = (torch.empty(1, 8, n, 64, dtype=torch.float16, device="meta") for n in (256, 4096))
    bias = torch.empty(1, 8, 256, 4096, dtype=torch.float16, device="meta")
    out, lse = launch.attend(agents, k, k, bias, 0.1)
    launch.attend_backward(out, agents, k, k, bias, out, lse, 0.1, True)
    assert grids == {
        "attend_kernel": [(16, 16)], "combine_shares": [(2048,)], "grad_rows_kernel": [(16, 1)],
        "grad_keys_kernel": [(256, 1)], "grad_bias_kernel": [(32, 64)],
    }  # fmt: skip


class _Recorder:
    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid if isinstance(grid, tuple) else (grid,))
        return lambda *_, **__: None
