"""Head sizes, precisions, layouts, grouped heads, ragged and empty lists: compiled, where the interpreter was kind."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.plan.block_plan import BlockPlan
from tests.support.tolerance import allowance, sdpa

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Every one is a compile of three kernels: all head sizes in one precision, three in the others.
HEAD_DIMS = {torch.bfloat16: [16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256], torch.float16: [40, 64, 128]}
HEAD_DIMS[torch.float32] = HEAD_DIMS[torch.float16]


def check(place, plan, q, k, v):
    """Output and gradients within the tolerance rule, against float64 over the plan's own mask; q's memory layout."""
    mask = plan.to_mask().to(place.device)

    def ours(*qkv):
        out = block_sparse_attention(*qkv, plan, backend=place.backend)
        assert out.stride() == torch.empty_like(q).stride()
        return out

    place.check(ours, lambda *t: sdpa(*t, mask, None), (q, k, v))


def ragged_plan(heads=2) -> BlockPlan:
    """Blocks of many lengths, lists of many lengths, an empty list, and queries in no block."""
    sizes = [64, 1, 37, 128, 3, 70, 64, 15, 100, 29]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = list(zip(starts, sizes, strict=True))
    lists = [[[j for j in range(len(sizes)) if (i * 7 + j * 3 + h) % 4 == 0] for i in range(9)] for h in range(heads)]
    lists[0][2] = []
    return BlockPlan.from_lists(blocks[:9], blocks, lists, q_length=sum(sizes), kv_length=sum(sizes))


@pytest.mark.parametrize(("dtype", "head_dim"), [(dtype, dim) for dtype in DTYPES for dim in HEAD_DIMS[dtype]], ids=str)
def test_head_sizes_and_precisions(place, dtype, head_dim):
    plan = ragged_plan()
    check(place, plan, *place.qkv(plan.q_length, head_dim, dtype, heads=2, batch=2, grad=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_blocks_with_empty_rows(place, dtype):
    mask = torch.rand(2, 300, 270, generator=torch.Generator().manual_seed(3)) < 0.2
    mask[:, 17] = False
    mask[0, :, 100:164] = True
    plan = BlockPlan.from_mask(mask, 64, 32)
    check(place, plan, *place.qkv(300, 64, dtype, heads=2, kv_tokens=270, grad=True))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(place, kv_heads):
    plan = ragged_plan(heads=8)
    check(place, plan, *place.qkv(plan.q_length, 64, torch.bfloat16, heads=8, kv_heads=kv_heads, grad=True))


@pytest.mark.parametrize("layout", ["(B, H, N, D)", "a slice of fused q, k, v", "tokens outermost"])
def test_any_strides(place, layout):
    plan = ragged_plan()
    q, k, v = place.qkv(plan.q_length, 64, torch.bfloat16, heads=2, batch=2)
    if layout == "(B, H, N, D)":
        q, k, v = (t.contiguous() for t in (q, k, v))
    elif layout.startswith("a slice"):
        q, k, v = torch.cat([q, k, v], dim=-1).split(64, dim=-1)
    else:
        q, k, v = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k, v))
    check(place, plan, *(t.detach().requires_grad_() for t in (q, k, v)))


def test_blind_rows_give_zero_and_minus_infinity(place):
    plan = ragged_plan()
    q, k, v = place.qkv(plan.q_length, 64, torch.bfloat16, heads=2)
    out, lse = block_sparse_attention(q, k, v, plan, backend=place.backend, return_lse=True)
    blind = ~plan.to_mask().any(-1).to(place.device)
    assert blind.any() and torch.equal(lse == float("-inf"), blind.expand_as(lse))
    assert bool((out[blind.expand(out.shape[:3])] == 0).all())


def test_the_gradient_of_the_lse(place):
    plan = ragged_plan()
    q, k, v = place.qkv(plan.q_length, 64, torch.float32, heads=2, grad=True)
    seen = plan.to_mask().to(place.device)
    keep = seen.any(-1)

    def both(q, k, v, attend):
        out, lse = attend(q, k, v)
        return torch.autograd.grad((out * out.detach()).sum() + lse[:, keep[0]].sin().sum(), (q, k, v))

    ours = both(q, k, v, lambda *t: block_sparse_attention(*t, plan, backend=place.backend, return_lse=True))
    pytorch = both(q, k, v, lambda *t: masked_attention(*t, seen, 64**-0.5))
    wide = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    exact = both(*wide, lambda *t: masked_attention(*t, seen, 64**-0.5))
    for one, other, right in zip(ours, pytorch, exact, strict=True):
        assert (one.double() - right).abs().max().item() <= allowance(other, right)


def test_logits_twenty_times_as_large_stay_finite(place):
    plan = ragged_plan()
    q, k, v = place.qkv(plan.q_length, 64, torch.float16, heads=2, grad=False)
    q, k, v = (20 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = block_sparse_attention(q, k, v, plan, backend=place.backend)
    assert all(bool(torch.isfinite(t).all()) for t in (out, *place.grads(out, (q, k, v))))
