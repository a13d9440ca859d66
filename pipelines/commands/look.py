"""`attn-plugins list | show | families | env`: what there is, without running anything."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table

from attn_plugins import presets
from attn_plugins.pipelines.commands.app import console
from attn_plugins.schedule import Schedule, describe


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("list")(list_methods)
    app.command()(show)
    app.command()(families)
    app.command()(env)


def list_methods() -> None:
    """The methods: name, kind and paper."""
    from attn_plugins import registry

    table = Table("name", "method", "kind", "paper", title="Methods")
    for name in registry.method_names():
        method = registry.method(name)
        table.add_row(method.name, method.title, method.kind, method.paper)
    console().print(table)


def show(name: Annotated[str, typer.Argument(metavar="METHOD", help="A name that `list` shows.")]) -> None:
    """The options of a method, and the models it has presets for."""
    from attn_plugins import registry

    method = registry.method(name)
    out = console()
    out.print(f"{method.name}: {method.title} ({method.kind}), {method.paper}", markup=False)
    told = field_docs(method.config_class.__doc__ or "")
    table = Table("option", "type", "default", "meaning", title="Options")
    for field in dataclasses.fields(method.config_class):
        table.add_row(field.name, str(field.type), default_of(field), told.get(field.name, ""))
    out.print(table)
    found = presets.available(method.name)
    if found:
        out.print(preset_table(found))


def families() -> None:
    """The models that can be patched."""
    from attn_plugins import registry

    table = Table("name", "models", "library", "attention", "notes", title="Families")
    for family in registry.families():
        kinds = dict.fromkeys(kind for _, kind in family.sites)
        table.add_row(family.name, family.title, family.library, ", ".join(kinds), family.notes)
    console().print(table)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON: name, value, note of each row.")] = False,
) -> None:
    """Versions, devices and backends, and what stands in for what is missing: paste this into an issue."""
    from attn_plugins.pipelines.environment import facts
    from attn_plugins.report import table

    rows = facts()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    for line in table((row.name, row.value, row.note) for row in rows):
        typer.echo(line)


def preset_table(files: Iterable[presets.PresetFile]) -> Table:
    """One row per preset and quality."""
    table = Table("preset", "model", "quality", "options", "dense steps", "evidence", title="Presets")
    for file in files:
        for quality in presets.QUALITIES:
            row = file.at(quality)
            settings = ", ".join(f"{key}={as_text(value)}" for key, value in row.options.items() if key != "base_size")
            first = quality == presets.QUALITIES[0]
            about = (file.name, file.title) if first else ("", "")
            table.add_row(
                *about,
                quality,
                settings,
                describe(Schedule(row.dense_steps)) or "none",
                evidence(row),
                end_section=quality == presets.QUALITIES[-1],
            )
    return table


def evidence(row: presets.Preset) -> str:
    """Where a preset's numbers come from, and what it gained and cost where that was measured."""
    found = [
        f"{one['speedup']:.2f}x, loss {one['loss']:.2g} on {one['model']} at {one['tokens']:,} tokens"
        for one in row.measured
    ]
    return "; ".join([row.evidence, *found])


def as_text(value: object) -> str:
    """An option as one would type it: [18, 24, 24] is 18x24x24; what has parts of its own is only counted."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    if all(isinstance(item, int) for item in value):
        return "x".join(str(int(item)) for item in value)
    return f"<{len(value)} parts, see the file>"


def default_of(field: dataclasses.Field) -> str:
    """A field's default as one would write it; "required" where there is none."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def field_docs(docstring: str) -> dict[str, str]:
    """What the `Args:` of a docstring say, by name; `a, b: text` tells of both."""
    found: dict[str, str] = {}
    current: list[str] = []
    inside, depth = False, 0
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        head = re.match(r"\s+((?:`?\w+`?, )*`?\w+`?): (.*)", line)
        if line.strip() in ("Args:", "Attributes:"):
            inside, depth = True, indent
        elif inside and line.strip() and indent <= depth:
            inside = False
        elif inside and head and (not current or indent <= depth + 4):
            current = [name.strip("`") for name in head[1].split(", ")]
            found |= dict.fromkeys(current, head[2].strip())
        elif inside and current and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found
