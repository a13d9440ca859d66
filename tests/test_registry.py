"""Names to methods and families, and what other packages and people add."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins import registry
from tests.support.tiny_models import MODELS, forward, wan
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What a test registers goes with it."""
    registry.families(), registry.method_names()
    methods, families, loaded = dict(registry._methods), dict(registry._families), set(registry._loaded)
    yield
    for current, before in ((registry._methods, methods), (registry._families, families)):
        current.clear()
        current.update(before)  # type: ignore[arg-type]
    registry._loaded.clear()
    registry._loaded.update(loaded)


def test_every_built_in_row_loads_and_is_called_as_it_says() -> None:
    for name in registry.BUILTIN_METHODS:
        assert registry.method(name).name == name
    rows = attn_plugins.available()
    assert {row["name"] for row in rows["methods"]} >= set(registry.BUILTIN_METHODS)
    assert all(row["title"] and row["paper"] and row["kind"] for row in rows["methods"])
    assert {row["name"] for row in rows["families"]} >= set(MODELS)


def test_a_method_by_decorator() -> None:
    @attn_plugins.register_method
    class Mine(Windowed):
        name = "mine"

    model, inputs = wan(), MODELS["wan"].inputs(1, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, "mine", size=1)
    assert not torch.equal(forward(model, inputs), dense)
    assert Mine.name in registry.method_names()


def test_a_taken_name_is_refused_unless_it_is_replaced() -> None:
    class Other(Windowed):
        name = "gna"

    with pytest.raises(ValueError, match="'gna' exists"):
        attn_plugins.register_method(Other)
    attn_plugins.register_method(replace=True)(Other)
    assert isinstance(registry.method("gna"), Other)


def test_an_incomplete_method_is_refused() -> None:
    class Nameless(registry.Method):
        def processor(self, *args: Any) -> None:
            return None

    with pytest.raises(TypeError, match="Nameless lacks name, title, kind, paper, config_class"):
        attn_plugins.register_method(Nameless)
    with pytest.raises(TypeError, match="subclass of"):
        attn_plugins.register_method(int)  # type: ignore[type-var]


def test_a_family_of_ones_own() -> None:
    wan_family = next(row for row in registry.families() if row.name == "wan")
    mine = dataclasses.replace(wan_family, name="mine", title="Mine")
    with pytest.raises(ValueError, match="'wan' exists"):
        attn_plugins.register_family(wan_family)
    attn_plugins.register_family(mine)
    assert registry.family_of(wan()) is mine  # the last registered wins
    with pytest.raises(TypeError, match="takes an"):
        attn_plugins.register_family("wan")  # type: ignore[arg-type]


def test_a_subclass_belongs_to_the_family_of_its_base() -> None:
    model = wan()
    model.__class__ = type("MyWan", (type(model),), {})
    family = registry.family_of(model)
    assert family is not None and family.name == "wan"


def test_unets_are_told_apart_by_their_config() -> None:
    for name in ("sd15", "sdxl"):
        family = registry.family_of(MODELS[name].build())
        assert family is not None and family.name == name


class _Entry:
    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, f"somewhere:{name}", found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_other_packages_announce_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Announced(Windowed):
        name = "announced"

    wan_family = next(row for row in registry.families() if row.name == "wan")
    family = dataclasses.replace(wan_family, name="announced_family", classes=("Announced",))
    rows = {
        "attn_plugins.methods": [_Entry("announced", Announced), _Entry("broken", ImportError("no such thing"))],
        "attn_plugins.families": [_Entry("families", (family,))],
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: rows[group])
    registry._loaded.difference_update(rows)
    with pytest.warns(UserWarning, match="entry point broken = somewhere:broken was left out: no such thing"):
        assert "announced" in registry.method_names()
    assert family in registry.families()


def test_a_family_module_without_its_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'somelib'", name="somelib")

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    registry._load_family_module("attn_plugins.patches.families.somelib")

    def ours(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'attn_plugins.typo'", name="attn_plugins.typo")

    monkeypatch.setattr(registry.importlib, "import_module", ours)
    with pytest.raises(ModuleNotFoundError):
        registry._load_family_module("attn_plugins.patches.families.broken")
