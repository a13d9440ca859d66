"""Every vision transformer of the registry, against the unpatched one under the same window as a matrix."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from attn_plugins import registry
from tests.support.snapshot import snapshot
from tests.support.tiny_vision import MODELS, build, features, grid, inputs, item, masked, visible

ALL = pytest.mark.parametrize("name", MODELS)
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}  # float32 through two layers, features of size 1 to 30


def patch(model: object, window: int = 2) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "gna", window=window, stride=1)


def test_every_row_has_a_tiny_model() -> None:
    rows = {row.name for row in registry.families() if row.library == "transformers" and row.sites[0][1] == "self"}
    assert rows == {registry.family_of(build(name)).name for name in MODELS}


@ALL
@pytest.mark.parametrize("size", [0, 1])
def test_a_window_is_what_brute_force_says(name: str, size: int) -> None:
    model, given = build(name), inputs(name, 2, size)
    dense = features(name, model, given)
    with masked(model, visible(name, size, 2)):
        expected = features(name, model, given)
    assert (expected - dense).abs().max() > 0.05
    handle = patch(model)
    assert len(handle.patches[0].layers) == 2
    torch.testing.assert_close(features(name, model, given), expected, **TOLERANCE)
    sequence = handle.patches[0].state.last_sequence
    assert sequence.grid == grid(name, size) and sequence.text_before == MODELS[name].before
    assert "2 of 2 sites" in handle.summary()


@ALL
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_exact_undo(name: str, implementation: str | None) -> None:
    patch(build(name))  # what is registered once stays (patching.GLOBALS)
    model, given = build(name), inputs(name, 2)
    if implementation:
        model.set_attn_implementation(implementation)
    dense = features(name, model, given)
    before, config, hidden = snapshot(model), model.config.to_dict(), dict(vars(model.config))
    patch(model)
    assert not torch.equal(features(name, model, given), dense)
    assert model.config.to_dict() == config
    attn_plugins.unpatch(model)
    assert snapshot(model) == before
    assert vars(model.config) == hidden
    assert torch.equal(features(name, model, given), dense)


@ALL
def test_a_window_over_everything_is_dense_attention(name: str) -> None:
    model, given = build(name), inputs(name, 2)
    dense = features(name, model, given)
    patch(model, -1)
    torch.testing.assert_close(features(name, model, given), dense, **TOLERANCE)


@ALL
def test_a_batch_gives_what_its_items_give(name: str) -> None:
    model, given = build(name), inputs(name, 2)
    patch(model)
    batch = features(name, model, given)
    for index, part in enumerate(batch.chunk(2)):
        torch.testing.assert_close(part, features(name, model, item(given, index)), **TOLERANCE)


@ALL
def test_a_copy_is_patched_on_its_own(name: str) -> None:
    model, given = build(name), inputs(name, 1)
    dense = features(name, model, given)
    patch(model)
    sparse = features(name, model, given)
    twin = copy.deepcopy(model)
    attn_plugins.unpatch(model)
    assert torch.equal(features(name, twin, given), sparse)
    assert torch.equal(features(name, model, given), dense)
    attn_plugins.unpatch(twin)
    assert torch.equal(features(name, twin, given), dense)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """No further from the float32 result than twice PyTorch's own masked attention is, in that precision."""
    model, given = build(name), inputs(name, 1)
    mask = visible(name, 0, 2)
    with masked(model, mask):
        exact = features(name, model, given)
    model.to(dtype)
    given = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in given.items()
    }
    with masked(model, mask):
        theirs = features(name, model, given)
    patch(model)
    ours = features(name, model, given)
    assert ours.dtype == theirs.dtype
    error, allowed = ((found.float() - exact).pow(2).mean().sqrt() for found in (ours, theirs))
    assert error <= 2 * allowed
