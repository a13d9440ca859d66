"""The trade-off between several losses under the same budgets: an epsilon-constraint grid, and what of it is best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from attn_plugins.search.choice import choose
from attn_plugins.search.problem import Choice, Problem


def dominates(a: Choice, b: Choice) -> bool:
    """Whether `a` is nowhere worse in its losses and somewhere better."""
    return all(x <= y for x, y in zip(a.losses, b.losses, strict=True)) and a.losses != b.losses


def best_of(choices: Iterable[Choice]) -> list[Choice]:
    """Those that no other dominates, one per set of losses, by the last loss."""
    unique = list({choice.losses: choice for choice in choices}.values())
    kept = [one for one in unique if not any(dominates(other, one) for other in unique)]
    return sorted(kept, key=lambda choice: choice.losses[::-1])


def pareto_set(
    problem: Problem,
    *,
    points: int = 5,
    solver: str = "auto",
    seconds: float = 20.0,
    tick: Callable[[], None] = lambda: None,
) -> list[Choice]:
    """Choices of which none is better in one loss without being worse in another.

    Every objective is minimised alone; then the last one, with each of the others bounded at `points` values between
    its own least and the largest that it has where another is least (MoA, arXiv 2406.14909, section 4.3, equation 5).

    Args:
        points: bounds an objective, at least 2 (unless there is one objective).
        solver, seconds: as for `choose`, of each of the points ** (objectives - 1) programs.
        tick: called after each program.

    Raises:
        ValueError: points below 2.
    """
    if points < 2:
        raise ValueError(f"points={points}: give 2 or more")
    count = len(problem.losses)
    found: list[Choice] = []
    for objective in range(count):
        one = choose(problem, objective, solver=solver, known=found, seconds=seconds)
        if one is None:
            raise ValueError("the budgets leave no choice: each can be met alone, but not all of them together")
        found.append(one)
        tick()
    table = np.array([choice.losses for choice in found])  # row: what was minimised
    grids = [np.linspace(table[:, other].min(), table[:, other].max(), points) for other in range(count - 1)]
    for levels in itertools.product(*grids) if count > 1 else ():
        bounds = {other: float(level) for other, level in enumerate(levels)}
        one = choose(problem, -1, bounds=bounds, solver=solver, known=found, seconds=seconds)
        if one is not None:
            found.append(one)
        tick()
    return best_of(found)
