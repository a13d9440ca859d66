"""Tiles for GPU kernels: full steps, and no more of them than the setting needs."""

import math

import pytest

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.gpu_tiles import KV_STEP, Q_STEP, gpu_tiles
from attn_plugins.plan.tables import device_tables
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [
        ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
        ((30, 48, 80), (30, 40, 40), (1, 32, 8)),
        ((256, 256), (80, 80), (16, 16)),
    ],
)
def test_settings_published_as_block_sparse_waste_nothing(grid, window, stride):
    axes = axis_windows(grid, window, stride)
    pairs = math.prod(grid) * math.prod(window)
    assert gpu_tiles(axes).cost == pytest.approx(pairs / (Q_STEP * KV_STEP))


@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation", "causal"),
    [
        ((12, 16, 20), (5, 7, 9), 1, 1, (True, False, False)),
        ((40, 52), (9, 12), (2, 3), (3, 2), False),
        ((1000,), (200,), 1, 1, True),
        ((1, 7, 5), (1, 3, 3), 1, 1, False),
        ((9, 9, 9), -1, 1, 1, False),
    ],
)
def test_the_cost_counts_the_steps_that_the_plan_makes(grid, window, stride, dilation, causal):
    axes = axis_windows(grid, window, stride, dilation, causal)
    tiles = gpu_tiles(axes)
    plan = BlockPlan.from_windows(
        Sequence(grid), window, stride, dilation, causal, q_tile=tiles.q_tile, kv_tile=tiles.kv_tile
    )
    steps, whole = int(plan.count.sum()), int(plan.full.sum())
    assert steps <= tiles.cost + 1e-6 <= steps * 1.1 + (steps - whole) * 0.3 + 1e-6
    assert math.prod(tiles.q_tile) <= Q_STEP and math.prod(tiles.kv_tile) <= KV_STEP
    made = device_tables(plan, plan.lists.device)
    assert len(made.q_pieces(Q_STEP).start) == len(plan.q_start)  # no tile is cut
