"""`attn-plugins bench`: masks by lengths by backends on this machine; and context parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.pipelines.commands.app import console

OUT = Path("out/bench.csv")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(bench)
    app.command("bench-parallel")(bench_parallel)


def bench(
    masks: Annotated[str, typer.Option(help="Names joined by commas; default: all.")] = "",
    backends: Annotated[str, typer.Option(help="Names joined by commas; default: all.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens, joined by commas.")] = "2048,4096,8192",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, joined by commas; default bf16 on a GPU.")] = "",
    head_dim: Annotated[str, typer.Option(help="Head sizes, joined by commas; default 64, 128 on a GPU.")] = "",
    heads: Annotated[int, typer.Option(help="Query heads; default 4, 16 on a GPU.")] = 0,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values; default: as many.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="The backward alone, and both together, too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="1,024 and 2,048 tokens, half a second each.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    seconds: Annotated[float, typer.Option(help="Timed rounds of a mask, all backends together.", min=0.0)] = 2.0,
    rounds: Annotated[int, typer.Option(help="Timed rounds, at the least.", min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many; 0 is no limit.", min=0.0)] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the file has of this commit.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Measure nothing: table and plots of the file.")] = False,
    out: Annotated[Path, typer.Option(help="The CSV file; table and plots go beside it.")] = OUT,
    page: Annotated[Path | None, typer.Option(help="With --plot: a Markdown page to put the tables into.")] = None,
) -> None:
    """Check and time masked attention by every backend that is installed (after arXiv 2510.17896)."""
    import torch

    from attn_plugins.pipelines import bench as pipeline

    screen = console()
    if page is not None and not plot:
        raise ValueError("--page goes with --plot")
    if plot:
        for path in pipeline.draw(out, page):
            screen.print(f"wrote {path}", markup=False, soft_wrap=True)
        return
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = where.startswith("cuda")
    if threads:
        torch.set_num_threads(threads)
    settings = pipeline.BenchSettings(
        masks=_names(masks),
        backends=_names(backends),
        lengths=_numbers("lengths", lengths),
        dtypes=_names(dtype) or ("bf16" if gpu else "fp32",),
        head_dims=_numbers("head-dim", head_dim) if head_dim else (128 if gpu else 64,),
        heads=heads or (16 if gpu else 4),
        kv_heads=kv_heads or heads or (16 if gpu else 4),
        batch=batch,
        backward=backward,
        device=where,
        seconds=seconds,
        rounds=(rounds, max(rounds, 51)),
    )
    settings = pipeline.quick(settings) if quick else settings
    with _bar(len(pipeline.jobs(settings))) as (tick, say):
        path = pipeline.run(settings, out, resume=resume, minutes=minutes, tick=tick, say=say)
    screen.print(f"wrote {out} and {path}", markup=False, soft_wrap=True)


def bench_parallel(
    processes: Annotated[str, typer.Option(help="Numbers of processes, joined by commas.")] = "2,4",
    tokens: Annotated[int, typer.Option(help="Of the sequence.", min=1)] = 512,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values; default: as many.")] = 0,
    head_dim: Annotated[int, typer.Option(help="Head size.", min=1)] = 32,
) -> None:
    """Ulysses over gloo processes: is it right, how many bytes move, and what that costs on 8 to 64 GPUs on paper."""
    from attn_plugins.pipelines.benching import network, parallel

    screen = console()
    for count in _numbers("processes", processes):
        found = parallel.check(count, tokens, heads, kv_heads or heads, head_dim)
        screen.print(found.line, markup=False, soft_wrap=True)
    for line in network.table():
        screen.print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """What advances the bar, and what prints above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield (
            lambda done: bar.update(task, advance=1, description=done),
            lambda text: bar.console.print(text, markup=False, soft_wrap=True),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`"2048,4096"` as numbers; `8k` is 8192.

    Raises:
        ValueError: anything else; the message names the option.
    """
    found = []
    for part in _names(text):
        number, unit = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"--{option} {text}: give whole numbers joined by commas, such as 2048,4096 or 2k,4k")
        found.append(int(number) * unit)
    return tuple(found)
