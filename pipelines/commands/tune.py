"""`attn-plugins tune`: a setting of your own for a model on disk, by layer, head group and step, with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import options as read_options

DIGITS = ("37", "58", "12", "90", "46", "21", "85")  # prompts of the embedded video model
SEEDS, TOKENS, ROWS = 3, 4096, 10


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
    seeds: Annotated[int | None, typer.Option(help="Seeds of each prompt that is reported. Default 3.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a run; default: the pipeline's.", min=2)] = None,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", "-a", help="Argument of the pipeline's call: height=512.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text for a language model; several times.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a row of text. Default 4096.", min=64)] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of text in all. Default 10.", min=4)] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods to try; default: all that can be.")] = None,
    probes: Annotated[int, typer.Option(help="Forwards in which candidates are measured.", min=1)] = 3,
    groups: Annotated[int | None, typer.Option(help="Runs of layers that share a choice; default: none do.")] = None,
    head_groups: Annotated[int, typer.Option(help="Runs of heads that may differ (gna).", min=1)] = 1,
    plans: Annotated[int, typer.Option(help="Plans of the front that are run.", min=1)] = 6,
    all_presets: Annotated[
        bool, typer.Option("--all-presets", help="Report every preset, not the best alone.")
    ] = False,
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
        tuple(method) if method else None, probes=probes, groups=groups, head_groups=head_groups, plans=plans,
        all_presets=all_presets,
    )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    place = loading.locate(model)
    of_pipelines = {"prompt": prompt, "prompts": prompts, "seeds": seeds, "steps": steps, "argument": argument}
    of_language = {"text": text, "tokens": tokens, "rows": rows}
    if place.kind == "pipeline":
        _refuse(of_language, "language models", model)
        found = _prompts(bool(place.embedded), prompt or (), prompts)
        loaded = loading.load(place, device, dtype)
        subject, cases = _pipeline(loaded, found, seeds or SEEDS, steps, read_options(argument or []))
    elif place.kind == "language":
        _refuse(of_pipelines, "pipelines", model)
        loaded = loading.load(place, device, dtype)
        subject, cases = _language(loaded, list(text or ()), tokens or TOKENS, rows or ROWS)
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


def _refuse(options: Mapping[str, Any], whose: str, model: str) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: of {whose}, which {model} is not")


def _prompts(embedded: bool, given: Sequence[str], file: Path | None) -> list[str]:
    """What to draw, each once; the embedded model has digits of its own."""
    from attn_plugins.pipelines.comparing.inputs import prompts

    found = prompts(given, file, "")
    if found == [""] and not embedded:
        raise ValueError("give prompts: --prompt '...' several times, or --prompts FILE with one a line")
    return list(DIGITS) if found == [""] else found


def _pipeline(
    loaded: Any, found: list[str], seeds: int, steps: int | None, arguments: dict[str, Any]
) -> tuple[Any, Any]:
    from attn_plugins.pipelines.demo_model import prompt as digits
    from attn_plugins.pipelines.tuner.cases import of_prompts
    from attn_plugins.pipelines.tuner.diffusion import DiffusionSubject

    call: Callable[[str], Mapping[str, Any]]
    if loaded.place.embedded:
        call = lambda text: digits(text, **{"steps": steps or 20, **arguments})  # noqa: E731
    else:
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
