"""The tuner: its program is the best there is, its recipes are what ran, and it never loses to a preset it ran."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

import attn_plugins  # noqa: E402
from attn_plugins import recipe, record  # noqa: E402
from attn_plugins.pipelines import tune as job  # noqa: E402
from attn_plugins.pipelines.tuner import cases, outcomes, plans, profile, steps  # noqa: E402
from attn_plugins.pipelines.tuner.candidates import Candidate, Single, candidates, methods_for  # noqa: E402
from attn_plugins.pipelines.tuner.diffusion import Call, DiffusionSubject  # noqa: E402
from attn_plugins.pipelines.tuner.language import LanguageSubject  # noqa: E402
from attn_plugins.pipelines.tuner.memory import Memory, mark  # noqa: E402
from attn_plugins.pipelines.tuner.outcomes import Budget  # noqa: E402
from attn_plugins.pipelines.tuner.subject import name_of  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.snapshot import snapshot  # noqa: E402
from tests.support.tiny_models import wan  # noqa: E402
from tests.support.tuned import WINDOWS, call, tiny_subject  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture
def subject() -> DiffusionSubject:
    return tiny_subject()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate takes a tenth of dense attention, and a run with it half the time, each a little less than the
    last: whether a tiny model gains anything is chance."""
    one, numbers = profile._one, itertools.count()
    for kind in (DiffusionSubject, LanguageSubject):

        def run(self: Any, case: Any, run: Any = kind.run) -> Any:
            sparse = any(record.patches_of(target.root) for target in self.targets)
            return dataclasses.replace(run(self, case), seconds=0.5 - next(numbers) / 1000 if sparse else 1.0)

        monkeypatch.setattr(kind, "run", run)
    monkeypatch.setattr(profile, "_one", lambda *arguments: ((found := one(*arguments)[0]), found and 0.1))
    monkeypatch.setattr(profile, "_dense_seconds", lambda subject, probes, tick: [1.0] * len(subject.places))


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
    fastest = max((one for one in result.validation if one.density != 1), key=lambda one: one.speedup)
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
    first = profile.measure(subject, WINDOWS, probes, memory=Memory(tmp_path / "measured.jsonl"))
    assert np.isfinite(first.error).all() and (first.error > 0).any() and (first.dense > 0).all()
    monkeypatch.setattr(profile, "_one", lambda *_: pytest.fail("measured again"))
    again = profile.measure(subject, WINDOWS, probes, memory=Memory(tmp_path / "measured.jsonl"))
    assert np.array_equal(again.error, first.error) and np.array_equal(again.seconds, first.seconds)
    _, others = subject.record(call("a dog", 1), 2)  # another prompt in the same folder is measured anew
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        profile.measure(subject, WINDOWS, others, memory=Memory(tmp_path / "measured.jsonl"))


def test_a_tuning_goes_on_where_it_stopped(
    subject: DiffusionSubject, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time runs dense alone, and says the same to the last digit."""
    given: dict[str, Any] = {
        "calibration": call(), "validation": [call(seed=1)], "test": [call("a dog", 3)], "budget": Budget(lose=1e9),
        "settings": job.TuneSettings(("gna",), probes=1, plans=2, parts=1, all_presets=True), "folder": tmp_path,
    }  # fmt: skip
    first = job.tune(subject, **given)
    assert {one.label for one in first.validation if not one.tuned} <= {one.label for one in first.tested}
    monkeypatch.setattr(outcomes, "_ran", lambda *_: pytest.fail("ran again"))
    monkeypatch.setattr(steps, "_lost", lambda *_: pytest.fail("ran again"))
    runs, run = [], subject.run
    monkeypatch.setattr(subject, "run", lambda case: runs.append(case) or run(case))
    again = job.tune(subject, **given)
    assert len(runs) == 5  # to count the forwards, to record them; to know each case again, for presets and for plans
    for one, other in zip(first.tested, again.tested, strict=True):
        assert (one.label, one.losses, one.seconds, one.dense) == (
            other.label,
            other.losses,
            other.seconds,
            other.dense,
        )
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        job.tune(subject, **{**given, "test": [call("a dog", 4)]})


def test_memory(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    memory = Memory(path)
    assert memory.of("a", lambda: (1.5, math.nan, None)) == memory.of("a", list)
    assert Memory(path).of("a", list)[::2] == [1.5, None] and "a" in Memory(path) and "b" not in Memory(path)
    with path.open("a") as file:
        file.write('["b", [2')  # the machine went off
    again = Memory(path)
    assert "a" in again and "b" not in again and again.of("b", lambda: [3.0]) == [3.0] == Memory(path).of("b", list)
    with pytest.raises(ValueError, match="torch was None and is '2': remove it to measure anew"):
        Memory(path, {"torch": "2"})
    for text in ("[1, 2]", "not JSON", '{"about": {}}\nx\ny\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no file of a tuning: remove it"):
            Memory(path)
    assert mark({"a": 1, "b": (2, 3)}) == mark({"b": [2, 3], "a": 1}) != mark({"a": 1, "b": (2, 4)})


def test_what_cannot_stand_or_would_be_dense_is_told(subject: DiffusionSubject) -> None:
    _, probes = subject.record(call(), 1)
    tried = [WINDOWS[0], Candidate("gna", "all", {"window": -1}), Candidate("gna", "wrong", {"window": (1, 2)})]
    found = profile.measure(subject, tried, probes)
    assert found.taken(0) and not found.taken(1) and not found.taken(2)
    assert found.reasons["all"] == "sees everything at this size" and "axes" in found.reasons["wrong"]
    assert plans.options_of(found, np.ones(steps.GRID), has_steps=True, steps=4)


def test_a_forward_that_cannot_be_run_again_is_refused(
    subject: DiffusionSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "again", lambda probe: probe.dense * 2)
    with pytest.raises(ValueError, match="gives something else when it is run again"):
        job.tune(subject, calibration=call(), validation=[call(seed=1)])
    monkeypatch.undo()
    with pytest.raises(ValueError, match='gave Image, not a tensor: .*output_type="latent"'):
        subject.run(Call({**call().kwargs, "output_type": "pil"}))


def test_a_model_is_called_as_people_call_it(tmp_path: Path) -> None:
    assert name_of(SimpleNamespace(name_or_path="someone/model")) == "someone/model"
    assert name_of(SimpleNamespace(name_or_path=str(tmp_path))) == tmp_path.name
    assert name_of(torch.nn.Identity()) == "Identity"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small_llama", "--prompt", "x", "--steps", "3"], "--prompt, --steps: of pipelines, which small_llama is not"),
        (["moving_digits", "--rows", "5"], "--rows: of language models, which moving_digits is not"),
        (["moving_digits", "--prompts", "none.txt"], "no such file"),
        (["moving_digits", "--faster", "1.5", "--lose", "1"], "two budgets"),
    ],
)
def test_the_command_refuses_before_it_loads(arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from attn_plugins.pipelines.cli import app

    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code and message in " ".join(result.output.split())


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
    assert "&id" not in path.read_text() and "*id" not in path.read_text()
    with pytest.raises(ValueError, match="stands in two of its patches"):
        attn_plugins.patch(model, path)
    recipe.write_rows([{**rows[0], "sites": []}, rows[1]], path)
    with pytest.raises(ValueError, match="each of several patches must name its sites"):
        attn_plugins.patch(model, path)
