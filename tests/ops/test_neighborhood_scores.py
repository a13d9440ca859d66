"""The two halves of neighborhood attention, against the rule written out as loops."""

import itertools
import random

import pytest
import torch

from attn_plugins.ops.neighborhood_scores import neighborhood_aggregate, neighborhood_scores


def window_keys(position, size, window, stride, dilation):
    """The keys of one position along one axis, straight from the rule."""
    residue, index = position % dilation, position // dilation
    length = len(range(residue, size, dilation))
    start = (index // stride) * stride + stride // 2 - window // 2
    start = max(0, min(start, length - window))
    return [(start + i) * dilation + residue for i in range(window)]


def loops(q, k, v, bias, grid, window, stride, dilation):
    """Scores and a weighted sum, one (query, key) pair at a time; weights are the scores themselves."""
    scores = q.new_zeros(*q.shape[:-1], torch.tensor(window).prod())
    out = torch.zeros_like(v)
    for query in itertools.product(*map(range, grid)):
        keys = [window_keys(*row) for row in zip(query, grid, window, stride, dilation, strict=True)]
        at = (slice(None), slice(None), *query)
        for slot, key in enumerate(itertools.product(*keys)):
            score = (q[at] * k[(slice(None), slice(None), *key)]).sum(-1)
            if bias is not None:
                place = [b // d - a // d + w - 1 for a, b, w, d in zip(query, key, window, dilation, strict=True)]
                score = score + bias[(slice(None), *place)]
            scores[(*at, slot)] = score
            out[at] += score[..., None] * v[(slice(None), slice(None), *key)]
    return scores, out


def problem(seed):
    """A random legal setting: 1 to 3 axes, sizes that dilations do not divide, windows even and odd, and of 1."""
    dice = random.Random(seed)
    rows = []
    for _ in range(dice.randint(1, 3)):
        size = dice.randint(1, 9)
        dilation = dice.randint(1, min(3, size))
        window = dice.randint(1, size // dilation)
        rows.append((size, window, dice.choice([1, 1, dice.randint(1, window)]), dilation))
    return tuple(zip(*rows, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seed", range(40))
def test_equals_the_loops(seed, backend):
    grid, window, stride, dilation = problem(seed)
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, *grid, 5, dtype=torch.float64)
    bias = torch.randn(3, *(2 * w - 1 for w in window), dtype=torch.float64) if max(stride) == 1 else None
    setting = {"window": window, "stride": stride, "dilation": dilation, "backend": backend}
    scores = neighborhood_scores(q, k, bias=bias, **setting)
    out = neighborhood_aggregate(scores, v, **setting)
    expected_scores, expected_out = loops(q, k, v, bias, grid, window, stride, dilation)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-11)


CASES = [
    ((5,), 3, 1, 1),
    ((4, 5), (3, 5), 1, 1),
    ((7, 3), 3, 1, (2, 1)),
    ((5, 6), (5, 2), (3, 2), 1),
    ((3, 2, 3), 2, 1, 1),
]


@pytest.mark.parametrize(("grid", "window", "stride", "dilation"), CASES)
def test_gradients_in_float64(grid, window, stride, dilation):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, *grid, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    setting = {"window": window, "stride": stride, "dilation": dilation}
    axes = [window] * len(grid) if isinstance(window, int) else window
    bias = torch.randn(2, *(2 * w - 1 for w in axes), dtype=torch.float64, requires_grad=True)
    with_bias = stride == 1

    def both(q, k, bias):
        scores = neighborhood_scores(q, k, bias=bias if with_bias else None, **setting)
        return neighborhood_aggregate(scores.softmax(-1) + (0 if with_bias else bias.sum()), k, **setting)

    assert torch.autograd.gradcheck(both, (q, k, bias))
    if len(grid) == 1:
        assert torch.autograd.gradgradcheck(both, (q, k, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_a_matrix_product(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 8, 9, 64, dtype=dtype)
    exact = neighborhood_scores(q.double(), k.double(), window=(3, 9))
    # with windows along whole rows of keys, the peer is a plain product of the same vectors
    peer = torch.einsum("bhyxd,bhykxzd->bhyxkz", q, rows_of(k)).flatten(-2)
    ours = neighborhood_scores(q, k, window=(3, 9))
    assert (ours - exact).abs().max() <= 2 * (peer - exact).abs().max()


def rows_of(k):
    """(B, H, 8, 3, 1, 9, D): the three rows of keys that each row of queries sees."""
    rows = torch.tensor([window_keys(y, 8, 3, 1, 1) for y in range(8)])
    return k[:, :, rows][:, :, :, :, None]


def test_inputs_of_any_stride_and_the_same_answer_twice():
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 5, 4, 8).permute(0, 3, 1, 2, 4).requires_grad_()
    results = []
    for k in (packed, packed, packed.contiguous()):
        out = neighborhood_aggregate(neighborhood_scores(k, k, window=3).softmax(-1), k, window=3)
        (gradient,) = torch.autograd.grad(out.square().sum(), packed)
        results.append((out, gradient))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_infinite_tokens_stay_within_their_windows():
    v = torch.randn(1, 1, 9, 4, requires_grad=True)
    weights = torch.rand(1, 1, 9, 3, requires_grad=True)
    upstream = torch.ones(1, 1, 9, 4)
    upstream[:, :, 0] = float("inf")
    gradient = torch.autograd.grad(neighborhood_aggregate(weights, v, window=3), v, upstream)[0]
    assert gradient[:, :, 3:].isfinite().all()
    assert not gradient[:, :, :3].isfinite().any()


def test_memory_stays_near_the_output():
    grid, window = (40, 40), 5
    q = torch.randn(1, 2, *grid, 16)
    with torch.profiler.profile(profile_memory=True) as profiler:
        scores = neighborhood_scores(q, q, window=window)
        neighborhood_aggregate(scores, q, window=window)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= scores.numel() * 4  # an N x N matrix would be 64 times that


def test_custom_op_contracts():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 6, 4, requires_grad=True)
    weights = torch.randn(1, 2, 5, 6, 9, requires_grad=True)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    ops = torch.ops.attn_plugins
    torch.library.opcheck(ops.neighborhood_scores, (q, q.detach().clone(), [3, 3], [1, 1], [1, 2]))
    torch.library.opcheck(ops.neighborhood_aggregate, (weights, q, [3, 3], [2, 1], [1, 2]))
    torch.library.opcheck(ops.neighborhood_spread, (weights, q, [3, 3], [1, 1], [1, 2]))
    torch.library.opcheck(ops.neighborhood_bias, (bias, [5, 6], [3, 3], [1, 2]))
    torch.library.opcheck(ops.neighborhood_bias_gradient, (torch.randn(2, 5, 6, 9), [5, 6], [3, 3], [1, 2]))


def test_compiles_whole():
    def both(q, bias):
        scores = neighborhood_scores(q, q, window=(3, 5), dilation=(2, 1), bias=bias)
        return neighborhood_aggregate(scores.softmax(-1), q, window=(3, 5), dilation=(2, 1))

    q, bias = torch.randn(1, 2, 7, 5, 4), torch.randn(2, 5, 9)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, bias), both(q, bias))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 6}, "legal are windows of 1..5"),
        ({"dilation": 2}, "axis 0"),
        ({"bias": torch.zeros(2, 5, 6)}, r"\(2, 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5), "stride": 2}, "stride 1"),
        ({"backend": "cuda"}, "legal are auto"),
        ({"k": torch.zeros(1, 2, 5, 7, 4)}, "one shape"),
        ({"k": torch.zeros(1, 2, 5, 6, 4, dtype=torch.float64)}, "one dtype"),
        ({"q": torch.zeros(2, 5, 4)}, "a grid of 1 to 3 axes"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {"q": torch.zeros(1, 2, 5, 6, 4), "k": torch.zeros(1, 2, 5, 6, 4), "window": 3} | change
    with pytest.raises(ValueError, match=words):
        neighborhood_scores(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_weights_of_another_window_are_named():
    with pytest.raises(ValueError, match=r"expected \(1, 2, 5, 6, 9\)"):
        neighborhood_aggregate(torch.zeros(1, 2, 5, 6, 25), torch.zeros(1, 2, 5, 6, 4), window=3)
