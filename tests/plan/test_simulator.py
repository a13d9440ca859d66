"""The simulator against tiles counted one by one in the reference mask, and against the paper's figures."""

import math
import random

import numpy as np
import pytest

from attn_plugins.ops.neighborhood.reference import axis_mask
from attn_plugins.plan.simulator import end_to_end, rank, simulate, useful_strides
from attn_plugins.plan.windows import AxisWindow

HUNYUAN = dict(grid=(30, 48, 80), window=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))


def counted(axis: AxisWindow, q_tile: int, kv_tile: int, dynamic: bool) -> tuple[int, int]:
    """(KV tiles that the worst query tile touches, query tiles), by looking at every entry of the mask."""
    mask = axis_mask(axis).numpy()
    worst = tiles = 0
    for residue in range(axis.dilation):
        of_class = mask[residue :: axis.dilation, residue :: axis.dilation]
        for first in range(0, len(of_class), q_tile):
            seen = np.flatnonzero(of_class[first : first + q_tile].any(axis=0))
            touched = math.ceil((seen[-1] - seen[0] + 1) / kv_tile) if dynamic else len(set(seen // kv_tile))
            worst, tiles = max(worst, touched), tiles + 1
    return worst, tiles


def random_axis(rng: random.Random) -> AxisWindow:
    size = rng.randint(1, 40)
    window = rng.randint(1, size)
    dilation = rng.randint(1, size // window)
    return AxisWindow(size, window, rng.randint(1, window), dilation, rng.random() < 0.4)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", range(150))
def test_visited_tiles_are_those_in_the_mask(case, dynamic):
    rng = random.Random(case)
    axis = random_axis(rng)
    q_tile, kv_tile = rng.randint(1, 12), rng.randint(1, 12)
    result = simulate(
        grid=axis.size, window=axis.window, stride=axis.stride, dilation=axis.dilation, causal=axis.causal,
        q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic,
    )  # fmt: skip
    visited, query_tiles = counted(axis, q_tile, kv_tile, dynamic)
    assert result.visited == visited
    assert result.axes[0].query_tiles == query_tiles
    assert result.total == math.ceil(axis.size / kv_tile)
    dense = result.total * math.ceil(axis.size / q_tile)
    assert result.speedup == pytest.approx(dense / (visited * query_tiles))
    assert result.flop_speedup == pytest.approx(axis.size / axis_mask(axis).sum(dim=1).max().item())


@pytest.mark.parametrize("case", range(150))
def test_block_sparse_means_no_tile_of_the_mask_is_partial(case):
    rng = random.Random(case)
    q_tile, kv_tile = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    size, window = rng.randint(4, 24), rng.randint(1, 4) * rng.choice([1, 2, 4])
    window = min(window, size)
    axis = AxisWindow(size, window, rng.randint(1, window), 1, rng.random() < 0.2)
    result = simulate(grid=size, window=window, stride=axis.stride, causal=axis.causal, q_tile=q_tile, kv_tile=kv_tile)
    mask = axis_mask(axis).numpy()
    partial = any(
        mask[i : i + q_tile, j : j + kv_tile].any() and not mask[i : i + q_tile, j : j + kv_tile].all()
        for i in range(0, size, q_tile)
        for j in range(0, size, kv_tile)
    )
    assert result.block_sparse == (not partial)


def test_axes_multiply():
    result = simulate(grid=(7, 12), window=(3, 4), stride=(1, 2), causal=(True, False), q_tile=(2, 4), kv_tile=2)
    first, second = result.axes
    assert result.visited == first.visited * second.visited
    assert result.total == 4 * 6
    assert result.speedup == pytest.approx(24 / result.visited)
    assert result.flop_speedup == pytest.approx(7 / 3 * 12 / 4)


@pytest.mark.parametrize(
    "stride, speedup, block_sparse", [(1, 3.2727, False), ((16, 8, 8), 11.1111, True), ((2, 8, 8), 10.0, False)]
)
def test_published_hunyuan_figures(stride, speedup, block_sparse):
    """Paper: 3.27x at stride 1 and 11.1x at 16x8x8 for window 18x24x24."""
    result = simulate(**HUNYUAN, stride=stride)
    assert result.speedup == pytest.approx(speedup, abs=1e-4)
    assert result.flop_speedup == pytest.approx(100 / 9)
    assert result.block_sparse is block_sparse


def test_a_stride_of_the_whole_window_need_not_be_block_sparse():
    assert not simulate(grid=96, window=24, stride=24, q_tile=16, kv_tile=16).block_sparse
    assert simulate(grid=96, window=24, stride=24, q_tile=24, kv_tile=24).block_sparse


def test_dynamic_tiling_never_visits_more():
    for stride in (1, 4, 8):
        setting = dict(grid=80, window=24, stride=stride, q_tile=8, kv_tile=8)
        assert simulate(**setting, dynamic=True).visited <= simulate(**setting).visited
    assert simulate(grid=80, window=24, stride=1, q_tile=8, kv_tile=8, dynamic=True).visited == 4


def test_useful_strides_keep_only_what_saves_a_tile():
    kept = useful_strides(**HUNYUAN)
    assert kept == ((1, 2, 16), (1, 8), (1, 8))
    for axis, strides in enumerate(kept):
        setting = {key: value[axis] for key, value in HUNYUAN.items()}
        every = [simulate(**setting, stride=s).visited for s in range(1, setting["window"] + 1)]
        assert list(strides) == [s for s in range(1, len(every) + 1) if s == 1 or every[s - 1] < min(every[: s - 1])]


def test_rank_is_sorted_and_complete():
    rows = rank(**HUNYUAN)
    assert len(rows) == 12
    assert rows[0].stride == (16, 8, 8)
    assert [row.speedup for row in rows] == sorted((row.speedup for row in rows), reverse=True)


def test_whole_axis_gains_nothing():
    result = simulate(grid=(5, 30), window=(-1, 30), stride=(2, 7), q_tile=(2, 8), kv_tile=(2, 8))
    assert result.speedup == result.flop_speedup == 1.0


def test_end_to_end_is_amdahl():
    assert end_to_end(4.0, 0.5) == pytest.approx(1.6)
    assert end_to_end(math.inf, 0.75) == pytest.approx(4.0)
    assert end_to_end(math.inf, 1.0) == math.inf
    assert end_to_end(1.0, 0.9) == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q_tile=(4, 8)), "q_tile=(4, 8)"),
        (dict(kv_tile=0), "kv_tile=0"),
        (dict(window=(18, 24, 81)), "axis 2 of grid"),
        (dict(stride=(19, 1, 1)), "stride=19: legal is 1..18"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError) as error:
        simulate(**(HUNYUAN | change))
    assert message in str(error.value)


@pytest.mark.parametrize("arguments, message", [((2.0, 1.5), "share=1.5"), ((0.0, 0.5), "speedup=0.0")])
def test_end_to_end_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        end_to_end(*arguments)
