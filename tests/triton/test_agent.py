"""The agent kernels, interpreted: output and gradients against float64, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import agent_attention  # noqa: E402
from attn_plugins.ops.agent.triton import configs, launch  # noqa: E402
from attn_plugins.ops.agent.triton.strides import in_rows, strides, unit_of  # noqa: E402
from attn_plugins.ops.block_sparse.triton.configs import Config  # noqa: E402
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


@pytest.mark.parametrize(("dim", "unit"), [(40, 8), (36, 4), (48, 16)])
def test_strides_in_units(dim, unit, small_shares):
    """Heads inside tokens, as a projection leaves them: what divides the strides of all is what a head size has."""
    problem = problem_of(3, 3, 40, 40, 9, dim, shortcut=0.075)
    tensors = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in problem.tensors.items()}
    assert unit_of(*tensors.values()) == unit
    check(Problem(tensors, problem.options), torch.float16)


def test_a_stride_is_in_units_and_of_one_it_is_none():
    q = torch.empty(1, 5, 3, 40).transpose(1, 2)
    assert unit_of(q) == 8 and strides(8, q, None) == [0, 5, 15, 1, 0, 0, 0, 0]
    assert unit_of(q, torch.empty(2, 3, 5, 41)[..., :40]) == 1
    assert unit_of(q[:1, :1, :1]) == 16  # nothing lies apart


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


@pytest.mark.parametrize("batch", [3, 9])
def test_items_that_share_a_bias_are_shared_out(batch, small_shares):
    """As in the trained models, whose bias is one for a whole batch: a program for each of them would wait for few."""
    biases = {"bias_aggregate": rand(1, 2, 5, 20), "bias_broadcast": rand(1, 2, 33, 5)}
    check(problem_of(2, 2, 33, 20, 5, 16, batch=batch, **biases), torch.float32)


def test_a_bias_may_be_expanded():
    """Strides of 0 along axes that are longer than 1."""
    problem = problem_of(2, 1, 20, 40, 5, 16).to(torch.float32)
    bias = rand(1, 1, 1, 40).float().requires_grad_()
    outs = [problem.call(bias_aggregate=one, backend="triton") for one in (bias, bias.expand(1, 2, 5, 40))]
    grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in outs]
    assert torch.equal(*outs)
    torch.testing.assert_close(*grads)


def test_a_bias_alike_for_all_keys():
    problem = problem_of(2, 1, 33, 70, 9, 16, batch=2)
    tensors = problem.tensors | {"bias_aggregate": rand(2, 2, 9, 1), "bias_broadcast": rand(1, 2, 33, 1)}
    check(Problem(tensors, {}), torch.float16, gradients=False)  # that of such a bias is 0


@pytest.mark.parametrize("first", [3, 16, None], ids=["at an odd place", "at an even place", "transposed"])
def test_a_bias_may_lie_as_it_likes(first):
    problem = problem_of(2, 1, 33, 70, 9, 16, batch=2).to(torch.float16)
    bias = rand(2, 2, 9, 70).half()
    if first is None:
        other = bias.mT.contiguous().mT
    else:
        other = torch.full((2, 2, 9, 96), float("nan"), dtype=torch.float16)[..., first : first + 70]
        other.copy_(bias)
    assert other.stride() != bias.stride()
    found = []
    for one in (bias, other):
        one = one.detach().requires_grad_()
        out = problem.call(bias_aggregate=one, backend="triton")
        found.append((out, torch.autograd.grad(out.float().square().sum(), one)[0]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_bias_is_read_as_it_lies_where_its_rows_are_even():
    bias = torch.randn(1, 3, 20, 64)
    for even in (bias, bias[:, :, 5:14], bias[..., 16:32], bias[..., 3:4], None):
        assert in_rows(even) is even
    for odd in (torch.randn(1, 3, 9, 61), torch.randn(1, 3, 9, 72)[..., 1:65], torch.randn(1, 3, 64, 9).mT):
        rows = in_rows(odd)
        assert rows.shape[3] == rows.stride(2) == 64 and rows.stride(3) == 1 and rows.is_contiguous()
        assert torch.equal(rows[..., : odd.shape[3]], odd)


def test_a_bias_that_was_expanded_is_copied_once():
    rows = in_rows(torch.randn(1, 3, 1, 61).expand(8, 3, 9, 61))
    assert rows.shape == (1, 3, 1, 64)
    assert in_rows(torch.randn(1, 3, 9, 1).expand(8, 3, 9, 64)).shape == (1, 3, 9, 1)


def test_an_empty_share_counts_nothing(monkeypatch):
    """70 keys in 7 shares of 32: four have none. Nor have four of 7 shares of the three items that have one bias."""
    monkeypatch.setattr(configs, "split_count", lambda *_: 7)
    check(problem_of(1, 1, 20, 70, 5, 16, batch=3), torch.float32)
    biases = {"bias_aggregate": rand(1, 1, 5, 70), "bias_broadcast": rand(1, 1, 20, 5)}
    check(problem_of(1, 1, 20, 70, 5, 16, batch=3, **biases), torch.float32)


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


@pytest.mark.parametrize(
    ("kernel", "queries", "keys", "width", "expected"),
    [
        ("attend", 4096, 256, 64, (128, 64, 8)),
        ("attend", 49, 197, 64, (64, 64, 4)),  # half the rows, half the warps
        ("attend", 49, 197, 128, (128, 64, 8)),  # 64 rows of 128 would be held by every warp
        ("attend", 25, 3136, 128, (128, 64, 8)),
        ("attend", 25, 3136, 64, (32, 64, 4)),
        ("attend", 9, 3136, 128, (16, 64, 4)),
        ("attend", 4096, 9, 64, (128, 16, 8)),
        ("grad_keys", 4096, 49, 64, (128, 64, 8)),
    ],
)
def test_tiles_are_no_longer_than_what_they_go_over(kernel, queries, keys, width, expected):
    found = configs.fit(kernel, Config(128, 64, 8, 2), queries, keys, width)
    assert (found.block_m, found.block_n, found.warps, found.stages) == (*expected, 2)


def test_a_padded_head_size_has_a_config_of_its_own_where_the_row_would_spill():
    whole, padded = (configs.choose("attend", "sm_120", torch.bfloat16, dim) for dim in (128, 80))
    assert whole != padded and (whole.block_m, whole.block_n) == (padded.block_m, padded.block_n)
    assert configs.choose("attend", "sm_90", torch.bfloat16, 80) == configs.choose(
        "attend", "sm_90", torch.bfloat16, 128
    )


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
        "grad_keys_kernel": [(256, 1)], "grad_bias_kernel": [(32, 64, 1)],
    }  # fmt: skip


class _Recorder:
    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid if isinstance(grid, tuple) else (grid,))
        return lambda *_, **__: None
