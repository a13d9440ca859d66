"""Neighborhood plans for any tiles: they allow what the rule allows, and are made without anything N x N."""

import functools
import math
import random
import time
import tracemalloc

import pytest
import torch

from attn_plugins.ops.neighborhood.reference import neighborhood_mask
from attn_plugins.plan import BlockPlan
from attn_plugins.plan.cost import choose_tiles
from attn_plugins.plan.neighborhood import neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence
from tests.support.rule import rule_mask


@functools.cache
def random_plan(seed):
    """A plan for random tiles, and the mask it has to allow."""
    dice = random.Random(seed)
    rows = []
    for _ in range(dice.randint(1, 3)):
        size = dice.randint(1, 8)
        dilation = dice.choice([1, dice.randint(1, min(3, size))])
        window = dice.randint(1, size // dilation)
        stride = dice.choice([1, window, dice.randint(1, window)])
        rows.append((size, window, stride, dilation, dice.random() < 0.3))
    grid, *setting = (tuple(column) for column in zip(*rows, strict=True))
    tiles = [tuple(dice.randint(1, size + 1) for size in grid) for _ in range(2)]
    (before, after), (real_before, real_after) = lengths = [dice.choice([0, 3, 6]) for _ in range(2)], [0, 0]
    lengths[1][:] = real_before, real_after = dice.randint(0, before), dice.randint(0, after)
    sequence = Sequence(grid, before, after, real_before, real_after)
    plan = neighborhood_plan(sequence, axis_windows(grid, *setting), *tiles)
    return plan, rule_mask(grid, *setting, (before, real_before), (after, real_after)), sequence


@pytest.mark.parametrize("seed", range(150))
def test_a_plan_allows_the_rule(seed):
    plan, mask, _ = random_plan(seed)
    assert torch.equal(plan.to_mask()[0, 0], mask)


@pytest.mark.parametrize("seed", range(150))
def test_full_blocks_are_full_and_no_visited_block_is_empty(seed):
    plan, mask, _ = random_plan(seed)
    kv_order = torch.arange(plan.kv_length) if plan.kv_order is None else plan.kv_order
    seen = torch.zeros_like(mask)
    for row in range(len(plan.q_start)):
        queries = plan.q_tokens(torch.tensor([row]))[0]
        listed = plan.lists[0, 0, row, : plan.count[0, 0, row]].tolist()
        assert len(set(listed)) == len(listed)
        for slot, n in enumerate(listed):
            keys = kv_order[int(plan.kv_start[n]) : int(plan.kv_start[n] + plan.kv_size[n])]
            block = mask[queries[:, None], keys[None]]
            assert block.any() and bool(block.all()) == (slot < plan.full[0, 0, row])
            seen[queries[:, None], keys[None]] = True
    assert plan.visited == seen.sum()
    assert not (mask & ~seen).any()


@pytest.mark.parametrize("seed", range(50))
def test_padding_is_in_no_block(seed):
    plan, mask, _ = random_plan(seed)
    covered = torch.cat([plan.q_tokens(torch.tensor([row]))[0] for row in range(len(plan.q_start))])
    assert torch.equal(torch.sort(covered).values, torch.nonzero(mask.any(-1))[:, 0])


def test_orders_are_permutations_that_leave_text_in_its_place():
    for seed in range(50):
        plan, _, sequence = random_plan(seed)
        first, last = sequence.text_before, sequence.text_before + sequence.tokens
        for order in (plan.q_order, plan.kv_order):
            if order is not None:
                assert torch.equal(torch.sort(order).values, torch.arange(sequence.length))
                text = torch.cat([order[:first], order[last:]])
                assert torch.equal(text, torch.cat([torch.arange(first), torch.arange(last, sequence.length)]))


def test_long_text_rows_come_in_pieces():
    sequence = Sequence((4,), 2500, 3)
    plan = neighborhood_plan(sequence, axis_windows((4,), 2), (2,), (1,))
    assert plan.q_size.tolist() == [2, 2, 1024, 1024, 452, 3]
    assert (plan.to_mask()[0, 0, :2500]).all()


VIDEO, WINDOW = (30, 48, 80), (18, 24, 24)


def torch_bytes(plan):
    """Of the plan's tensors that torch allocated; the memory of those made from numpy's arrays is numpy's."""
    tensors = [value for value in vars(plan).values() if isinstance(value, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().resizable())


@pytest.mark.parametrize("stride", [(16, 8, 8), (1, 1, 1)])
def test_a_plan_of_115200_tokens_is_small(stride):
    """Less than 50 MB while it is made: numpy's part by tracemalloc, torch's by its tensors."""
    axes = axis_windows(VIDEO, WINDOW, stride)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        tiles = choose_tiles(axes)
        plan = neighborhood_plan(Sequence(VIDEO), axes, tiles.q_tile, tiles.kv_tile)
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    memory = (peak + torch_bytes(plan)) / 2**20
    print(f"stride {stride}: tiles {tiles.q_tile}, {seconds:.2f} s while traced, {memory:.1f} MB")
    assert plan.q_length == 115_200 and plan.density >= math.prod(WINDOW) / plan.q_length
    assert memory < 50


def test_from_windows_is_the_plan_of_the_rule():
    sequence = Sequence((5, 8), 2, 3, None, 1)
    axes = axis_windows(sequence.grid, (3, 4), (1, 2))
    want = neighborhood_mask(sequence, axes)
    for tiles in ({}, {"q_tile": (2, 3), "kv_tile": (2, 2)}):
        plan = BlockPlan.from_windows(sequence, (3, 4), (1, 2), **tiles)
        assert torch.equal(plan.to_mask()[0, 0], want)
    with pytest.raises(ValueError, match="one plan for each"):
        BlockPlan.from_windows(Sequence((5, 8), 2, 0, (1, 2)), 3)
