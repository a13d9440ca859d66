"""`attn-plugins tune`: a setting of your own for a model on disk, by layer, head group and step, with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import options as read_options

DIGITS = ("37", "58", "12", "90", "46", "21", "85")  # prompts of the embedded video model
ROWS = 10


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("tune")(tune)


def tune(
    model: Annotated[
        str, typer.Argument(help="Folder of a pipeline or a causal language model, moving_digits, or small_llama.")
    ] = "moving_digits",
    faster: Annotated[float | None, typer.Option(help="Times faster than dense, whole runs. Default 1.2.")] = None,
    lose: Annotated[float | None, typer.Option(help="Loss that may not be exceeded, instead of --faster.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts; several times, the more the better.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each prompt that is reported.", min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps of a run; default: the pipeline's.", min=2)] = None,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", "-a", help="Argument of the pipeline's call: height=512.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text for a language model; several times.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a row of text.", min=64)] = 4096,
    rows: Annotated[int, typer.Option(help="Rows of text in all.", min=4)] = ROWS,
    method: Annotated[list[str] | None, typer.Option(help="Methods to try; default: all that can be.")] = None,
    probes: Annotated[int, typer.Option(help="Forwards in which candidates are measured.", min=1)] = 3,
    groups: Annotated[int | None, typer.Option(help="Runs of layers that share a choice; default: none do.")] = None,
    head_groups: Annotated[int, typer.Option(help="Runs of heads that may differ (gna).", min=1)] = 1,
    plans: Annotated[int, typer.Option(help="Plans of the front that are run.", min=1)] = 6,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder; a tuning that was interrupted in it goes on.")] = Path("out/tune"),
) -> None:
    """Choose, for each layer and range of steps, among all methods: "be y times faster", or "lose no more than x"."""
    import torch

    from attn_plugins.pipelines.comparing import loading
    from attn_plugins.pipelines.tune import TuneSettings
    from attn_plugins.pipelines.tune import tune as run
    from attn_plugins.pipelines.tuner.files import table
    from attn_plugins.pipelines.tuner.outcomes import Budget
    from attn_plugins.report import table as aligned

    budget = Budget(faster, lose)
    settings = TuneSettings(
        tuple(method) if method else None, probes=probes, groups=groups, head_groups=head_groups, plans=plans
    )
    if threads:
        torch.set_num_threads(threads)
    place = loading.locate(model)
    loaded = loading.load(place, device, dtype)
    if place.kind == "pipeline":
        subject, cases = _pipeline(loaded, list(prompt or ()), prompts, seeds, steps, read_options(argument or []))
    elif place.kind == "language":
        subject, cases = _language(loaded, list(text or ()), tokens, rows)
    else:
        raise ValueError(f"{model} is an image classifier: tune takes pipelines and causal language models")
    out_to = console()
    result = run(
        subject, calibration=cases.calibration, validation=cases.validation, test=cases.test, budget=budget,
        settings=settings, folder=out, progress=out_to.is_terminal,
    )  # fmt: skip
    out_to.print("\n".join(aligned(table(result))), markup=False, soft_wrap=True)
    for line in result.failed:
        out_to.print(f"not run: {line}", markup=False, soft_wrap=True)
    if not result.met:
        out_to.print("nothing that was tried meets the budget; this is the nearest", soft_wrap=True)
    for path in result.save(out):
        out_to.print(str(path), soft_wrap=True)
    out_to.print(f'attn_plugins.patch(obj, "{out / "recipe.yaml"}")', markup=False, soft_wrap=True)


def _pipeline(
    loaded: Any, given: list[str], file: Path | None, seeds: int, steps: int | None, arguments: dict[str, Any]
) -> tuple[Any, Any]:
    from attn_plugins.pipelines.comparing.inputs import prompts
    from attn_plugins.pipelines.tuner.cases import of_prompts
    from attn_plugins.pipelines.tuner.diffusion import DiffusionSubject

    call: Callable[[str], Mapping[str, Any]]
    if loaded.place.embedded:
        from attn_plugins.pipelines.demo_model import prompt as digits

        known = {"steps": steps or 20, **arguments}
        found, call = list(given or DIGITS), lambda text: digits(text, **known)
    else:
        found = prompts(given, file, "")
        if found == [""]:
            raise ValueError("give prompts: --prompt '...' several times, or --prompts FILE with one a line")
        length = {} if steps is None else {"num_inference_steps": steps}
        call = lambda text: {"prompt": text, **length, **arguments}  # noqa: E731
    return DiffusionSubject(loaded.obj), of_prompts(found, seeds, call)


def _language(loaded: Any, files: list[Path], tokens: int, rows: int) -> tuple[Any, Any]:
    from attn_plugins.pipelines.comparing.inputs import start_token, text
    from attn_plugins.pipelines.tuner.cases import of_text
    from attn_plugins.pipelines.tuner.language import LanguageSubject

    ids, note = text(loaded.reader, files, bool(loaded.place.embedded))
    console().print(note, markup=False, soft_wrap=True)
    return LanguageSubject(loaded.obj), of_text(ids, tokens, rows, start_token(loaded.reader))
