"""What is typed as a method: names, options, recipes, folders of weights; what is refused before a model is loaded."""

from __future__ import annotations

import pytest
import torch
import yaml

import attn_plugins
from attn_plugins import recipe
from attn_plugins.pipelines.compare import compare_pipeline
from attn_plugins.pipelines.comparing.asked import Asked, options, read
from attn_plugins.record import patches_of
from tests.support import tiny_pipelines


def test_options_are_those_of_patch():
    found = options("gna:...", "window=3x4x2,causal=[true, false],small-grid=error,dense_steps=0.5,layers=2")
    assert found == {
        "window": (3, 4, 2), "causal": [True, False], "small_grid": "error", "dense_steps": 0.5, "layers": 2,
    }  # fmt: skip
    assert options("", "") == {}


@pytest.mark.parametrize("pairs", ["window", "=3", "window=3,window=4", "a=[1", "window=3,"])
def test_options_refuse(pairs):
    with pytest.raises(ValueError, match="^gna:x: "):
        options("gna:x", pairs)


def test_labels_and_common_settings():
    one, two = read(["gna", "vmoba:k_blocks=4"], {"quality": "fast", "k_blocks": 2})
    assert (one.label, one.method, one.settings) == ("gna", "gna", {"quality": "fast", "k_blocks": 2})
    assert (two.label, two.settings) == ("vmoba:k_blocks=4", {"quality": "fast", "k_blocks": 4})


@pytest.mark.filterwarnings("ignore:attn_plugins. moh. its routers")
def test_recipes_and_weights(tmp_path):
    pipe = tiny_pipelines.build("wan")
    with attn_plugins.patched(pipe, "gna", window=2, min_tokens=0, dense_steps=0.5) as handle:
        handle.save(tmp_path / "mine.yaml")
    (mine,) = read([str(tmp_path / "mine.yaml")])
    with mine.patched(pipe) as handle:
        assert mine.name(handle) == "mine" and handle.patches[0].state.schedule.dense_steps == 0.5
    with mine.patched(pipe, dense_steps=0) as handle:
        assert handle.patches[0].state.schedule.always_sparse
    with attn_plugins.patched(pipe, "moh", active=0.5) as handle:
        handle.save_weights(tmp_path / "weights")
    (weights,) = read([str(tmp_path / "weights")])
    with weights.patched(pipe, dense_steps=0) as handle:
        assert weights.name(handle) == "weights" and handle.method == "moh"
    assert not patches_of(pipe.transformer)


def test_several_patches_in_one_recipe(tmp_path):
    pipe = tiny_pipelines.build("wan")
    rows = []
    for site, window, steps in (("blocks.0", 2, 0.5), ("blocks.1", -1, 0)):
        with attn_plugins.patched(pipe, "gna", window=window, layers=[int(site[-1])], dense_steps=steps) as handle:
            rows.append({**recipe.row(handle.patches[0]), "min_tokens": 1 + len(rows)})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"patches": rows}))
    call = {"prompt": "a", "height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16}
    asked = read([str(tmp_path / "two.yaml")])
    (found,) = compare_pipeline(pipe, asked, call_kwargs={**call, "num_inference_steps": 2, "output_type": "latent"})
    assert (found.method, found.dense_steps, found.steps) == ("two", 0, 2), "the second is never dense"
    assert found.likeness.drift[-1].relative_l2 > 0 and not patches_of(pipe.transformer)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="unknown method .gnaa"):
        read(["gnaa"])
    with pytest.raises(ValueError, match="asked for twice"):
        read(["gna", "gna"])
    with pytest.raises(ValueError, match="nothing to compare"):
        read([])
    with pytest.raises(FileNotFoundError, match="no recipe"):
        read([str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="no weights of a method"):
        read([str(tmp_path)])
    (tmp_path / "attn_plugins.json").write_text("[]")
    with pytest.raises(ValueError, match="leave window out"):
        read([f"{tmp_path}:window=3"])
    with pytest.raises(ValueError, match="give a method"):
        read([":window=3"])


def test_a_patch_goes_when_the_block_is_left_by_an_error():
    pipe = tiny_pipelines.build("flux")
    asked = Asked("gna", "gna", {"window": 2, "min_tokens": 0})
    with pytest.raises(KeyboardInterrupt), asked.patched(pipe):
        assert patches_of(pipe.transformer)
        raise KeyboardInterrupt
    assert not patches_of(pipe.transformer) and torch.is_tensor(next(pipe.transformer.parameters()))
