"""Agent attention: against its definition, the facts that hold for it, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import cpu, op
from tests.ops.test_memory import LiveBytes, nbytes
from tests.support.agents import Problem, random_problem

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def dense(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def close(one, other, atol=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def agree(found, expected, atol=1e-11):
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=0, atol=atol, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed, monkeypatch):
    """Output and all gradients; few keys in a cut, and scores of a few rows at once where a bias wants a gradient."""
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 700)
    monkeypatch.setattr(cpu, "CUT_KEYS", 7)
    problem = random_problem(seed)
    found = problem.results()
    agree(found, problem.results(backend="reference"))
    assert found["out"].stride() == torch.empty_like(problem.tensors["q"]).stride()


@pytest.mark.parametrize("seed", range(8))
def test_any_strides(seed):
    problem = random_problem(seed)
    apart = {}
    for name, t in problem.tensors.items():
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
        wide[..., ::2] = t
        apart[name] = wide[..., ::2]
    agree({"out": Problem(apart, problem.options).call()}, {"out": problem.call()}, atol=1e-13)


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_only_some_gradients_are_wanted(seed):
    """A bias that wants none is a mask for the flash kernel, and gives the others the same gradients."""
    problem = random_problem(seed)
    everything = problem.results()
    for wanted in problem.tensors:
        tensors = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
        out = Problem(tensors, problem.options).call()
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
        close(torch.autograd.grad(out, tensors[wanted], upstream)[0], everything[wanted])


# The exact facts.
@pytest.mark.parametrize("agents", [1, 4, 30])
def test_equal_queries_give_exact_attention(agents):
    k, v = rand(2, 3, 30, 8), rand(2, 3, 30, 8)
    q = rand(2, 3, 1, 8).expand(-1, -1, 30, -1)
    close(agent_attention(q, k, v, q[:, :, :agents]), dense(q, k, v))


def test_constant_values_come_back():
    q, k, a = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 5, 8)
    v = rand(1, 2, 1, 8).expand(-1, -1, 20, -1)
    biases = {"bias_aggregate": rand(1, 2, 5, 20), "bias_broadcast": rand(1, 2, 20, 5)}
    close(agent_attention(q, k, v, a, **biases), v)
    close(agent_attention(q, k, v, a, **biases, shortcut=0.075), 1.075 * v)


def test_one_agent_makes_all_rows_equal():
    q, k, v, a = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 1, 8)
    out = agent_attention(q, k, v, a)
    close(out, out[:, :, :1].expand_as(out))
    close(out[:, :, :1], dense(a, k, v))


def test_agents_that_are_the_queries_are_not_the_identity():
    q, k, v = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8)
    out = agent_attention(q, k, v, q)
    assert (out - dense(q, k, v)).abs().max() > 0.05


def test_queries_of_equal_norm_and_a_large_second_scale_give_exact_attention():
    """Each query then finds itself among the agents."""
    q, k, v = F.normalize(rand(1, 2, 20, 8), dim=-1), rand(1, 2, 20, 8), rand(1, 2, 20, 8)
    close(agent_attention(q, k, v, q, scale_broadcast=1e5), dense(q, k, v))


def test_repeated_agents_are_a_bias_of_the_second_step_only():
    q, k, v, a = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 4, 8)
    counts = torch.tensor([1, 3, 2, 5])
    repeated = agent_attention(q, k, v, a.repeat_interleave(counts, dim=2))
    logs = counts.to(DOUBLE).log()
    close(agent_attention(q, k, v, a, bias_broadcast=logs[None, None, None]), repeated)
    close(agent_attention(q, k, v, a, bias_aggregate=logs[None, None, :, None]), agent_attention(q, k, v, a))
    close(agent_attention(q, k, v, torch.cat([a, a], dim=2)), agent_attention(q, k, v, a))


def test_the_order_of_keys_does_not_matter():
    q, k, v, a = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 4, 8)
    order = torch.randperm(20)
    close(agent_attention(q, k[:, :, order], v[:, :, order], a), agent_attention(q, k, v, a))


def test_the_map_is_row_stochastic_of_rank_n():
    """Values that are the identity give the map itself."""
    q, k, a = rand(1, 1, 24, 24), rand(1, 1, 24, 24), rand(1, 1, 5, 24)
    out = agent_attention(q, k, torch.eye(24, dtype=DOUBLE)[None, None], a)
    assert (out > 0).all() and torch.linalg.matrix_rank(out).item() == 5
    close(out.sum(-1), torch.ones(1, 1, 24, dtype=DOUBLE))


def test_a_convolution_of_its_centre_tap_is_the_shortcut():
    q, k, v, a = rand(2, 4, 20, 8), rand(2, 2, 20, 8), rand(2, 2, 20, 8), rand(2, 4, 3, 8)
    weight = torch.zeros(32, 1, 3, 3, dtype=DOUBLE)
    weight[:, :, 1, 1] = 0.075
    out = agent_attention(q, k, v, a, dwc_weight=weight, grid=(4, 5))
    close(out, agent_attention(q, k, v, a, shortcut=0.075))


def test_exact_rows_are_exact_and_the_others_do_not_see_them_as_agents():
    q, k, v, a = rand(1, 4, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 4, 3, 8)
    biases = {"bias_aggregate": rand(1, 4, 3, 20), "bias_broadcast": rand(1, 4, 20, 3)}
    out = agent_attention(q, k, v, a, exact_before=3, exact_after=2, shortcut=0.1, **biases)
    full = dense(q, k, v, enable_gqa=True)
    close(out[:, :, :3], full[:, :, :3])
    close(out[:, :, 18:], full[:, :, 18:])
    close(out[:, :, 3:18], agent_attention(q, k, v, a, shortcut=0.1, **biases)[:, :, 3:18])


def test_the_convolution_touches_only_the_image():
    """One class token, a grid, two exact rows: rows 1 to 6."""
    q, k, v, a = rand(1, 2, 9, 8), rand(1, 2, 9, 8), rand(1, 2, 9, 8), rand(1, 2, 3, 8)
    weight, bias = rand(16, 1, 3, 3), rand(16)
    plain = agent_attention(q, k, v, a, exact_after=2)
    out = agent_attention(q, k, v, a, exact_after=2, dwc_weight=weight, dwc_bias=bias, grid=(2, 3))
    close(out[:, :, [0, 7, 8]], plain[:, :, [0, 7, 8]], atol=0)
    image = F.conv2d(v[:, :, 1:7].transpose(-1, -2).reshape(1, 16, 2, 3), weight, bias, padding=1, groups=16)
    close((out - plain)[:, :, 1:7], image.view(1, 2, 8, 6).transpose(-1, -2))


# What holds for every operator.
def test_a_batch_gives_what_its_items_give_alone():
    for seed in range(12):
        problem = random_problem(seed)
        batch = len(problem.tensors["q"])
        whole = problem.call()
        for b in range(batch):
            item = {
                name: t[b : b + 1] if len(t) == batch and not name.startswith("dwc") else t
                for name, t in problem.tensors.items()
            }
            close(whole[b : b + 1], Problem(item, problem.options).call(), atol=1e-13)


def test_the_same_call_gives_the_same_bits_and_no_random_number_is_drawn():
    state = torch.get_rng_state()
    problem = random_problem(4).to(torch.float32)
    one, other = problem.results(), problem.results()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_are_never_expanded():
    """A bias of heads alone, over 64 agents: forward and backward stay within twice q, k, v."""
    q, k, v = (torch.randn(1, 2048, 8, 64).transpose(1, 2).requires_grad_() for _ in range(3))
    agents = torch.randn(1, 64, 8, 64).transpose(1, 2).requires_grad_()
    biases = [torch.randn(1, 8, 64, 1), torch.randn(1, 8, 1, 64)]
    for wanted in (False, True):
        tensors = [q, k, v, agents, *(bias.requires_grad_(wanted) for bias in biases)]
        with LiveBytes(tensors) as live:
            out = agent_attention(*tensors[:4], bias_aggregate=tensors[4], bias_broadcast=tensors[5])
        assert 0 < live.peak - nbytes(out) <= 2 * nbytes(q, k, v) / 3
        inputs = tensors if wanted else tensors[:4]
        with LiveBytes([*tensors, out]) as live:
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert 0 < live.peak - nbytes(*grads) <= 2 * nbytes(q, k, v) + 6 * wanted * cpu.CHUNK_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_is_made_once(dtype):
    """Where the kernel leaves q's layout no second one is asked for, not even for its strides: pages are costly."""
    q, k, v = (torch.randn(1, 4096, 4, 32).to(dtype).transpose(1, 2) for _ in range(3))
    agents = torch.randn(1, 64, 4, 32).to(dtype).transpose(1, 2)
    with LiveBytes([q, k, v, agents]) as live, torch.no_grad():
        out = agent_attention(q, k, v, agents, shortcut=0.075)
    own = nbytes(out) + (nbytes(k, v) if cpu._reads_slowly(dtype) else 0)
    assert out.stride() == q.stride() and live.peak <= own + nbytes(q) / 2


def test_results_lie_without_gaps():
    """As the fake tensors promise, whatever a kernel hands over."""
    gapped = torch.randn(2, 3, 4, 16)[..., :8]
    for like in (gapped, gapped.transpose(1, 2), gapped.contiguous()):
        found = op._laid_out(gapped if like.shape == gapped.shape else gapped.transpose(1, 2), like)
        assert found.stride() == torch.empty_like(like).stride()


Q, A = torch.zeros(2, 4, 12, 8), torch.zeros(2, 4, 3, 8)
K = Q[:, :2]
W = torch.zeros(32, 1, 3, 3)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "named"),
    [
        ((Q, K, K, A[:, :2]), {}, ValueError, r"agents \(2, 2, 3, 8\): legal is \(2, 4, n, 8\)"),
        ((Q, K, K, A[:, :, :0]), {}, ValueError, "n of 1 or more"),
        ((Q, K, K, A.double()), {}, TypeError, "agents are torch.float64 on cpu: give them as q is, torch.float32"),
        ((Q, K[:, :, :0], K[:, :, :0], A), {}, ValueError, "k has no tokens"),
        ((Q, K, K, A), {"exact_before": 8, "exact_after": 4}, ValueError, "exact_before=8, exact_after=4 of 12 rows"),
        ((Q, K, K, A), {"exact_after": -1}, ValueError, "exact_after=-1 of 12 rows: legal is 0 or more"),
        ((Q, K[:, :, :5], K[:, :, :5], A), {"shortcut": 0.1}, ValueError, "the rows of q, 5 to 12: .*F.interpolate"),
        ((Q, K[:, :, :5], K[:, :, :5], A), {"dwc_weight": W, "grid": (3, 4)}, ValueError, "5 to 12: .*depthwise"),
        ((Q, K, K, A), {"dwc_weight": W}, ValueError, r"grid=\(height, width\)"),
        ((Q, K, K, A), {"dwc_bias": W[:, 0, 0, 0]}, ValueError, "give dwc_weight too"),
        ((Q, K, K, A), {"dwc_weight": W, "grid": (4, 4)}, ValueError, r"grid=\(4, 4\): .* at most 12 in all"),
        ((Q, K, K, A), {"dwc_weight": W, "grid": (12,)}, ValueError, r"legal is \(32, 1, odd\)"),
        ((Q, K, K, A), {"dwc_weight": W[..., :2], "grid": (3, 4)}, ValueError, r"legal is \(32, 1, odd, odd\)"),
        ((Q, K, K, A), {"dwc_weight": W, "dwc_bias": W[:3, 0, 0, 0], "grid": (3, 4)}, ValueError, r"legal is \(32,\)"),
        ((Q, K, K, A), {"bias_aggregate": Q}, ValueError, r"legal is \(1 or 2, 1 or 4, 1 or 3, 1 or 12\)"),
        ((Q, K, K, A), {"bias_broadcast": A[0]}, ValueError, r"legal is \(1 or 2, 1 or 4, 1 or 12, 1 or 3\)"),
        ((Q, K, K, A), {"bias_broadcast": Q[:, :, :, :3].half()}, TypeError, "cast it to q's, torch.float32"),
        ((Q.double(), K.double(), K.double(), A.double()), {"backend": "triton"}, ValueError, "not float64"),
        ((Q, K, K, A), {"backend": "flash"}, ValueError, "backend='flash'"),
    ],
)
def test_errors(tensors, options, error, named):
    with pytest.raises(error, match=named):
        agent_attention(*tensors, **options)
