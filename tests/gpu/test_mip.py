"""weighted_merge at the sizes of SDXL's and Stable Diffusion 1.5's layers, against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import weighted_merge
from attn_plugins.pipelines.benching.oracle import rounding_kernels
from tests.support.merging import paper
from tests.support.tolerance import allowance


def layer(place, dtype, head_dim, heads=10, references=3, tokens=16, rows=5):
    """Arguments of the operator, as projections leave them; the phrases and images differ in length."""
    rng = torch.Generator(place.device).manual_seed(0)
    positions = 200 if place.tiny else 4096

    def made(*shape):
        *front, n, h, d = shape
        return torch.randn(*front, n, h, d, generator=rng, device=place.device, dtype=dtype).transpose(-2, -3)

    return {
        "q": made(2, positions, heads, head_dim), "text_out": made(2, positions, heads, head_dim),
        "phrase_k": made(1, references, rows, heads, head_dim), "image_k": made(2, references, tokens, heads, head_dim),
        "phrase_lengths": torch.tensor([[1, 5, 2]], device=place.device),
        "image_v": made(2, references, tokens, heads, head_dim),
        "image_lengths": torch.tensor([[16, 4, 5]], device=place.device),
    }  # fmt: skip


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_against_float64(place, dtype, head_dim):
    tensors = layer(place, dtype, head_dim)
    out, weights = weighted_merge(**tensors, scales=0.7, backend=place.backend, return_weights=True)
    with rounding_kernels(tensors["q"]):
        theirs = paper(**tensors, scales=0.7)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact, exact_weights = paper(**wide, scales=0.7, return_weights=True)
    assert (out.double() - exact).abs().max().item() <= allowance(theirs, exact)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_nan_at_twenty_times_the_scores(place, dtype):
    tensors = layer(place, dtype, 64)
    tensors["q"] = tensors["q"] * 20
    out, weights = weighted_merge(**tensors, backend=place.backend, return_weights=True)
    assert out.isfinite().all() and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights.sum(1)))


def test_ten_times_the_same_bits(place):
    tensors = layer(place, torch.bfloat16, 64)
    first = weighted_merge(**tensors, backend=place.backend)
    for _ in range(9):
        assert torch.equal(first, weighted_merge(**tensors, backend=place.backend))
