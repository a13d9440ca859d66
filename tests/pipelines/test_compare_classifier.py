"""Image classifiers against a plain run of the model, and the pictures that they are given."""

from __future__ import annotations

import pytest
import torch

import attn_plugins
from attn_plugins.metrics import kl_divergence
from attn_plugins.pipelines.compare import compare_classifier
from attn_plugins.pipelines.comparing import inputs, report_files
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.stopwatch import Stopwatch, attach
from attn_plugins.record import patches_of

SETTINGS = {"window": 2, "min_tokens": 0}
ASKED = [Asked("gna", "gna", SETTINGS), Asked("all", "gna", {"window": -1, "min_tokens": 0})]


@pytest.fixture(scope="module")
def model():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)).eval()


@pytest.fixture(scope="module")
def batches():
    pytest.importorskip("sklearn")
    return inputs.pictures({"image_mean": [0.4] * 3}, type("Config", (), {"image_size": 32}), None, 5, 2)[0]


def test_figures_are_those_of_the_model(model, batches, tmp_path):
    first, all_of_it = compare_classifier(model, ASKED, batches)
    with torch.no_grad():
        dense = torch.cat([model(batch).logits for batch in batches])
        with attn_plugins.patched(model, "gna", **SETTINGS):
            own = torch.cat([model(batch).logits for batch in batches])
    torch.testing.assert_close(first.kl, kl_divergence(dense, own), atol=1e-12, rtol=1e-4)
    assert first.kl.mean() > 0 and torch.equal(first.agree, dense.argmax(-1) == own.argmax(-1))
    assert all_of_it.kl.max() < 1e-10 and first.noise_kl.max() == 0
    assert 0 < first.dense.attention < first.dense.timed_step and first.batch == 2
    assert first.batch_bound == pytest.approx(1 / (1 - first.dense.share))
    assert not patches_of(model)
    report_files.write("tiny", [first, all_of_it], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.html", "tiny.csv", "tiny.json"}
    assert "A batch of 2 takes" in (tmp_path / "tiny.html").read_text() and "5 pictures" in str(first)


@pytest.mark.filterwarnings("ignore:attn_plugins. moh. its routers")
def test_methods_that_read_the_layers_input_are_timed_as_they_are(model, batches):
    with attn_plugins.patched(model, "moh", active=1) as handle, torch.no_grad():
        expected = model(batches[0]).logits
        watch = Stopwatch()
        attach(watch, handle)
        assert torch.equal(model(batches[0]).logits, expected), (
            "a clock changes nothing, and nothing falls back to dense"
        )
        assert watch.calls == 2 and watch.lap() > 0 and watch.calls == 0


@pytest.mark.filterwarnings("ignore:attn_plugins. dense attention used")
def test_what_stays_dense_is_said(model, batches):
    (found,) = compare_classifier(model, [Asked("gna", "gna", {"window": 2, "min_tokens": 10**6})], batches)
    assert found.kl.max() == 0 and found.dense.attention == 0
    assert found.sentences()[2].startswith("No call of this run was patched")


def test_refusals(model, batches):
    with pytest.raises(ValueError, match="and pictures"):
        compare_classifier(model, ASKED, [])
    with attn_plugins.patched(model, "gna", **SETTINGS), pytest.raises(ValueError, match="patched already"):
        compare_classifier(model, ASKED, batches)


def test_photographs_are_the_same_every_time(batches):
    again, note = inputs.pictures({"image_mean": [0.4] * 3}, type("Config", (), {"image_size": 32}), None, 5, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches[0].shape[1:] == (3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(again, batches, strict=True)) and "photographs" in note
    assert batches[0].min() >= -0.8 - 1e-6 and batches[0].max() <= 1.2 + 1e-6, "less 0.4, over 0.5"


def test_pictures_of_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "inside").mkdir()
    image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "inside" / "red.png")
    image.new("L", (9, 30), 0).save(tmp_path / "black.JPG".lower())
    (found,), note = inputs.pictures({}, type("Config", (), {"image_size": (8, 12)}), tmp_path, 9, 4)
    assert found.shape == (2, 3, 8, 12) and note == f"pictures: 2 of {tmp_path.name}"
    assert torch.allclose(found[0], torch.full_like(found[0], -1), atol=0.02) and found[1, 0].min() == 1
    with pytest.raises(ValueError, match="no pictures there"):
        inputs.pictures({}, object(), tmp_path / "none", 4, 4)
