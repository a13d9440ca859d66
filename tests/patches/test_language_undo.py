"""A patched language model taken back, copied, pickled and shared: exact, and each on its own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from tests.support.tiny_language import patch, prompt, tiny


def test_two_methods_on_different_layers_and_either_undone_first() -> None:
    model = tiny()
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids).logits
        first = patch(model, 3, layers=[0])
        alone = model(ids).logits
        second = patch(model, 4, layers=[1])
        both = model(ids).logits
        first.remove()
        assert model.config._attn_implementation == "attn_plugins"
        assert not torch.equal(model(ids).logits, dense)
        second.remove()
        assert torch.equal(model(ids).logits, dense)
        assert model.config._attn_implementation == "sdpa"
    assert not torch.equal(alone, both)


def test_an_implementation_chosen_later_is_kept_for_the_undo() -> None:
    model = tiny()
    ids, _ = prompt()
    with torch.no_grad():
        patch(model)
        sparse = model(ids).logits
        model.set_attn_implementation("eager")
        assert torch.equal(model(ids).logits, sparse)
        attn_plugins.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_copies_and_pickles_are_patched_on_their_own(tmp_path: Any) -> None:
    model = tiny()
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids).logits
        patch(model)
        sparse = model(ids).logits
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(ids).logits, sparse)
            attn_plugins.unpatch(twin)
            assert torch.equal(twin(ids).logits, dense)
            assert torch.equal(model(ids).logits, sparse)
        model.save_pretrained(tmp_path)
        assert "attn_plugins" not in (tmp_path / "config.json").read_text()
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, dense)


def test_a_model_made_from_a_patched_models_config_is_dense() -> None:
    model = tiny()
    ids, _ = prompt()
    with torch.no_grad():
        dense = model(ids).logits
        patch(model)
        twin = type(model)(model.config).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(ids).logits, dense)
        attn_plugins.unpatch(model)
        assert torch.equal(twin(ids).logits, dense)
