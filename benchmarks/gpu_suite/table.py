"""The results as Markdown: what it was measured on, a table per direction, what falls short."""

from __future__ import annotations

from collections.abc import Sequence

from attn_plugins.pipelines.benching.sides import DIRECTIONS
from benchmarks.gpu_suite.columns import Row
from benchmarks.gpu_suite.summary import Line, lines, summary

HEAD = (
    "case", "tokens", "dtype", "D", "density (mask)", "dense ms", "by", "peers, parts ms", "ours ms (.2 - .8)",
    "speed-up", "of ideal", "of the mask's", "index ms", "of ideal, 1 call", "extra MiB",
)  # fmt: skip


def markdown(rows: Sequence[Row], title: str = "GPU results") -> str:
    """Made from the rows alone, so that it can be made again from the CSV."""
    parts = [f"# {title}", "", *_environment(rows), ""]
    for direction in DIRECTIONS:
        some = [line for line in lines(rows) if line.any["direction"] == direction]
        if some:
            parts += [f"## {direction}", "", _row(HEAD), _row(["---"] * len(HEAD))]
            parts += [_row(_cells(line)) for line in some]
            parts += [""]
    parts += ["## Against the marks", ""]
    for heading, found in summary(rows).items():
        parts += [
            f"**{heading}: {len(found) or 'none'}**",
            "",
            *(f"- {text}" for text in found),
            *([""] if found else []),
        ]
    return "\n".join(parts).rstrip() + "\n"


def _environment(rows: Sequence[Row]) -> list[str]:
    columns = ("gpu", "driver", "cuda", "torch", "triton", "natten", "commit")
    found = {name: " / ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in columns}
    clock = [float(str(row[f"sm_mhz_{when}"])) for row in rows for when in ("before", "after")]
    known = [value for value in clock if value > 0]
    shown = f"{min(known):.0f} to {max(known):.0f} MHz" if known else "-1"
    return [", ".join(f"{name} {value}" for name, value in found.items()) + f". SM clock beside the runs: {shown}."]


def _cells(line: Line) -> list[str]:
    row = line.ours or line.any
    side = str(row["side"])
    others = [
        f"{name} {_number(line.number(name, 'ms'))}"
        for name, one in line.sides.items()
        if one["role"] in ("peer", "part")
    ]
    times = (line.number(side, name) for name in ("ms", "p20_ms", "p80_ms"))
    ms, low, high = (_number(value) for value in times)
    return [
        f"{row['case']} ({row['shape']}, {row['option']})",
        f"{int(float(str(row['tokens']))):,}",
        str(row["dtype"]),
        str(row["head_dim"]),
        f"{_number(line.number(side, 'density'))} ({_number(line.number(side, 'work'))})",
        _number(line.number(side, "baseline_ms")),
        str(row["baseline"]),
        ", ".join(others) or "-",
        f"{ms} ({low} - {high})",
        *(_number(line.number(side, name)) for name in ("speedup", "share", "share_of_work", "index_ms")),
        *(_number(line.number(side, name)) for name in ("share_one_call", "extra_mib")),
    ]


def _number(value: float) -> str:
    return "-1" if value < 0 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
