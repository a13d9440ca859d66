"""The choice against brute force; budgets that hold; more budget, never worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attn_plugins.search import Choice, Problem, best_of, choose, dominates, pareto_set
from attn_plugins.search.solvers import Linear, _improved, _repaired


def draw(seed: int, items: int, options: int, budgets, objectives: int = 2) -> Problem:
    """Losses that fall as costs rise, as those of windows do, with noise and scales of many sizes."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.random((len(budgets), items, options)), axis=2)
    costs[:, :, -1], costs[:, :, 0] = 1.0, 0.05
    fall = -np.sort(-rng.random((objectives, items, options)), axis=2) * rng.lognormal(0, 3, (objectives, items, 1))
    fall[:, :, -1] = 0
    return Problem(1e-4 * fall, costs, budgets)


def every(problem: Problem) -> list[Choice]:
    product = itertools.product(range(problem.options), repeat=problem.items)
    choices = [Choice.of(problem, options) for options in product]
    return [one for one in choices if all(np.array(one.costs) <= problem.budgets * (1 + 1e-9))]


@pytest.mark.parametrize("seed", range(8))
def test_branch_and_bound_finds_the_optimum(seed):
    problem = draw(seed, 5, 5, (0.5, 0.4))
    best = min(one.losses[-1] for one in every(problem))
    found = choose(problem)
    assert found is not None and found.losses[-1] == pytest.approx(best, rel=1e-5, abs=1e-12)
    assert all(np.array(found.costs) <= problem.budgets * (1 + 1e-9))


@pytest.mark.parametrize("seed", range(8))
def test_bounds_on_other_losses_hold_and_the_optimum_is_theirs(seed):
    problem = draw(seed, 4, 5, (0.5,))
    feasible = every(problem)
    level = float(np.median([one.losses[0] for one in feasible]))
    allowed = [one for one in feasible if one.losses[0] <= level * (1 + 1e-9)]
    found = choose(problem, bounds={0: level})
    assert found is not None and found.losses[0] <= level * (1 + 1e-9)
    assert found.losses[-1] == pytest.approx(min(one.losses[-1] for one in allowed), rel=1e-5, abs=1e-12)


def test_bounds_that_allow_nothing_give_none():
    problem = Problem(np.ones((2, 3, 2)), np.ones((1, 3, 2)) * [0.1, 1.0], (0.5,))
    assert choose(problem, bounds={0: 2.0}) is None and choose(problem, bounds={0: 3.0}) is not None
    assert choose(problem, bounds={0: 0.0}) is None


@pytest.mark.parametrize("solver", ["lp", "milp"])
@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_is_never_worse(seed, solver):
    known: list[Choice] = []
    for budget in (0.2, 0.25, 0.3, 0.5, 0.75, 1.0):
        problem = draw(seed, 24, 9, (budget, budget))
        found = choose(problem, solver=solver, known=known)
        assert found is not None and max(found.costs) <= budget * (1 + 1e-9)
        assert not known or found.losses[-1] <= known[-1].losses[-1] * (1 + 1e-6)
        known.append(found)
    assert known[-1].losses[-1] == 0 < known[0].losses[-1]


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_near_the_relaxation_at_the_size_of_a_large_model(seed):
    from scipy.optimize import linprog

    problem = draw(seed, 256, 48, (0.5, 0.5, 0.5), objectives=1)
    found = choose(problem, solver="lp")
    linear = Linear.of(problem, 0, {})
    ones = np.kron(np.eye(256), np.ones((1, 48)))
    bound = linprog(linear.weights.ravel(), linear.rows.reshape(3, -1), np.ones(3), ones, np.ones(256)).fun
    assert found is not None and all(np.array(found.costs) <= problem.budgets * (1 + 1e-9))
    assert bound <= linear.loss(np.array(found.options)) * (1 + 1e-9) <= bound * 1.02


@pytest.mark.parametrize("seed", range(4))
def test_repair_meets_the_limits_from_far_outside_and_improvement_keeps_them(seed):
    linear = Linear.of(draw(seed, 12, 6, (0.4, 0.35)), -1, {})
    outside = np.full(12, 5)
    assert linear.excess(outside) > 1
    repaired = _repaired(linear, outside)
    improved = _improved(linear, repaired)
    assert linear.excess(repaired) == linear.excess(improved) == 0
    assert linear.loss(improved) <= linear.loss(repaired)
    assert np.array_equal(_improved(linear, outside), outside)


def test_what_was_known_is_taken_where_it_is_better():
    worse = 0
    for seed in range(8):
        problem = draw(seed, 5, 5, (0.5, 0.4))
        best = min(every(problem), key=lambda one: one.losses[-1])
        alone, together = (choose(problem, solver="lp", known=known) for known in ((), (best,)))
        assert alone is not None and together is not None and together.losses[-1] <= best.losses[-1]
        worse += alone.losses[-1] > best.losses[-1] * (1 + 1e-9)
    assert worse >= 1
    outside = Choice.of(problem, [4] * 5)
    found = choose(problem, known=[outside])
    assert found is not None and found.losses[-1] > outside.losses[-1] == 0


def test_the_pareto_set_is_the_true_one_as_far_as_its_grid_reaches():
    problem = draw(11, 6, 4, (0.5,))
    true = best_of(every(problem))
    found = pareto_set(problem, points=9)
    assert len(found) >= 3
    assert not [one for one in found if any(dominates(other, one) for other in found)]
    for one in found:
        rivals = [other for other in true if dominates(other, one)]
        assert all(np.allclose(other.losses, one.losses, rtol=1e-4, atol=1e-9) for other in rivals)
    for objective in (0, 1):
        least = min(one.losses[objective] for one in true)
        assert min(one.losses[objective] for one in found) == pytest.approx(least, rel=1e-5, abs=1e-12)


def test_three_objectives_and_every_program_counts():
    calls = []
    found = pareto_set(draw(5, 6, 5, (0.5, 0.5), objectives=3), points=3, tick=lambda: calls.append(1))
    assert len(calls) == 3 + 9 and len({one.losses for one in found}) == len(found) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((1, 2, 3)), np.ones((1, 2, 2)), (1,)), "losses"),
        ((np.ones((1, 2, 3)), np.ones((2, 2, 3)), (1,)), "budgets"),
        ((np.ones((1, 2, 3)), np.ones((1, 2, 3)), (0.5,)), "budget 0 is 0.5, but the cheapest options cost 1"),
        ((np.full((1, 2, 3), np.nan), np.ones((1, 2, 3)), (1,)), "finite"),
    ],
)
def test_what_is_no_problem_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Problem(*arguments)


def test_unknown_solver_and_too_few_points():
    problem = draw(0, 2, 2, (0.9,))
    with pytest.raises(ValueError, match="solver='simplex'"):
        choose(problem, solver="simplex")
    with pytest.raises(ValueError, match="points=1"):
        pareto_set(problem, points=1)
