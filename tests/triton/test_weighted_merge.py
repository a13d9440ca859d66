"""The merge kernels, interpreted: against the paper's formula in float64, by the tolerance rule."""

import math

import pytest
import torch

pytest.importorskip("triton")

from attn_plugins.ops.weighted_merge.triton import configs, launch  # noqa: E402
from tests.support.merging import Problem, paper, random_problem  # noqa: E402
from tests.support.tolerance import within  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and shares of 16, so that small problems are cut as large ones are."""
    small = {key: configs.Config(16, 4, 1, 16) for key in configs.TABLE}
    monkeypatch.setattr(configs, "TABLE", small)
    monkeypatch.setattr(configs, "SHARE", 16)


def check(problem, dtype):
    problem = problem.to(dtype)
    wide = problem.to(torch.float64)
    out, weights = problem.run(backend="triton", return_weights=True)
    exact, exact_weights = wide.run(paper, return_weights=True)
    theirs, their_weights = problem.run(paper, return_weights=True)
    assert out.stride() == torch.empty_like(problem.tensors["q"]).stride()
    assert within(out, theirs, exact)
    if dtype == torch.float32:
        assert within(weights, their_weights, exact_weights)
    else:  # ours are float32 of rounded inputs, whose products are exact
        torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed, small_tiles):
    check(random_problem(seed), DTYPES[seed % 3])


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 256])
def test_head_sizes(dim):
    check(random_problem(dim, head_dim=dim, positions=70), DTYPES[dim // 8 % 3])


def test_long_phrases_and_many_tokens(small_tiles):
    """More rows and tokens than a tile holds, and a phrase that ends inside the second."""
    rng = torch.Generator().manual_seed(0)
    q, text = (torch.randn(1, 2, 40, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    phrase, k, v = (torch.randn(1, 2, 2, n, 16, generator=rng, dtype=torch.float64) for n in (37, 257, 257))
    tensors = {"q": q, "text_out": text, "phrase_k": phrase, "image_k": k, "image_v": v}
    tensors |= {"phrase_lengths": torch.tensor([[37, 20]]), "image_lengths": torch.tensor([[257, 100]])}
    check(Problem(tensors, {}), torch.float32)


def test_any_strides(small_tiles):
    problem = random_problem(5, references=2)
    for name in ("q", "text_out", "phrase_k", "image_k", "image_v"):
        t = problem.tensors[name]
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
        wide[..., ::2] = t
        problem.tensors[name] = wide[..., ::2]
    problem = problem.to(torch.float64)
    strided = {n: t.float() if t.is_floating_point() else t for n, t in problem.tensors.items()}
    check(Problem(strided, problem.options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_nan_at_twenty_times_the_scores(dtype, small_tiles):
    problem = random_problem(9, references=3, plain=True, positions=100, head_dim=40)
    problem.tensors["q"] *= 20
    out, weights = problem.to(dtype).run(backend="triton", return_weights=True)
    assert out.isfinite().all() and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights.sum(1)))


def test_absent_references(small_tiles):
    tensors = random_problem(3, references=3, plain=True).to(torch.float32).tensors
    none = torch.zeros_like(tensors["phrase_lengths"])
    found = launch.weights(tensors["q"], tensors["phrase_k"].nan_to_num(), none, None, 0.3, math.inf, None)
    assert not found.any()
    for lengths in ({"phrase_lengths": none}, {"image_lengths": torch.zeros(1, 3, dtype=torch.int32)}):
        out = Problem({**tensors, **lengths}, {}).run(backend="triton")
        assert torch.equal(out, tensors["text_out"])


def test_the_backward_is_there():
    problem = random_problem(4).to(torch.float32)
    found, expected = problem.results(backend="triton"), problem.results(backend="cpu")
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], equal_nan=True)
