"""Recipes: a patch as a YAML file that a person can read, keep beside a model, and hand to `patch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_plugins.record import Patched

SUFFIXES = (".yaml", ".yml")
FIELDS = {"method", "family", "options", "dense_steps", "num_steps", "min_tokens", "sites"}


def is_recipe(method: object) -> bool:
    return isinstance(method, Path) or (isinstance(method, str) and method.endswith(SUFFIXES))


def row(patched: Patched) -> dict[str, Any]:
    """What `patched` is, its sites by name, in plain values. `strict` and a person's `quality` are not part of it."""
    schedule = patched.state.schedule
    told: dict[str, Any] = {
        "method": patched.method,
        "family": patched.family,
        "options": patched.config.to_options(),
        "dense_steps": schedule.dense_steps,
        "sites": [layer.name for layer in patched.layers],
    }
    if schedule.num_steps is not None:
        told["num_steps"] = schedule.num_steps
    if patched.state.min_tokens:
        told["min_tokens"] = patched.state.min_tokens
    return told


def write(patched: Patched, path: str | Path) -> Path:
    """Write what `patched` is as a file."""
    import yaml

    path = Path(path)
    path.write_text(yaml.safe_dump(row(patched), sort_keys=False, default_flow_style=None), encoding="utf-8")
    return path


def read(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a recipe: no method, or an unknown field.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; handle.save({str(path)!r}) writes one")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "method" not in found:
        raise ValueError(f"{path} is no recipe: it lacks the field 'method'; a recipe has {', '.join(sorted(FIELDS))}")
    unknown = sorted(set(found) - FIELDS)
    if unknown:
        raise ValueError(f"{path}: unknown fields {', '.join(unknown)}; a recipe has {', '.join(sorted(FIELDS))}")
    return found
