"""Language models: predictions against a plain run of the model, the clock, the caches, and the table by position."""

from __future__ import annotations

import math

import pytest
import torch

import attn_plugins
from attn_plugins.pipelines.compare import compare_language
from attn_plugins.pipelines.comparing import pages, report_files
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.language import Reading, rows_of
from attn_plugins.pipelines.comparing.language_speed import cache_bytes, generate
from attn_plugins.record import patches_of

READING = Reading(window=96, rows=3, prompt=200, tokens=4, rounds=1, start=0)
SETTINGS = {"pattern": "streaming", "window": 28, "block": 16}
ASKED = [Asked("streaming", "moa", SETTINGS), Asked("all", "moa", {"span": 1.0})]
TEXT = torch.randint(1, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def found(model):
    return compare_language(model, ASKED, TEXT, READING)


@torch.no_grad()
def test_predictions_are_those_of_the_model(model, found):
    windows = rows_of(TEXT, READING)
    assert [window[0] for window in windows] == [TEXT[0], TEXT[152], TEXT[304]]
    for row, window in enumerate(windows):
        ids = torch.tensor([[0, *window]])
        dense = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        with attn_plugins.patched(model, "moa", **SETTINGS):
            own = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        targets = ids[0, 1:, None]
        one = found[0]
        torch.testing.assert_close(one.dense[row], -dense.gather(1, targets)[:, 0])
        torch.testing.assert_close(one.patched.losses[row], -own.gather(1, targets)[:, 0])
        torch.testing.assert_close(one.patched.kl[row], (dense.exp() * (dense - own)).sum(-1), atol=1e-12, rtol=1e-6)
        assert torch.equal(one.patched.agree[row], dense.argmax(-1) == own.argmax(-1))
    assert one.patched.kl[:, 40:].mean() > 1e-6 and (one.patched.kl[:, :28] < 1e-12).all(), "the window holds all of it"


def test_the_floor_is_dense_against_itself(found):
    assert found[0].noise.kl.abs().max() == 0 and bool(found[0].noise.agree.all())
    assert torch.equal(found[0].noise.losses, found[0].dense)
    assert found[1].patched.kl.max() < 1e-9, "a span that sees everything is dense"


def test_intervals_are_by_row(found):
    one = found[0]
    gaps = (one.patched.losses - one.dense).mean(1)
    half = 1.96 * gaps.std().item() / math.sqrt(3)
    assert one.ratio.mean == pytest.approx(math.exp(gaps.mean().item()))
    assert one.ratio.high == pytest.approx(math.exp(gaps.mean().item() + half))
    assert one.perplexity.mean == pytest.approx(math.exp(one.patched.losses.mean().item()))
    figures = one.figures()
    assert figures["kl_q50"] <= figures["kl_q90"] <= figures["kl_q99"] <= one.patched.kl.max()
    assert figures["top1_high"] <= 1


def test_speed_and_caches(model, found):
    one, both = found
    dense, own = one.speed.dense, one.speed.patched
    assert 0 < dense.attention[0] < dense.clocked[0] and own.token > 0 and own.prefill > 0
    assert one.speed.prefill_bound == pytest.approx(1 / (1 - dense.attention[0] / dense.clocked[0]))
    kept = 200 + 4 - 1  # the last token is not read any more
    assert dense.cache == 2 * 2 * 2 * kept * 8 * 4, "layers, K and V, KV heads, tokens, width, bytes"
    assert own.cache < dense.cache / 3 and both.speed.dense == dense
    assert not patches_of(model)


def test_generation_is_timed_token_by_token(model):
    written = generate(model, torch.tensor([TEXT[:20]]), 5)
    assert len(written.seconds) == len(written.attention) == 5 and min(written.seconds) > 0
    assert cache_bytes(None) == 0


def test_by_position_and_tables(found):
    one = found[0]
    assert one.stretches() == [(0, 16), (16, 64), (64, 96)]
    head, *lines = one.by_position()
    assert head[0] == "tokens before" and [line[0] for line in lines] == ["0 to 15", "16 to 63", "64 to 95"]
    assert lines[0][3] == "1.0000" and float(lines[2][4]) == pytest.approx(
        float(one.patched.kl[:, 64:].mean()), rel=0.05
    )
    text = str(one)
    assert "3 rows of 96 tokens" in text and "(95 % intervals by row)" in text and "cache" in text


def test_report(found, tmp_path):
    paths = report_files.write("tiny", found, tmp_path)
    assert {"tiny.html", "tiny.csv", "tiny.json", "tiny_streaming_positions.csv"} < {path.name for path in paths}
    page = (tmp_path / "tiny.html").read_text(encoding="utf-8")
    for word in ("Reading 200 tokens", "KL(dense || patched)", "By position", "Amdahl", "of cache for"):
        assert word in page, f"{word!r} is missing from the report"


def test_no_speed_was_asked_for(model):
    (one,) = compare_language(model, ASKED[:1], TEXT, Reading(window=400, rows=5, tokens=0))
    assert one.rows == 1 and one.speed is None and "prefill_seconds" not in one.figures()
    assert "not measured" in one.sentences()[0] and math.isnan(one.ratio.low)
    assert "(" not in pages.page("tiny", [one]).overview.rows[1][1]


@pytest.mark.parametrize(
    "reading, message",
    [
        (Reading(window=401), "the text has 400 tokens, and a window 401"),
        (Reading(window=96, prompt=401, tokens=2), "the prompt 401"),
        (Reading(window=96, prompt=300, tokens=5000), "positions for"),
    ],
)
def test_refusals(model, reading, message):
    with pytest.raises(ValueError, match=message):
        compare_language(model, ASKED, TEXT, reading)
    assert not patches_of(model)


def test_refusals_of_readings_and_patched_models(model):
    for wrong in ({"rows": 0}, {"window": 1}, {"tokens": 1}, {"rounds": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Reading(**wrong)
    with pytest.raises(ValueError, match="one or more methods"):
        compare_language(model, [], TEXT, READING)
    with attn_plugins.patched(model, "moa", span=0.5), pytest.raises(ValueError, match="patched already"):
        compare_language(model, ASKED, TEXT, READING)
