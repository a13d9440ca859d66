"""The figures of the docs: each has a command, and what tunings found stands where it is told."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attn_plugins import presets
from tests.support.pages import ROOT

pytest.importorskip("diffusers")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_picture_of_the_docs_has_a_command() -> None:
    shown = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        shown |= set(re.findall(r"pictures/([\w./]+\.png)", page.read_text(encoding="utf-8")))
    assert shown == {path.relative_to(ROOT / "docs" / "pictures").as_posix() for path in pictures()}
    copied = {picture for figure in tool("figures").FIGURES.values() for picture in figure.pictures.values()}
    drawn = {name for name in shown if name.startswith(("gallery/", "bench_")) or name == "regions.png"}
    assert shown == copied | drawn


def pictures() -> list[Path]:
    return sorted((ROOT / "docs" / "pictures").rglob("*.png"))


def test_pages_have_the_markers_that_commands_fill() -> None:
    for page, name in (("README.md", "demo"), ("docs/compare.md", "compare"), ("docs/tuning.md", "tuned")):
        assert f"<!-- {name}:begin -->" in (ROOT / page).read_text(encoding="utf-8")


def test_a_table_of_a_comparison() -> None:
    told = {
        "dense": {"step_seconds": 0.5, "drift": 0.0, "psnr": None},
        "methods": [
            {"method": "gna", "figures": {"step_seconds": 0.25, "step_speedup": 2.0, "drift": 0.25, "psnr": 19.3}}
        ],
    }
    lines = tool("figures").beside(told).splitlines()
    assert lines[0] == "|  | dense | `gna` |" and "| step: faster | - | 2.00x |" in lines
    assert "| PSNR | equal | 19.3 dB |" in lines and "| drift | 0 | 2.5e-01 |" in lines


def test_what_tunings_found_stands_in_presets_and_docs() -> None:
    evidence = tool("preset_evidence")
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = 0
    for folder in sorted(path.parent for path in evidence.TUNED.glob("*/front.csv")):
        tuning = evidence.Tuning.read(folder)
        assert tuning.section() in page
        for (method, preset, quality), row in tuning.measured().items():
            held = next(one for one in presets.available(method) if one.name == preset).at(quality).measured
            assert row in held
            rows += 1
    assert rows > 20


def test_rows_of_evidence_replace_their_like() -> None:
    merged = tool("preset_evidence")._merged
    old, new = {"model": "a", "tokens": 2, "loss": 1.0}, {"model": "a", "tokens": 2, "loss": 2.0}
    other = {"model": "a", "tokens": 1, "loss": 3.0}
    assert merged([old], new) == [new] and merged([old], other) == [other, old] and merged([old], None) == [old]
