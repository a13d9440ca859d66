"""Choose one option for each item so that a loss is least and no budget is exceeded, by SciPy's HiGHS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from attn_plugins.search.problem import Choice, Problem
from attn_plugins.search.solvers import Linear, by_milp, by_relaxation

AUTO_EXACT = 4096  # options of all items together: up to there branch and bound takes moments


def choose(
    problem: Problem,
    objective: int = -1,
    *,
    bounds: Mapping[int, float] | None = None,
    solver: str = "auto",
    known: Iterable[Choice] = (),
    seconds: float = 60.0,
) -> Choice | None:
    """The choice of least loss under all budgets, or None where the bounds on other losses allow none.

    Args:
        objective: which loss; negative counts from the end.
        bounds: {other objective: at most}.
        solver: "milp" (branch and bound), "lp" (the relaxation, which leaves about as many items undecided as there
            are budgets and bounds; they are rounded, repaired and improved one move at a time), "auto" (milp for
            problems of up to 4,096 items x options).
        known: choices found before: the best of those that meet budgets and bounds is returned if it is better, so
            that a larger budget never gives a worse choice than a smaller one that is handed in, with any solver.
        seconds: limit of one branch and bound; then its best choice so far counts.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in ("auto", "lp", "milp"):
        raise ValueError(f"solver={solver!r}: legal are 'auto', 'lp', 'milp'")
    linear = Linear.of(problem, objective, dict(bounds or {}))
    exact = solver == "milp" or (solver == "auto" and problem.items * problem.options <= AUTO_EXACT)
    taken = by_milp(linear, seconds) if exact else by_relaxation(linear, seconds)
    found = [np.array(one.options) for one in known] + ([] if taken is None else [taken])
    met = sorted((linear.loss(options), tuple(options.tolist())) for options in found if linear.excess(options) == 0)
    return Choice.of(problem, met[0][1]) if met else None
