"""What `handle.report` and `handle.plot` say of a patched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins.methods.moa.report import LayerCache, report
from attn_plugins.methods.moa.rule import LayerRule
from tests.support.moa import UNEVEN, generated
from tests.support.tiny_language import prompt, tiny


def test_the_bytes_are_those_of_the_cache() -> None:
    model = tiny()
    handle = attn_plugins.patch(model, "moa", plan=UNEVEN)
    ids, mask = prompt(tokens=100)
    cache = generated(model, ids, mask, 28).past_key_values
    layers, itemsize = handle._cache_layers()
    told = [2 * layer.kept(128) * layer.head_dim * itemsize * 2 for layer in layers]
    unread = 2 * 2 * 8 * 4  # a slot a layer and item, which nobody reads
    assert told == [layer.nbytes - unread for layer in cache.layers]
    text = handle.report(128, batch=2)
    share = sum(told) / (2 * 2 * 2 * 2 * 128 * 8 * 4)
    assert f"({share:.1%} of dense)" in text
    assert f"pairs of a prefill: {UNEVEN.pair_fraction(128):.1%}" in text
    assert len(text.splitlines()) == 2 + 2


def test_layers_that_are_not_patched_or_slide_are_as_they_were() -> None:
    dense = LayerCache("a", None, 4, 2, 8)
    sliding = LayerCache("b", LayerRule((8,), (0,), 2, 1), 4, 2, 8, window=16)
    assert (dense.kept(100), dense.dense(100), dense.pairs(100), dense.spans(100)) == (200, 200, 1.0, (100,) * 4)
    assert (sliding.kept(100), sliding.dense(100), sliding.spans(100)) == (32, 32, (6,) * 4)
    model = tiny("GptOss")
    text = attn_plugins.patch(model, "moa", span=8, sink=2, block=1, layers=[1]).report(64)
    assert "model.layers.0.self_attn  4 " in text and "model.layers.1.self_attn  6 " in text


def test_methods_without_a_cache_and_bad_numbers_are_named() -> None:
    handle = attn_plugins.patch(tiny(), "moba", block=4, k_blocks=2)
    with pytest.raises(ValueError, match="'moba' keeps no cache"):
        handle.report()
    with pytest.raises(ValueError, match="batch=0"):
        report([LayerCache("a", None, 4, 2, 8)], 10, 0, 4)


def test_the_spans_are_drawn(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    model = tiny()
    paths = []
    for name, alpha in (("small", 64), ("large", 512)):
        with attn_plugins.patched(model, "moa", span=alpha, block=1, sink=2) as handle:
            paths.append(handle.plot(tmp_path / f"{name}.png", 1024))
    pictures = [torch.from_numpy(imread(path)) for path in paths]
    assert pictures[0].ndim == 3 and not torch.equal(*pictures)
