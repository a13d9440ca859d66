"""The tile that the cost model chooses is legal, its numbers are those of the plan it leads to, and none is cheaper."""

import itertools
import math
import random

import pytest
import torch

from attn_plugins.ops.block_sparse.jobs import plan_chunks
from attn_plugins.plan import cost
from attn_plugins.plan.cost import (
    CALL,
    CHUNK_KEYS,
    GATHER,
    HEADS,
    KEPT_BYTES,
    MASKED,
    PAIR,
    REMADE,
    SLICES,
    choose_tiles,
)
from attn_plugins.plan.neighborhood import neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence


def random_axes(seed, longest=10):
    dice = random.Random(seed)
    rows = []
    for _ in range(dice.randint(1, 3)):
        size = dice.randint(1, longest)
        dilation = dice.choice([1, dice.randint(1, min(3, size))])
        window = dice.randint(1, size // dilation)
        rows.append((size, window, dice.choice([1, window, dice.randint(1, window)]), dilation, dice.random() < 0.3))
    return axis_windows(*(tuple(column) for column in zip(*rows, strict=True)))


def work(axes, text, q_tile, kv_tile):
    """(pairs, pairs at their tile's cost, masked, gathered, tiles) of the grid's rows, counted on the plan."""
    tokens = math.prod(axis.size for axis in axes)
    plan = neighborhood_plan(Sequence(tuple(axis.size for axis in axes), text), axes, q_tile, kv_tile)
    pairs = sliced = masked = gathered = covered = tiles = 0
    for row in range(len(plan.q_start)):
        if covered == tokens:
            break  # the text's own rows
        queries, count = int(plan.q_size[row]), int(plan.count[0, 0, row])
        keys = int(plan.kv_size[plan.lists[0, 0, row, :count].long()].sum())
        covered += queries
        pairs += queries * keys
        sliced += queries * keys * PAIR[next(height for least, height in SLICES if queries >= least)]
        tiles += 1
        masked += queries * keys * int(plan.full[0, 0, row] < count)
        gathered += keys
    return pairs, sliced, masked, gathered, tiles


def priced(work, kinds, itemsize):
    """The cost model's formula, in the plan's own counts."""
    pairs, sliced, masked, gathered, tiles = work
    together = max(1, CHUNK_KEYS[itemsize] * tiles // gathered)
    entries = masked / tiles * kinds
    remade = REMADE[itemsize] * entries if entries * itemsize + 8 * gathered > KEPT_BYTES else 0
    calls = CALL[itemsize] * max(kinds / HEADS, tiles / together)
    return sliced + MASKED[itemsize] * masked + GATHER[itemsize] * gathered + calls + remade


@pytest.mark.parametrize("seed", range(120))
def test_the_choice_is_legal_and_its_numbers_are_the_plans(seed):
    axes, text = random_axes(seed, 14), seed % 3 * 5
    choice = choose_tiles(axes, text)
    for axis, q, kv in zip(axes, choice.q_tile, choice.kv_tile, strict=True):
        assert 1 <= kv <= axis.size
        assert sum(q) == axis.size and axis.dilation == 1 if isinstance(q, tuple) else 1 <= q <= axis.class_length(0)
    counted = work(axes, text, choice.q_tile, choice.kv_tile)
    assert (choice.pairs, choice.masked, choice.gathered, choice.tiles) == (counted[0], *counted[2:])
    assert choice.sliced == pytest.approx(counted[1])
    assert choice.cost == pytest.approx(priced(counted, choice.kinds, choice.itemsize))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("seed", range(25))
def test_no_candidate_is_much_cheaper(seed, itemsize):
    """Tried one by one, counted on their plans; tiles of different lengths are chosen if they promise 5 % at least."""
    axes, text = random_axes(seed, 7), seed % 2 * 5
    choice = choose_tiles(axes, text, itemsize)
    best = {False: math.inf, True: math.inf}
    for tile in itertools.product(*(cost._candidates(axis) for axis in axes)):
        kinds = math.prod(cost._axis_work(axis, one).kinds for axis, one in zip(axes, tile, strict=True))
        uneven = any(isinstance(one, tuple) for one in tile)
        best[uneven] = min(best[uneven], priced(work(axes, text, tile, (1,) * len(axes)), kinds, itemsize))
    assert min(best.values()) * (1 - 1e-9) <= choice.cost <= min(best[False], best[True] / cost.UNEVEN) * (1 + 1e-9)
    assert choice.uneven == any(isinstance(one, tuple) for one in choice.q_tile)
    if choice.uneven:
        assert choice.cost <= best[False] * cost.UNEVEN * (1 + 1e-9)


def test_windows_that_stand_still_at_the_borders_get_tiles_of_their_own():
    """A window that leaves out little is whole for nearly all queries: cut there, it needs no mask at all."""
    choice = choose_tiles(axis_windows((8, 32, 32), (8, 32, 30)))
    assert choice.q_tile == (8, 32, (16, 1, 15)) and choice.masked == 0
    assert choice.pairs == 8192 * 8 * 32 * 30


def test_small_grids_have_every_power_and_stride_as_candidate():
    for size in range(1, 11):
        for stride in range(1, size + 1):
            candidates = cost._candidates(axis_windows((size,), -1, stride)[0])
            assert {t for t in (1, 2, 4, 8) if t <= size} | {stride, size} <= set(candidates)
            assert all(1 <= t <= size for t in candidates if not isinstance(t, tuple))


def test_long_axes_keep_few_candidates_and_the_strides_multiples():
    axis = axis_windows((30_000,), 4096, 96)[0]
    candidates = [t for t in cost._candidates(axis) if not isinstance(t, tuple)]
    assert len(candidates) <= 14 and {1, 96, 192, 384} <= set(candidates) and max(candidates) <= cost.MAX_TILE


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [((64, 64), 40, 1), ((16, 32, 32), (9, 9, 11), 1), ((4096,), 3000, 7), ((900,), 400, 3)],
)
def test_masks_of_a_chosen_tile_stay_small(grid, window, stride):
    axes = axis_windows(grid, window, stride)
    choice = choose_tiles(axes)
    plan = neighborhood_plan(Sequence(grid), axes, choice.q_tile, choice.kv_tile)
    biases = [
        part.bias.numel()
        for chunk in plan_chunks(plan, 0, 0, 1 << 20, 1, torch.float32)
        for part in chunk.parts
        if part.bias is not None
    ]
    assert biases and max(biases) <= 2 * cost.MASK_SHARE * math.prod(grid)


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [
        ((32, 32), (16, 16), (16, 16)),
        ((16, 44, 80), (16, 24, 16), (1, 8, 16)),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
    ],
)
def test_aligned_settings_need_no_mask(grid, window, stride):
    assert choose_tiles(axis_windows(grid, window, stride)).masked == 0


def test_the_key_run_grows_rather_than_the_lists(monkeypatch):
    """With few list entries to spend, runs lengthen; what is gathered then is counted as it is."""
    axes = axis_windows((6, 50), (3, 7))
    monkeypatch.setattr(cost, "MAX_LIST_ENTRIES", 100)
    choose_tiles.cache_clear()
    try:
        choice = choose_tiles(axes)
        plan = neighborhood_plan(Sequence((6, 50)), axes, choice.q_tile, choice.kv_tile)
        assert choice.kv_tile[-1] > 1 and int(plan.count.sum()) <= 2 * 100
        assert torch.equal(plan.count > 0, torch.ones_like(plan.count, dtype=torch.bool))
        counted = work(axes, 0, choice.q_tile, choice.kv_tile)
        assert (choice.pairs, choice.masked, choice.gathered) == (counted[0], *counted[2:4])
    finally:
        choose_tiles.cache_clear()
