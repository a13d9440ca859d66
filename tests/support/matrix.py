"""Method x family, from the registry: a new method or family is tested without a line here."""

from __future__ import annotations

import os
from typing import Any

import pytest

from attn_plugins import registry
from attn_plugins.method import Method
from tests.support.windowed import Windowed

# options that make a method sparse on a tiny grid, and those that make it dense attention; {} where there are none
SPARSE: dict[str, dict[str, Any]] = {
    "windowed": {"size": 2},
    "gna": {"window": 2, "stride": 1},
    "vmoba": {"blocks": ((2, 2, 2), (-1, 2, 2), (2, 2, 2)), "k_blocks": 1},
    "draft": {"pool": (2, 2), "keep": 1},
    "sparge": {"block": 4, "tau": 0.0},
    "radial": {"block": 1, "decay": 0.5, "sink": False},
    "agent": {"ratio": 0.2},
    "kv_pool": {"factor": 2},
}
FULL: dict[str, dict[str, Any]] = {
    "windowed": {"size": 0},
    "gna": {"window": -1},
    "vmoba": {"rule": "threshold", "tau": 1.0},
    "draft": {"keep": 1.0},
    "sparge": {"tau": 1.0},
    "kv_pool": {"factor": 1},
}
# those of them that show a window of two tokens an axis, or the whole grid
WINDOWS = ("windowed", "gna")

FAMILIES = [family.name for family in registry.families() if family.library == "diffusers"]
METHODS = ["windowed", *(name for name in registry.method_names() if registry.method(name).kind != "module")]


def method(name: str) -> Method:
    return Windowed() if name == "windowed" else registry.method(name)


def settings(name: str, full: bool = False) -> dict[str, Any]:
    """Options and what keeps presets and minimum sizes out of a tiny model."""
    return {**(FULL if full else SPARSE).get(name, {}), "min_tokens": 0, "dense_steps": 0}


def fits(method_name: str, family_name: str) -> bool:
    """Whether the method is for any kind of attention that the family has."""
    family = next(row for row in registry.families() if row.name == family_name)
    takes = method(method_name)
    if takes.needs_prompts:  # with prompts as its models take them: tests/patches/test_regions.py
        return False
    if takes.needs_references:  # no attention of the model's own: tests/patches/test_mip.py loads the images for it
        return False
    return bool({kind for _, kind in family.sites} & takes.sites)


PAIRS = [pytest.param(m, f, id=f"{m}-{f}") for f in FAMILIES for m in METHODS if fits(m, f)]
EVERY = bool(os.environ.get("EVERY_PAIR"))


def _some() -> list[Any]:
    """A quarter of the pairs, every method and every family among them."""
    taken = [pair for pair in PAIRS if (METHODS.index(pair.values[0]) + FAMILIES.index(pair.values[1])) % 4 == 0]
    there = {pair.values[1] for pair in taken}
    return taken + [pair for pair in PAIRS if pair.values[1] not in there]


# what hardly depends on the pair is tested on these, and on all with EVERY_PAIR=1 (`make matrix`)
SOME = PAIRS if EVERY else _some()
# families of which a method over grids takes something; the others (linear self-attention) have cross-attention alone
ON_GRID = [family for family in FAMILIES if fits("windowed", family)]
