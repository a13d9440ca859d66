"""The profile of a model: what it says of each head, against attention written out, and what it suggests, measured."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import pytest
import torch

from attn_plugins import patch, presets
from attn_plugins.metrics.hops import chebyshev
from attn_plugins.pipelines.comparing.measure_files import can_plot
from attn_plugins.pipelines.profile import check, profile, suggest, work
from attn_plugins.pipelines.profiling import clusters, plots, suggestions
from attn_plugins.pipelines.profiling.importance import _Again
from attn_plugins.pipelines.profiling.sums import LayerSums
from attn_plugins.pipelines.profiling.watching import watched
from attn_plugins.sequence import Sequence
from tests.support import tiny_pipelines
from tests.support.snapshot import snapshot
from tests.support.tiny_language import tiny

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
ALL = 10**6


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.build("wan")


@pytest.fixture(scope="module")
def video(pipe):
    """The profile of the tiny video model, all rows."""
    (found,) = profile(pipe, lambda: tiny_pipelines.run("wan", pipe), rows=ALL, inputs="a cat")
    return found


@pytest.fixture(scope="module")
def language():
    """(model, its profile, the ids)."""
    model, ids = tiny(), torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    (found,) = profile(model, lambda: model(input_ids=ids, use_cache=False), rows=ALL, sinks=4, copies=3)
    return model, found, ids


def attention_of(model, ids):
    """Weights (layers, B, H, N, N) by the model's own eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return torch.stack(model(ids, use_cache=False, output_attentions=True).attentions).double()
    finally:
        model.set_attn_implementation("sdpa")


def test_every_number_of_a_text_against_weights_written_out(language):
    model, found, ids = language
    weights = attention_of(model, ids)
    n = ids.shape[1]
    back = torch.arange(n)[:, None] - torch.arange(n)
    for number, (name, sums) in enumerate(found.layers.items()):
        w = weights[number]
        entropy = torch.special.entr(w).sum(-1).mean((0, 2))
        torch.testing.assert_close(found.entropy(name), entropy, atol=1e-5, rtol=1e-5)
        distance = (w * back.clamp(min=0)).sum(-1).mean((0, 2))
        torch.testing.assert_close(found.distance(name), distance, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.share(name, "first"), w[..., 0].mean((0, 2)), atol=1e-6, rtol=1e-5)
        own = w.diagonal(dim1=-2, dim2=-1).mean((0, 2))
        torch.testing.assert_close(found.share(name, "own"), own, atol=1e-6, rtol=1e-5)
        spans, share = suggestions.spans_of(sums, 0.9)
        for span in (1, 7, 40):
            seen = (back >= 0) & ((back < span) | (torch.arange(n) < 4))
            expected = w.masked_fill(~seen, 0).sum(-1).mean((0, 2))
            torch.testing.assert_close(share[:, span], expected, atol=1e-6, rtol=1e-5)
        for head, span in enumerate(spans):
            mine = share[2 * head : 2 * head + 2]
            assert bool((mine[:, span] >= 0.9 - 1e-9).all()) and (span == 1 or bool((mine[:, span - 1] < 0.9).any()))


def test_grids_against_weights_written_out():
    """One call with text, by definition."""
    from attn_plugins.method import AttentionCall

    grid, text = (2, 3, 4), 5
    q, k, v = (torch.randn(2, 3, 29, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sums = LayerSums("layer", "joint", 0)
    sums.add(AttentionCall(q, k, v, "joint", Sequence(grid, text_before=text)), ALL, 0)
    w = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)[:, :, text:]
    assert sums.rows == 2 * 24
    hops = chebyshev(torch.arange(24), grid)
    for distance in range(4):
        expected = (w[..., text:] * (hops == distance)).sum((0, 2, 3))
        torch.testing.assert_close(sums.hops[:, distance], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.text, w[..., :text].sum((0, 2, 3)), atol=1e-5, rtol=1e-5)
    rows = torch.arange(24) // 12
    for distance in range(2):
        frames = (rows[:, None] - rows).abs() == distance
        expected = (w[..., text:] * frames).sum((0, 2, 3))
        torch.testing.assert_close(sums.axes[0][:, distance], expected, atol=1e-5, rtol=1e-5)
    assert float(sums.windows.sum()) == pytest.approx(float(w[..., text:].sum()), rel=1e-5)
    window, share = suggestions.window_of(sums, 0.6)
    assert 0.6 <= share < 1 and math.prod(window) < 24, "text counts as kept"


def test_the_model_is_as_before(pipe, video, language):
    dense = tiny_pipelines.run("wan", pipe)
    before = snapshot(pipe.transformer)
    with pytest.raises(RuntimeError, match="in mid run"):
        profile(pipe, fail)
    again = profile(pipe, lambda: tiny_pipelines.run("wan", pipe), rows=4, importance=0)
    assert snapshot(pipe.transformer) == before and torch.equal(tiny_pipelines.run("wan", pipe), dense)
    assert again[0].steps == video.steps == 2 and not again[0].change and again[0].importance("blocks.0.attn1") is None
    with watched(pipe, 4, 4):
        assert torch.equal(tiny_pipelines.run("wan", pipe), dense), "watched, it computes what it did"


def fail():
    raise RuntimeError("in mid run")


def test_importance_is_what_switching_a_head_off_does(language):
    """The output projection without the head's columns, one head at a time, and the loss by hand."""
    model, found, ids = language

    def outcome():
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return logits.double(), float(loss)

    plain, loss = outcome()
    for number, (name, sums) in enumerate(found.layers.items()):
        weight = model.model.layers[number].self_attn.o_proj.weight
        for head in range(sums.heads):
            columns = slice(8 * head, 8 * head + 8)
            kept = weight.data[:, columns].clone()
            weight.data[:, columns] = 0
            without, worse = outcome()
            weight.data[:, columns] = kept
            expected = float((without - plain).norm() / plain.norm())
            assert float(found.change[name][head]) == pytest.approx(expected, rel=1e-3)
            assert float(found.loss[name][head]) == pytest.approx(worse - loss, abs=1e-5)
    assert found.importance_of.startswith("loss")


@pytest.mark.parametrize("architecture", ["Gemma2", "GptOss", "Mixtral"])
def test_capped_scores_sinks_and_windows_are_the_models_own(architecture):
    """Watched, the model computes what it did, which plain attention would not."""
    model, ids = tiny(architecture), torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    seen = []
    (found,) = profile(model, lambda: seen.append(model(ids, use_cache=False).logits), rows=4, copies=2)
    torch.testing.assert_close(seen[0], plain, rtol=0, atol=5e-5)
    assert len(found.layers) == 2 and found.loss is not None


def test_padded_texts_and_generation(language):
    model, _, ids = language
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="no padding"):
        profile(model, lambda: model(ids, attention_mask=mask, use_cache=False))
    (found,) = profile(model, lambda: model.generate(ids, max_new_tokens=3, do_sample=False), importance=0)
    assert found.steps == 3 and next(iter(found.layers.values())).grid == (42,)


def test_batches_that_change_the_forward_are_not_trusted(pipe, monkeypatch):
    with watched(pipe, 4, 4) as (watch,), torch.no_grad():
        tiny_pipelines.run("wan", pipe, steps=1)
        assert _Again(watch, 0, 2).copies == 2
        real = watch.root.forward
        monkeypatch.setattr(
            watch.root, "forward", lambda hidden_states, **more: (real(hidden_states, **more)[0] + len(hidden_states),)
        )
        assert _Again(watch, 0, 2).copies == 1


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_joint_text_and_levels(name):
    pipe = tiny_pipelines.build(name)
    (found,) = profile(pipe, lambda: tiny_pipelines.run(name, pipe, steps=1), rows=8, importance=0)
    assert tiny_pipelines.PIPELINES[name].grid in {sums.grid for sums in found.layers.values()}
    text = torch.cat([found.share(layer, "text") for layer in found.layers])
    assert bool((text > 0).all()) == (name == "flux")
    for one in suggest(found, 0.4):  # random weights attend to everything alike
        if one.recall is not None:
            assert one.recall >= 0.4
            measures = check(pipe, lambda: tiny_pipelines.run(name, pipe, steps=1), one, rows=ALL)
            assert {row.layer for row in measures.layer_steps} == set(one.sites)


def test_suggested_windows_keep_what_they_promise(pipe, video):
    one = next(one for one in suggest(video, 0.5) if one.method == "gna")
    assert one.recall >= 0.5 and one.options["base_size"] == tiny_pipelines.PIPELINES["wan"].grid
    measures = check(pipe, lambda: tiny_pipelines.run("wan", pipe), one, rows=ALL)
    found = torch.stack([measures.grid("recall")]).mean()
    assert float(found) == pytest.approx(one.recall, abs=0.02), "the first layers change what the later ones see"
    first = [row.recall for row in measures.layer_steps if row.step == 0 and row.layer == "blocks.0.attn1"]
    assert first and first[0] > 0.45


def test_suggested_spans_keep_what_they_promise(language):
    model, found, ids = language
    one = next(one for one in suggest(found, 0.5) if one.method == "moa")
    measures = check(model, lambda: model(input_ids=ids, use_cache=False), one, rows=ALL)
    assert float(measures.grid("recall").mean()) == pytest.approx(one.recall, abs=0.02)


def test_recipes_and_lines_to_paste_work(pipe, video, language, tmp_path):
    model, found, _ = language
    for obj, one_profile, family, name in ((pipe, video, "wan", "pipe"), (model, found, "llama", "model")):
        for one in suggest(one_profile, 0.5):
            path = one.save(tmp_path, family)
            lines = suggestions.code(one, path, name)
            told = {"attn_plugins": __import__("attn_plugins"), name: obj}
            with pytest.warns(UserWarning) if one.method == "moh" else torch.no_grad():
                exec(lines[0], told)
            assert {layer.name for layer in told["handle"].patches[0].layers} >= set(one.sites or ())
            told["handle"].remove()
            again = patch(obj, path) if one.method != "moh" else None
            if again is not None:
                assert again.method == one.method
                again.remove()


def test_what_is_wide_stays_dense(video):
    layers = {name: dataclasses.replace(sums) for name, sums in video.layers.items()}
    for sums in layers.values():
        sums.windows = torch.ones_like(sums.windows)  # every window alike: 95 % needs nearly all of the grid
    flat = dataclasses.replace(video, layers=layers)
    assert not [one for one in suggest(flat, 0.95) if one.method == "gna"]
    layers["blocks.0.attn1"].windows = torch.zeros_like(video.layers["blocks.0.attn1"].windows)
    layers["blocks.0.attn1"].windows[0, 1, 2] = 1.0
    (one,) = [one for one in suggest(flat, 0.95) if one.method == "gna"]
    assert one.options["window"] == (1, 2, 3) and one.recall == 1
    assert one.dense == ["blocks.1.attn1"] and one.sites == ["blocks.0.attn1"]
    for keep in (0, 1, -0.1):
        with pytest.raises(ValueError, match="keep"):
            suggest(video, keep)


def test_groups_of_heads():
    points = torch.cat([torch.zeros(4, 3), torch.ones(3, 3)]).double() + 0.01 * torch.randn(7, 3).double()
    labels, _ = clusters.k_means(points, 2)
    assert len(set(labels[:4].tolist())) == len(set(labels[4:].tolist())) == 1 and labels[0] != labels[4]
    assert torch.equal(clusters.k_means(points, 2)[0], labels)
    layers = {}
    for name, hops in (("own", [1.0, 0, 0, 0]), ("far", [0, 0, 0, 1.0])):
        sums = LayerSums(name, "self", 0, grid=(4,), heads=1)
        sums.hops, sums.axes = torch.tensor([hops]).double(), [torch.tensor([hops]).double()]
        sums.own, sums.text, sums.first = sums.hops[:, 0], torch.zeros(1).double(), torch.zeros(1).double()
        sums.steps = {0: type("M", (), {"entropy": torch.zeros(1).double(), "rows": 1})()}
        layers[name] = sums
    titles = {one.heads[0][0]: one.title for one in clusters.clusters(layers, 5)}
    assert titles == {"own": "the own token (100%)", "far": "far tokens (100%)"}
    assert clusters.clusters({}, 3) == []


def test_files_and_pictures(video, language, tmp_path):
    for found in (video, language[1]):
        folder = tmp_path / found.model
        written = [*found.save(folder), *plots.write(found, folder, 0.9)]
        assert all(path.stat().st_size > 100 for path in written)
        names = {path.name for path in written}
        pictures = {"heads.png", "distance.png", "groups.png"} | ({"steps.png"} if found is video else set())
        assert names == {"heads.csv", "hops.csv", "steps.csv", "profile.json"} | (pictures if can_plot() else set())
        with (folder / "heads.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(sums.heads for sums in found.layers.values()) and float(rows[0]["entropy"]) > 0
        told = json.loads((folder / "profile.json").read_text())
        assert told["heads"][0]["layer"] == rows[0]["layer"]
        text = "\n".join(found.summary())
        assert all(name in text for name in found.layers) and "heads attend to" in text


def test_refusals(pipe):
    for given in ({"rows": 0}, {"importance": -1}, {"copies": True}, {"groups": 0}, {"sinks": 1.5}):
        with pytest.raises(ValueError, match=next(iter(given))):
            profile(pipe, fail, **given)
    with pytest.raises(ValueError, match="no attention"):
        profile(pipe, lambda: None)
    assert work(pipe, 1, 8) == 3


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from attn_plugins.pipelines.cli import app

    def run(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    tiny_pipelines.build("wan").save_pretrained(tmp_path / "wan")
    call = ["-a", "height=48", "-a", "width=64", "-a", "num_frames=9", "-a", "max_sequence_length=16", "--steps", "2"]
    arguments = ["profile", str(tmp_path / "wan"), *call, "--keep", "0.5", "--check", "--out", str(tmp_path / "out")]
    text = run(*arguments).output
    assert (
        "least window of blocks.0.attn1: " in text
        and "suggests gna" in text
        and "was expected; measured" in text
        and "blocks.1.attn1" in text
    )
    assert (tmp_path / "out" / "gna.yaml").is_file() and (tmp_path / "out" / "heads.csv").is_file()
    assert "no such folder" in run("profile", str(tmp_path / "nothing"), code=2).stderr
    assert "--keep" in run("profile", str(tmp_path / "wan"), "--keep", "1.5", code=2).stderr
    assert presets.load(), "presets are untouched"


def test_pictures_of_your_own(tmp_path):
    import transformers
    from PIL import Image

    from attn_plugins.pipelines.profiling.inputs import Given, inputs_for

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="--images"):
        inputs_for(str(tmp_path / "vit"), Given(), "cpu")
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "red.png")
    found = inputs_for(str(tmp_path / "vit"), Given(images=[tmp_path / "red.png"]), "cpu")
    (one,) = profile(found.obj, found.run, rows=ALL, copies=2)
    sums = next(iter(one.layers.values()))
    assert sums.grid == (4, 4) and found.words == "1 pictures of 32 x 32 px" and one.loss is None
    assert 0 < float(one.share(sums.name, "text").mean()) < 1, "the class token stands before the grid"
