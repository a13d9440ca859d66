"""The tuner's program: options, the best plan for every budget, what a plan says, and what is taken of all that ran."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

import attn_plugins  # noqa: E402
from attn_plugins import recipe  # noqa: E402
from attn_plugins.pipelines import tune as job  # noqa: E402
from attn_plugins.pipelines.tuner import corrections, outcomes, plans, profile, steps  # noqa: E402
from attn_plugins.pipelines.tuner.candidates import Candidate, Single  # noqa: E402
from attn_plugins.pipelines.tuner.diffusion import DiffusionSubject  # noqa: E402
from attn_plugins.pipelines.tuner.outcomes import Budget, Outcome  # noqa: E402
from attn_plugins.pipelines.tuner.subject import Place  # noqa: E402
from tests.support.tuned import WINDOWS, call, tiny_subject  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture
def subject() -> DiffusionSubject:
    return tiny_subject()


def made_up(seed: int, places: int = 3) -> profile.Profile:
    """A profile of two windows and of their halves, with random numbers."""
    rng = np.random.default_rng(seed)
    tried = [*WINDOWS]
    for candidate in WINDOWS:
        tried += [half for heads in ((0,), (1,)) if (half := candidate.on(heads)) is not None]
    rows = tuple(Place(f"blocks.{number}.attn1", "self", 2) for number in range(places))
    dense = rng.uniform(1, 2, places)
    shares = rng.uniform(0.2, 0.9, (places, len(tried)))
    shares[:, len(WINDOWS) :] = 0.5 + shares[:, len(WINDOWS) :] / 2  # half of the heads stay dense
    errors = rng.uniform(0, 1, (2, places, len(tried)))
    errors[..., len(WINDOWS) :] /= 3
    return profile.Profile(rows, tuple(tried), np.array([0.25, 0.75]), errors, shares * dense[:, None], dense)


@pytest.mark.parametrize("seed", range(4))
def test_each_plan_is_the_best_for_its_time(subject: DiffusionSubject, seed: int) -> None:
    found = made_up(seed)
    weights = np.random.default_rng(seed).uniform(0.5, 2, steps.GRID)
    share = found.dense.sum() / 10
    rows = plans.options_of(found, weights, has_steps=True)
    front = plans.front(subject, found, weights, share)
    assert len(front) >= 3
    everything = [
        (sum(option.seconds for option in taken), sum(option.error for option in taken))
        for taken in itertools.product(*rows)
    ]
    for plan in front:
        seconds = found.dense.sum() - (1 - 1 / plan.speedup) * 10
        best = min(error for time, error in everything if time <= seconds * (1 + 1e-9))
        assert plan.loss == pytest.approx(math.sqrt(best), rel=1e-6)
    losses = [plan.loss for plan in front]
    assert losses == sorted(losses, reverse=True)


def test_options_are_what_their_parts_add_up_to(subject: DiffusionSubject) -> None:
    checked = 0
    for found in (made_up(seed) for seed in range(8)):
        for place, row in enumerate(plans.options_of(found, np.ones(steps.GRID), has_steps=False)):
            for one in (option for option in row if len(option.columns) == 2):
                wholes = [found.candidates.index(found.candidates[column].of) for column in one.columns]
                assert one.seconds == pytest.approx(found.seconds[place, wholes].mean())  # two heads, each has its half
                error = found.error[:, place, list(one.columns)].sum(-1).mean()
                assert one.error == pytest.approx(error, rel=1e-2)
                assert sorted(found.candidates[column].heads for column in one.columns) == [(0,), (1,)]
                checked += 1
    assert checked


def test_heads_that_stay_dense_take_what_they_took() -> None:
    """Three groups of heads of which two are sparse: each a third of its whole, the third as the method computes it."""
    whole = Candidate("gna", "a", {"window": 1})
    tried = (whole, *(Candidate("gna", f"a {head}", {}, (head,), whole) for head in range(3)))
    # dense attention takes 9, but the method needs 2 for a dense head, and .5 for a sparse one
    seconds = np.array([[1.5, 4.5, 4.5, 4.5]])
    found = profile.Profile(
        (Place("x", "self", 3),), tried, np.array([0.5]), np.ones((1, 1, 4)), seconds, np.array([9.0])
    )  # fmt: skip
    assert plans._seconds(found, 0, (1, 2)) == pytest.approx(0.5 + 0.5 + 2)
    assert plans._seconds(found, 0, (1, 2, 3)) == pytest.approx(1.5) and plans._seconds(found, 0, (2,)) == 4.5


def test_what_a_row_says_is_what_was_chosen(subject: DiffusionSubject, tmp_path: Path) -> None:
    """Head groups and steps, through the file, onto the layers."""
    found = made_up(2, places=len(subject.places))
    found = dataclasses.replace(found, places=subject.places)
    plan = next(
        plan
        for plan in plans.front(subject, found, np.ones(steps.GRID), found.dense.sum() / 10)
        if any("per_head" in row["options"] for row in plan.rows)
    )
    path = recipe.write_rows([dict(row) for row in plan.rows], tmp_path / "plan.yaml")
    handle = attn_plugins.patch(subject.obj, path)
    patched = {layer.name: row for row in handle.patches for layer in row.layers}
    for row in plan.rows:
        for name in row["sites"]:
            assert patched[name].config == patched[name].config.from_options(**row["options"])
            first = row["dense_steps"][0] if isinstance(row["dense_steps"], list) else row["dense_steps"]
            assert patched[name].state.schedule.first == first
    handle.remove()


def test_schedules_are_of_whole_steps() -> None:
    """Of 4 steps .1 is none of them, and .2 and .3 are the same one; 10 steps of a quarter are 2."""
    assert [dense for dense, _ in steps.schedules(4)] == [
        (0.0, 0.0),
        (0.2, 0.0),
        (0.5, 0.0),
        (0.7, 0.0),
        (0.0, 0.25),
        (0.0, 0.5),
        (0.25, 0.25),
    ]
    assert steps.inside((0.25, 0.25), 10).mean() == 0.6 and steps.inside((3, 3), 10).mean() == 0.4
    assert len(steps.schedules(1)) == 1 and len(steps.schedules(None)) == len(steps.DENSE_STEPS)


def test_a_front_is_thinned_around_the_budget() -> None:
    front = [plans.Plan(f"tuned {number}", (), 2.0 - number / 10, 0.5 - number / 20) for number in range(10)]
    kept = job._thinned(front, 4, Budget(faster=1.55))
    assert [plan.label for plan in kept] == ["tuned 0", "tuned 4", "tuned 6", "tuned 9"]
    assert (
        job._thinned(front, 1, Budget(lose=0.21))[0].label == "tuned 6" and job._thinned(front, 20, Budget()) == front
    )


def test_weights_say_what_an_error_at_a_step_does(subject: DiffusionSubject) -> None:
    ran, probes = subject.record(call(), 2)
    found = profile.measure(subject, WINDOWS, probes)
    weights = steps.weights(subject, found, call(), ran, parts=2)
    column = steps._representative(found)
    with attn_plugins.patch(subject.obj, "gna", dense_steps=(0.5, 0.0), **WINDOWS[column].options):
        lost = subject.loss(subject.run(call()).result, ran.result)
    curve = steps.curves(found)[:, :, column].sum(axis=1) * weights
    assert math.sqrt(curve[steps.GRID // 2 :].sum() / steps.GRID) == pytest.approx(lost, rel=1e-6)


def outcome(label: str, speedup: float, loss: float) -> Outcome:
    return Outcome(Single(label, "fast", label), (loss, loss), (1 / speedup,), (1.0,))


def test_errors_are_scaled_to_what_presets_lost(subject: DiffusionSubject) -> None:
    """A preset's setting by its own factor, the rest of its method by the mean of them, another method by nothing."""
    safe, fast = (Single("kv_pool", quality, "transformers") for quality in ("safe", "fast"))
    tried = [Candidate("kv_pool", one.label, one.told["options"]) for one in (safe, fast)]
    tried += [Candidate("kv_pool", "of the ladder", {"factor": 4}), WINDOWS[0], WINDOWS[0].on((0,))]
    found = profile.Profile(
        (Place("x", "self", 2),), tuple(tried), np.array([0.5]), np.full((1, 1, 5), 0.01), np.ones((1, 5)), np.ones(1)
    )  # fmt: skip
    weights, subject.grid, subject.steps = np.full(steps.GRID, 2.0), (8, 32, 32), 10
    lost = [Outcome(one, (), (1.0,), (1.0,)) for one in (safe, fast)]
    for number, (one, factor) in enumerate(zip((safe, fast), (4.0, 9.0), strict=True)):
        expected = 0.01 * 2 * (1 - one.steps[0])  # safe keeps 40 % of the steps dense, fast 20 %
        lost[number] = Outcome(one, (math.sqrt(factor * expected),) * 2, (1.0,), (1.0,))
    factors = corrections.scales(subject, found, weights, lost)
    assert factors == pytest.approx([4, 9, 6, 1, 1])
    # half of the dense time is foreseen to be saved in 60 and 80 % of the steps, where attention is half of the run
    timed = dataclasses.replace(found, dense=np.array([2.0]))
    saved = [0.6 * 0.25 * 0.7, 0.8 * 0.25 * 0.9]
    rows = [Outcome(one, (0.1,), (1 - part,), (1.0,)) for one, part in zip((safe, fast), saved, strict=True)]
    assert corrections.savings(subject, timed, rows, 0.5) == pytest.approx(0.8)
    assert corrections.savings(subject, timed, [], 0.5) == 1
    assert corrections.scaled(found, factors).error[0, 0] == pytest.approx([0.04, 0.09, 0.06, 0.01, 0.01])
    none = Outcome(safe, (0.0,), (1.0,), (1.0,))
    assert (corrections.scales(subject, found, weights, [none]) == 1).all()


def test_dense_runs_stand_between_the_others(subject: DiffusionSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "BETWEEN", 2)
    seconds = iter(range(1, 100))
    run = subject.run
    monkeypatch.setattr(subject, "run", lambda case: dataclasses.replace(run(case), seconds=float(next(seconds))))
    singles = [Single("kv_pool", quality, "transformers") for quality in ("safe", "balanced", "fast")]
    found, _ = outcomes.measure(subject, singles, [call()])
    assert [(one.dense, one.seconds) for one in found] == [((1,), (2,)), ((1,), (3,)), ((4,), (5,))]
    assert found[2].speedup == 4 / 5


def test_numbers_that_are_not_finite_are_no_choice(subject: DiffusionSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "loss", lambda result, dense: math.nan)
    found, failed = outcomes.measure(subject, [Single("kv_pool", "safe", "transformers")], [call()])
    assert not found and failed == ["kv_pool transformers safe: gave numbers that are not finite"]


def test_budgets() -> None:
    rows = [outcome("a", 1.1, 0.1), outcome("b", 1.5, 0.2), outcome("c", 1.4, 0.3), outcome("d", 2.0, 0.9)]
    assert Budget(faster=1.3).best(rows) == (rows[1], True)
    assert Budget(faster=3.0).best(rows) == (rows[3], False)
    assert Budget(lose=0.5).best(rows) == (rows[1], True)
    assert Budget(lose=0.01).best(rows) == (rows[0], False)
    assert [one.label for one in outcomes.best_of(rows)] == ["d d fast", "b b fast", "a a fast"]
    for wrong in ({"faster": 1.5, "lose": 1.0}, {"faster": 1.0}, {"lose": 0.0}, {"faster": math.nan}):
        with pytest.raises(ValueError, match="budgets|speedup|loss"):
            Budget(**wrong)


def test_losses_choose_and_all_times_count() -> None:
    one = Outcome(Single("a", "fast", "a"), (1.0,), (0.5,), (1.0,))  # twice as fast, by one run
    other = dataclasses.replace(one, losses=(3.0, 3.0), seconds=(0.9, 0.8), dense=(1.0, 1.0))
    both = outcomes.timed_with(one, other)
    assert both.loss == 1 and both.speedup == 1 / 0.8 and outcomes.timed_with(one, one) is one


def test_intervals_are_students() -> None:
    one = Outcome(Single("a", "fast", "a"), (1.0, 2.0, 3.0), (1.0,), (1.0,))
    assert one.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert outcome("b", 1.0, 1.0).half == 0 and Outcome(one.what, (1.0,), (1.0,), (1.0,)).half == math.inf
