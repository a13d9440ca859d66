"""The search from calibration to plan, on the embedded model at lengths that a test can afford."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from attn_plugins.methods.moa import SpanPlan, load_plan
from attn_plugins.methods.moa.plan import shape_of
from attn_plugins.pipelines import moa_search
from attn_plugins.pipelines.moa import profile
from attn_plugins.pipelines.moa.calibration import Texts, own_answer_loss, retrieval_row, tasks_for
from attn_plugins.pipelines.moa.options import Options, SearchSettings
from attn_plugins.pipelines.moa.profile import Profile
from attn_plugins.pipelines.moa.running import spans_in_place
from attn_plugins.pipelines.small_llama import small_llama
from attn_plugins.search import Choice, Rule, choose
from attn_plugins.training.small_llama import corpus
from attn_plugins.training.small_llama.tokenizer import tokenize

TINY = SearchSettings(0.5, (256, 384), 320, rows=1, validation_rows=1, points=2)
SHAPE = (4, 8, 4)


@pytest.fixture(scope="module")
def shipped():
    return small_llama()


@pytest.fixture(scope="module")
def texts(shipped) -> Texts:
    ids = tokenize(shipped[1], corpus.texts("held_out")[:6])
    third = len(ids) // 3
    return Texts(ids[:third], ids[third : 2 * third], ids[2 * third :])


@pytest.fixture(scope="module")
def found(shipped, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moa")
    before = {name: part.clone() for name, part in shipped[0].state_dict().items()}
    steps: list[tuple[str, int]] = []
    result = moa_search.search(*shipped, texts, folder, TINY, name="small", tick=lambda *step: steps.append(step))
    assert all(torch.equal(part, before[name]) for name, part in shipped[0].state_dict().items())
    assert shipped[0].config._attn_implementation == "sdpa"
    expected = moa_search.work(TINY, len(result.plans))
    assert sum(amount for _, amount in steps) == pytest.approx(expected, rel=0.01)
    return result, folder


def test_rows_ask_what_they_have_told(shipped, texts):
    tokenizer = shipped[1]
    tasks = tasks_for(tokenizer, texts.calibration)
    row, again = (retrieval_row(tasks, 1024, "seed") for _ in range(2))
    assert torch.equal(row.ids, again.ids) and row.ids.shape == (1, 1024) and row.answers.shape == (1024,)
    assert 2 <= int(row.answers.sum()) < 200
    starts = (row.answers & ~row.answers.roll(1)).nonzero()[:, 0].tolist()
    for start in starts:
        end = start + int((~row.answers[start:]).int().argmax()) if not bool(row.answers[start:].all()) else 1024
        value = tokenizer.decode(row.ids[0, start:end]).strip().rstrip(".")
        before = tokenizer.decode(row.ids[0, :start])
        assert value and value in before


def test_the_loss_is_of_the_models_own_answers(shipped, texts):
    logits = torch.randn(1, 9, 5)
    answers = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    rows = logits[0, [1, 2, 7]]
    expected = -(rows.log_softmax(-1).amax(-1)).mean()
    torch.testing.assert_close(own_answer_loss(logits, answers), expected)


def test_texts_share_nothing(shipped, tmp_path):
    tokenizer = shipped[1]
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("".join(f"line {number} {line}\n" for line in range(400)))
    texts = Texts.of_files(tokenizer, sorted(tmp_path.iterdir()))
    whole = tokenize(tokenizer, [path.read_text() for path in sorted(tmp_path.iterdir())])
    assert texts.calibration + texts.validation + texts.test == whole
    assert len(texts.calibration) > len(texts.test) > len(texts.validation) > 100


def test_tokenizers_bring_words_or_are_refused():
    class Bare:
        bos_token_id, backend_tokenizer = None, None

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="0 lower-case words"):
        tasks_for(Bare(), [])
    letters = "abcdefghijk"
    words = {f"▁{a}{b}a": 0 for a in letters for b in letters}

    class Pieces(Bare):
        eos_token_id = 5

        def get_vocab(self):
            return words

    tasks = tasks_for(Pieces(), [])
    assert tasks.start == 5 and len(tasks.words) == 121 and tasks.words[0] == "aaa"
    with pytest.raises(ValueError, match="slow tokenizer"):
        tasks_for(object(), [])


def test_the_plan_keeps_to_its_budget_at_every_length(found):
    result, _ = found
    assert TINY.bounded == (256, 320, 384)
    for plan in result.plans:
        assert plan.matches(SHAPE)
        # a length of whole blocks: what the search counted is what the plan keeps
        assert all(plan.density(n) <= 0.5 + 1e-9 for n in TINY.bounded)
    assert result.plan is result.plans[result.best]
    assert result.validated[result.best].mean == min(one.mean for one in result.validated)


def test_what_was_written_can_be_read(found):
    result, folder = found
    written = {path.name for path in result.save(folder)}
    assert {"plan.json", "pareto.csv", "search.json"} <= written
    assert load_plan(folder / "plan.json") == result.plan
    told = json.loads((folder / "search.json").read_text())
    assert SearchSettings(**{**told["settings"], "lengths": tuple(told["settings"]["lengths"])}) == TINY
    assert [row["chosen"] for row in told["plans"]].index(1) == result.best
    assert (folder / "pareto.csv").read_text().count("\n") == len(result.plans) + 1
    if {"pareto.png"} <= written:
        from PIL import Image

        sizes = [Image.open(folder / f"{name}.png").size for name in ("pareto", "spans", "influence")]
        assert min(min(size) for size in sizes) > 300


def test_a_search_goes_on_where_it_stopped(found, shipped, texts, monkeypatch):
    result, folder = found
    probed = []
    real = profile.output_gradients
    monkeypatch.setattr(profile, "output_gradients", lambda *args: (probed.append(1), real(*args))[1])
    tasks = tasks_for(shipped[1], texts.calibration)
    again = profile.profile(shipped[0], tasks, TINY.lengths, 1, folder / "profile.pt")
    assert not probed and all(torch.equal(again.maps(n), result.profile.maps(n)) for n in TINY.lengths)
    more = profile.profile(shipped[0], tasks, (256,), 2, folder / "profile.pt")
    assert len(probed) == 1 and more.counts == {256: 2, 384: 1}
    assert not torch.equal(more.maps(256), result.profile.maps(256))


def test_a_profile_of_something_else_is_refused(found, shipped, texts):
    tasks = tasks_for(shipped[1], texts.calibration)
    for other in ({"seed": 1}, {"influence": "pairs"}, {"block": 32}):
        with pytest.raises(ValueError, match="give another folder"):
            profile.profile(shipped[0], tasks, (256,), 1, found[1] / "profile.pt", **other)
    with pytest.raises(ValueError, match="'windows' and 'pairs'"):
        profile.profile(shipped[0], tasks, (256,), 1, found[1] / "profile.pt", influence="both")


@pytest.mark.parametrize("per", ["layer", "kv", "query"])
def test_options_count_what_a_plan_hides_and_keeps(per):
    """A random choice against sums over the maps by the plan's own spans."""
    torch.manual_seed(1)
    settings = dataclasses.replace(TINY, lengths=(256, 512), density=1.0, validate_at=384)
    profile = Profile("random", {n: torch.rand(2, 6, n // 64, n // 64) for n in (256, 512)}, {256: 1, 512: 2})
    options = Options.of(profile, settings, (2, 6, 3), per)
    items = {"layer": 2, "kv": 6, "query": 12}[per]
    assert options.problem.losses.shape == (2, items, len(options.rules))
    choice = Choice.of(options.problem, np.random.default_rng(0).integers(len(options.rules) // 2, size=items))
    plan = options.plan(choice, "m", seed=3)
    assert plan.per == ("query" if per == "query" else "kv") and plan.provenance == {"seed": 3}
    for place, n in enumerate(settings.bounded):
        assert choice.costs[place] == pytest.approx(plan.density(n), rel=1e-12)
    for place, n in enumerate(settings.lengths):
        spans = plan.spans(n) // 64
        spans = spans.repeat_interleave(6 // spans.shape[1], 1)
        hidden = 0.0
        for layer, head, a, b in np.ndindex(2, 6, n // 64, n // 64):
            if b <= a and b >= 1 and a - b >= spans[layer, head]:
                hidden += float(profile.maps(n)[layer, head, a, b])
        assert hidden > 0 and choice.losses[place] == pytest.approx(hidden, rel=1e-6)


def test_heads_of_more_influence_get_the_memory():
    n = 512
    maps = torch.full((2, 4, 8, 8), 1e-3)
    maps[1, 2] = 1.0
    options = Options.of(
        Profile("", {n: maps}, {n: 1}), dataclasses.replace(TINY, lengths=(n,), validate_at=n), (2, 4, 2)
    )
    chosen = choose(options.problem)
    assert chosen is not None
    kept = options.plan(chosen).cache_lengths(n)
    assert kept[1, 1] == n == kept.max() and kept.sum() < 4 * n * 0.5 + 1


@pytest.mark.parametrize("plan", [None, SpanPlan(((0,) * 4,) * 4, ((1.0,) * 4,) * 4, "kv", 8, 4)])
def test_a_plan_that_hides_nothing_is_dense(shipped, texts, plan):
    ids = torch.tensor([texts.test[:300]])
    with torch.no_grad():
        expected = shipped[0](ids, use_cache=False).logits
        with spans_in_place(shipped[0], plan):
            found = shipped[0](ids, use_cache=False).logits
        assert torch.equal(shipped[0](ids, use_cache=False).logits, expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_plan_in_place_hides_what_it_says(shipped, texts):
    """Tokens that no layer of a short plan can carry to the end change nothing there; those within reach do."""
    plan = SpanPlan(((128,) * 4,) * 4, ((0.0,) * 4,) * 4, "kv", 8, 4)
    ids = torch.tensor([texts.test[:640]])
    far, near = ids.clone(), ids.clone()
    far[0, 80:100] = 7  # behind the sinks; four layers of 64 tokens reach back 256
    near[0, 620:630] = 7
    with torch.no_grad(), spans_in_place(shipped[0], plan):
        last, other, changed = (shipped[0](x, use_cache=False).logits[0, -1] for x in (ids, far, near))
    torch.testing.assert_close(other, last, rtol=1e-4, atol=1e-4)
    assert float((changed - last).abs().max()) > 0.1


def test_a_plan_of_another_shape_names_both(shipped):
    with (
        pytest.raises(ValueError, match="3 layers.*4 layers"),
        spans_in_place(shipped[0], SpanPlan(((0,) * 4,) * 3, ((1.0,) * 4,) * 3, "kv", 8, 4)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"lengths": (100,)}, "at least two blocks"),
        ({"lengths": (200,)}, "whole blocks"),
        ({"sink": 10}, "whole blocks"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**options)


def test_an_unseen_length_lies_between_the_longest():
    assert SearchSettings().unseen == 3072 and SearchSettings(lengths=(4096,)).unseen == 3072
    assert SearchSettings(reach=8192).bounded == (1024, 2048, 3072, 4096, 8192)


def test_a_budget_that_no_plan_meets_is_named(found):
    with pytest.raises(ValueError, match=r"budget 0 is 0\.1"):
        Options.of(found[0].profile, dataclasses.replace(TINY, density=0.1), SHAPE, rules=[Rule(128, 0.0)])


def test_texts_that_are_too_short_are_named(shipped, texts, tmp_path):
    with pytest.raises(ValueError, match="validation text of 10 tokens: rows have 384"):
        moa_search.search(*shipped, dataclasses.replace(texts, validation=texts.validation[:10]), tmp_path, TINY)


def test_the_shape_of_the_embedded_model(shipped):
    assert shape_of(shipped[0].config) == SHAPE
