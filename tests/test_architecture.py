"""The floors of docs/design.md, read from the source: what a reviewer would have to keep in mind otherwise."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_plugins
from attn_plugins import ops, registry

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"attn_plugins": "attn_plugins", "patches": "attn_plugins.patches", "pipelines": "attn_plugins.pipelines"}
# From the ground up. Units of one row may import each other, except across a "|": those stay strangers.
FLOORS = [
    "sequence",
    "plan",
    "ops",
    "search | metrics | training",
    "models",
    "method prompts references runtime schedule watching",
    "methods | patches",
    "presets registry",
    "patching grafting targets selection handle measured_call measures measuring pretrained recipe record report "
    "serving weights",
    "__init__",
    "pipelines",
    "cli",
]
LEVEL = {unit: level for level, row in enumerate(FLOORS) for unit in row.replace("|", " ").split()}
STRANGERS = [{unit.strip() for unit in row.split("|")} for row in FLOORS if "|" in row]
HEAVY = (
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "matplotlib",
    "sklearn",
    "skimage",
    "rich",
    "typer",
)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package, as it is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()
FILES = sorted(path for path in ROOT.rglob("*.py") if not any(part[0] == "." for part in path.relative_to(ROOT).parts))


def unit_of(module: str) -> str:
    """The unit of the floors that a module belongs to."""
    parts = module.split(".")[1:] or ["__init__"]
    return "cli" if parts[0] == "pipelines" and parts[1:2] in (["cli"], ["commands"]) else parts[0]


def imports_of(source: str) -> Iterator[str]:
    """Every module of ours that a source imports, wherever in the file: lazily counts too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "attn_plugins")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: a relative one depends on where the folder stands"
            if (node.module or "").split(".")[0] == "attn_plugins":
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    yield full if full in MODULES else str(node.module)


def offence(importer: str, imported: str) -> str | None:
    """What is wrong with an import, or None."""
    here, there = unit_of(importer), unit_of(imported)
    if here == there:
        return None
    if LEVEL[here] < LEVEL[there]:
        return f"{importer} imports {imported}: {here} is below {there}"
    if any({here, there} <= row for row in STRANGERS):
        return f"{importer} imports {imported}: {here} and {there} must not know each other"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    found = [offence(module, imported) for imported in imports_of(MODULES[module].read_text(encoding="utf-8"))]
    assert not [line for line in found if line]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("attn_plugins.plan.windows", "def f():\n    from attn_plugins import ops"),
        ("attn_plugins.methods.gna", "from attn_plugins.patches.family import Family"),
        ("attn_plugins.patches.family", "import attn_plugins.methods.gna"),
        ("attn_plugins.ops.neighborhood", "from attn_plugins import patch"),
        ("attn_plugins.pipelines.environment", "from attn_plugins.pipelines.commands.app import app"),
    ],
)
def test_the_check_sees_an_import_that_runs_up(importer, source):
    assert [line for line in (offence(importer, name) for name in imports_of(source)) if line]


def test_every_unit_stands_on_a_floor():
    assert {unit_of(module) for module in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_above_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, attn_plugins; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("owner", [attn_plugins, ops], ids=lambda owner: owner.__name__)
def test_the_public_face_is_documented(owner):
    public = {name: getattr(owner, name) for name in owner.__all__}
    bare = [name for name, value in public.items() if callable(value) and not (value.__doc__ or "").strip()]
    assert not bare


@pytest.mark.parametrize("name", ops.__all__)
def test_operators_say_their_shapes(name):
    assert "(B, H" in getattr(ops, name).__doc__


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_says_where_it_comes_from(name):
    method = registry.method(name)
    assert method.paper.strip() and method.title.strip() and sys.modules[type(method).__module__].__doc__
    page = ROOT / "docs" / f"{name.replace('_', '-')}.md"
    assert page.is_file(), f"docs/{page.name} is missing: every method has a page with its rule, options and limits"
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
