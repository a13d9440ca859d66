"""The one line: what it takes, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins import patching, presets
from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from attn_plugins.patches.family import Site
from tests.support.snapshot import snapshot
from tests.support.tiny_models import MODELS, forward, sd3, wan
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
INPUTS = MODELS["wan"].inputs


class _Zero(Processor):
    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return torch.zeros_like(call.q)


_ZERO = _Zero()


class CrossZero(Method):
    """A method for cross-attention, so that two methods meet on one model."""

    name = "cross-zero"
    title = "no text"
    kind = "operator"
    paper = "none"
    config_class = MethodConfig
    sites = frozenset({"cross"})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "cross"
    ) -> Processor:
        return _ZERO


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def names(handle: attn_plugins.PatchHandle) -> list[str]:
    return [layer.name for patched in handle.patches for layer in patched.layers]


# What it takes.


def test_a_context_manager_takes_it_back() -> None:
    model, inputs = wan(), INPUTS(1, 0)
    dense = forward(model, inputs)
    with unchanged(model):
        with attn_plugins.patched(model, Windowed()) as handle:
            assert handle.active and not torch.equal(forward(model, inputs), dense)
        assert not handle.active
        with attn_plugins.patch(model, Windowed()):
            assert not torch.equal(forward(model, inputs), dense)
        with pytest.raises(RuntimeError, match="inside"), attn_plugins.patched(model, Windowed()):
            raise RuntimeError("inside")
    assert torch.equal(forward(model, inputs), dense)


def test_a_context_manager_leaves_a_patch_that_was_there() -> None:
    model = wan()
    handle = attn_plugins.patch(model, Windowed())
    with attn_plugins.patched(model, Windowed()) as same:
        assert same is handle
    assert handle.active
    other = wan()
    with unchanged(other), attn_plugins.patched([model, other], Windowed()) as both:
        assert both.roots == [model, other]
    assert handle.active


def test_methods_stack_on_different_sites_and_go_in_any_order() -> None:
    model, inputs = wan(), INPUTS(1, 0)
    dense = forward(model, inputs)
    with unchanged(model):
        one = attn_plugins.patch(model, Windowed())
        only_one = forward(model, inputs)
        two = attn_plugins.patch(model, CrossZero())
        both = forward(model, inputs)
        one.remove()
        only_two = forward(model, inputs)
        assert len({t.sum().item() for t in (dense, only_one, only_two, both)}) == 4
        two.remove()
        assert torch.equal(forward(model, inputs), dense)
        attn_plugins.patch(model, Windowed())
        attn_plugins.patch(model, CrossZero())
        attn_plugins.unpatch(model, "cross-zero")
        assert torch.equal(forward(model, inputs), only_one)
        attn_plugins.unpatch(model)


def test_the_same_method_with_two_settings_on_different_layers() -> None:
    model = wan(4)
    attn_plugins.patch(model, Windowed(), layers="0-1")
    attn_plugins.patch(model, Windowed(), layers="2-3", size=3)
    assert len(model.__dict__["_attn_plugins_patches"]) == 2


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (1, [1]),
        (-1, [3]),
        ([0, -1], [0, 3]),
        (range(2), [0, 1]),
        ("1-2", [1, 2]),
        ("0, 2-3", [0, 2, 3]),
        (r"blocks\.[13]\.", [1, 3]),
        (lambda site: site.index == 2, [2]),
    ],
)
def test_layers(layers: Any, expected: list[int]) -> None:
    handle = attn_plugins.patch(wan(4), Windowed(), layers=layers)
    assert names(handle) == [f"blocks.{i}.attn1" for i in expected]


def test_a_method_may_leave_layers_dense() -> None:
    handle = attn_plugins.patch(wan(4), Windowed(), first_dense=3)
    assert names(handle) == ["blocks.3.attn1"]
    assert "blocks.0.attn1: dense, the method leaves this layer dense" in handle.explain()


def test_a_list_and_what_is_in_it_twice() -> None:
    one, two = wan(), wan()
    handle = attn_plugins.patch([one, two, one], Windowed())
    assert handle.roots == [one, two]
    attn_plugins.unpatch([one, two])
    assert not handle.active


def test_wrapped_models_are_unwrapped() -> None:
    peft = pytest.importorskip("peft")
    model = wan()
    compiled = torch.compile(model, backend="eager")
    assert attn_plugins.patch(compiled, Windowed()).roots == [model]
    attn_plugins.unpatch(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert attn_plugins.patch(lora, Windowed()).roots == [model]
    attn_plugins.unpatch(lora)


def test_a_joint_model_with_image_only_layers_patches_both() -> None:
    handle = attn_plugins.patch(sd3(), Windowed())
    kinds = {layer.name: layer.kind for layer in handle.patches[0].layers}
    assert kinds == {
        "transformer_blocks.0.attn": "joint",
        "transformer_blocks.0.attn2": "self",
        "transformer_blocks.1.attn": "joint",
    }


def test_a_patch_does_not_keep_the_model_alive() -> None:
    """Without the cycle collector: a person who deletes a pipeline wants its memory now."""
    model = wan()
    model.enable_gradient_checkpointing()
    forward(model, INPUTS(1, 0))
    handle = attn_plugins.patch(model, Windowed())
    forward(model, INPUTS(1, 0))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert handle.roots == [] and not handle.active
    handle.remove()


def test_presets_options_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(method: str, family: str, model: object, quality: str = "balanced", preset: str | None = None) -> Any:
        return presets.Preset(
            "made", "Made", method, quality, {"size": 3, "first_dense": 1}, 0.25, "derived", "here", layers=(1, 2, 3)
        )

    monkeypatch.setattr(presets, "resolve", resolve)
    model = wan(4)
    plan = attn_plugins.patch(model, Windowed(), num_steps=8).patches[0]
    assert plan.config == Windowed.config_class(size=3, first_dense=1)
    assert (plan.state.schedule.dense_steps, plan.preset) == (0.25, "made")
    assert [layer.index for layer in plan.layers] == [1, 2, 3]
    attn_plugins.unpatch(model)
    plan = attn_plugins.patch(model, Windowed(), first_dense=0, dense_steps=0, layers=0).patches[0]
    assert plan.config == Windowed.config_class(size=3, first_dense=0)
    assert plan.state.schedule.always_sparse and [layer.index for layer in plan.layers] == [0]
    attn_plugins.unpatch(model)
    plan = attn_plugins.patch(model, Windowed(), size=2).patches[0]  # a setting of one's own: no preset
    assert plan.preset is None and plan.state.schedule.always_sparse and len(plan.layers) == 4


def test_recipes_come_back_as_they_were(tmp_path: Path) -> None:
    model, inputs = wan(4), INPUTS(1, 0)
    handle = attn_plugins.patch(
        model, "gna", window=(1, 2, 2), stride=(1, 1, 2), layers="1-2", dense_steps=0.5, num_steps=4, min_tokens=8
    )
    path = handle.save(tmp_path / "recipe.yaml")
    forward(model, inputs)
    sparse = forward(model, inputs)
    first = handle.patches[0]
    handle.remove()
    again = attn_plugins.patch(model, str(path))
    assert again.patches[0].same_as(first)
    forward(model, inputs)
    assert torch.equal(forward(model, inputs), sparse)
    again.remove()
    assert attn_plugins.patch(model, path, window=(1, 1, 1), stride=1).patches[0].config != first.config


def test_summary_and_explain_say_what_is_patched() -> None:
    model = wan()
    assert attn_plugins.summary(model) == "WanTransformer3DModel is not patched"
    handle = attn_plugins.patch(model, "gna", window=2, stride=1, layers=0)
    for text in (attn_plugins.summary(model), handle.summary()):
        assert "gna" in text and "1" in text
    forward(model, INPUTS(1, 0))
    assert "gna" in handle.summary()
    explained = handle.explain()
    assert "blocks.0.attn1: self, gna" in explained
    assert "blocks.1.attn1: dense, not among layers" in explained
    assert "blocks.0.attn2: dense, a site of kind 'cross'" in explained


# What it refuses.


def test_another_setting_on_a_taken_site() -> None:
    model = wan()
    attn_plugins.patch(model, Windowed())
    with unchanged(model), pytest.raises(ValueError, match=r"'blocks.0.attn1' .* held by method 'windowed'.*unpatch"):
        attn_plugins.patch(model, Windowed(), size=3)
    with unchanged(model), pytest.raises(ValueError, match=r"held by method 'windowed'.*unpatch\(obj, 'windowed'\)"):
        attn_plugins.patch(model, "gna", window=2, stride=1)


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_plugins.patches import processor_swap

    one, two = wan(), wan()
    original = processor_swap.carry

    def failing(modules: Any, state: Any) -> None:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls == 2:  # type: ignore[attr-defined]
            raise MemoryError("half way")
        original(modules, state)

    failing.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(processor_swap, "carry", failing)
    attn_plugins.patch(wan(), Windowed()).remove()
    failing.calls = 0  # type: ignore[attr-defined]
    with unchanged(one), unchanged(two), pytest.raises(MemoryError):
        attn_plugins.patch([one, two], Windowed())


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("method", {"method": "gnaa"}, ValueError, "unknown method 'gnaa'.*'gna'"),
    ("option", {"method": "gna", "windw": 3}, TypeError, "unknown option 'windw'.*'window'"),
    ("layer", {"method": "gna", "layers": [9]}, ValueError, r"layers=\[9\].*indices 0..1"),
    ("no layer", {"method": "gna", "layers": "nothing"}, ValueError, "zero sites"),
    ("regex", {"method": "gna", "layers": "["}, ValueError, "neither ranges .* nor a regular expression"),
    ("layers type", {"method": "gna", "layers": 1.5}, TypeError, r"layers=1.5: give indices"),
    ("no bool", {"method": "gna", "layers": True}, TypeError, "layers=True"),
    ("dense steps", {"method": "gna", "dense_steps": 1.5}, ValueError, r"dense_steps=1.5.*fraction"),
    ("share", {"method": "gna", "window": 2, "dense_steps": 0.3}, ValueError, "num_steps"),
    ("quality", {"method": "gna", "quality": "best"}, ValueError, "quality='best'.*safe, balanced, fast"),
    ("preset", {"method": "gna", "preset": "wan_481p"}, ValueError, "wan_480p"),
    ("other model", {"method": "gna", "preset": "flux_4k"}, ValueError, "flux"),
    ("recipe", {"method": "missing.yaml"}, FileNotFoundError, "no recipe at missing.yaml"),
    ("window", {"method": "gna", "window": 2, "stride": 3}, ValueError, "stride"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_named_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = wan()
    with unchanged(model), pytest.raises(error, match=message):
        attn_plugins.patch(model, **arguments)


def test_a_window_larger_than_the_grid_under_error() -> None:
    model, inputs = wan(), INPUTS(1, 0)
    dense = forward(model, inputs)
    with unchanged(model):
        handle = attn_plugins.patch(model, "gna", window=(5, 3, 3), stride=1, small_grid="error")
        with pytest.raises(ValueError, match="5"):
            forward(model, inputs)
        handle.remove()
    assert torch.equal(forward(model, inputs), dense)


def test_a_model_of_no_family() -> None:
    class WanTransformerModel(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"no family .* WanTransformerModel; nearest: WanTransformer3DModel \(Wan"):
        attn_plugins.patch(WanTransformerModel(), "gna")
    with pytest.raises(ValueError, match="register_family"):
        attn_plugins.patch(torch.nn.Linear(2, 2), "gna")
    for nothing in (None, 3, []):
        with pytest.raises(ValueError, match="no family"):
            attn_plugins.patch(nothing, "gna")


def test_no_site_of_the_methods_kind() -> None:
    model = MODELS["hunyuan_video"].build()
    with unchanged(model), pytest.raises(ValueError, match="'cross-zero' is for .* kind cross.*joint.*zero sites"):
        attn_plugins.patch(model, CrossZero())
    with pytest.raises(ValueError, match="leaves every site .* dense: zero sites"):
        attn_plugins.patch(wan(2), Windowed(), first_dense=2)


def test_nothing_to_unpatch() -> None:
    model = wan()
    with pytest.raises(ValueError, match="WanTransformer3DModel is not patched by attn_plugins"):
        attn_plugins.unpatch(model)
    attn_plugins.patch(model, Windowed())
    with pytest.raises(ValueError, match=r"not patched by 'gna' \(it is by windowed\)"):
        attn_plugins.unpatch(model, "gna")


def test_a_backend_that_the_method_has_not() -> None:
    with pytest.raises(ValueError, match="backend='triton': method 'windowed' has no choice"):
        attn_plugins.patch(wan(), Windowed(), backend="triton")


def test_a_recipe_that_is_none(tmp_path: Path) -> None:
    for text, message in (("[1, 2]", "no recipe"), ("method: gna\nwindw: 3\n", "unknown fields windw")):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            attn_plugins.patch(wan(), path)


def test_a_recipe_for_another_family(tmp_path: Path) -> None:
    path = attn_plugins.patch(wan(), Windowed()).save(tmp_path / "recipe.yaml")
    path.write_text(path.read_text().replace("windowed", "gna").replace("options: {}", "options: {window: 2}"))
    with pytest.raises(ValueError, match="recipe is for models of 'wan'; FluxTransformer2DModel is of 'flux'"):
        attn_plugins.patch(MODELS["flux"].build(), path)


def test_roots_that_differ_have_no_single_recipe(tmp_path: Path) -> None:
    handle = attn_plugins.patch([wan(2), wan(3)], Windowed())
    with pytest.raises(ValueError, match="differ in sites or config"):
        handle.save(tmp_path / "recipe.yaml")


def test_every_left_over_name_is_declared() -> None:
    """The registry of LayerSkip is the only thing in another library that grows, and it is in GLOBALS."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model = MODELS["flux"].build()
    attn_plugins.patch(model, Windowed(), dense_steps=0)
    cls = type(model.transformer_blocks[0].attn.processor)
    attn_plugins.unpatch(model)
    assert cls in AttentionProcessorRegistry._registry
    assert any("AttentionProcessorRegistry" in row for row in patching.GLOBALS)


def test_importing_costs_nothing() -> None:
    code = "import sys, attn_plugins; print([m for m in ('diffusers', 'transformers', 'triton') if m in sys.modules])"
    root = Path(attn_plugins.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_a_callable_is_given_the_site() -> None:
    seen: list[Site] = []
    attn_plugins.patch(wan(), Windowed(), layers=lambda site: seen.append(site) or True)
    assert all(isinstance(site, Site) and site.kind == "self" for site in seen)
