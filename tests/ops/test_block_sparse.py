"""Block-sparse attention over plans from lists and masks, against masked attention."""

import gc
import random
import weakref

import pytest
import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.ops.block_sparse import jobs
from attn_plugins.ops.block_sparse.jobs import Chunk
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.plan.block_plan import BlockPlan

NAMES = ("out", "lse", "grad q", "grad k", "grad v")


def cuts(dice, length, most):
    """Blocks of any sizes, some left out, in any order."""
    blocks, at = [], 0
    while at < length:
        size = min(dice.randint(1, most), length - at)
        blocks.append((at, size))
        at += size + dice.choice([0, 0, 0, 2])
    return dice.sample(blocks, len(blocks))


def random_lists(seed, batch, heads):
    """A plan of ragged blocks, and its mask written out."""
    dice = random.Random(seed)
    q_length, kv_length = dice.randint(1, 40), dice.randint(1, 50)
    q_blocks, kv_blocks = cuts(dice, q_length, 9), cuts(dice, kv_length, 9)
    shape = dice.choice([(1, 1), (1, heads), (batch, 1), (batch, heads)])
    lists = [
        [
            [dice.sample(range(len(kv_blocks)), dice.randint(0, len(kv_blocks))) for _ in q_blocks]
            for _ in range(shape[1])
        ]
        for _ in range(shape[0])
    ]
    mask = torch.zeros(*shape, q_length, kv_length, dtype=torch.bool)
    for b, item in enumerate(lists):
        for h, head in enumerate(item):
            for (start, size), row in zip(q_blocks, head, strict=True):
                for n in row:
                    first, width = kv_blocks[n]
                    mask[b, h, start : start + size, first : first + width] = True
    return BlockPlan.from_lists(q_blocks, kv_blocks, lists, q_length=q_length, kv_length=kv_length), mask


def random_bits(seed, batch, heads):
    """A plan of a random mask with empty rows, and the mask."""
    dice = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    shape = dice.choice([(1, 1), (1, heads), (batch, 1), (batch, heads)])
    mask = torch.rand(*shape, dice.randint(1, 40), dice.randint(1, 50), generator=rng) < dice.choice([0.02, 0.3, 0.9])
    mask[..., : dice.randint(0, 20), : dice.randint(0, 30)] = True
    mask[..., :: dice.randint(2, 9), :] = False
    return BlockPlan.from_mask(mask, dice.randint(1, 9), dice.randint(1, 9)), mask


def inputs(plan, batch, heads, kv_heads, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((heads, plan.q_length), (kv_heads, plan.kv_length), (kv_heads, plan.kv_length))
    return [torch.randn(batch, h, n, 8, generator=rng, dtype=torch.float64) for h, n in shapes]


def results(attend, tensors):
    """out, lse and the gradients of q, k, v. Rows that see nothing are given a gradient too, which must be ignored."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = attend(*tensors)
    rng = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in (out, lse)]
    return out, lse, *torch.autograd.grad((out, lse.masked_fill(lse.isneginf(), 0.0)), tensors, upstream)


def check(plan, mask, tensors, **options):
    found = results(lambda *qkv: block_sparse_attention(*qkv, plan, return_lse=True, **options), tensors)
    exact = results(lambda *qkv: masked_attention(*qkv, mask, 8**-0.5), tensors)
    for name, one, other in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    empty = ~mask.any(-1).expand(found[1].shape)
    assert (found[0][empty] == 0).all() and found[1][empty].isneginf().all() and (found[2][empty] == 0).all()


@pytest.mark.parametrize("make", [random_lists, random_bits])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(25))
def test_random_plans(make, kv_heads, seed):
    plan, mask = make(seed, 3, 4)
    check(plan, mask, inputs(plan, 3, 4, kv_heads, seed))


def test_random_bits_whose_tiles_go_in_two_parts(monkeypatch):
    """Keys that all queries of a block see go without a mask, merged with the rest by LSE: here from 1 key on."""
    monkeypatch.setattr(jobs, "WHOLE_KEYS", 1)
    parts = []
    monkeypatch.setattr(jobs, "Chunk", lambda q, made, heads: parts.append(len(made)) or Chunk(q, made, heads))
    for seed in range(30):
        plan, mask = random_bits(seed, 3, 4)
        check(plan, mask, inputs(plan, 3, 4, 2, seed))
    assert parts.count(2) > 100


@pytest.mark.parametrize("make", [random_lists, random_bits])
def test_the_reference_backend(make):
    plan, mask = make(3, 2, 2)
    check(plan, mask, inputs(plan, 2, 2, 2), backend="reference")


def test_keys_in_no_list_get_no_gradient_and_are_not_read():
    plan = BlockPlan.from_lists([(0, 6)], [(0, 3), (3, 4), (7, 3)], [[2, 0]])
    q, k, v = inputs(plan, 1, 2, 2)
    expected = results(lambda *qkv: block_sparse_attention(*qkv, plan, return_lse=True), (q, k, v))
    assert (expected[3][:, :, 3:7] == 0).all() and (expected[4][:, :, 3:7] == 0).all()
    k[:, :, 3:7] = v[:, :, 3:7] = float("nan")
    found = results(lambda *qkv: block_sparse_attention(*qkv, plan, return_lse=True), (q, k, v))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_rows_in_no_block_are_zero_and_not_read():
    plan = BlockPlan.from_lists([(1, 2), (5, 1)], [(0, 4)], [[0], []], q_length=8)
    q, k, v = inputs(plan, 2, 2, 1)
    q[:, :, [0, 3, 4, 5, 6, 7]] = float("nan")
    out, lse, *grads = results(lambda *qkv: block_sparse_attention(*qkv, plan, return_lse=True), (q, k, v))
    assert (out[:, :, [0, 3, 4, 5, 6, 7]] == 0).all() and not any(t.isnan().any() for t in (out, lse, *grads))
    assert lse.isneginf().sum() == 2 * 2 * 6


def test_a_plan_in_which_no_one_sees_anything():
    plan = BlockPlan.from_lists([(0, 4)], [(0, 6)], [[]])
    check(plan, torch.zeros(1, 1, 4, 6, dtype=torch.bool), inputs(plan, 1, 2, 1))


def test_kv_blocks_that_overlap_in_different_lists():
    plan = BlockPlan.from_lists([(0, 3), (3, 3)], [(0, 5), (2, 5)], [[0], [1]])
    check(plan, plan.to_mask(), inputs(plan, 2, 2, 1))


def test_the_order_of_a_list_is_of_no_matter():
    blocks = ([(0, 4), (4, 4)], [(0, 3), (3, 2), (5, 3)])
    one = BlockPlan.from_lists(*blocks, [[0, 1, 2], [2, 0]])
    other = BlockPlan.from_lists(*blocks, [[2, 0, 1], [0, 2]])
    tensors = inputs(one, 2, 2, 2)
    check(other, one.to_mask(), tensors)


def test_the_same_call_gives_the_same_bits():
    plan, _ = random_bits(7, 2, 3)
    tensors = [t.float() for t in inputs(plan, 2, 3, 3)]

    def once():
        return results(lambda *qkv: block_sparse_attention(*qkv, plan, return_lse=True), tensors)

    assert all(torch.equal(one, other) for one, other in zip(once(), once(), strict=True))


def test_a_plan_lives_until_the_backward_has_run():
    plan, mask = random_lists(2, 2, 2)
    tensors = [t.requires_grad_() for t in inputs(plan, 2, 2, 2)]
    alive = weakref.ref(plan)
    out = block_sparse_attention(*tensors, plan)
    del plan
    gc.collect()
    grads = torch.autograd.grad(out.sum(), tensors)
    exact = torch.autograd.grad(masked_attention(*tensors, mask, 8**-0.5)[0].sum(), tensors)
    torch.testing.assert_close(grads, exact, rtol=0, atol=1e-11)
    del out
    gc.collect()
    assert alive() is None


def test_only_the_lse_is_differentiated():
    plan, mask = random_lists(1, 2, 2)
    tensors = [t.requires_grad_() for t in inputs(plan, 2, 2, 2)]
    grads = []
    for attend in (
        lambda *t: block_sparse_attention(*t, plan, return_lse=True),
        lambda *t: masked_attention(*t, mask, 8**-0.5),
    ):
        _, lse = attend(*tensors)
        grads.append(torch.autograd.grad(lse.masked_fill(lse.isneginf(), 0).sum(), tensors, materialize_grads=True))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


PLAN = BlockPlan.from_lists([(0, 4), (4, 4)], [(0, 8)], [[0], [0]])
PER_HEAD = BlockPlan.from_lists([(0, 8)], [(0, 8)], [[[0]], [[]], [[0]]])
Q = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("tensors", "plan", "options", "error", "named"),
    [
        ((Q[:, :, :7], Q, Q), PLAN, {}, ValueError, "7 query tokens, but the plan is for 8"),
        ((Q, Q[:, :, :7], Q[:, :, :7]), PLAN, {}, ValueError, "7 keys, but the plan is for 8"),
        ((Q, Q, Q), PER_HEAD, {}, ValueError, "4 query heads, but the plan has lists for 3"),
        ((Q, Q, Q[:, :, :7]), PLAN, {}, ValueError, "k and v have one shape"),
        ((Q[0], Q, Q), PLAN, {}, ValueError, "batch, heads, tokens, head_dim"),
        ((Q, Q[:, :3], Q[:, :3]), PLAN, {}, ValueError, "multiple of the 3 KV heads"),
        ((Q, Q.double(), Q), PLAN, {}, TypeError, "float64"),
        ((Q.double(),) * 3, PLAN, {"backend": "triton"}, ValueError, "backend='triton': .*not float64"),
    ],
)
def test_errors(tensors, plan, options, error, named):
    with pytest.raises(error, match=named):
        block_sparse_attention(*tensors, plan, **options)


@pytest.mark.parametrize("with_lse", [False, True])
def test_the_plain_matrix_products_of_other_devices(with_lse):
    """What runs where ATen's CPU kernel does not; here called by hand, in float64."""
    from attn_plugins.ops.block_sparse.tile_attention import _plain_backward

    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    bias = torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.rand(5, 7) < 0.3, float("-inf"))
    out, lse = masked_attention(q, k, v, bias == 0, 0.4)
    upstream = [torch.randn_like(out), torch.randn_like(lse) if with_lse else torch.zeros_like(lse)]
    exact = torch.autograd.grad((out, lse), (q, k, v), upstream)
    grad_lse = upstream[1] if with_lse else None
    with torch.no_grad():
        found = _plain_backward(upstream[0], grad_lse, q, k, v, out, lse, bias, 0.4)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
