"""Write the README's tables of methods and models from the registry: `python tools/matrix.py [--check]`.

With --check nothing is written; the exit code is 1 where the README is not what the registry says.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from attn_plugins import presets, registry
from attn_plugins.method import Method
from attn_plugins.patches.family import Family

README = Path(__file__).resolve().parent.parent / "README.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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


def cell(method: Method, family: Family) -> str:
    """Which attention of a family a method takes, and "presets" where settings are shipped; "-" where it takes none."""
    kinds = [kind for kind in dict.fromkeys(kind for _, kind in family.sites) if kind in method.sites]
    shipped = presets.available(method.name, family.name)
    return (", ".join(kinds) + (" (presets)" if shipped else "")) if kinds else "-"


def models_table() -> str:
    """One row per family: title, library, root classes, and one column per method."""
    methods = [registry.method(name) for name in registry.method_names()]
    rows = []
    for family in registry.families():
        classes = ", ".join(f"`{name}`" for name in family.classes)
        rows.append([family.title, classes, *(cell(method, family) for method in methods), family.notes])
    return table(["models", "root classes", *(f"`{method.name}`" for method in methods), "notes"], rows)


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises:
        ValueError: the markers are missing.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no markers <!-- {name}:begin --> and <!-- {name}:end -->")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the README; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README is out of date")
    check = parser.parse_args(arguments).check
    before = README.read_text(encoding="utf-8")
    after = filled(filled(before, "methods", methods_table()), "models", models_table())
    if check and after != before:
        print("README.md does not say what the registry says: run `make matrix`", file=sys.stderr)
        return 1
    if not check:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
