"""One option for each item, under budgets: the problem, and a choice with what it costs.

Whatever the options are (rules of spans, settings of layers), they are numbers here: what an option costs an item under
each budget, and what it adds to each loss. This is a multiple-choice knapsack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-9  # relative: sums of float64 in another order


@dataclass(frozen=True)
class Problem:
    """`losses` (objectives, items, options), `costs` (budgets, items, options), `budgets` (budgets,).

    A choice's loss is the sum over items, its cost the mean over items: a budget of .5 is half of what costs of 1 are.

    Raises:
        ValueError: shapes that do not go together, numbers that are not finite, or a budget that no choice meets.
    """

    losses: np.ndarray
    costs: np.ndarray
    budgets: np.ndarray

    def __post_init__(self) -> None:
        for name in ("losses", "costs", "budgets"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        losses, costs, budgets = self.losses, self.costs, self.budgets
        if losses.ndim != 3 or costs.ndim != 3 or losses.shape[1:] != costs.shape[1:] or not losses.size:
            raise ValueError(f"losses {losses.shape}, costs {costs.shape}: give (kinds, items, options) of both")
        if budgets.shape != costs.shape[:1]:
            raise ValueError(f"budgets {budgets.shape} for costs {costs.shape}: give one per kind of cost")
        if not all(np.isfinite(numbers).all() for numbers in (losses, costs, budgets)):
            raise ValueError("losses, costs and budgets must be finite")
        least = costs.min(axis=2).mean(axis=1)
        if (least > budgets * (1 + TOLERANCE)).any():
            where = int(np.argmax(least - budgets))
            raise ValueError(
                f"budget {where} is {budgets[where]:.4g}, but the cheapest options cost {least[where]:.4g}"
            )

    @property
    def items(self) -> int:
        return self.losses.shape[1]

    @property
    def options(self) -> int:
        return self.losses.shape[2]


@dataclass(frozen=True)
class Choice:
    """`options`: one index per item. `losses`: of each objective, summed. `costs`: under each budget, averaged."""

    options: tuple[int, ...]
    losses: tuple[float, ...]
    costs: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem, options: Iterable[int]) -> Choice:
        taken = tuple(int(option) for option in options)
        index = np.array(taken)[None, :, None]
        losses = np.take_along_axis(problem.losses, index, axis=2).sum(axis=(1, 2))
        costs = np.take_along_axis(problem.costs, index, axis=2).mean(axis=(1, 2))
        return cls(taken, tuple(losses.tolist()), tuple(costs.tolist()))
