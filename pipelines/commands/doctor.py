"""`attn-plugins doctor`: what a patch would do to a model, before a weight is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import sizes


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(doctor)


def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a name on the hub, or an embedded model: moving_digits, small_llama."
        ),
    ],
    method: Annotated[
        list[str] | None, typer.Option(help="Look at this one alone; may be given several times.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of a picture or video in px, height x width: 480x832.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a text.", min=1)] = None,
    text: Annotated[int | None, typer.Option(help="Tokens of the prompt in joint attention.", min=0)] = None,
    grid: Annotated[str | None, typer.Option(help="Tokens per axis instead of a size in px: 21x30x52.")] = None,
    quality: Annotated[str, typer.Option(help="Which of a preset's settings: safe, balanced or fast.")] = "balanced",
    timed: Annotated[bool, typer.Option(help="Measure this machine; else gains are told from FLOPs alone.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """What would be patched, the expected gain and its bound, why not more, and the line to paste."""
    import torch

    from attn_plugins.pipelines.doctor import diagnose
    from attn_plugins.pipelines.doctoring.sizes import Asked
    from attn_plugins.pipelines.doctoring.skeleton import skeleton

    if threads:
        torch.set_num_threads(threads)
    height, width = (None, None) if size is None else _pair(size)
    asked = Asked(height, width, frames, tokens, text, None if grid is None else sizes("grid", grid))
    found = diagnose(skeleton(model), asked, methods=method, quality=quality, timed=timed)
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in found], indent=1))
        return
    out = console()
    for row in found:
        for line in row.lines():
            style = "bold red" if line.startswith("WARNING") else "bold" if line.startswith("recommended") else None
            out.print(line, markup=False, soft_wrap=True, style=style)


def _pair(size: str) -> tuple[int, int]:
    values = sizes("size", size)
    if len(values) != 2:
        raise ValueError(f"--size {size}: give height x width in px, such as 480x832")
    return values[0], values[1]
