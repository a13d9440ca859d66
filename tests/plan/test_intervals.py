"""Packed intervals say what the windows say."""

import itertools

import pytest
import torch

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.intervals import pack, window_intervals
from attn_plugins.plan.neighborhood import neighborhood_plan
from attn_plugins.plan.partition import axis_visits
from attn_plugins.plan.rules import WindowRule
from attn_plugins.plan.windows import AxisWindow
from attn_plugins.sequence import Sequence
from tests.support.rule import legal_axes, rule_mask


def by_token(plan: BlockPlan, mask: torch.Tensor) -> torch.Tensor:
    """A mask by place, as one by token."""
    q = torch.arange(plan.q_length) if plan.q_order is None else plan.q_order
    kv = torch.arange(plan.kv_length) if plan.kv_order is None else plan.kv_order
    found = torch.zeros_like(mask)
    found[q[:, None], kv] = mask
    return found


def intervals_of(sequence, axes, tile):
    plan = neighborhood_plan(sequence, axes, tile, tile)
    visits = tuple(axis_visits(axis, size, size) for axis, size in zip(axes, tile, strict=True))
    rule = WindowRule(visits, (), sequence.text_before, torch.zeros(0))
    return plan, window_intervals(rule, plan)


@pytest.mark.parametrize("text", [(0, 0), (2, 3)], ids=str)
def test_every_legal_axis(text):
    for setting in legal_axes(7):
        axis = AxisWindow(**setting)
        plan, made = intervals_of(Sequence((axis.size,), *text), (axis,), (2,))
        row = [(setting[name],) for name in ("window", "stride", "dilation", "causal")]
        expected = rule_mask((axis.size,), *row, *((n, n) for n in text))
        assert torch.equal(by_token(plan, made.to_mask()), expected), setting


def test_axes_are_compared_each_for_itself():
    settings = [(5, 3, 1, 2, False), (4, 2, 2, 1, True), (6, 3, 2, 1, False), (1, 1, 1, 1, False)]
    for rows in itertools.permutations(settings, 3):
        axes = tuple(AxisWindow(size, window, stride, 1 if window * dilation > size else dilation, causal)
                     for size, window, stride, dilation, causal in rows)  # fmt: skip
        grid = tuple(axis.size for axis in axes)
        plan, made = intervals_of(Sequence(grid, 1, 2), axes, (2, 2, 2))
        columns = zip(*((a.window, a.stride, a.dilation, a.causal) for a in axes), strict=True)
        assert torch.equal(by_token(plan, made.to_mask()), rule_mask(grid, *columns, (1, 1), (2, 2)))


def test_an_empty_interval_sees_nothing():
    made = pack([torch.arange(4)], [torch.tensor([2, 0])], [torch.tensor([1, 3])], [4])
    assert made.to_mask().tolist() == [[False] * 4, [True] * 4]


def test_the_ends_of_the_legal_range_leave_the_axes_beside_alone():
    """`low` and `high` may be the size itself: 7 has every bit of its field set, 8 one more than the last position."""
    rows = [((7, 0), (0, 8)), ((0, 8), (7, 0)), ((0, 0), (7, 8)), ((6, 0), (7, 0)), ((0, 7), (0, 8))]
    ends = torch.tensor(rows).permute(1, 2, 0)  # (low or high, axis, query)
    places = torch.cartesian_prod(torch.arange(7), torch.arange(8)).T
    made = pack([*places], [*ends[0]], [*ends[1]], [7, 8])
    low, high = ends[..., None]
    assert torch.equal(made.to_mask(), ((low <= places[:, None]) & (places[:, None] <= high)).all(0))
    assert made.to_mask().sum(1).tolist() == [0, 0, 56, 1, 1]


def test_numbers_stay_positive_up_to_31_bits_and_no_further():
    sizes = [1000, 1000, 200]  # 10 + 10 + 8 bits and three guards
    ends = [torch.tensor([0, size - 1]) for size in sizes]
    made = pack(ends, ends, ends, sizes)
    assert (made.q >= 0).all() and (made.k >= 0).all() and made.guards > 2**30 - 1
    assert torch.equal(made.to_mask(), torch.eye(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit 31 bits"):
        pack(ends, ends, ends, [1000, 1000, 300])
