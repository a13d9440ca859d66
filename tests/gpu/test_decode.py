"""decode_attention on long ragged caches, against float64."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import decode_attention
from attn_plugins.pipelines.benching.oracle import rounding_kernels
from tests.support.tolerance import allowance, sdpa


def ragged_cache(place, dtype, head_dim, kv_heads=4, batch=2):
    """Two ranges per KV head, of lengths from 0 to the thousands, in one packed cache."""
    rng = torch.Generator(place.device).manual_seed(0)
    total = 300 * kv_heads if place.tiny else 16384 * kv_heads
    k, v = torch.randn(2, batch, total, head_dim, generator=rng, device=place.device, dtype=dtype)
    each = total // kv_heads
    ranges = [
        [[h * each, h * each + (h * each) // (3 * kv_heads)], [h * each + each // 2, (h + 1) * each - h]]
        for h in range(kv_heads)
    ]
    return k, v, torch.tensor([ranges], device=place.device)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_against_float64(place, dtype, head_dim, queries):
    k, v, ranges = ragged_cache(place, dtype, head_dim)
    rng = torch.Generator(place.device).manual_seed(1)
    q = torch.randn(2, 16, queries, head_dim, generator=rng, device=place.device, dtype=dtype)
    mask = torch.zeros(1, 4, k.shape[1], dtype=torch.bool, device=place.device)
    for head, rows in enumerate(ranges[0].tolist()):
        for start, end in rows:
            mask[0, head, start:end] = True
    mask = mask.repeat_interleave(4, dim=1)[:, :, None].expand(2, 16, queries, -1)
    out, lse = decode_attention(q, k, v, ranges=ranges, backend=place.backend, return_lse=True)
    with rounding_kernels(q):
        theirs = sdpa(q, k[:, None], v[:, None], mask, None)
    exact = sdpa(q.double(), k[:, None].double(), v[:, None].double(), mask, None)
    assert (out.double() - exact).abs().max().item() <= allowance(theirs, exact)
    scores = (q.double() @ k[:, None].double().transpose(-1, -2)) * head_dim**-0.5
    right = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), right, rtol=0, atol=1e-4)  # float32 sums of up to 16,384 terms


def test_ten_times_the_same_bits(place):
    k, v, ranges = ragged_cache(place, torch.bfloat16, 128)
    q = torch.randn(2, 16, 1, 128, device=place.device, dtype=torch.bfloat16)
    first = decode_attention(q, k, v, ranges=ranges, backend=place.backend)
    for _ in range(9):
        assert torch.equal(first, decode_attention(q, k, v, ranges=ranges, backend=place.backend))
