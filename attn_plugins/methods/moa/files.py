"""Plans as files: ours, the authors' of MoA, and DuoAttention's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_plugins.methods.moa.patterns import duo
from attn_plugins.methods.moa.plan import SpanPlan

FORMAT = "attn_plugins.moa"
VERSION = 1
DUO_FILE = "full_attention_heads.tsv"
_KEYS = ("per", "query_heads", "kv_heads", "sink", "block", "model", "provenance", "alphas", "betas")


def load_plan(path: str | Path) -> SpanPlan:
    """Read a plan, whichever of three forms the file has.

    - JSON that `SpanPlan.save` wrote;
    - JSON of MoA's authors, `{"alphas": [layers][query heads], "betas": ...}`: sinks and blocks are 64 tokens;
    - DuoAttention's `full_attention_heads.tsv`, or the folder that holds it, per KV head: gates of 0.5 and more stay
      dense, the others keep sinks and recent tokens, as many as the `config.json` beside it says (else 128 and 256).
      Other cuts of the gates: `attn_plugins.methods.moa.patterns.duo`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these forms, or a newer version of ours.
    """
    path = Path(path)
    if path.is_dir():
        path = path / DUO_FILE
    if path.suffix == ".tsv":
        return _read_duo(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no plan: neither JSON nor DuoAttention's {DUO_FILE} ({error})") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: holds a {type(data).__name__}; a plan is an object with alphas and betas")
    try:
        return plan_of(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plan_of(given: Any) -> SpanPlan:
    """A plan as it is, from a mapping in one of the JSON forms, or from a file.

    Raises:
        ValueError, TypeError, FileNotFoundError: none of these.
    """
    if isinstance(given, SpanPlan):
        return given
    if isinstance(given, (str, Path)):
        return load_plan(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"plan is a {type(given).__name__}: give a SpanPlan, a mapping, or the path of a file")
    if "alphas" not in given or "betas" not in given:
        raise ValueError(f"a plan has alphas and betas; this mapping has {', '.join(map(str, given)) or 'nothing'}")
    if "per" not in given:
        heads = len(given["alphas"][0])
        return SpanPlan(given["alphas"], given["betas"], "query", heads, heads, provenance={"format": "MoA"})
    if given.get("version", VERSION) > VERSION:
        raise ValueError(f"version {given['version']} of the format: this release reads up to {VERSION}; update it")
    return SpanPlan(**{key: given[key] for key in _KEYS if key in given})


def to_mapping(plan: SpanPlan) -> dict[str, Any]:
    """The plan in our form, of values that JSON and YAML hold."""
    found: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for key in _KEYS:
        value = getattr(plan, key)
        found[key] = [list(row) for row in value] if key in ("alphas", "betas") else value
    return {**found, "provenance": dict(plan.provenance)}


def write(plan: SpanPlan, path: str | Path) -> Path:
    """A row of a table on each line: a plan can be read, and compared line by line."""
    lines = []
    for key, value in to_mapping(plan).items():
        text = json.dumps(value)
        if key in ("alphas", "betas"):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path = Path(path)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def _read_duo(path: Path) -> SpanPlan:
    try:
        gates = [[float(cell) for cell in line.split()] for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: a row of numbers per layer, a column per KV head is wanted ({error})") from None
    beside, sizes = path.parent / "config.json", {}
    if beside.is_file():
        config = json.loads(beside.read_text(encoding="utf-8"))
        names = {"sink": "sink_size", "recent": "recent_size"}
        sizes = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    return duo(gates, **sizes)
