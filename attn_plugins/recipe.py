"""Recipes: a patch as a YAML file that a person can read, keep beside a model, and hand to `patch`.

A recipe is one row (a method on some sites), or several under `patches`, which hold different sites: what a tuner
writes (pipelines/tune.py). `evidence` says where it was measured, and is not needed to patch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_plugins.record import Patched

SUFFIXES = (".yaml", ".yml")
FIELDS = {"method", "family", "options", "dense_steps", "num_steps", "min_tokens", "sites"}
BESIDE = {"patches", "evidence", "title"}


@dataclass(frozen=True)
class Recipe:
    """`rows`: one for each patch, with some of `FIELDS`. `evidence`: of its file, if it has any."""

    rows: tuple[dict[str, Any], ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of the least and of the largest grid that the evidence is of."""
        found = self.evidence.get("tokens")
        return None if found is None else (int(found[0]), int(found[1]))


def is_recipe(method: object) -> bool:
    return isinstance(method, Path) or (isinstance(method, str) and method.endswith(SUFFIXES))


def row(patched: Patched) -> dict[str, Any]:
    """What `patched` is, its sites by name, in plain values. `strict` and a person's `quality` are not part of it."""
    schedule = patched.state.schedule
    told: dict[str, Any] = {
        "method": patched.method,
        "family": patched.family,
        "options": patched.config.to_options(),
        "dense_steps": list(steps) if isinstance(steps := schedule.dense_steps, tuple) else steps,
        "sites": [layer.name for layer in patched.layers],
    }
    if schedule.num_steps is not None:
        told["num_steps"] = schedule.num_steps
    if patched.state.min_tokens:
        least = patched.state.min_tokens
        told["min_tokens"] = list(least) if isinstance(least, tuple) else least
    return told


def write(patches: Iterable[Patched], path: str | Path, evidence: Mapping[str, Any] | None = None) -> Path:
    """Write the patches of one root as a file, with what was measured of them, in plain values."""
    return write_rows([row(patched) for patched in patches], path, evidence)


def write_rows(rows: list[dict[str, Any]], path: str | Path, evidence: Mapping[str, Any] | None = None) -> Path:
    """As `write`, of rows that have some of `FIELDS`."""
    import yaml

    rows = [copy.deepcopy(one) for one in rows]  # what two rows share would be an alias in the file
    told: dict[str, Any] = dict(rows[0]) if len(rows) == 1 else {"patches": rows}
    if evidence:
        told["evidence"] = dict(evidence)
    path = Path(path)
    path.write_text(yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")
    return path


def read(path: str | Path) -> Recipe:
    """A recipe file, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a recipe: no method, an unknown field, or a site that two patches want.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; handle.save({str(path)!r}) writes one")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    several = found.get("patches") if isinstance(found, dict) else None
    rows = several if isinstance(several, list) and several else [found]
    legal = FIELDS | BESIDE if rows[0] is found else BESIDE
    for one in rows:
        if not isinstance(one, dict) or "method" not in one:
            told = ", ".join(sorted(FIELDS))
            raise ValueError(f"{path} is no recipe: it lacks the field 'method'; a recipe has {told}")
        unknown = sorted(set(one) - (FIELDS | BESIDE if one is found else FIELDS)) or sorted(set(found) - legal)
        if unknown:
            told = ", ".join(sorted(FIELDS))
            raise ValueError(f"{path}: unknown fields {', '.join(unknown)}; a recipe has {told}")
    names = [name for one in rows for name in one.get("sites", ())]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or (len(rows) > 1 and not all(one.get("sites") for one in rows)):
        why = (
            f"site {twice[0]!r} stands in two of its patches"
            if twice
            else "each of several patches must name its sites"
        )
        raise ValueError(f"{path}: {why}")
    kept = [{key: value for key, value in one.items() if key in FIELDS} for one in rows]
    return Recipe(tuple(kept), found.get("evidence") or {})
