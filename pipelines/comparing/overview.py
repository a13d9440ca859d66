"""One table for all methods beside each other: the same numbers for the terminal, the report, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from attn_plugins.metrics import Interval, quantile

Figures = dict[str, float | None]  # by the names of COLUMNS; a name with _low and _high: the ends of a 95 % interval
ENDS = ("_low", "_high")
UNKNOWN = "-"


@dataclass(frozen=True)
class Column:
    """`name`: in CSV and JSON, with its unit. `title`: in tables. `show`: a number as text. `meaning`: one line."""

    name: str
    title: str
    show: Callable[[float], str]
    meaning: str


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def times(value: float) -> str:
    return f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{value:.1%}"


def power(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


COLUMNS = (
    Column("density", "density", percent, "share of the dense pairs that are computed, or of dense attention's cost"),
    Column("step_seconds", "step", milliseconds, "a denoising step; of a method, a sparse one; median"),
    Column("step_speedup", "faster", times, "the dense step over this one"),
    Column("step_bound", "at most", times, "the same if attention cost nothing (Amdahl)"),
    Column("attention_seconds", "attention", milliseconds, "attention at the patched sites within a step or forward"),
    Column("attention_speedup", "faster", times, "dense attention over this one"),
    Column("attention_share", "its share", percent, "attention's share of the step or forward it was timed in"),
    Column("job_seconds", "job", lambda seconds: f"{seconds:.2f} s", "the whole call of the pipeline; median"),
    Column("job_speedup", "faster", times, "the dense job over this one"),
    Column("job_bound", "at most", times, "the same if attention cost nothing in the sparse steps (Amdahl)"),
    Column("prefill_seconds", "prefill", milliseconds, "the prompt up to the first new token; median"),
    Column("prefill_speedup", "faster", times, "the dense prefill over this one"),
    Column("prefill_bound", "at most", times, "the same if attention cost nothing (Amdahl)"),
    Column("decode_seconds", "a token", milliseconds, "each new token after the first; median"),
    Column("decode_speedup", "faster", times, "dense decoding over this one"),
    Column("decode_bound", "at most", times, "the same if attention cost nothing (Amdahl)"),
    Column("cache_bytes", "cache", size, "keys and values that are kept at the end of the generation"),
    Column("batch_seconds", "batch", milliseconds, "one forward of a batch of pictures; median"),
    Column("batch_speedup", "faster", times, "the dense forward over this one"),
    Column("batch_bound", "at most", times, "the same if attention cost nothing (Amdahl)"),
    Column("recall", "recall", percent, "share of the dense attention weights on the pairs that are kept"),
    Column("relative_l1", "rel. L1", power, "of the attention's output, sparse against dense, layer by layer"),
    Column("drift", "drift", power, "relative L2 of the last latents against dense"),
    Column("latent_psnr", "latents", decibel, "PSNR of the last latents over their dense range"),
    Column("psnr", "PSNR", decibel, "of the pictures against dense with the same noise"),
    Column("ssim", "SSIM", lambda value: f"{value:.4f}", "the same; 1 is equal"),
    Column("lpips", "LPIPS", lambda value: f"{value:.4f}", "the same by AlexNet's features; 0 is equal"),
    Column("perplexity", "perplexity", lambda value: f"{value:.4g}", "of held-out text"),
    Column("perplexity_ratio", "over dense", lambda value: f"{value:.4f}", "perplexity over dense on the same rows"),
    Column("kl", "KL", power, "KL(dense || patched) of each prediction, nats; mean"),
    Column("kl_q50", "median", power, "of the same"),
    Column("kl_q90", "90 %", power, "quantile of the same"),
    Column("kl_q99", "99 %", power, "quantile of the same"),
    Column("top1", "top-1", lambda value: f"{value:.2%}", "share of predictions whose first choice is dense's"),
)
NAMES = tuple(column.name for column in COLUMNS)


def with_ends(name: str, interval: Interval) -> Figures:
    """The ends of an interval beside a figure."""
    return {name + ENDS[0]: interval.low, name + ENDS[1]: interval.high}


def quantiles_of_kl(kl: torch.Tensor) -> Figures:
    """The median and the two tails of divergences."""
    return {f"kl_q{share}": quantile(kl, share / 100) for share in (50, 90, 99)}


def cell(column: Column, figures: Mapping[str, float | None]) -> str:
    """A figure as text, with its interval if it has one."""
    value = figures.get(column.name)
    if value is None or math.isnan(value):
        return UNKNOWN
    low, high = (figures.get(column.name + end) for end in ENDS)
    if low is None or high is None or math.isnan(low) or math.isnan(high) or low == high:
        return column.show(value)
    return f"{column.show(value)} ({column.show(low)} to {column.show(high)})"


def columns_of(rows: Sequence[Mapping[str, float | None]]) -> list[Column]:
    """The columns that some row has a number for."""
    return [column for column in COLUMNS if any(row.get(column.name) is not None for row in rows)]


def overview(rows: Mapping[str, Mapping[str, float | None]], meanings: bool = False) -> list[tuple[str, ...]]:
    """Cells of the table, header first: a line for each figure, a column for each name; in the last what it means."""
    lines = [("", *rows, *(["meaning"] if meanings else []))]
    for column in columns_of(list(rows.values())):
        cells = [cell(column, figures) for figures in rows.values()]
        lines.append((column.title, *cells, *([column.meaning] if meanings else [])))
    return lines


def records(rows: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, str | float | None]]:
    """The numbers as they are, one record a row, for CSV: the same keys in each, None where there is none."""
    columns = columns_of(list(rows.values()))
    ends = {name + end for name in NAMES for end in ENDS}
    known = {key for figures in rows.values() for key in figures}
    names = [name for column in columns for name in (column.name, *(column.name + end for end in ENDS))]
    names = [name for name in names if name not in ends or name in known]
    return [{"method": label, **{name: figures.get(name) for name in names}} for label, figures in rows.items()]
