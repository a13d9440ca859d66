"""One loss, several limits: the integer program by branch and bound, or by its relaxation and local moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_plugins.search.problem import TOLERANCE, Problem


@dataclass(frozen=True)
class Linear:
    """`weights` (items, options) to minimise; `rows` (limits, items, options) whose sums are at most 1.

    Everything is scaled to about 1, as HiGHS's tolerances are absolute; what exceeds a limit alone counts as twice it.
    """

    weights: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, problem: Problem, objective: int, bounds: Mapping[int, float]) -> Linear:
        given = [*zip(problem.costs / problem.items, problem.budgets, strict=True)]
        given += [(problem.losses[other], bound) for other, bound in bounds.items()]
        rows = [np.minimum(numbers / limit, 2.0) if limit > 0 else 2.0 * (numbers > 0) for numbers, limit in given]
        weights = problem.losses[objective]
        return cls(weights / (weights.max() or 1.0), np.stack(rows))

    @property
    def items(self) -> int:
        return self.weights.shape[0]

    def loss(self, options: np.ndarray) -> float:
        return float(self.weights[np.arange(self.items), options].sum())

    def used(self, options: np.ndarray) -> np.ndarray:
        return self.rows[:, np.arange(self.items), options].sum(axis=1)

    def excess(self, options: np.ndarray) -> float:
        """By how much the limits are exceeded, in parts of each; 0 where all are met."""
        return float(_over(self.used(options)))


def by_milp(linear: Linear, seconds: float) -> np.ndarray | None:
    """(items,) options, or None where there is no choice (or none was found in time)."""
    from scipy.optimize import milp

    constraints, bounds = _constraints(linear)
    settings = {"time_limit": seconds, "mip_rel_gap": 1e-6}
    found = milp(linear.weights.ravel(), integrality=1, bounds=bounds, constraints=constraints, options=settings)
    if found.x is None:
        return None
    options = found.x.reshape(linear.weights.shape).argmax(axis=1)
    # a limit met to HiGHS's tolerance may be missed by a hair
    return _improved(linear, _repaired(linear, options))


def by_relaxation(linear: Linear, seconds: float) -> np.ndarray | None:
    """As `by_milp`, from the linear relaxation: a vertex has few fractional items."""
    from scipy.optimize import milp

    constraints, bounds = _constraints(linear)
    found = milp(linear.weights.ravel(), bounds=bounds, constraints=constraints, options={"time_limit": seconds})
    if found.x is None:
        return None
    options = _repaired(linear, found.x.reshape(linear.weights.shape).argmax(axis=1))
    if linear.excess(options) > 0:  # moves of one item are not enough
        return by_milp(linear, seconds)
    return _improved(linear, options)


def _constraints(linear: Linear) -> tuple[list[Any], Any]:
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import identity, kron

    one_each = kron(identity(linear.items), np.ones((1, linear.weights.shape[1])), format="csr")
    limits = linear.rows.reshape(len(linear.rows), -1)
    return [LinearConstraint(one_each, 1, 1), LinearConstraint(limits, -np.inf, 1)], Bounds(0, 1)


def _over(used: np.ndarray) -> np.ndarray:
    """Sums of the parts above 1 over the first axis (limits)."""
    return np.where(used > 1 + TOLERANCE, used - 1, 0.0).sum(axis=0)


def _moves(linear: Linear, options: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every move of one item, (items, options): how the loss changes, and the excess that remains."""
    each = np.arange(linear.items)
    loss = linear.weights - linear.weights[each, options][:, None]
    used = linear.used(options)[:, None, None] + linear.rows - linear.rows[:, each, options][:, :, None]
    return loss, _over(used)


def _repaired(linear: Linear, options: np.ndarray) -> np.ndarray:
    """Move items, least loss per part of excess first, until all limits are met or no move helps."""
    options = options.copy()
    while (excess := linear.excess(options)) > 0:
        loss, remaining = _moves(linear, options)
        gain = excess - remaining
        with np.errstate(divide="ignore", invalid="ignore"):
            # less is rounding: staying put would seem to gain, for ever
            price = np.where(gain > TOLERANCE / 2, loss / gain, np.inf)
        if not np.isfinite(price).any():
            break
        item, option = np.unravel_index(int(price.argmin()), price.shape)
        options[item] = option
    return options


def _improved(linear: Linear, options: np.ndarray) -> np.ndarray:
    """Move items for as long as a move lowers the loss and keeps the limits."""
    options = options.copy()
    if linear.excess(options) > 0:
        return options
    while True:
        loss, excess = _moves(linear, options)
        loss = np.where(excess > 0, 0.0, loss)
        item, option = np.unravel_index(int(loss.argmin()), loss.shape)
        if loss[item, option] >= -1e-12:
            return options
        options[item] = option
