"""The results as Markdown, made from the rows alone, so that it can be made again from the CSV."""

from __future__ import annotations

from collections.abc import Sequence

from attn_plugins.pipelines.benching.backends.registry import BACKENDS
from attn_plugins.pipelines.benching.masks import MASKS
from attn_plugins.pipelines.benching.results import Row
from attn_plugins.pipelines.benching.sides import DIRECTIONS

GROUP = ("machine", "threads", "direction", "dtype", "head_dim", "heads", "kv_heads", "batch", "tokens")
UNITS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}


def markdown(rows: Sequence[Row], level: int = 2) -> str:
    """A table for each direction, precision and length: masks by backends, milliseconds, the fastest in bold.

    Beside the time stands the share of ideal: of the speed-up over the fastest dense kernel (causal where the mask is)
    that the mask's own pairs would allow. Backends that ran nowhere in a table are left out of it.
    """
    parts = [_measured_on(rows), ""] if rows else ["No rows.", ""]
    for group in sorted({tuple(str(row[name]) for name in GROUP) for row in rows}, key=_place):
        some = [row for row in rows if tuple(str(row[name]) for name in GROUP) == group]
        parts += [f"{'#' * level} {_title(some[0])}", "", *_lines(some), ""]
    return "\n".join(parts).rstrip() + "\n"


def _measured_on(rows: Sequence[Row]) -> str:
    names = ("machine", "threads", "torch", "triton", "natten", "flash_attn", "driver", "cuda", "commit")
    told = {name: " / ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in names}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value != "-1") + "."


def _place(group: tuple[str, ...]) -> tuple[object, ...]:
    """Where a table stands: by machine, direction, precision, and then by its sizes."""
    machine, threads, direction, dtype, *sizes = group
    return machine, int(threads), DIRECTIONS.index(direction), dtype != "fp32", dtype, [int(size) for size in sizes]


def _title(row: Row) -> str:
    heads = f"{row['heads']} heads" + (f" on {row['kv_heads']}" if row["kv_heads"] != row["heads"] else "")
    shape = f"{int(str(row['tokens'])):,} tokens, {UNITS[str(row['direction'])]}, {row['dtype']}, {heads}"
    return f"{shape}, head size {row['head_dim']}" + (f", batch {row['batch']}" if str(row["batch"]) != "1" else "")


def _lines(rows: Sequence[Row]) -> list[str]:
    ran = [name for name in BACKENDS if any(row["backend"] == name and number(row, "ms") > 0 for row in rows)]
    head = ["mask", "density", "dense ms", *ran, "index, fastest of ours"]
    lines = [_row(head), _row(["---"] * len(head))]
    for mask in (name for name in MASKS if any(row["mask"] == name for row in rows)):
        mine = {str(row["backend"]): row for row in rows if row["mask"] == mask}
        lines.append(_row(_cells(mask, mine, ran)))
    return lines


def _cells(mask: str, mine: dict[str, Row], ran: list[str]) -> list[str]:
    times = {name: number(row, "ms") for name, row in mine.items() if number(row, "ms") > 0}
    best = min(times, key=lambda name: times[name], default="")
    ours = min((name for name in times if name.startswith("ours")), key=lambda name: times[name], default="")
    first = next(iter(mine.values()))
    cells = [f"`{mask}`", short(number(first, "density")), short(number(first, "baseline_ms"))]
    for name in ran:
        row = mine.get(name)
        if row is None or number(row, "ms") <= 0:
            cells.append("wrong" if row is not None and str(row["reason"]).startswith("WRONG") else "-1")
            continue
        text = f"{short(number(row, 'ms'))} ({short(number(row, 'share'))})"
        cells.append(f"**{text}**" if name == best else text)
    return [*cells, f"{short(number(mine[ours], 'index_ms'))} ms" if ours else "-1"]


def number(row: Row, name: str) -> float:
    return float(str(row[name]))


def short(value: float) -> str:
    """Three digits; never an exponent; -1 as it is."""
    if value < 0:
        return "-1"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}".removeprefix("0") if value >= 1e-3 else "0"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
