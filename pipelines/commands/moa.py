"""`attn-plugins moa-search | moa-evaluate`: a plan of spans for a language model on disk, and what it is worth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_plugins.pipelines.commands.app import console

if TYPE_CHECKING:
    from attn_plugins.pipelines.moa.calibration import Texts
    from attn_plugins.pipelines.moa.profile import Tick

Folder = Annotated[
    Path | None,
    typer.Argument(metavar="[MODEL_DIR]", help="A causal language model on disk; without it, the embedded one."),
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option(help="Text between the records; may be given several times. Default: Python's own library and help."),
]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")]
Dtype = Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("moa-search")(moa_search)
    app.command("moa-evaluate")(moa_evaluate)


def moa_search(
    folder: Folder = None,
    density: Annotated[float, typer.Option(help="Most of a dense cache that may be kept, at every length.")] = 0.5,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens to profile at; several times. Default 1024, 2048, 4096.")
    ] = None,
    validate_at: Annotated[int | None, typer.Option(help="Tokens, not profiled; default: between the longest.")] = None,
    reach: Annotated[int | None, typer.Option(help="Longest length the plan is for; default: the longest one.")] = None,
    rows: Annotated[int, typer.Option(help="Calibration rows of each length.", min=1)] = 12,
    validation_rows: Annotated[int, typer.Option(help="Rows of each kind that choose the plan.", min=1)] = 4,
    influence: Annotated[
        str, typer.Option(help="windows: exact for all that a window hides; pairs: the paper's sum over pairs.")
    ] = "windows",
    step: Annotated[int | None, typer.Option(help="Tokens between alphas; default: half of the shortest.")] = None,
    parts: Annotated[int, typer.Option(help="Parts of beta's way from 0 to 1.", min=1)] = 8,
    solver: Annotated[str, typer.Option(help="auto, milp or lp.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of calibration and validation.")] = 0,
    text: TextFiles = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="Folder; a search that was interrupted in it goes on.")] = Path("out/moa"),
) -> None:
    """Find a span for every KV head (MoA): profile, choose under a budget, validate at an unseen length."""
    from attn_plugins.pipelines import moa_search as pipeline
    from attn_plugins.pipelines.moa.options import SearchSettings

    settings = SearchSettings(
        density, tuple(length or (1024, 2048, 4096)), validate_at, reach, rows, validation_rows,
        influence=influence, step=step, parts=parts, solver=solver, seed=seed,
    )  # fmt: skip
    model, tokenizer, texts = _load(folder, text, device, dtype, threads)
    with _bar(pipeline.work(settings)) as tick:
        found = pipeline.search(model, tokenizer, texts, out, settings, name=_name(folder), tick=tick)
    best = found.validated[found.best]
    out_to = console()
    out_to.print(
        f"{len(found.plans)} plans of the Pareto set; number {found.best} is the best at {settings.unseen} tokens:"
    )
    out_to.print(f"  running text {best.text:.4f} nats a token (dense {found.dense.text:.4f})")
    out_to.print(f"  the dense model's answers {best.answers:.4f} nats a token (dense {found.dense.answers:.4f})")
    for n in settings.bounded:
        out_to.print(
            f"  {n} tokens: {found.plan.density(n):.1%} of the cache, {found.plan.pair_fraction(n):.1%} of the pairs"
        )
    for path in found.save(out):
        out_to.print(str(path), soft_wrap=True)


def moa_evaluate(
    folder: Folder = None,
    search: Annotated[
        list[Path] | None, typer.Option(help="A folder that moa-search wrote; once for each seed. Default out/moa.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of running text for each seed.", min=1)] = 12,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 4096,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of prompts; default 1024, 2048, 4096.")] = None,
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth, for each seed.", min=1)] = 8,
    decode: Annotated[int, typer.Option(help="Tokens to time in generation; 0: none.", min=0)] = 64,
    text: TextFiles = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="Folder of the tables and the picture.")] = Path("out/moa"),
) -> None:
    """Compare searched plans with dense and with other plans of the same memory, on held-out text and prompts."""
    from attn_plugins.methods.moa import load_plan
    from attn_plugins.pipelines.moa import baselines, evaluation, report
    from attn_plugins.pipelines.moa.options import SearchSettings
    from attn_plugins.pipelines.moa.profile import Profile
    from attn_plugins.pipelines.moa_search import FOUND, PLAN, PROFILE

    settings = evaluation.EvaluationSettings(window, windows, tuple(length or (1024, 2048, 4096)), trials=trials)
    folders = search or [Path("out/moa")]
    for found in folders:
        if not (found / PLAN).is_file():
            raise ValueError(f"{found}: no {PLAN} there; run attn-plugins moa-search --out {found} first")
    model, tokenizer, texts = _load(folder, text, device, dtype, threads)
    judged = []
    with _bar(6 * len(folders) * evaluation.work(settings)) as tick:
        for found in folders:
            told = json.loads((found / FOUND).read_text(encoding="utf-8"))["settings"]
            searched = SearchSettings(**{**told, "lengths": tuple(told["lengths"])})
            plans = baselines.contenders(load_plan(found / PLAN), Profile.load(found / PROFILE), searched)
            path = found / evaluation.FILE
            judged.append(
                evaluation.judge(model, tokenizer, texts, plans, searched.seed, settings, path=path, tick=tick)
            )
    out_to = console()
    out_to.print(report.table(judged), markup=False, soft_wrap=True)
    for path in report.write(judged, out):
        out_to.print(str(path), soft_wrap=True)
    if decode:
        _tell_decoding(model, load_plan(folders[0] / PLAN), texts, max(settings.lengths) - decode, decode)


def _tell_decoding(model: Any, plan: Any, texts: Texts, prompt: int, tokens: int) -> None:
    import torch

    from attn_plugins.pipelines.moa.decoding import decoding

    ids = torch.tensor([texts.test[:prompt]], device=model.device)
    found = decoding(model, plan, ids, tokens=tokens)
    for name, rate in found.rates.items():
        console().print(f"{name} cache: {rate:.1f} tokens/s at {found.length} tokens, {found.bytes[name]:,} bytes")


def _load(
    folder: Path | None, text: list[Path] | None, device: str | None, dtype: str | None, threads: int
) -> tuple[Any, Any, Texts]:
    """Model, tokenizer and texts.

    Raises:
        ValueError: no model there, an unknown dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attn_plugins.pipelines.moa.calibration import Texts
    from attn_plugins.pipelines.small_llama import asset_folder

    folder = folder or asset_folder()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there; give the folder of a causal language model on this machine")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: legal are float32, bfloat16, float16")
    if threads:
        torch.set_num_threads(threads)
    with console().status(f"loading {folder.name}"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = Texts.of_files(tokenizer, text) if text else Texts.of_python(tokenizer)
    return model.eval().to(device), tokenizer, texts


def _name(folder: Path | None) -> str:
    return "small_llama" if folder is None else folder.resolve().name


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Tick]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda what, amount: bar.update(task, advance=amount, description=what)
