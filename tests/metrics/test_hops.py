"""Attention by distance, against definitions and against the windows that GNA really has."""

from __future__ import annotations

import math

import pytest
import torch

from attn_plugins.metrics.entropy import row_entropy
from attn_plugins.metrics.hops import (
    axis_distances,
    chebyshev,
    kept,
    least_window,
    least_windows,
    mass_by,
    window_mass,
)
from attn_plugins.plan.windows import axis_windows

GRIDS = [(7,), (4, 5), (3, 4, 6), (1, 5, 1)]


def rows_of(grid: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(grid))


def weights_of(grid: tuple[int, ...]) -> torch.Tensor:
    scores = torch.randn(math.prod(grid), math.prod(grid), generator=torch.Generator().manual_seed(0))
    return (2 * scores).softmax(-1)


@pytest.mark.parametrize("grid", GRIDS)
def test_distances_by_definition(grid):
    places = [tuple(int(i) for i in torch.unravel_index(token, grid)) for token in rows_of(grid)]
    hops = chebyshev(rows_of(grid), grid)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            assert hops[i, j] == max(abs(x - y) for x, y in zip(query, key, strict=True))
    for axis, distances in enumerate(axis_distances(rows_of(grid), grid)):
        assert all(distances[i, y] == abs(place[axis] - y) for i, place in enumerate(places) for y in range(grid[axis]))


@pytest.mark.parametrize("size", range(1, 10))
def test_least_windows_are_those_of_gna(size):
    """Every window of every size, as the operator has it."""
    (least,) = least_windows(torch.arange(size), (size,))
    for window in range(1, size + 1):
        (axis,) = axis_windows((size,), (window,), (1,), (1,), (False,))
        seen = torch.from_numpy(axis.seen_from(torch.arange(size).numpy()))
        assert torch.equal(least <= window, seen), window


@pytest.mark.parametrize("grid", GRIDS)
def test_kept_is_what_each_window_shows(grid):
    weights = weights_of(grid)
    held = kept(window_mass(weights, rows_of(grid), grid))
    assert held.shape == grid and held[(-1,) * len(grid)] == pytest.approx(len(weights))
    for window in {tuple(max(1, size // 2) for size in grid), (1,) * len(grid), grid}:
        seen = torch.ones(len(weights), 1, dtype=torch.bool)
        for axis, places in zip(
            axis_windows(grid, window, (1,) * len(grid), (1,) * len(grid), (False,) * len(grid)),
            torch.unravel_index(rows_of(grid), grid),
            strict=True,
        ):
            seen = (seen[:, :, None] & torch.from_numpy(axis.seen_from(places.numpy()))[:, None]).flatten(1)
        assert held[tuple(size - 1 for size in window)] == pytest.approx(float(weights[seen].double().sum()))


def test_least_window_is_the_smallest_that_is_enough():
    grid = (4, 6)
    mass = window_mass(weights_of(grid), rows_of(grid), grid)
    held = kept(mass)
    for share in (0.3, 0.7, 0.95):
        window = least_window(mass, share * float(mass.sum()))
        enough = [(i + 1) * (j + 1) for i in range(4) for j in range(6) if held[i, j] >= share * mass.sum()]
        assert window is not None and math.prod(window) == min(enough)
        assert held[window[0] - 1, window[1] - 1] >= share * mass.sum()
    assert least_window(mass, float(mass.sum()) + 1) is None
    assert least_window(mass, -1.0) == (1, 1), "where text alone is enough"


def test_mass_by_adds_up():
    weights = torch.rand(3, 5)
    numbers = torch.randint(0, 4, (3, 5))
    mass = mass_by(weights, numbers, 4)
    assert mass.dtype == torch.float64 and float(mass.sum()) == pytest.approx(float(weights.double().sum()))
    assert float(mass[2]) == pytest.approx(float(weights[numbers == 2].double().sum()))


def test_entropy():
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.1, 0.1, 0, 0], [0.0] * 4])
    found = row_entropy(weights)
    assert found.tolist() == pytest.approx([math.log(4), 0, math.log(2), 0])
    assert row_entropy(weights.half()).dtype == torch.float64
