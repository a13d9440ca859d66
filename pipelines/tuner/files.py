"""What a tuning leaves: the recipe with its evidence, the front as CSV and as a picture."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins import recipe
from attn_plugins.pipelines.benching.machine import describe
from attn_plugins.pipelines.tuner.outcomes import Outcome, applied
from attn_plugins.pipelines.tuner.plans import Plan
from attn_plugins.pipelines.tuner.subject import Subject, name_of

if TYPE_CHECKING:
    from attn_plugins.pipelines.tune import TuneResult

COLUMNS = ("setting", "speedup", "loss", "half", "density", "foreseen speedup", "foreseen loss", "cases", "chosen")


def save(result: TuneResult, folder: Path) -> list[Path]:
    """Write all of them; the recipe is what `attn_plugins.patch(obj, folder / "recipe.yaml")` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [_recipe(result, folder / "recipe.yaml"), _csv(result, folder / "front.csv")]
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(draw(result, folder / "front.png"))
    return written


def table(result: TuneResult) -> list[tuple[str, ...]]:
    """Cells: a header, and a line for each setting that was tested, quickest first."""
    rows: list[tuple[str, ...]] = [("setting", "times faster", f"{result.subject.loss_name}", "density", "foreseen")]
    for one in sorted(result.tested, key=lambda one: -one.speedup):
        mark = " (chosen)" if one.what is result.chosen.what else ""
        foreseen = "" if one.foreseen is None else f"{one.foreseen[0]:.2f}, {one.foreseen[1]:.3g}"
        rows.append((one.label + mark, f"{one.speedup:.2f}", _interval(one), _share(one.density), foreseen))
    return rows


def evidence(result: TuneResult) -> dict[str, Any]:
    """What a recipe says of where it comes from, in plain values."""
    chosen = result.chosen
    return {
        "model": name_of(result.subject.obj),
        "grid": list(result.subject.grid),
        "tokens": [math.prod(result.subject.grid)] * 2,
        "density": None if chosen.density is None else round(chosen.density, 4),
        "speedup": round(chosen.speedup, 3),
        "loss": {"name": result.subject.loss_name, "mean": _rounded(chosen.loss), "half_of_95": _rounded(chosen.half)},
        "cases": len(chosen.losses),
        **{name: result.about[name] for name in ("machine", "torch", "commit", "date")},
    }


def machine(subject: Subject) -> str:
    """The device's name, and the threads of a CPU."""
    if subject.device.type == "cuda":
        return torch.cuda.get_device_name(subject.device)
    about = describe()
    return f"{about['cpu']}, {about['threads']} threads"


def draw(result: TuneResult, path: Path) -> Path:
    """Speed against loss: tuned plans, presets by method, and what was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    methods: dict[str, list[Outcome]] = {}
    for one in result.tested:
        methods.setdefault("tuned" if one.tuned else one.what.method, []).append(one)  # type: ignore[union-attr]
    for number, (method, rows) in enumerate(sorted(methods.items(), key=lambda item: item[0] != "tuned")):
        rows = sorted(rows, key=lambda one: one.speedup)
        errors = [one.half if one.half < float("inf") else 0.0 for one in rows]
        axes.errorbar(
            [one.speedup for one in rows], [one.loss for one in rows], yerr=errors, capsize=2,
            marker="o" if method == "tuned" else "sv^D<>ph*"[number % 9], linestyle="-" if method == "tuned" else ":",
            label=method, linewidth=2 if method == "tuned" else 1,
        )  # fmt: skip
    chosen = result.chosen
    axes.scatter([chosen.speedup], [chosen.loss], s=180, facecolors="none", edgecolors="black", label="chosen")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster than dense, whole run")
    axes.set_ylabel(result.subject.loss_name)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path


def _recipe(result: TuneResult, path: Path) -> Path:
    what = result.chosen.what
    if isinstance(what, Plan):
        return recipe.write_rows(what.told, path, evidence(result))
    with applied(result.subject, what) as handle:
        return handle.save(path, evidence(result))


def _csv(result: TuneResult, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("set", *COLUMNS))
        # without cases to test on, what was tested is the validation itself
        tested = [one for one in result.tested if one not in result.validation]
        for name, rows in (("validation", result.validation), ("test", tested)):
            for one in rows:
                foreseen = one.foreseen or ("", "")
                numbers = (one.speedup, one.loss, one.half, one.density, *foreseen)
                cells = [f"{value:.6g}" if isinstance(value, float) else value for value in numbers]
                writer.writerow((name, one.label, *cells, len(one.losses), one.what is result.chosen.what))
    return path


def _interval(one: Outcome) -> str:
    return f"{one.loss:.3g}" if one.half == float("inf") else f"{one.loss:.3g} ± {one.half:.2g}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


def _rounded(value: float) -> float | None:
    return None if value == float("inf") else float(f"{value:.4g}")
