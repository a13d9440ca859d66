"""The decode kernels, interpreted: against masked attention in float64, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops import decode_attention  # noqa: E402
from attn_plugins.ops.block_sparse.reference import masked_attention  # noqa: E402
from attn_plugins.ops.decode.triton import configs  # noqa: E402
from tests.support.decoding import Problem, random_problem  # noqa: E402
from tests.support.tolerance import allowance, within  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_shares(monkeypatch):
    """Shares of a few keys, so that small problems are split as large ones are."""
    monkeypatch.setattr(configs, "SPLIT_KEYS", 16)


def exact(problem):
    scale = problem.options.get("scale", problem.q.shape[-1] ** -0.5)
    wide = [t.double() for t in (problem.q, problem.k[:, None], problem.v[:, None])]
    return masked_attention(*wide, problem.mask(), scale)


def check(problem):
    out, lse = decode_attention(problem.q, problem.k, problem.v, **problem.options, backend="triton", return_lse=True)
    expected, expected_lse = exact(problem)
    assert out.dtype == problem.q.dtype and out.stride() == torch.empty_like(problem.q).stride()
    assert within(out, problem.pytorchs(), expected)
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and (out[~seen] == 0).all()
    # Scores of some units, in base 2 and back: a few roundings of float32, whatever the precision of q and k.
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed, small_shares):
    check(random_problem(seed, longest=30).to(DTYPES[seed % 3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 40, 72, 80, 96, 128, 256])
def test_head_sizes(dim, dtype):
    check(random_problem(dim, head_dim=dim, longest=20).to(dtype))


@pytest.mark.parametrize("splits", [1, 2, 17, 40])
def test_any_number_of_shares(splits, monkeypatch):
    """17 and 40 need two and three rounds of the merge; most of them are empty."""
    from attn_plugins.ops.decode.triton import launch

    monkeypatch.setattr(launch, "split_count", lambda *_: splits)
    for seed in (0, 3):
        check(random_problem(seed, longest=60).to(torch.float32))


def test_more_query_rows_than_a_program_takes():
    q, k = torch.randn(1, 10, 17, 8), torch.randn(1, 70, 8)
    check(Problem(q, k, torch.randn_like(k), {"ranges": torch.tensor([[[[3, 20], [30, 70]]]])}))


def test_any_strides(small_shares):
    problem = random_problem(1).to(torch.float32)
    wide = [torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0) for t in (problem.k, problem.v)]
    for whole, t in zip(wide, (problem.k, problem.v), strict=True):
        whole[..., ::2] = t
    options = dict(problem.options)
    for name in ("key_positions", "query_positions", "ranges"):
        if name in options:
            options[name] = options[name].repeat_interleave(2, dim=1)[:, ::2]
    check(Problem(problem.q.transpose(0, 1).contiguous().transpose(0, 1), *(t[..., ::2] for t in wide), options))


def test_ranges_that_leave_k_are_cut_and_never_read_beyond():
    """The device checks nothing, so the kernel must not trust it; the sanitizer would see the load."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 20, 16)
    wild = torch.tensor([[[[-5, 8], [30, 40]], [[12, 99], [7, 3]]]])
    tame = torch.tensor([[[[0, 8], [20, 20]], [[12, 20], [3, 3]]]])
    out = decode_attention(q, k, k, ranges=wild, backend="triton")
    assert torch.equal(out, decode_attention(q, k, k, ranges=tame, backend="triton"))


def test_a_token_in_two_ranges_of_a_head_counts_twice():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 8, 16)
    _, lse = decode_attention(q, k, k, ranges=torch.tensor([[[[0, 8], [0, 8]]]]), backend="triton", return_lse=True)
    _, once = decode_attention(q, k, k, ranges=torch.tensor([[[[0, 8]]]]), return_lse=True)
    torch.testing.assert_close(lse, once + torch.tensor(2.0).log(), rtol=1e-6, atol=1e-6)


def test_scores_that_would_overflow_an_exponential():
    problem = random_problem(5, head_dim=32, longest=100)
    problem.options["scale"] = 8.0
    for dtype in DTYPES:
        out = decode_attention(*_tensors(problem.to(dtype)), **problem.options, backend="triton")
        assert within(out, problem.to(dtype).pytorchs(), exact(problem.to(dtype))[0])


def test_the_rule_sees_an_error_of_twice_the_tolerance():
    problem = random_problem(5, head_dim=32).to(torch.bfloat16)
    out = decode_attention(*_tensors(problem), **problem.options, backend="triton")
    expected, _ = exact(problem)
    wrong, at = out.contiguous().view(-1).clone(), int(expected.abs().argmax())
    wrong[at] = expected.reshape(-1)[at] + 2 * allowance(problem.pytorchs(), expected)
    assert not within(wrong.view(out.shape), problem.pytorchs(), expected)


@pytest.mark.parametrize("seed", [0, 3])
def test_gradients_come_from_the_plain_form(seed):
    problem = random_problem(seed).to(torch.float32)
    grads = []
    for backend in ("triton", "cpu"):
        tensors = [t.detach().clone().requires_grad_() for t in _tensors(problem)]
        out, lse = decode_attention(*tensors, **problem.options, backend=backend, return_lse=True)
        grads.append(torch.autograd.grad((out.square().sum(), lse.masked_fill(lse.isneginf(), 0).sum()), tensors))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    problem = random_problem(4).to(torch.float16)
    one, other = (decode_attention(*_tensors(problem), **problem.options, backend="triton") for _ in range(2))
    assert torch.equal(one, other)


def test_one_graph():
    problem = random_problem(3).to(torch.float32)

    def attend(q, k, v):
        return decode_attention(q, k, v, **problem.options, backend="triton", return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*_tensors(problem)), attend(*_tensors(problem)), strict=True):
        assert torch.equal(one, other)


def test_the_host_reads_no_value(monkeypatch):
    """A launch from meta tensors, which have none: grids and buffers come from shapes."""
    from attn_plugins.ops.decode.inputs import Positions
    from attn_plugins.ops.decode.triton import launch

    grids = []
    monkeypatch.setattr(launch, "attend_share", _Recorder(grids))
    monkeypatch.setattr(launch, "combine_shares", _Recorder(grids))
    q, k = torch.empty(2, 8, 1, 64, device="meta"), torch.empty(2, 40_000, 64, device="meta")
    numbers = torch.empty(2, 40_000, dtype=torch.int64, device="meta")
    positions = Positions(numbers, numbers[:, :1], numbers[0, :8], 4)
    launch.forward(q, k, k, torch.empty(1, 4, 2, 2, dtype=torch.int64, device="meta"), positions, 0.1)
    assert grids == [(8, 40, 1), (16,)]


class _Recorder:
    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


def test_what_the_kernels_do_not_take_is_refused():
    q, k = torch.zeros(1, 1, 1, 512), torch.zeros(1, 4, 512)
    large, wide = (q, k, "head sizes of up to 256, not 512"), (q[..., :8].double(), k[..., :8].double(), "not float64")
    for t, s, named in (large, wide):
        with pytest.raises(ValueError, match=named):
            decode_attention(t, s, s, ranges=torch.tensor([[[[0, 4]]]]), backend="triton")


def _tensors(problem):
    return problem.q, problem.k, problem.v
