"""Plans as PyTorch flex attention's block masks."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from attn_plugins.ops import block_sparse_attention
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.neighborhood import neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence


def placed(plan):
    """The plan's mask with its rows and columns in the plan's own orders."""
    mask = plan.to_mask()
    mask = mask if plan.q_order is None else mask[:, :, plan.q_order]
    return mask if plan.kv_order is None else mask[..., plan.kv_order]


def compiled_mask(block_mask, batch, heads):
    """What compiled flex attention computes: full blocks unasked, the mask function in partial ones, else nothing."""
    (q_size, kv_size), (q_length, kv_length) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    asked = create_mask(block_mask.mask_mod, batch, heads, q_length, kv_length)
    seen = torch.zeros_like(asked)
    parts = (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    )
    for counts, indices, full in parts:
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, counts.shape[-1]))).tolist():
            for n in indices[b, h, row, : counts[b, h, row]].tolist():
                at = (b, h, slice(row * q_size, (row + 1) * q_size), slice(n * kv_size, (n + 1) * kv_size))
                seen[at] = True if full else asked[at]
    return seen


def check(plan):
    block_mask = plan.to_block_mask()
    expected = placed(plan)
    assert torch.equal(compiled_mask(block_mask, *expected.shape[:2]), expected)
    everywhere = create_mask(block_mask.mask_mod, *expected.shape)  # what uncompiled flex attention computes
    assert torch.equal(everywhere, expected)


SETTINGS = [
    ((12,), {"window": 5, "stride": 2}, (4,), (3,), 0),
    ((8, 12), {"window": (4, 6), "stride": (2, 3)}, (4, 6), (2, 3), 0),
    ((8, 12), {"window": (3, 5), "causal": (True, False)}, (4, 4), (4, 2), 0),
    ((4, 6, 8), {"window": (2, 3, 3), "dilation": (2, 1, 2), "stride": (1, 3, 1)}, (2, 3, 4), (1, 3, 2), 0),
    ((4, 6, 8), {"window": -1}, (4, 3, 4), (4, 3, 2), 0),
    ((4, 8), {"window": 4, "stride": 4}, (4, 4), (4, 4), 5),  # text after, within one shorter block
    ((4, 8), {"window": (3, 3)}, (4, 4), (4, 4), 16),
    ((10,), {"window": 3}, (4,), (3,), 0),  # a last block that is shorter
]


@pytest.mark.parametrize(("grid", "setting", "q_tile", "kv_tile", "text"), SETTINGS)
def test_a_window_plan_as_a_block_mask(grid, setting, q_tile, kv_tile, text):
    check(neighborhood_plan(Sequence(grid, 0, text), axis_windows(grid, **setting), q_tile, kv_tile))


@pytest.mark.parametrize("shape", [(17, 20), (3, 16, 16), (2, 1, 9, 22), (2, 3, 12, 8)])
def test_a_bit_mask_plan_as_a_block_mask(shape):
    mask = torch.rand(shape) < 0.3
    mask[..., 4:9, :8] = True
    check(BlockPlan.from_mask(mask, 4, 4))


def test_a_plan_without_masks_as_a_block_mask():
    q_blocks, kv_blocks = [(0, 4), (4, 4), (8, 2)], [(0, 3), (3, 3), (6, 3), (9, 1)]
    check(BlockPlan.from_lists(q_blocks, kv_blocks, [[[0], [], [3, 1]], [[2, 3], [0, 1, 2, 3], [1]]]))


def test_flex_attention_gives_what_the_operator_gives():
    axes = axis_windows((8, 12), (3, 5), (1, 2))
    plan = neighborhood_plan(Sequence((8, 12)), axes, (4, 6), (2, 6))
    q, k, v = torch.randn(3, 2, 3, 96, 16, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention says that it is not compiled
        out = flex_attention(
            q[:, :, plan.q_order], k[:, :, plan.kv_order], v[:, :, plan.kv_order], block_mask=plan.to_block_mask()
        )
    expected = block_sparse_attention(q, k, v, plan)[:, :, plan.q_order]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "tiles", "text", "valid", "side"),
    [
        ((10, 8), (4, 4), (0, 0), (0, 0), "query blocks of \\[8, 16\\]"),  # ragged tiles inside
        ((8, 8), (4, 4), (3, 0), (3, 0), "query blocks"),  # text before: blocks out of order
        ((8, 8), (4, 4), (0, 9), (0, 5), "query blocks"),  # padding: rows in no block
        ((8, 8), (4, 4), (0, 20), (0, 20), "query blocks"),  # text longer than a tile
    ],
)
def test_what_flex_attention_cannot_express_is_refused(grid, tiles, text, valid, side):
    plan = neighborhood_plan(Sequence(grid, *text, *valid), axis_windows(grid, 4), tiles, tiles)
    with pytest.raises(ValueError, match=side):
        plan.to_block_mask()


def test_gaps_between_kv_blocks_are_refused():
    with pytest.raises(ValueError, match="KV blocks"):
        BlockPlan.from_lists([(0, 4)], [(0, 2), (3, 2)], [[0, 1]]).to_block_mask()
    with pytest.raises(ValueError, match="KV blocks"):
        BlockPlan.from_lists([(0, 4)], [(0, 2), (2, 2)], [[0, 1]], kv_length=6).to_block_mask()
