"""What an evaluation found, over its seeds: a table with intervals, every number as CSV, and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attn_plugins.pipelines.comparing.measure_files import can_plot
from attn_plugins.pipelines.moa.evaluation import Judged, losses_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.96  # 95 %
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)


def ratio(judged: Sequence[Judged], name: str, part: slice = slice(None)) -> tuple[float, float, float]:
    """Perplexity over dense, on the same windows: the mean and its 95 % interval, from the spread between windows.

    part: which tokens of the windows. With one window the interval is nan.
    """
    differences = torch.cat([(losses_of(one, name) - losses_of(one, "dense"))[:, part].mean(1) for one in judged])
    mean, half = differences.mean().item(), Z * differences.std().item() / math.sqrt(len(differences))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def perplexity(judged: Sequence[Judged], name: str) -> float:
    return math.exp(torch.cat([losses_of(one, name).mean(1) for one in judged]).mean().item())


def share(judged: Sequence[Judged], name: str, length: int, depth: float | None = None) -> tuple[float, float, float]:
    """Of prompts that were answered, over depths and seeds: the share and Wilson's 95 % interval."""
    hits = trials = 0
    for one in judged:
        row = one.found[name][length]
        hits += sum(row.values()) if depth is None else row[depth]
        trials += one.settings.trials * (len(row) if depth is None else 1)
    return hits / trials, *wilson(hits, trials)


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    p, z = hits / trials, Z * Z / trials
    middle, half = (p + z / 2) / (1 + z), Z * math.sqrt(p * (1 - p) / trials + z / (4 * trials)) / (1 + z)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def table(judged: Sequence[Judged]) -> str:
    """Markdown: a row per plan; and retrieval by depth at the longest prompts."""
    settings = judged[0].settings
    lengths, longest = settings.lengths, max(settings.lengths)
    windows, prompts = len(judged) * settings.windows, len(judged) * settings.trials * len(settings.depths)
    head = ["plan", f"cache at {longest:,}", f"perplexity at {settings.window:,}", "over dense (95 %)"]
    head += [f"retrieval at {n:,} (95 %)" for n in lengths] + [f"by seed at {longest:,}"]
    lines = [" | ".join(("", *head, "")).strip(), "|---" * len(head) + "|"]
    for name in judged[0].names:
        kept = sum(one.memory[name][longest] for one in judged) / len(judged)
        cells = [name, f"{kept:.1%}", f"{perplexity(judged, name):.3f}"]
        cells.append("" if name == "dense" else _interval(ratio(judged, name), 4))
        cells += [_interval(share(judged, name, n), 2) for n in lengths]
        cells.append(", ".join(f"{share([one], name, longest)[0]:.2f}" for one in judged))
        lines.append(" | ".join(("", *cells, "")).strip())
    lines += ["", f"{windows} windows of text and {prompts} prompts of each length, {len(judged)} seeds.", ""]
    lines += [
        " | ".join(("", f"retrieval at {longest:,}", *(f"depth {depth:g}" for depth in settings.depths), "")).strip()
    ]
    lines.append("|---" * (len(settings.depths) + 1) + "|")
    for name in judged[0].names:
        cells = [f"{share(judged, name, longest, depth)[0]:.2f}" for depth in settings.depths]
        lines.append(" | ".join(("", name, *cells, "")).strip())
    lines += [
        "",
        " | ".join(("", "perplexity over dense, tokens", *(f"{a:,}-{b:,}" for a, b in _parts(judged)), "")).strip(),
    ]
    lines.append("|---" * (len(_parts(judged)) + 1) + "|")
    for name in judged[0].names[1:]:
        cells = [f"{ratio(judged, name, slice(a, b))[0]:.4f}" for a, b in _parts(judged)]
        lines.append(" | ".join(("", name, *cells, "")).strip())
    return "\n".join(lines) + "\n"


def write(judged: Sequence[Judged], folder: Path) -> list[Path]:
    """Write evaluation.md, evaluation.csv and, with matplotlib, evaluation.png."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "evaluation.md", folder / "evaluation.csv"]
    written[0].write_text(table(judged), encoding="utf-8")
    with written[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "plan", "what", "length", "place", "value", "count"))
        writer.writerows(row for one in judged for row in _rows(one))
    if can_plot():
        written.append(folder / "evaluation.png")
        picture(judged).savefig(written[-1], dpi=130)
    return written


def picture(judged: Sequence[Judged]) -> Figure:
    """Retrieval by depth at the longest prompts, by length, and perplexity over dense by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, longest, parts = judged[0].settings, max(judged[0].settings.lengths), _parts(judged)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_depth, by_length, by_place = figure.subplots(1, 3)
    for number, name in enumerate(judged[0].names):
        dense = name == "dense"
        style = {"color": "black" if dense else f"C{number - 1}", "lw": 2.4 if name == "searched" else 1.3}
        style["zorder"] = 5 if dense else 3
        dashes = "--" if dense else "-"
        found = [share(judged, name, longest, depth)[0] for depth in settings.depths]
        by_depth.plot(settings.depths, found, dashes, marker="o", ms=3, label=name, **style)
        shares = torch.tensor([share(judged, name, n) for n in settings.lengths])
        spread = (shares[:, 0] - shares[:, 1]).abs().tolist(), (shares[:, 2] - shares[:, 0]).abs().tolist()
        moved = [at + 0.04 * (number - 2.5) for at in range(len(settings.lengths))]
        by_length.errorbar(moved, shares[:, 0].tolist(), spread, ls=dashes, marker="o", ms=3, capsize=2, **style)
        if not dense:
            values = [ratio(judged, name, slice(a, b))[0] for a, b in parts]
            by_place.plot(range(len(parts)), values, marker="o", ms=3, **style)
    by_depth.set(xlabel="depth of the record (0: farthest)", ylabel="share of values found", ylim=(-0.03, 1.03))
    by_depth.set_title(f"retrieval at {longest:,} tokens", fontsize=10)
    by_depth.legend(fontsize=7)
    by_length.set_xticks(range(len(settings.lengths)), [f"{n:,}" for n in settings.lengths])
    by_length.set(xlabel="prompt, tokens", ylim=(-0.03, 1.03))
    by_length.set_title("retrieval over all depths (95 %)", fontsize=10)
    by_place.axhline(1, color="black", ls="--", lw=1)
    by_place.set_xticks(range(len(parts)), [f"{a}-{b}" for a, b in parts], rotation=30, fontsize=7)
    by_place.set(xlabel="tokens of the window", ylabel="perplexity over dense")
    by_place.set_title(f"running text, windows of {settings.window:,}", fontsize=10)
    for axes in (by_depth, by_length, by_place):
        axes.grid(alpha=0.3)
    return figure


def _interval(numbers: tuple[float, float, float], digits: int) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{value} ({low}-{high})"


def _parts(judged: Sequence[Judged]) -> list[tuple[int, int]]:
    window = judged[0].settings.window
    edges = [edge for edge in EDGES if edge < window] + [window]
    return list(pairwise(edges))


def _rows(one: Judged) -> Iterator[tuple[object, ...]]:
    settings = one.settings
    for name in one.names:
        for length, kept in one.memory[name].items():
            yield one.seed, name, "cache, share of dense", length, "", f"{kept:.6g}", 1
        losses = losses_of(one, name)
        for a, b in _parts([one]):
            value = f"{losses[:, a:b].mean().item():.6g}"
            yield one.seed, name, "text, nats a token", settings.window, f"{a}-{b}", value, len(losses)
        for length, row in one.found[name].items():
            for depth, hits in row.items():
                yield one.seed, name, "retrieval, found", length, depth, hits, settings.trials
