"""What neighborhood attention promises beside its numbers: layout, batches, repetition, padding, unfilled memory."""

import contextlib
import sys

import pytest
import torch

from attn_plugins.ops import neighborhood_attention
from tests.support.problems import random_problem


def results(problem, backend="auto", **changed):
    """out, lse and the gradients of q, k, v, under fixed gradients of out and lse."""
    tensors = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    options = {**problem.options, **changed}
    out, lse = neighborhood_attention(*tensors, **options, return_lse=True, backend=backend)
    rng = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), tensors, upstream)]


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state(seed):
    problem = random_problem(seed, torch.float32)
    state = torch.get_rng_state()
    first, second = results(problem), results(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_a_batch_gives_what_its_items_give_alone(seed, dtype):
    problem = random_problem(seed, dtype)
    q, k, v, options = problem.q, problem.k, problem.v, problem.options
    whole = neighborhood_attention(q, k, v, **options, return_lse=True)
    for b in range(len(q)):
        one = {
            name: value if isinstance(value, int) else value[b : b + 1]
            for name, value in options.items()
            if "text" in name
        }
        alone = neighborhood_attention(*(t[b : b + 1] for t in (q, k, v)), **{**options, **one}, return_lse=True)
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True))


def fused(count, tokens, kind):
    """q, k, v (2, 3, tokens, 8) as a model may hold them: none contiguous as (B, H, N, D)."""
    if kind == "fused":  # slices of one projection
        return list(torch.randn(2, tokens, count, 3, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4))
    if kind == "sliced":  # a part of longer tensors
        return list(torch.randn(count, 2, 3, tokens + 5, 16, dtype=torch.float64)[..., 2:-3, ::2])
    if kind == "expanded":  # one item serves the batch
        return list(torch.randn(count, 1, 3, tokens, 8, dtype=torch.float64).expand(-1, 2, -1, -1, -1))
    return list(torch.randn(count, 2, 3, 8, tokens, dtype=torch.float64).transpose(-1, -2))


@pytest.mark.parametrize("kind", ["fused", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("window", [(3, 4), (6, 7), [(3, 3), (2, 5), (3, 3)]], ids=["window", "dense", "per head"])
def test_any_strides(kind, window):
    q, k, v = fused(3, 46, kind)
    options = {"grid": (6, 7), "window": window, "text_before": [[4, 4], [4, 2]], "return_lse": True}
    rng = torch.Generator().manual_seed(1)

    def attend(tensors, upstream):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out, lse = neighborhood_attention(*tensors, **options)
        return out, lse, *torch.autograd.grad((out, lse.masked_fill(lse.isinf(), 0.0)), tensors, upstream)

    for steps in (0, 1):  # the gradient of a sum is one number seen everywhere; else it has a layout like q's
        grad_out = (
            torch.ones((), dtype=q.dtype).expand(q.shape) if steps == 0 else torch.empty_like(q).normal_(generator=rng)
        )
        for grad_lse in (
            torch.zeros(q.shape[:3], dtype=q.dtype),
            torch.randn(q.shape[:3], dtype=q.dtype, generator=rng),
        ):
            found = attend((q, k, v), (grad_out, grad_lse))
            plain = attend([t.contiguous() for t in (q, k, v)], (grad_out.contiguous(), grad_lse))
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    out = found[0]
    assert out.stride() == torch.empty_like(q).stride()  # q's own, or what PyTorch makes of one that is not dense


@pytest.mark.parametrize("window", [(3, 4), (6, 7)])
def test_outputs_and_gradients_keep_the_layout_of_a_projection(window):
    tensors = [torch.randn(2, 42, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    out = neighborhood_attention(*tensors, grid=(6, 7), window=window)
    assert out.stride() == tensors[0].stride()
    for grad, t in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.stride() == t.stride()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7])
def test_scale_is_taken_as_given(scale):
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    options = {"grid": (5, 6), "window": (3, 3), "scale": scale, "return_lse": True}
    out, lse = neighborhood_attention(q, k, v, **options)
    exact, exact_lse = neighborhood_attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close((out, lse), (exact, exact_lse), rtol=0, atol=1e-12)
    if scale == 0:
        torch.testing.assert_close(lse, torch.full_like(lse, 9.0).log())  # nine keys that weigh alike


@contextlib.contextmanager
def uninitialised_is_nan(monkeypatch):
    """What code of the package gets from torch's `empty` functions is full of NaN. Yields the callers seen."""
    seen = []

    def poisoned(original):
        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("attn_plugins") and made.is_floating_point():
                seen.append(caller)
                made.fill_(float("nan"))
            return made

        return make

    with monkeypatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield seen


def test_no_result_is_left_uninitialised(monkeypatch):
    problems = [random_problem(seed) for seed in range(60)]
    expected = [results(problem) for problem in problems]
    with uninitialised_is_nan(monkeypatch) as seen:
        for problem, plain in zip(problems, expected, strict=True):
            found = results(problem)
            assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), problem
            assert not any(t.isnan().any() for t in found)
    assert {name.rpartition(".")[2] for name in seen} >= {"cpu", "dense", "op"}  # the poison was really drunk


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [(3, 4), -1], ids=["window", "whole"])
def test_padding_never_leaks(poison, backend, window):
    """Whatever stands in padding rows of q, k and v: the rest is as without, padding gives 0 and gets no gradient."""
    rows = {"text_before": [[4, 1], [4, 4]], "text_after": [[3, 0], [3, 2]]}
    padding = torch.zeros(2, 37, dtype=torch.bool)
    for b in range(2):
        padding[b, rows["text_before"][b][1] : 4] = True
        padding[b, 34 + rows["text_after"][b][1] :] = True
    at = padding[:, None, :, None]
    clean = [torch.randn(2, 2, 37, 8, dtype=torch.float64).masked_fill(at, 0.0) for _ in range(3)]

    def attend(tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out, lse = neighborhood_attention(
            *tensors, grid=(5, 6), window=window, **rows, return_lse=True, backend=backend
        )
        real = ~padding[:, None].expand_as(lse)
        upstream = (out.detach().masked_fill(at, 0.5), torch.where(real, lse, 0.0).detach())
        return [out, lse, *torch.autograd.grad((out, torch.where(real, lse, 0.0)), tensors, upstream)]

    expected, found = attend(clean), attend([t.masked_fill(at, poison) for t in clean])
    for name, one, other in zip(("out", "lse", "grad q", "grad k", "grad v"), found, expected, strict=True):
        assert torch.equal(one, other), name
    assert (found[0].masked_select(at) == 0).all() and found[1][padding[:, None].expand(-1, 2, -1)].isneginf().all()
    assert all((grad.masked_select(at) == 0).all() for grad in found[2:])


def test_a_second_derivative_is_refused_and_not_wrong():
    q, k, v = (torch.randn(1, 1, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = neighborhood_attention(q, k, v, grid=12, window=3)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)
