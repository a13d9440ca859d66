"""The tuner: its program is the best there is, its recipes are what ran, and it never loses to a preset it ran."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

import attn_plugins  # noqa: E402
from attn_plugins import recipe  # noqa: E402
from attn_plugins.pipelines import tune as job  # noqa: E402
from attn_plugins.pipelines.tuner import cases, outcomes, plans, profile, steps  # noqa: E402
from attn_plugins.pipelines.tuner.candidates import Candidate, Single, candidates, methods_for  # noqa: E402
from attn_plugins.pipelines.tuner.diffusion import Call, DiffusionSubject  # noqa: E402
from attn_plugins.pipelines.tuner.language import LanguageSubject  # noqa: E402
from attn_plugins.pipelines.tuner.outcomes import Budget, Outcome  # noqa: E402
from attn_plugins.pipelines.tuner.subject import Place  # noqa: E402
from tests.support import tiny_models, tiny_pipelines  # noqa: E402
from tests.support.snapshot import snapshot  # noqa: E402
from tests.support.tiny_models import wan  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

WINDOWS = (
    Candidate("gna", "narrow", {"window": (1, 2, 2), "stride": 1}),
    Candidate("gna", "wide", {"window": (2, 4, 4), "stride": 1}),
)


@pytest.fixture
def subject() -> DiffusionSubject:
    return DiffusionSubject(tiny_pipelines.build("wan"))


def call(prompt: str = "a cat", seed: int = 0, number: int = 4) -> Call:
    known = tiny_pipelines.PIPELINES["wan"].call
    return Call({**known, "prompt": prompt, "num_inference_steps": number}, seed, prompt)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate takes a tenth of dense attention: whether a tiny model gains anything is chance."""
    one = profile._one
    monkeypatch.setattr(profile, "_one", lambda *arguments: (one(*arguments)[0], 0.1))
    monkeypatch.setattr(profile, "_dense_seconds", lambda subject, probes, tick: np.ones(len(subject.places)))


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
    return profile.Profile(
        rows, tuple(tried), np.array([0.25, 0.75]), rng.uniform(0, 1, (2, places, len(tried))),
        shares * dense[:, None], dense,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_each_plan_is_the_best_for_its_time(subject: DiffusionSubject, seed: int) -> None:
    found = made_up(seed)
    weights = np.random.default_rng(seed).uniform(0.5, 2, steps.GRID)
    job_seconds, forwards = 20.0, 2
    rows = plans.options_of(found, weights, has_steps=True)
    front = plans.front(subject, found, weights, job_seconds, forwards)
    assert len(front) >= 3
    everything = [
        (sum(option.seconds for option in taken), sum(option.error for option in taken))
        for taken in itertools.product(*rows)
    ]
    for plan in front:
        seconds = found.dense.sum() - (1 - 1 / plan.speedup) * job_seconds / forwards
        best = min(error for time, error in everything if time <= seconds * (1 + 1e-9))
        assert plan.loss == pytest.approx(math.sqrt(best), rel=1e-6)
    losses = [plan.loss for plan in front]
    assert losses == sorted(losses, reverse=True)


def test_options_are_what_their_parts_add_up_to(subject: DiffusionSubject) -> None:
    checked = 0
    for found in (made_up(seed) for seed in range(8)):
        for place, row in enumerate(plans.options_of(found, np.ones(steps.GRID), has_steps=False)):
            for one in (option for option in row if len(option.columns) == 2):
                parts = found.seconds[place, list(one.columns)]
                assert one.seconds == pytest.approx(found.dense[place] - (found.dense[place] - parts).sum())
                error = found.error[:, place, list(one.columns)].sum(-1).mean()
                assert one.error == pytest.approx(error, rel=1e-2)
                assert sorted(found.candidates[column].heads for column in one.columns) == [(0,), (1,)]
                checked += 1
    assert checked


def test_what_a_row_says_is_what_was_chosen(subject: DiffusionSubject, tmp_path: Path) -> None:
    """Head groups and steps, through the file, onto the layers."""
    found = made_up(2, places=len(subject.places))
    found = profile.Profile(subject.places, *list(vars(found).values())[1:])
    plan = next(
        plan
        for plan in plans.front(subject, found, np.ones(steps.GRID), 20.0, 2)
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


def test_a_pipeline_is_tuned_and_left_alone(subject: DiffusionSubject, quick: None, tmp_path: Path) -> None:
    dense = subject.run(call("a dog", 3)).result  # from its first call on, diffusers keeps a hook of its own there
    before = snapshot(subject.obj.transformer)
    budget = Budget(lose=1e9)  # anything goes: the fastest of all that ran, so at least as fast as each preset
    settings = job.TuneSettings(("gna", "kv_pool"), probes=2, plans=2, parts=2)
    result = job.tune(
        subject, calibration=call(), validation=[call(seed=1), call("a dog", 2)], test=[call("a dog", 3)],
        budget=budget, settings=settings, folder=tmp_path,
    )  # fmt: skip
    assert snapshot(subject.obj.transformer) == before
    assert result.met and any(one.tuned for one in result.validation)
    assert any(isinstance(one.what, Single) for one in result.validation)
    fastest = max(result.validation, key=lambda one: one.speedup)
    assert result.chosen.what is fastest.what
    written = {path.name for path in result.save(tmp_path)}
    assert {"recipe.yaml", "front.csv"} <= written
    saved = recipe.read(tmp_path / "recipe.yaml")
    assert saved.tokens == (math.prod(subject.grid),) * 2 and saved.evidence["cases"] == 1
    # the file is what ran: the same latents
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fastest may be a preset that leaves so small a grid dense
        handle = attn_plugins.patch(subject.obj, tmp_path / "recipe.yaml")
        again = subject.run(call("a dog", 3)).result
    handle.remove()
    assert subject.loss(again, dense) == result.chosen.losses[0]
    assert torch.equal(subject.run(call("a dog", 3)).result, dense)


def test_a_profile_goes_on_where_it_stopped(
    subject: DiffusionSubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, probes = subject.record(call(), 2)
    first = profile.measure(subject, WINDOWS, probes, path=tmp_path / "profile.json")
    assert np.isfinite(first.error).all() and (first.error > 0).any() and (first.dense > 0).all()
    monkeypatch.setattr(profile, "_one", lambda *_: pytest.fail("measured again"))
    again = profile.measure(subject, WINDOWS, probes, path=tmp_path / "profile.json")
    assert np.array_equal(again.error, first.error) and np.array_equal(again.seconds, first.seconds)
    _, others = subject.record(call("a dog", 1), 2)  # another prompt in the same folder is measured anew
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        profile.measure(subject, WINDOWS, others, path=tmp_path / "profile.json")


def test_the_error_of_a_place_is_that_of_patching_it(subject: DiffusionSubject) -> None:
    _, probes = subject.record(call(), 1)
    found = profile.measure(subject, WINDOWS[:1], probes)
    name = subject.places[1].name
    with attn_plugins.patch(subject.obj, "gna", layers=lambda site: site.name == name, **WINDOWS[0].options):
        out = subject.again(probes[0])
    assert found.error[0, 1, 0] == subject.error(out, probes[0].dense) > 0
    assert torch.equal(subject.again(probes[0]), probes[0].dense)


def test_groups_of_layers_are_measured_together(subject: DiffusionSubject) -> None:
    _, probes = subject.record(call(), 1)
    found = profile.measure(subject, WINDOWS[:1], probes, groups=1)
    with attn_plugins.patch(subject.obj, "gna", **WINDOWS[0].options):
        out = subject.again(probes[0])
    assert found.error[0, :, 0].sum() == pytest.approx(subject.error(out, probes[0].dense))


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


def test_intervals_are_students() -> None:
    one = Outcome(Single("a", "fast", "a"), (1.0, 2.0, 3.0), (1.0,), (1.0,))
    assert one.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert outcome("b", 1.0, 1.0).half == 0 and Outcome(one.what, (1.0,), (1.0,), (1.0,)).half == math.inf


def test_no_case_is_used_twice() -> None:
    for prompts in (["a"], ["a", "b"], ["a", "b", "c", "d", "e"]):
        found = cases.of_prompts(prompts, 3, lambda text: {"prompt": text})
        keys = [(one.label, one.seed) for one in (found.calibration, *found.validation, *found.test)]
        assert len(set(keys)) == len(keys) and len(found.validation) >= 2
    held_out = {one.label for one in found.test}
    assert not held_out & {one.label for one in (found.calibration, *found.validation)}
    rows = cases.of_text(list(range(1000)), 50, 8, start=-1)
    seen = torch.cat([rows.calibration[1:], *(row[1:] for row in (*rows.validation, *rows.test))])
    assert len(set(seen.tolist())) == len(seen) == 8 * 49 and all(row[0] == -1 for row in rows.test)
    with pytest.raises(ValueError, match="text for them"):
        cases.of_text(list(range(100)), 50, 8, start=0)


def test_a_language_model(tiny_llama: Path, quick: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    rows = cases.of_text(torch.randint(3, 2000, (4 * 300,)).tolist(), 256, 4, start=1)
    subject = LanguageSubject(model)
    result = job.tune(
        subject, calibration=rows.calibration, validation=rows.validation, test=rows.test, folder=tmp_path,
        budget=Budget(lose=1e9), settings=job.TuneSettings(("gna", "moa"), plans=2),
    )  # fmt: skip
    result.save(tmp_path)
    with attn_plugins.patch(model, tmp_path / "recipe.yaml"):
        assert subject.loss(subject.run(rows.test[0]).result, subject.run(rows.test[0]).result) == 0
    assert any(one.tuned for one in result.validation) and result.chosen.loss >= 0
    assert {one.method for one in candidates(subject, methods_for(subject))} == {"gna", "moa", "moba"}


def test_refusals(subject: DiffusionSubject) -> None:
    case: dict[str, Any] = {"calibration": call(), "validation": [call(seed=1)]}
    with pytest.raises(ValueError, match="validation is empty"):
        job.tune(subject, calibration=call(), validation=[])
    with pytest.raises(ValueError, match="methods gnaa: to be tried on this model are agent, draft, gna"):
        job.tune(subject, **case, settings=job.TuneSettings(("gnaa",)))
    with pytest.raises(ValueError, match="plans=0: give 1 or more"):
        job.TuneSettings(plans=0)
    with attn_plugins.patch(subject.obj, "gna"), pytest.raises(ValueError, match="patched already"):
        job.tune(subject, **case)


def test_recipes_of_several_patches(tmp_path: Path) -> None:
    model, inputs = wan(4), tiny_models.MODELS["wan"].inputs(1, 0)
    window = {"window": (1, 2, 2), "stride": 1}
    first = attn_plugins.patch(model, "gna", layers="0-1", **window)
    second = attn_plugins.patch(model, "kv_pool", layers=3, min_tokens=0, factor=2)
    sparse = tiny_models.forward(model, inputs)
    rows = [recipe.row(handle.patches[0]) for handle in (first, second)]
    attn_plugins.unpatch(model)
    path = recipe.write_rows(rows, tmp_path / "two.yaml", {"tokens": [1, 2]})
    handle = attn_plugins.patch(model, path)
    assert handle.method == "gna+kv_pool" and "kv_pool on" in handle.summary()
    assert torch.equal(tiny_models.forward(model, inputs), sparse)
    with pytest.warns(UserWarning, match="measured at grids of 1 to 2 tokens; this one has"):
        tiny_models.forward(model, inputs)
    assert attn_plugins.patch(model, path) is handle
    again = handle.save(tmp_path / "again.yaml")
    assert [row["method"] for row in recipe.read(again).rows] == ["gna", "kv_pool"]
    handle.remove()
    with pytest.raises(ValueError, match="is 2 patches; change it in the file"):
        attn_plugins.patch(model, path, window=3)
    recipe.write_rows([rows[0], rows[0]], path)
    with pytest.raises(ValueError, match="stands in two of its patches"):
        attn_plugins.patch(model, path)
    recipe.write_rows([{**rows[0], "sites": []}, rows[1]], path)
    with pytest.raises(ValueError, match="each of several patches must name its sites"):
        attn_plugins.patch(model, path)
