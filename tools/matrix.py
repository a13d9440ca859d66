"""Write the tables of methods and models: `python tools/matrix.py [--check]`.

README.md gets the methods and a line per kind of model, docs/models.md the whole matrix. A model stands there because
its tests passed: docs/models.json, which `make matrix` has the tests write, lists the classes that were patched, run
and taken back. With --check nothing is written; the exit code is 1 where a file is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

from attn_plugins import presets, registry
from attn_plugins.method import Method
from attn_plugins.patches import families as package
from attn_plugins.patches.family import Family
from attn_plugins.pipelines.markdown import filled, table

ROOT = Path(__file__).resolve().parent.parent
README, MODELS, GREEN = ROOT / "README.md", ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"

# What a file of patches/families is about; one without a line here has a group of its own.
GROUPS = {
    "image": "Image transformers", "packed": "Image transformers", "unet": "UNets", "controlnet": "ControlNets",
    "video": "Video transformers", "video_wan": "Video transformers", "video_hunyuan": "Video transformers",
    "video_unet": "Video UNets", "language": "Language models", "vision_language": "Vision-language models",
    "vision": "Vision transformers",
}  # fmt: skip


def linked(paper: str) -> str:
    """A paper's text with its arXiv numbers as links."""
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", paper)


def methods_table() -> str:
    """One row per method: name with its page, title, kind, paper, source."""
    rows = []
    for name in registry.method_names():
        method = registry.method(name)
        page = f"[`{name}`](docs/{name.replace('_', '-')}.md)"
        source = type(method).__module__.replace(".", "/") + ".py"
        rows.append([page, method.title, method.kind, linked(method.paper), f"[{Path(source).name}]({source})"])
    return table(["method", "title", "kind", "paper", "source"], rows)


def groups() -> dict[str, list[Family]]:
    """The built-in families by what they are, in the order of GROUPS."""
    found: dict[str, list[Family]] = {title: [] for title in GROUPS.values()}
    for module in pkgutil.iter_modules(package.__path__):
        rows = importlib.import_module(f"{package.__name__}.{module.name}").FAMILIES
        found.setdefault(GROUPS.get(module.name, module.name.capitalize()), []).extend(rows)
    return found


def green() -> dict[str, list[str]]:
    """family -> the classes that its tests found right."""
    return json.loads(GREEN.read_text(encoding="utf-8"))["classes"]


def cell(method: Method, family: Family) -> str:
    """Which attention of a family a method takes, and "presets" where settings are shipped; "-" where it takes none, or
    brings weights and the family does not tell what they must be made for, or merges references that it has not."""
    if method.kind == "module" and (family.shape is None or (method.needs_grid and not family.sized)):
        return "-"
    if method.needs_references:
        return family.extras["references"].takes if "references" in family.extras else "-"
    if method.needs_prompts and "prompts" not in family.extras:
        return "-"
    kinds = [kind for kind in dict.fromkeys(kind for _, kind in family.sites) if kind in method.sites]
    shipped = presets.available(method.name, family.name)
    return (", ".join(kinds) + (" (presets)" if shipped else "")) if kinds else "-"


def summary_table() -> str:
    """A line per kind of model: how many classes are green, and their names."""
    tested, rows = green(), []
    for title, families in groups().items():
        there = [family for family in families if tested.get(family.name)]
        classes = {name for family in there for name in tested[family.name]}
        rows.append([title, str(len(classes)), ", ".join(family.title for family in there)])
    return table(["kind", "classes", "models"], rows)


def models_page() -> str:
    """docs/models.md: a table per kind of model, one row per family, one column per method."""
    tested = green()
    versions = json.loads(GREEN.read_text(encoding="utf-8"))["versions"]
    methods = [registry.method(name) for name in registry.method_names()]
    parts = [
        "# Supported models",
        "Written by `make matrix` from the tests that passed, with "
        + " and ".join(f"{name} {version}" for name, version in versions.items())
        + ": each class was built tiny with random weights, patched, run, compared with dense attention and with a "
        "brute force of the method's mask, and taken back bit for bit. Released checkpoints were not run. [families.md]"
        "(families.md) says what the tokens of each are and what stays dense. In a column: which attention of the "
        "model the method takes, and whether settings for it are shipped.",
    ]
    for title, families in groups().items():
        rows = []
        for family in families:
            classes = ", ".join(f"`{name}`" for name in tested.get(family.name, []))
            if classes:
                rows.append([family.title, classes, *(cell(method, family) for method in methods), family.notes])
        parts += [f"## {title}", table(["models", "classes", *(f"`{m.name}`" for m in methods), "notes"], rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    check = parser.parse_args(arguments).check
    readme = README.read_text(encoding="utf-8")
    readme = filled(filled(readme, "methods", methods_table()), "models", summary_table())
    status = 0
    for path, text in ((README, readme), (MODELS, models_page())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.name} does not say what the registry and the tests say: run `make matrix`", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
