"""`attn-plugins upcycle`: dense checkpoints of one architecture become one mixture of experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.pipelines.commands.app import console


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("upcycle")(upcycle)


def upcycle(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.YML", help="What to mix, and how: docs/bam.md.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")],
    allow_identical: Annotated[bool, typer.Option("--allow-identical", help="Equal experts are no error.")] = False,
    shard_size: Annotated[float, typer.Option(help="Of a file, GB.", min=1e-6)] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report; write nothing.")] = False,
) -> None:
    """Mix dense models into one (BAM, BTX, sparse upcycling); an interrupted run goes on where it was."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from attn_plugins.pipelines import upcycle_bam as pipeline
    from attn_plugins.pipelines.upcycle.options import UpcycleSettings

    settings = UpcycleSettings.of_file(config)
    if allow_identical:
        settings = dataclasses.replace(settings, allow_identical=True)
    out_to = console()
    if not dry_run and out.exists():
        raise FileExistsError(f"{out} exists: give a folder that does not, or remove it first")
    with out_to.status("reading the experts' headers"):
        found = pipeline.plan(settings)
    if not dry_run:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=out_to, transient=True) as bar:
            task = bar.add_task("starting", total=found.size)
            pipeline.upcycle(
                found, out, shard=int(shard_size * 1e9),
                tick=lambda what, amount: bar.update(task, advance=amount, description=what),
            )  # fmt: skip
    for line in found.report.lines():
        out_to.print(line, markup=False, soft_wrap=True)
    if not dry_run:
        out_to.print(str(out), markup=False, soft_wrap=True)
