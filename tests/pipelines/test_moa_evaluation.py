"""The evaluation: rivals of equal memory, seeds that share no text, numbers that a table can be trusted with."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch

import attn_plugins

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from attn_plugins.methods.moa import SpanPlan
from attn_plugins.pipelines.moa import baselines, evaluation, report
from attn_plugins.pipelines.moa.calibration import Texts
from attn_plugins.pipelines.moa.evaluation import EvaluationSettings, Judged, judge
from attn_plugins.pipelines.moa.options import SearchSettings
from attn_plugins.pipelines.moa.profile import Profile
from attn_plugins.pipelines.moa.running import spans_in_place
from attn_plugins.pipelines.small_llama import small_llama
from attn_plugins.training.small_llama import corpus
from attn_plugins.training.small_llama.tokenizer import tokenize

SETTINGS = SearchSettings(0.5, (512, 1024), 768)
TINY = EvaluationSettings(window=384, windows=2, lengths=(256, 384), depths=(0.25, 1.0), trials=2)
NARROW = SpanPlan(((128,) * 4,) * 4, ((0.0,) * 4,) * 4, "kv", 8, 4)


@pytest.fixture(scope="module")
def shipped():
    return small_llama()


@pytest.fixture(scope="module")
def texts(shipped) -> Texts:
    return Texts([], [], tokenize(shipped[1], corpus.texts("held_out")[:6]))


@pytest.fixture(scope="module")
def rivals() -> dict:
    """Of a profile in which one KV head, the second of the last layer, needs all of the text."""
    maps = {n: torch.full((4, 8, n // 64, n // 64), 1e-4) for n in (512, 1024)}
    for each in maps.values():
        each[3, 2:4] = 1.0
    plan = SpanPlan(((0,) * 4,) * 4, ((0.5,) * 4,) * 4, "kv", 8, 4)
    return baselines.contenders(plan, Profile("", maps, {512: 1, 1024: 1}), SETTINGS)


@pytest.fixture(scope="module")
def judged(shipped, texts, tmp_path_factory) -> list[Judged]:
    folder = tmp_path_factory.mktemp("judged")
    plans = {"dense": lambda n: None, "narrow": lambda n: NARROW}
    return [judge(*shipped, texts, plans, seed, TINY, path=folder / f"{seed}.json") for seed in (0, 1)]


@pytest.mark.parametrize("n", [512, 768, 1024, 4096])
def test_rivals_keep_no_more_than_the_budget(rivals, n):
    assert list(rivals) == ["dense", "searched", "per layer", "uniform", "streaming", "duo"]
    assert rivals["dense"](n) is None
    for name in list(rivals)[1:]:
        plan = rivals[name](n)
        assert plan.matches((4, 8, 4)) and 0.3 < plan.memory(n) <= 0.5 + 1e-9, name


def test_rivals_are_what_their_names_say(rivals):
    n = 1024
    by_layer = rivals["per layer"](n).cache_lengths(n)
    assert bool((by_layer == by_layer[:, :1]).all()) and int(by_layer[3, 0]) == n == int(by_layer.max())
    assert len(rivals["uniform"](n).cache_lengths(n).unique()) == 1
    assert rivals["streaming"](n).sink == 4 and int(rivals["streaming"](n).spans(n)[0, 0]) == n // 2 - 4
    duo = rivals["duo"](n).cache_lengths(n)
    assert int(duo[3, 1]) == n and set(duo.flatten().tolist()) == {384, n}


def test_gates_are_the_influence_of_a_group():
    maps = torch.zeros(2, 4, 8, 8)
    maps[0, 1, 7, 1] = 3.0  # behind a window of 4 blocks
    maps[1, 2, 7, 1], maps[1, 3, 7, 1] = 1.0, 0.5
    maps[1, 0, 7, 6] = 9.0  # within it
    maps[0, 3, 7, 0] = 9.0  # a sink
    gates = baselines.duo_gates(Profile("", {512: maps}, {512: 1}), SETTINGS, (2, 4, 2))
    assert torch.tensor(gates).tolist() == torch.tensor([[1.0, 0.0], [0.0, 0.5]]).tolist()


def test_dense_is_the_models_own_loss_and_a_narrow_plan_is_worse(judged, shipped):
    assert report.ratio(judged, "dense") == (1.0, 1.0, 1.0)
    value, low, high = report.ratio(judged, "narrow")
    assert low < value < high and value > 1.005
    late, early = (report.ratio(judged, "narrow", part)[0] for part in (slice(256, 384), slice(0, 64)))
    assert late > 1.01 and early == pytest.approx(1, abs=1e-4)
    assert report.share(judged, "narrow", 384, 0.25)[0] < report.share(judged, "dense", 384, 0.25)[0]
    assert report.share(judged, "narrow", 384, 1.0)[0] > 0


def test_seeds_share_no_window(texts):
    windows = [tuple(w) for seed in range(3) for w in evaluation._windows(texts.test, TINY, seed)]
    starts = sorted(next(at for at in range(len(texts.test)) if tuple(texts.test[at : at + 384]) == w) for w in windows)
    assert len(starts) == 6 and min(b - a for a, b in zip(starts, starts[1:], strict=False)) >= 384
    with pytest.raises(ValueError, match="6 windows of 384 are needed"):
        evaluation._windows(texts.test[:2000], TINY, 0)


def test_what_was_judged_is_kept_and_not_judged_again(shipped, texts, tmp_path, monkeypatch):
    path, plans = tmp_path / "e.json", {"dense": lambda n: None}
    small = dataclasses.replace(TINY, windows=1, lengths=(256,), depths=(1.0,), trials=1)
    first = judge(*shipped, texts, plans, 0, small, path=path)
    assert Judged.load(path) == first
    monkeypatch.setattr(evaluation, "text_losses", None)
    assert judge(*shipped, texts, plans, 0, small, path=path) == first
    with pytest.raises(ValueError, match="is of seed 0"):
        judge(*shipped, texts, plans, 1, small, path=path)


def test_the_report_holds_every_number(judged, tmp_path):
    written = report.write(judged, tmp_path)
    text = (tmp_path / "evaluation.md").read_text()
    assert "4 windows of text and 8 prompts of each length, 2 seeds" in text
    row = next(line for line in text.splitlines() if line.startswith("| narrow |"))
    assert f"{report.ratio(judged, 'narrow')[0]:.4f} (" in row
    cells = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    hits = [int(cell["value"]) for cell in cells if cell["plan"] == "dense" and cell["what"].startswith("retrieval")]
    assert len(hits) == 2 * 2 * 2 and sum(hits) == sum(
        sum(r.values()) for one in judged for r in one.found["dense"].values()
    )
    kept = {
        cell["length"]: float(cell["value"]) for cell in cells if cell["plan"] == "narrow" and "cache" in cell["what"]
    }
    assert kept == {"256": 0.5, "384": pytest.approx(1 / 3, rel=1e-5)}
    if len(written) == 3:
        from PIL import Image

        assert min(Image.open(written[2]).size) > 300


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634)]
)
def test_wilsons_interval(hits, trials, low, high):
    assert report.wilson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_the_interval_of_a_ratio_is_that_of_the_mean_difference():
    losses = {"dense": [[2.0, 2.0]] * 3, "x": [[2.1, 2.3], [2.0, 2.2], [2.0, 2.0]]}
    one = Judged(0, dataclasses.replace(TINY, window=2, windows=3), losses)
    differences = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    half = 1.96 * differences.std().item() / math.sqrt(3)
    assert report.ratio([one], "x") == pytest.approx((math.exp(0.1), math.exp(0.1 - half), math.exp(0.1 + half)))


def test_settings_without_trials_are_named():
    with pytest.raises(ValueError, match="trials=0"):
        EvaluationSettings(trials=0)


def test_what_is_judged_is_what_the_method_runs(shipped, texts):
    """The evaluation replaces attention on whole sequences; `patch` brings its own caches and code."""
    torch.manual_seed(0)
    alphas, betas = torch.randint(64, 300, (4, 4)).tolist(), (0.5 * torch.rand(4, 4)).tolist()
    plan = SpanPlan(alphas, betas, "kv", 8, 4)
    ids = torch.tensor([texts.test[:640]])
    assert plan.cache_lengths(640).unique().numel() > 2
    with torch.no_grad():
        dense = shipped[0](ids, use_cache=False).logits
        with spans_in_place(shipped[0], plan):
            expected = shipped[0](ids, use_cache=False).logits
        with attn_plugins.patched(shipped[0], "moa", plan=plan):
            found = shipped[0](ids, use_cache=False).logits
    assert float((dense - expected).abs().max()) > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_decoding_counts_what_the_caches_hold(shipped, texts):
    from attn_plugins.pipelines.moa.decoding import decoding

    found = decoding(shipped[0], NARROW, torch.tensor([texts.test[:192]]), tokens=4, rounds=1)
    assert found.length == 196 and min(found.rates.values()) > 0
    assert found.bytes == {"dynamic": 4 * 4 * 196 * 256, "static": 4 * 4 * 196 * 256, "plan": 4 * 4 * 128 * 256}
    with pytest.raises(ValueError, match="tokens=1"):
        decoding(shipped[0], NARROW, torch.tensor([[1]]), tokens=1)
