"""`attn-plugins simulate`: what a GNA setting can gain at a tiling, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import per_axis, sizes

if TYPE_CHECKING:
    from attn_plugins.plan.simulator import Simulation

SHOWN = 12  # rows of the table of strides; the rest differ by less and less


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(simulate)


def simulate(
    grid: Annotated[str, typer.Option(help="Tokens per axis, such as 30x48x80 (T x H x W).")],
    window: Annotated[str, typer.Option(help="Keys per axis; -1 is the whole axis.")],
    q_tile: Annotated[str, typer.Option(help="Queries per tile and axis, such as 4x8x8.")],
    kv_tile: Annotated[str, typer.Option(help="Keys per tile and axis, such as 2x8x8.")],
    stride: Annotated[str, typer.Option(help="Queries per axis that share one window.")] = "1",
    dilation: Annotated[str, typer.Option(help="Step between the keys of a window.")] = "1",
    causal: Annotated[str, typer.Option(help="1 on the axes that look back only, such as 1x0x0.")] = "0",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="KV tiles begin where the window begins.")] = False,
    useful_strides: Annotated[bool, typer.Option("--useful-strides", help="Rank the strides worth trying.")] = False,
    share: Annotated[
        float | None, typer.Option(help="Attention's share of a step x share of sparse steps: estimates end to end.")
    ] = None,
) -> None:
    """Estimate the gain of a GNA setting from the tiles it visits (arXiv 2504.16922, section 4)."""
    import attn_plugins
    from attn_plugins.plan.simulator import rank

    shape = sizes("grid", grid)
    setting: dict[str, Any] = dict(
        grid=shape,
        window=per_axis("window", window, len(shape)),
        dilation=per_axis("dilation", dilation, len(shape)),
        causal=tuple(bool(value) for value in per_axis("causal", causal, len(shape))),
        q_tile=per_axis("q-tile", q_tile, len(shape)),
        kv_tile=per_axis("kv-tile", kv_tile, len(shape)),
        dynamic=dynamic,
    )
    asked = attn_plugins.simulate(stride=per_axis("stride", stride, len(shape)), **setting)
    rows = [asked]
    if useful_strides:
        rows += [row for row in rank(**setting) if row.stride != asked.stride]
    out = console()
    out.print(_table(rows[: SHOWN + 1], share))
    if len(rows) > SHOWN + 1:
        out.print(f"{len(rows) - SHOWN - 1} more stride combinations not shown (slower than these).")


def _table(rows: list[Simulation], share: float | None) -> Table:
    from attn_plugins.plan.simulator import end_to_end

    first = rows[0]
    title = f"window {_joined(first.window)}, {'dynamic' if first.dynamic else 'static'} KV tiles"
    names = ["stride", "KV tiles visited", "speed-up bound", "FLOP bound", "block-sparse"]
    table = Table(*names, *(["end to end"] if share is not None else []), title=title)
    for row in rows:
        cells = [
            _joined(row.stride),
            f"{row.visited} of {row.total}",
            f"{row.speedup:.2f}x",
            f"{row.flop_speedup:.2f}x",
            "yes" if row.block_sparse else "no",
        ]
        if share is not None:
            cells.append(f"{end_to_end(row.speedup, share):.2f}x (at most {end_to_end(float('inf'), share):.2f}x)")
        table.add_row(*cells)
    return table


def _joined(values: tuple[int, ...]) -> str:
    return "x".join(str(value) for value in values)
