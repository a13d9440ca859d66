"""Saving, copying and pickling with a patch in place: files hold the plain model, copies a patch of their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import attn_plugins
from tests.support import tiny_language
from tests.support.beside import SMALL, traces
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def test_a_saved_pipeline_is_plain(tmp_path: Path) -> None:
    pipe = build("flux")
    dense = run("flux", pipe)
    attn_plugins.patch(pipe, "gna", **SMALL)
    sparse = run("flux", pipe)
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*.json") if "attn_plugins" in path.read_text(encoding="utf-8")]
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert not traces(again.transformer)
    torch.testing.assert_close(run("flux", again), dense)
    attn_plugins.patch(again, "gna", **SMALL)
    torch.testing.assert_close(run("flux", again), sparse)


def test_a_saved_language_model_is_plain(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_language.tiny()
    ids, _ = tiny_language.prompt()
    with torch.no_grad():
        dense = model(ids).logits
        tiny_language.patch(model, 3)
        model(ids)
        model.save_pretrained(tmp_path)
        assert "attn_plugins" not in (tmp_path / "config.json").read_text(encoding="utf-8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not traces(again) and torch.equal(again(ids).logits, dense)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_a_patch_of_its_own(way: str) -> None:
    model = tiny_language.tiny()
    ids, _ = tiny_language.prompt()
    with torch.no_grad():
        dense = model(ids).logits
        tiny_language.patch(model, 3)
        sparse = model(ids).logits
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        attn_plugins.unpatch(model)
        assert torch.equal(model(ids).logits, dense) and torch.equal(twin(ids).logits, sparse)
        attn_plugins.unpatch(twin)
        assert torch.equal(twin(ids).logits, dense) and not traces(twin)
