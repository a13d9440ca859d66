"""A model patched as a recipe would patch it: what is measured is what the file will do."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_plugins import recipe, report
from attn_plugins.patching import patch
from attn_plugins.pipelines.tuner.subject import Subject


def row(
    subject: Subject, method: str, options: Mapping[str, Any], dense_steps: Sequence[float], sites: Iterable[str]
) -> dict[str, Any]:
    """A row of a recipe. dense_steps: first and last, as shares, or as whole steps."""
    first, last = dense_steps
    return {
        "method": method, "family": subject.targets[0].family.name, "options": dict(options),
        "dense_steps": [first, last] if last else first, "sites": list(sites),
    }  # fmt: skip


def patched(subject: Subject, rows: Iterable[Mapping[str, Any]], *, strict: bool = False) -> Any:
    """The handle of a recipe's rows. strict: what a site cannot take is an error."""
    with tempfile.TemporaryDirectory() as folder:
        path = recipe.write_rows([dict(one) for one in rows], Path(folder) / "rows.yaml")
        return patch(subject.obj, path, strict=strict)


def density(handle: Any, places: int) -> float | None:
    """Mean over all of a model's places, those without a patch and steps that stay dense counted as 1; None where it
    cannot be told."""
    shares: list[float] = []
    for root in report.analyse(handle):
        for group in root.groups:
            if group.density is None or root.dense_share is None:
                return None
            shares += [root.dense_share + (1 - root.dense_share) * group.density] * len(group.names)
    return statistics.fmean(shares + [1.0] * (places - len(shares))) if shares else None
