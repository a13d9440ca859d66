"""Several methods, prompts and seeds on one pipeline; pipelines without a callback; the report and its files."""

from __future__ import annotations

import csv
import html.parser
import json
import re

import pytest
import torch

from attn_plugins.metrics import drift
from attn_plugins.pipelines.compare import as_frames, compare_pipeline
from attn_plugins.pipelines.comparing import pages, report_files
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.overview import records
from attn_plugins.pipelines.comparing.page import Page, Table
from attn_plugins.record import patches_of
from tests.support import tiny_pipelines

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
STEPS = 2
CALL = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": STEPS}
NASTY = "<script>alert('a & b')</script>"
PROMPTS = {"a cat": {"prompt": "a cat"}, NASTY: {"prompt": NASTY}}
SETTINGS = {"window": 2, "min_tokens": 0, "dense_steps": 0}
ASKED = [Asked("gna:window=2", "gna", SETTINGS), Asked("half dense", "gna", {**SETTINGS, "dense_steps": 1})]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.build("flux")


@pytest.fixture(scope="module")
def found(pipe):
    return compare_pipeline(pipe, ASKED, call_kwargs=CALL, prompts=PROMPTS, seeds=(0, 3), measure_rows=8, keep=3)


def run(pipe, prompt, seed):
    generator = torch.Generator().manual_seed(seed)
    return pipe(**CALL, prompt=prompt, generator=generator, output_type="latent").images


def test_cases_are_prompts_by_seeds(pipe, found):
    first, second = found
    assert [one.method for one in found] == ["gna:window=2", "half dense"]
    assert first.cases == ("a cat, seed 0", "a cat, seed 3", f"{NASTY}, seed 0", f"{NASTY}, seed 3")
    assert (first.dense_steps, second.dense_steps) == (0, 1)
    for number, (prompt, seed) in enumerate((p, s) for p in PROMPTS for s in (0, 3)):
        dense = run(pipe, prompt, seed)
        with ASKED[0].patched(pipe):
            expected = drift(run(pipe, prompt, seed), dense).relative_l2
        assert first.likeness.cases[number].drift == pytest.approx(expected)
    mean = sum(case.drift for case in first.likeness.cases) / 4
    assert first.likeness.drift[-1].relative_l2 == pytest.approx(mean)
    assert second.likeness.cases[0].drift != first.likeness.cases[0].drift


def test_methods_stand_against_the_same_dense_runs(found):
    first, second = found
    assert first.dense == second.dense and first.noise == second.noise
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.frames, second.frames, strict=True))


def test_pictures_are_kept_of_the_first_cases(found):
    assert len(found[0].frames) == len(found[0].again) == 3 < len(found[0].likeness.cases)
    dense, patched = found[0].frames[0]
    assert torch.equal(dense, found[0].again[0]) and not torch.equal(dense, patched)


def test_figures_have_intervals_over_the_cases(found):
    rows = pages.rows_of(found)
    assert list(rows) == ["dense", "gna:window=2", "half dense"]
    own = rows["gna:window=2"]
    assert own["drift_low"] < own["drift"] < own["drift_high"] and rows["dense"]["drift"] == 0
    assert own["step_bound"] == found[0].step_bound and 0 < own["recall"] < 1
    assert {row["method"] for row in records(rows)} == set(rows)


def test_the_pipeline_is_left_as_it_was(pipe, found):
    assert not patches_of(pipe.transformer)


class Reader(html.parser.HTMLParser):
    """What of a page matters here: its tags in balance, its text, where it points to."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_files(found, tmp_path):
    pytest.importorskip("matplotlib")
    paths = report_files.write("tiny", found, tmp_path / "new", ["a note"])
    names = {path.name for path in paths}
    assert names == {path.name for path in (tmp_path / "new").iterdir()}
    own = {f"tiny_{one}{end}" for one in ("gna_window_2", "half_dense") for end in (".png", "_steps.csv", "_steps.png")}
    own |= {"tiny_gna_window_2_layers.csv", "tiny_half_dense_layers.csv"}
    assert names == {"tiny.html", "tiny.csv", "tiny.json"} | own
    page = read((tmp_path / "new" / "tiny.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert NASTY in text and "script" not in page.tags, "what a person gives is text"
    assert page.links and all(link.startswith("data:image/") for link in page.links), "nothing comes from elsewhere"
    assert "@import" not in text and "url(" not in text
    for word in ("speed", "cost", "bound", "faster than", "noise floor", "95 %", "|half dense - dense| x 4", "a note"):
        assert word in text, f"{word!r} is missing from the report"
    # two methods: dense, both, dense again, three differences, of three cases; the latents; one plot each
    assert len(page.links) == 3 * 7 + 1 + 2
    with (tmp_path / "new" / "tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", "gna:window=2", "half dense"]
    assert float(rows[1]["drift"]) == pytest.approx(found[0].likeness.drift[-1].relative_l2, rel=1e-4)
    told = json.loads((tmp_path / "new" / "tiny.json").read_text())
    assert told["methods"][1]["dense_steps"] == 1 and told["methods"][1]["steps"][0]["bit_identical"]
    assert told["methods"][0]["cases"][2]["case"].startswith(NASTY) and told["dense"]["psnr"] is None


def test_what_is_cut_short_leaves_nothing(found, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_files.pages, "page", lambda *arguments: Page("", [], [], Table([("",)])))
    monkeypatch.setattr(report_files.measure_files, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report_files.write("tiny", found, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        compare_pipeline(pipe, ASKED, call_kwargs={**CALL, "prompt": "a"}, to_frames=interrupt)
    assert not patches_of(pipe.transformer) and pipe._progress_bar_config == {"disable": True}


def test_without_a_callback_the_scheduler_tells_the_steps():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16).eval()
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [1], "num_inference_steps": 2, "guidance_scale": 1.0}
    asked = [Asked("gna", "gna", SETTINGS)]
    (found,) = compare_pipeline(pipe, asked, call_kwargs=call)
    assert found.steps == 2 and found.likeness.drift[0].relative_l2 > 0 and all(found.noise.identical)
    assert found.frames[0][0].shape == (1, 1, 3, 8, 8), "its pictures come as NumPy arrays"
    assert "step" not in vars(pipe.scheduler), "the scheduler is as it was"
    latents = []
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: (out := original(*a, **k), latents.append(out[0].clone()))[0]
    pipe(**call, generator=torch.Generator().manual_seed(0))
    dense = latents[:]
    with asked[0].patched(pipe):
        pipe(**call, generator=torch.Generator().manual_seed(0))
    expected = [drift(a, b).relative_l2 for a, b in zip(latents[2:], dense, strict=True)]
    assert [row.relative_l2 for row in found.likeness.drift] == pytest.approx(expected)


def test_frames_of_arrays_and_pictures():
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    expected = pixels.movedim(-1, 1)[:, None].float() / 255
    assert torch.equal(as_frames([image.fromarray(one.numpy()) for one in pixels]), expected)
    assert torch.equal(as_frames(pixels.float().div(255).numpy()), expected)
    assert as_frames(pixels[None].float().div(255).numpy()).shape == (1, 2, 3, 4, 5)


def test_refusals(pipe):
    with pytest.raises(ValueError, match="give one or more methods"):
        compare_pipeline(pipe, [], call_kwargs=CALL)
    with pytest.raises(ValueError, match="prompts is empty"):
        compare_pipeline(pipe, ASKED, call_kwargs=CALL, prompts={})
    with pytest.raises(ValueError, match="hight, which FluxPipeline"):
        compare_pipeline(pipe, ASKED, prompts={"a": {"prompt": "a", "hight": 3}})


def test_names_of_files_are_plain_and_differ():
    taken: set[str] = set()
    names = [report_files.slug(text, taken) for text in ("a/b: c=1", "a b c 1", "../../x", "é" * 300)]
    assert names[:3] == ["a_b_c_1", "a_b_c_1_2", "x"] and all(re.fullmatch(r"[\w.]*", name) for name in names)
