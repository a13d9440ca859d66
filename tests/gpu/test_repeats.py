"""The same call gives the same bits, forward and backward; a batch gives what its items give alone."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import block_sparse_attention, neighborhood_attention


def bits(place, attend, leaves):
    out, lse = attend(*leaves)
    return [out.detach(), lse.detach(), *place.grads(out, leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["windows", "windows, stride 1", "lists per head", "grouped heads"])
def test_ten_times_the_same_bits(place, kind, dtype):
    """With other work on the GPU in between, so that programs are scheduled in another order."""
    grid = (4, 6, 6) if place.tiny else (16, 32, 32)
    blocks = 6 if place.tiny else 256
    plan = place.lists_plan(blocks, 0.2, heads=8)
    kv_heads = 2 if kind == "grouped heads" else 8
    tokens = plan.q_length if not kind.startswith("windows") else grid[0] * grid[1] * grid[2]
    leaves = place.qkv(tokens, 64, dtype, heads=8, kv_heads=kv_heads, grad=True)
    stride = 1 if kind.endswith("stride 1") else tuple(n // 2 for n in grid)

    def attend(q, k, v):
        if kind.startswith("windows"):
            options = {"grid": grid, "window": tuple(n // 2 for n in grid), "stride": stride}
            return neighborhood_attention(q, k, v, **options, backend=place.backend, return_lse=True)
        return block_sparse_attention(q, k, v, plan, backend=place.backend, return_lse=True)

    first = bits(place, attend, leaves)
    noise = torch.randn(64 if place.tiny else 4096, 64 if place.tiny else 4096, device=place.device)
    for _ in range(2 if place.tiny else 9):
        noise = (noise @ noise).tanh()
        assert all(torch.equal(a, b) for a, b in zip(first, bits(place, attend, leaves), strict=True))


def test_a_batch_is_its_items(place):
    plan = place.lists_plan(6 if place.tiny else 96, 0.3, heads=4)
    leaves = place.qkv(plan.q_length, 80, torch.bfloat16, heads=4, batch=3, grad=True)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, plan, backend=place.backend, return_lse=True)

    together = bits(place, attend, leaves)
    rng = torch.Generator(place.device).manual_seed(5)
    upstream = torch.randn(together[0].shape, generator=rng, device=place.device, dtype=torch.bfloat16)
    for b in range(3):
        alone = tuple(t[b : b + 1].detach().requires_grad_() for t in leaves)
        out, lse = attend(*alone)
        found = [out, lse, *torch.autograd.grad(out, alone, upstream[b : b + 1])]
        assert all(torch.equal(one[0], whole[b]) for one, whole in zip(found, together, strict=True))
