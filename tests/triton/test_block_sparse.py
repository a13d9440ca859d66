"""The block-sparse kernels, interpreted: every shape of plan and tensor, in every precision, forward and backward."""

import dataclasses

import pytest
import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.plan import pieces
from attn_plugins.plan.block_plan import BlockPlan
from tests.support.tolerance import allowance, sdpa, within
from tests.support.walks import mask_of, random_plan, shuffled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "lse", "grad q", "grad k", "grad v")

THREE = [(0, 32), (32, 32), (64, 32)]
RAGGED = [(0, 40), (44, 16), (60, 33)]  # cut by a step of 32, with a gap
WHOLE = [[0, 2], [1], [2, 0, 1]]


def bits(batch, heads, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, 70, 93, generator=rng) < 0.4
    mask[..., :32, :64] = True  # whole blocks
    mask[..., 40:45, :] = False  # rows that see nothing
    mask[..., 50:, :32] = False
    return BlockPlan.from_mask(mask, 32, 32)


# name -> plan, (batch, heads, KV heads, head size), layout
CASES = {
    "whole": (BlockPlan.from_lists(THREE, THREE, WHOLE), (1, 1, 1, 32), "BHND"),
    "ragged": (BlockPlan.from_lists(RAGGED, RAGGED, WHOLE, q_length=95, kv_length=97), (1, 2, 2, 16), "BNHD"),
    "per head": (BlockPlan.from_lists(THREE, RAGGED, [WHOLE, [[], [0], [1, 2]]]), (2, 2, 1, 16), "BHND"),
    "per item": (BlockPlan.from_lists(THREE, RAGGED, [[WHOLE], [[[2], [], [0]]]]), (2, 2, 2, 16), "BNHD"),
    "an order": (shuffled(BlockPlan.from_lists(THREE, RAGGED, WHOLE), 3), (1, 2, 1, 16), "BNHD"),
    "bits": (bits(1, 1), (2, 2, 1, 16), "BHND"),
    "bits per head": (bits(2, 2), (2, 2, 2, 16), "BNHD"),
    "head size 40": (bits(1, 1), (1, 1, 1, 40), "BHND"),
    "head size 72": (BlockPlan.from_lists(THREE, THREE, WHOLE), (1, 2, 2, 72), "BNHD"),
    "head size 80": (BlockPlan.from_lists(RAGGED, THREE, WHOLE), (1, 1, 1, 80), "BHND"),
    "head size 96": (bits(1, 1, 1), (1, 2, 2, 96), "BNHD"),
}


def tensors_of(plan, shape, layout, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, dim = shape
    made = []
    for count, length in ((heads, plan.q_length), (kv_heads, plan.kv_length), (kv_heads, plan.kv_length)):
        size = (batch, length, count, dim) if layout == "BNHD" else (batch, count, length, dim)
        t = torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)
        made.append(t.transpose(1, 2) if layout == "BNHD" else t)
    return made


def results(attend, tensors, with_lse=False):
    """Output and gradients; `with_lse`: the LSE too, which then gets a gradient, in rows that see nothing as well."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = attend(*tensors)
    rng = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(tensors[0].dtype) for t in (out, lse)]
    if not with_lse:
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream[0])]
    kept = lse.masked_fill(lse.isneginf(), 0.0)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, kept), tensors, (upstream[0], upstream[1].to(lse)))]


def ours(plan, scale=None):
    return lambda *qkv: block_sparse_attention(*qkv, plan, scale=scale, backend="triton", return_lse=True)


def exact(mask, scale, tensors, with_lse=False):
    return results(lambda *qkv: masked_attention(*qkv, mask, scale), [t.double() for t in tensors], with_lse)


def check(plan, tensors, scale):
    """Output and gradients as good as PyTorch's in the same precision; 0 where nothing is seen. Returns them."""
    mask = mask_of(plan)
    found = results(ours(plan, scale), tensors)
    theirs = results(lambda *qkv: (sdpa(*qkv, mask, scale), torch.zeros(1)), tensors)
    right = exact(mask, scale, tensors)
    for name, *three in zip(("out", "grad q", "grad k", "grad v"), found, theirs, right, strict=True):
        assert within(*three), name
    blind = ~mask.any(-1).expand(found[0].shape[:3])
    assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()
    group = (tensors[1].shape[1], -1)
    unseen = ~mask.any(-2).expand(*tensors[0].shape[:2], -1).unflatten(1, group).any(2)
    assert (found[2][unseen] == 0).all() and (found[3][unseen] == 0).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_pytorch_in_the_same_precision(case, dtype):
    plan, shape, layout = CASES[case]
    tensors = tensors_of(plan, shape, layout, dtype)
    found = check(plan, tensors, shape[-1] ** -0.5)
    assert found[0].stride() == tensors[0].stride()  # q's memory layout


@pytest.mark.parametrize("case", ["ragged", "per head", "an order", "bits per head"])
def test_the_lse_and_its_gradient(case):
    plan, shape, layout = CASES[case]
    tensors, mask, scale = tensors_of(plan, shape, layout, torch.float32), mask_of(plan), 0.3
    found = results(ours(plan, scale), tensors, with_lse=True)
    theirs = results(lambda *qkv: masked_attention(*qkv, mask, scale), tensors, with_lse=True)
    right = exact(mask, scale, tensors, with_lse=True)
    assert found[1].dtype == torch.float32 and torch.equal(found[1].isneginf(), right[1].isneginf())
    for name, *three in zip(NAMES, found, theirs, right, strict=True):
        assert within(*(t.masked_fill(t.isneginf(), 0.0) for t in three)), name


@pytest.mark.parametrize("scale", [0.0, -0.5, 40.0])
def test_scales(scale):
    """0 makes every seen key equal, a negative one turns the order round, a large one leaves one key a row."""
    plan, shape, layout = CASES["bits per head"]
    tensors, mask = tensors_of(plan, shape, layout, torch.float32), mask_of(plan)
    found = results(ours(plan, scale), tensors)
    theirs = results(lambda *qkv: masked_attention(*qkv, mask, scale), tensors)
    for name, *three in zip(
        ("out", "grad q", "grad k", "grad v"), found, theirs, exact(mask, scale, tensors), strict=True
    ):
        assert within(*three), name


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(seed):
    plan = random_plan(seed, 2, 2)
    tensors = tensors_of(plan, (2, 2, 1 + seed % 2, 16), ("BHND", "BNHD")[seed // 2 % 2], torch.float32, seed)
    check(plan, tensors, 0.25)


def test_kv_blocks_that_overlap_in_different_lists():
    """A key of two blocks gets its gradient from both, in one fixed order."""
    plan = BlockPlan.from_lists([(0, 20), (20, 20)], [(0, 40), (25, 40)], [[0], [1]])
    check(plan, tensors_of(plan, (1, 1, 1, 16), "BHND", torch.float32), 0.25)


def test_rows_and_keys_in_no_block_are_not_read():
    plan = BlockPlan.from_lists(
        [(1, 20), (25, 3)], [(0, 20), (20, 9), (33, 7)], [[0, 2], []], q_length=30, kv_length=42
    )
    tensors = tensors_of(plan, (1, 2, 1, 16), "BHND", torch.float32)
    expected = results(ours(plan), tensors)
    tensors[0][:, :, [0, 21, 22, 25, 29]] = float("nan")
    tensors[1][:, :, 20:33] = tensors[2][:, :, 20:33] = float("nan")
    assert all(torch.equal(one, other) for one, other in zip(results(ours(plan), tensors), expected, strict=True))


def test_the_same_call_gives_the_same_bits():
    plan, shape, layout = CASES["bits per head"]
    tensors = tensors_of(plan, shape, layout, torch.bfloat16)
    once, again = (results(ours(plan), tensors, with_lse=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_a_batch_gives_what_its_items_give_alone():
    plan, shape, layout = CASES["bits"]
    tensors = tensors_of(plan, shape, layout, torch.float32)
    whole = results(ours(plan), tensors)
    alone = [results(ours(plan), [t[i : i + 1] for t in tensors]) for i in range(2)]
    assert all(torch.equal(whole[0][i], alone[i][0][0]) for i in range(2))


def test_a_plan_whose_lists_live_on_a_device(monkeypatch):
    """Made in each call, by a dynamic method; here by the same route on the CPU. The gradients pass through it too."""
    from attn_plugins.plan.tables import PlanTables

    monkeypatch.setattr(PlanTables, "known", False)
    for name in ("per head", "bits", "an order"):
        plan, shape, layout = CASES[name]
        plan = dataclasses.replace(plan, lists=plan.lists.clone(), prepared={})
        check(plan, tensors_of(plan, shape, layout, torch.float32), 0.25)


def test_blocks_whose_sizes_live_on_a_device(monkeypatch):
    from attn_plugins.plan.tables import PlanTables

    monkeypatch.setattr(PlanTables, "known", False)

    def unknown(start, size, order, step):
        return pieces._cut_unknown(start, size, order, int((start + size).max()), step, start.device)

    monkeypatch.setattr(pieces, "_cut_known", unknown)
    plan = BlockPlan.from_lists([(0, 40), (40, 9)], [(0, 33), (40, 20)], [[1, 0], [1]])
    check(plan, tensors_of(plan, (1, 1, 1, 16), "BHND", torch.float32), 0.25)


def test_the_rule_sees_an_error_of_twice_the_tolerance():
    plan, shape, layout = CASES["ragged"]
    tensors, mask = tensors_of(plan, shape, layout, torch.bfloat16), mask_of(plan)
    right, theirs = exact(mask, 0.25, tensors), results(lambda *qkv: (sdpa(*qkv, mask, 0.25), torch.zeros(1)), tensors)
    for one, other, truth in zip(results(ours(plan), tensors), theirs, right, strict=True):
        wrong = one.clone()
        at = tuple(int(i) for i in torch.unravel_index(truth.abs().argmax(), truth.shape))
        wrong[at] = truth[at] + 2 * allowance(other, truth)
        assert within(one, other, truth) and not within(wrong, other, truth)
