"""Attention over disjoint sets of keys, merged, is attention over their union."""

import pytest
import torch

from attn_plugins.ops import block_sparse_attention, merge_attention_states, neighborhood_attention
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.plan.block_plan import BlockPlan
from tests.support.rule import rule_mask


def parts_of(keys, count, rows=12):
    """`count` disjoint masks (rows, keys); some rows see nothing in some, and row 0 nothing at all."""
    owner = torch.randint(0, count + 1, (rows, keys))  # the number `count` is no one's
    owner[0] = count
    owner[1] = 0
    return [owner == n for n in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_merge_to_the_whole_with_gradients_through_the_lse(count):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (12, 20, 20))
    masks = parts_of(20, count)
    states = [block_sparse_attention(q, k, v, BlockPlan.from_mask(mask, 4, 5), return_lse=True) for mask in masks]
    merged, lse = merge_attention_states(*zip(*states, strict=True))
    whole, whole_lse = masked_attention(q, k, v, torch.stack(masks).any(0), 8**-0.5)
    assert (merged[:, :, 0] == 0).all() and lse[:, :, 0].isneginf().all()
    torch.testing.assert_close((merged, lse), (whole, whole_lse), rtol=0, atol=1e-12)
    upstream = [torch.randn_like(merged), torch.randn_like(lse)]
    upstream[1][:, :, 0] = 0.0
    grads = [torch.autograd.grad(pair, (q, k, v), upstream) for pair in ((merged, lse), (whole, whole_lse))]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


def test_a_neighborhood_and_the_rest_are_dense_attention():
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    near = neighborhood_attention(q, k, v, grid=(5, 6), window=3, return_lse=True)
    mask = rule_mask((5, 6), (3, 3), (1, 1), (1, 1), (False, False))
    far = block_sparse_attention(q, k, v, BlockPlan.from_mask(~mask, 6, 6), return_lse=True)
    merged, _ = merge_attention_states(*zip(near, far, strict=True))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(merged, dense, rtol=0, atol=1e-12)


def test_large_lses_do_not_overflow_and_the_order_is_of_no_matter():
    outputs = list(torch.randn(3, 1, 1, 4, 8))
    lses = [torch.full((1, 1, 4), value) for value in (1e4, 1e4, -1e4)]
    merged, lse = merge_attention_states(outputs, lses)
    torch.testing.assert_close(merged, (outputs[0] + outputs[1]) / 2)
    torch.testing.assert_close(lse, lses[0] + torch.log(torch.tensor(2.0)))
    again, _ = merge_attention_states(outputs[::-1], lses[::-1])
    torch.testing.assert_close(merged, again)


def test_what_holds_no_key_has_no_say():
    """An LSE of -inf beside a finite one: neither its output nor a gradient comes through."""
    out = torch.randn(2, 1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[[[0.3, 1.0, -2.0, 7.0]]], [[[float("-inf")] * 4]]], dtype=torch.float64, requires_grad=True)
    merged, merged_lse = merge_attention_states(list(out), list(lse))
    assert torch.equal(merged, out[0]) and torch.equal(merged_lse, lse[0])
    grads = torch.autograd.grad((merged.sum() + merged_lse.sum()), (out, lse))
    assert (grads[0][1] == 0).all() and (grads[1][1] == 0).all()
    assert (grads[0][0] == 1).all() and not grads[1].isnan().any()


def test_where_no_set_has_a_key_the_result_is_zero_whatever_the_outputs_hold():
    outputs = [torch.ones(1, 1, 4, 8, requires_grad=True) for _ in range(2)]
    merged, lse = merge_attention_states(outputs, [torch.full((1, 1, 4), float("-inf"))] * 2)
    assert (merged == 0).all() and lse.isneginf().all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(merged.sum(), outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype):
    outputs = [torch.randn(1, 1, 4, 8).to(dtype) for _ in range(2)]
    lses = [torch.randn(1, 1, 4) for _ in range(2)]
    merged, lse = merge_attention_states(outputs, lses)
    exact, exact_lse = merge_attention_states([o.double() for o in outputs], [t.double() for t in lses])
    assert merged.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(merged, exact.to(dtype))
    torch.testing.assert_close(lse.double(), exact_lse)


@pytest.mark.parametrize(
    ("outputs", "lses"),
    [
        ([], []),
        ([torch.zeros(1, 1, 4, 8)], []),
        ([torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 8)], [torch.zeros(1, 1, 4), torch.zeros(1, 1, 5)]),
        ([torch.zeros(1, 1, 4, 8)], [torch.zeros(1, 1, 4, 8)]),
    ],
)
def test_errors(outputs, lses):
    with pytest.raises(ValueError, match="LSE"):
        merge_attention_states(outputs, lses)
