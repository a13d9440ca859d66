"""The doctor: what it says of a model without weights is what the model with weights does."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from attn_plugins import patch, registry, report
from attn_plugins.method import AttentionCall, Processor
from attn_plugins.metrics.flops import step_flops
from attn_plugins.pipelines import environment
from attn_plugins.pipelines.cli import app
from attn_plugins.pipelines.doctor import diagnose
from attn_plugins.pipelines.doctoring import machine, skeleton
from attn_plugins.pipelines.doctoring.sizes import Asked, sized
from attn_plugins.pipelines.doctoring.skeleton import Skeleton
from attn_plugins.pipelines.stopwatch import Dense
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.sequence import Sequence
from attn_plugins.targets import find
from tests.support import tiny_pipelines
from tests.support.snapshot import snapshot

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NAMES = ("wan", "flux", "ltx_video", "sdxl", "z_image")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a pipeline in memory, its folder), by name, each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            pipe, folder = tiny_pipelines.build(name), tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            for weights in folder.rglob("*.safetensors"):
                weights.unlink()  # what the doctor must not need
            made[name] = pipe, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_a_run(name, saved):
    """The skeleton is on no device, and the tokens that it is told to have are those that the pipeline has."""
    pipe, folder = saved(name)
    call = tiny_pipelines.PIPELINES[name].call
    target = find(skeleton.skeleton(folder).obj)[0]
    assert next(target.root.parameters()).device.type == "meta"
    text = call.get("max_sequence_length")
    found = sized(target, Asked(call.get("height"), call.get("width"), call.get("num_frames"), text=text)).sequence
    with patch(pipe, Dense(), min_tokens=0, layers=lambda site: site.kind != "cross") as handle:
        tiny_pipelines.run(name, pipe, steps=1)
        real = handle.patches[0].state.last_sequence
    assert found.grid == real.grid


def test_findings_are_what_a_patch_says(saved):
    """Bounds and densities: those of the report on the model itself after a run."""
    pipe, folder = saved("wan")
    (found,) = diagnose(skeleton.skeleton(folder), Asked(48, 64, 9), timed=False)
    rows = {row.method: row for row in found.findings}
    assert set(rows) == set(registry.method_names()) and found.sites == {"self": 2, "cross": 2}
    with patch(pipe, "gna", num_steps=found.steps) as handle:
        tiny_pipelines.run("wan", pipe, steps=2)
        (real,) = report.analyse(handle)
    gna = rows["gna"]
    assert gna.applies and gna.sites == 2 and gna.preset is None and rows["radial"].preset == "video"
    assert gna.density == pytest.approx(1 - real.saved) and gna.dense_sites == (("a site of kind 'cross'", 2),)
    assert gna.bound == pytest.approx(real.gain(math.inf)) and found.flop_share == pytest.approx(real.share)
    assert gna.promised == gna.expected == pytest.approx(real.gain(1 / gna.density))
    for name, word in (("moba", "causal"), ("moa", "causal"), ("mip", "IP-Adapter")):
        assert not rows[name].applies and word in rows[name].why


def test_nothing_is_left_on_a_model_in_memory(saved):
    pipe, _ = saved("wan")
    before = snapshot(pipe.transformer)
    (found,) = diagnose(Skeleton(pipe, ("pipe = mine()",), "pipe", pipe=pipe), Asked(48, 64, 9), timed=False)
    assert snapshot(pipe.transformer) == before and found.findings
    with patch(pipe, "gna"), pytest.raises(ValueError, match="unpatch it first"):
        diagnose(Skeleton(pipe, (), "pipe", pipe=pipe), timed=False)


def test_why_not_more(saved):
    """kv_pool asks for 512 tokens on a CPU and for more elsewhere: at 36 it would be dense."""
    _, folder = saved("wan")
    (found,) = diagnose(skeleton.skeleton(folder), Asked(48, 64, 9), methods=["kv_pool"], timed=False)
    (row,) = found.findings
    assert "min_tokens" in row.not_more[0] and row.density == 1 and row.expected == 1
    assert found.best is None and "leave it dense" in found.recommendation and not found.paste
    assert "why not more" in "\n".join(found.lines())


def test_a_large_model_is_worth_it_and_the_line_to_paste_works(saved):
    _, folder = saved("wan")
    asked = Asked(grid=(16, 45, 80))
    (found,) = diagnose(skeleton.skeleton(folder), asked, methods=["gna", "moh"], timed=False)
    assert found.best is not None and found.best.method == "gna", "moh has a router to train"
    assert found.recommendation.startswith("gna (its own settings, no preset): an expected ")
    model = find(skeleton.skeleton(folder).obj)[0].root
    share = step_flops(
        model, [(s.name, s.kind) for s in find(model)[0].family.find_sites(model)], Sequence((16, 45, 80))
    )
    assert found.best.bound == pytest.approx(end_to_end(math.inf, share.share * (1 - found.best.dense_steps)))
    *loads, last = found.paste
    assert "DiffusionPipeline.from_pretrained" in loads[-1] and str(folder) in loads[-1]
    told = {"attn_plugins": __import__("attn_plugins"), "pipe": skeleton.skeleton(folder).obj}
    exec(last, told)
    report_of = diagnose(skeleton.skeleton(folder), asked, methods=["gna", "radial"], timed=False)[0]
    assert report_of.best.method == "radial", "one with a preset before others"


def test_a_unet_has_no_share_from_shapes(saved):
    _, folder = saved("sd15")
    (found,) = diagnose(skeleton.skeleton(folder), Asked(512, 512), methods=["gna"], timed=False)
    assert found.flop_share is None and found.findings[0].expected is None
    assert "attn-plugins compare" in found.recommendation


def test_a_language_model_and_a_vision_transformer(tmp_path):
    import transformers

    from tests.support.tiny_language import tiny

    tiny().save_pretrained(tmp_path / "llm")
    (found,) = diagnose(skeleton.skeleton(tmp_path / "llm"), Asked(tokens=512), timed=False)
    moa = next(row for row in found.findings if row.method == "moa")
    assert moa.applies and moa.preset == "language" and found.tokens.startswith("512")
    assert any("router" in note or "heads" in note for row in found.findings for note in row.notes), "moh warns"
    with pytest.raises(ValueError, match="--tokens"):
        diagnose(skeleton.skeleton(tmp_path / "llm"), Asked(64, 64), timed=False)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path / "vit")
    target = find(skeleton.skeleton(tmp_path / "vit").obj)[0]
    assert sized(target, Asked()).sequence.grid == (4, 4) and sized(target, Asked(64, 48)).sequence.grid == (8, 6)
    assert "ViTForImageClassification.from_pretrained" in skeleton.skeleton(tmp_path / "vit").code[-1]


def test_versions_outside_the_tested_range_are_loud(saved, monkeypatch):
    from attn_plugins.patches import versions

    _, folder = saved("wan")
    assert environment.untested("diffusers") is None
    monkeypatch.setitem(versions.TESTED, "diffusers", ((0, 1), (0, 2)))
    assert "tested with 0.1 to 0.2" in str(environment.untested("diffusers"))
    (found,) = diagnose(skeleton.skeleton(folder), Asked(48, 64, 9), methods=["gna"], timed=False)
    assert next(found.lines()).startswith("WARNING: diffusers")


class Slow(Processor):
    """Claims a quarter of the work and does all of it, four times over."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        for _ in range(4):
            out = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
        return out

    def density(self, sequence: Sequence) -> float:
        return 0.25


def test_an_operator_that_does_not_keep_its_promise_is_seen(monkeypatch):
    monkeypatch.setattr(machine, "BUDGET", 2e8)
    threads = torch.get_num_threads()
    measured, probe = machine.measure("self", Sequence((16, 32, 32)), 32, 64)
    assert torch.get_num_threads() == threads and measured.linear > 0 and measured.attention > 0
    assert math.prod(probe.sequence.grid) < 16 * 32 * 32
    assert 0.02 < probe.efficiency(Slow()) < 0.15, "a sixteenth of what it promises"
    full = Slow()
    full.density = lambda sequence: 1.0
    assert probe.efficiency(full) is None


@pytest.mark.parametrize("grid", [(16, 16, 16), (21, 30, 52), (8192,), (1, 1, 1)])
def test_smaller_grids_are_parts_of_the_grid(grid):
    sequence = Sequence(grid, text_before=100)
    small = machine.smaller(sequence, 64, 1e9)
    assert all(size % part == 0 for size, part in zip(grid, small.grid, strict=True))
    assert 4 * 64 * small.length**2 <= 1e9 and small.text_before <= 100


def test_models_that_are_not_there(tmp_path, monkeypatch):
    for model, word in (
        (str(tmp_path), "model_index.json"),
        (str(tmp_path / "no"), "no such folder"),
        ("x", "owner/name"),
    ):
        with pytest.raises(ValueError, match=word):
            skeleton.skeleton(model)
    with pytest.raises(OSError, match="not in the cache"):
        skeleton.skeleton("nobody/nothing-at-all")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="has no NoSuchPipeline"):
        skeleton.skeleton(tmp_path)


def test_a_hub_name_fetches_configs_alone(saved, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    _, folder = saved("wan")
    asked = []

    def download(name, **given):
        asked.append(given)
        if given.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert skeleton.skeleton("owner/name").pipe is not None
    assert len(asked) == 2 and all(set(row["allow_patterns"]) == {"*.json", "*/*.json"} for row in asked)


@pytest.mark.parametrize(
    ("bad", "word"), [({"height": 0}, "height"), ({"text": -1}, "text"), ({"tokens": -3}, "tokens")]
)
def test_sizes_refuse(bad, word):
    with pytest.raises(ValueError, match=word):
        Asked(**bad)


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command(saved):
    _, folder = saved("wan")
    arguments = ["doctor", str(folder), "--size", "48x64", "--frames", "9", "--no-timed"]
    text = run(*arguments).output
    assert "3 x 3 x 4 = 36 tokens" in text and "recommended:" in text and "does not apply" in text
    (row,) = json.loads(run(*arguments, "--method", "gna", "--json").output)
    assert row["model"] == "WanTransformer3DModel" and row["findings"][0]["method"] == "gna"
    assert "480x832" in run("doctor", str(folder), "--size", "480", code=2).stderr
    assert "gnaa" in run("doctor", str(folder), "--method", "gnaa", code=2).stderr


def test_env_says_what_stands_in_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(environment, "package_version", lambda name: "-" if name == "scipy" else "1.0")
    rows = {row.name: row for row in environment.facts()}
    assert rows["scipy"].value == "-" and "moa-search" in rows["scipy"].note and not rows["peft"].note
    told = json.loads(run("env", "--json").output)
    assert [row["name"] for row in told] == list(rows) and set(told[0]) == {"name", "value", "note"}
    assert set(environment.PACKAGES) <= set(rows)


def test_backends_are_explained(monkeypatch):
    note = {row.name: row.note for row in environment.facts()}["backends"]
    assert "cpu" in note or "triton" in note
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    assert environment._about_backends(["reference", "cpu", "triton"]).startswith("backend=")
