"""All files of a comparison, written at once: the report, its figures as CSV and JSON, what belongs to each method."""

from __future__ import annotations

import csv
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.comparing import measure_files, pages, pictures
from attn_plugins.pipelines.comparing.comparison import Comparison
from attn_plugins.pipelines.comparing.language_comparison import LanguageComparison
from attn_plugins.pipelines.comparing.overview import records
from attn_plugins.pipelines.comparing.page import render


def write(name: str, comparisons: Sequence[pages.AnyComparison], folder: Path, notes: Sequence[str] = ()) -> list[Path]:
    """Write into `folder` (made if missing), and say what; whatever ends it early, it leaves no half of it.

    `<name>.html`, `<name>.csv`, `<name>.json`; for each method of a pipeline its pictures, steps and layers
    (`<name>_<method>...`), of a language model its positions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = pages.page(name, comparisons, notes)
    with tempfile.TemporaryDirectory(prefix=".compare-", dir=folder) as place:
        aside = Path(place)
        made = [aside / f"{name}.html", aside / f"{name}.csv", aside / f"{name}.json"]
        made[0].write_text(render(page), encoding="utf-8")
        _table(made[1], records(pages.rows_of(comparisons)))
        made[2].write_text(json.dumps(told(name, comparisons, notes), indent=1) + "\n", encoding="utf-8")
        taken: set[str] = set()
        for one in comparisons:
            own = slug(f"{name}_{one.method}", taken)
            if isinstance(one, Comparison):
                made += [*pictures.write(one, aside, own), *measure_files.write(one, aside, own)]
            elif isinstance(one, LanguageComparison):
                head, *lines = one.by_position()
                made.append(aside / f"{own}_positions.csv")
                _table(made[-1], [dict(zip(head, line, strict=True)) for line in lines])
        return [path.replace(folder / path.name) for path in made]


def told(name: str, comparisons: Sequence[pages.AnyComparison], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The figures as JSON has them: infinite and unknown ones are null, and bit-identical is said in words."""
    first = comparisons[0]
    rows: list[dict[str, Any]] = []
    for one in comparisons:
        row: dict[str, Any] = {"method": one.method, "figures": _plain(one.figures()), "patched": one.summary}
        row |= dict(zip(("speed", "cost", "bound"), one.sentences(), strict=True))
        if isinstance(one, Comparison):
            likeness = one.likeness
            row["dense_steps"] = one.dense_steps
            row["steps"] = [
                {"drift": step.relative_l2, "latent_psnr": _number(decibels), "bit_identical": same}
                for step, decibels, same in zip(likeness.drift, likeness.latent_psnr, likeness.identical, strict=True)
            ]
            row["cases"] = [
                {"case": case, "drift": s.drift, "psnr": _number(s.psnr), "ssim": s.ssim, "lpips": s.lpips}
                for case, s in zip(one.cases, likeness.cases, strict=True)
            ]
        rows.append(row)
    about = {"name": name, "model": first.model, "machine": first.machine, "notes": [*notes, *first.notes]}
    return {**about, "dense": _plain(first.floor()), "methods": rows}


def slug(text: str, taken: set[str]) -> str:
    """A file name of a label that is no other's so far; `taken` gets it."""
    name = stem = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")[:80]
    number = 2
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name)
    return name


def _table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def _plain(figures: pages.Figures) -> dict[str, float | None]:
    return {name: _number(value) for name, value in figures.items()}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
