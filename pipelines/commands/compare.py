"""`attn-plugins demo | compare`: dense against patched, in numbers, in pictures and as a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import options as read_options

if TYPE_CHECKING:
    from attn_plugins.pipelines.comparing.pages import AnyComparison


def _of(panel: str) -> Callable[..., Any]:
    """Options that stand under a title of their own in --help."""

    def option(text: str, *names: str, least: int | None = None) -> Any:
        return typer.Option(*names, help=text, min=least, rich_help_panel=panel)

    return option


_of_pipelines, _of_language, _of_classifiers = map(_of, ("Diffusers pipelines", "Language models", "Image classifiers"))
METHOD_HELP = (
    "What to compare with dense attention, one or more: a name that `list` shows, with options of its own if wanted "
    "(gna:window=8x12x12,dense_steps=0.2), a recipe file, or a folder of a method's weights."
)
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Noise; may be given several times. Default 0.")]
Quality = Annotated[str, typer.Option(help="Which of a preset's settings: safe, balanced or fast.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the method or of patch: window=8x12x12.")
]
Out = Annotated[Path, typer.Option(help="Folder for what is written.")]
Measures = Annotated[
    int,
    typer.Option(
        help="Query rows of each head that one more run compares with dense attention: recall and relative L1 by layer "
        "and step; 0 leaves it out.",
        min=0,
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(demo)
    app.command()(compare)


def demo(
    method: Annotated[str, typer.Option(help="A name that `list` shows.")] = "gna",
    quality: Quality = "balanced",
    option: Options = None,
    digits: Annotated[str, typer.Option(help="What to draw: pairs of digits, such as 37 or 37,04.")] = "37",
    frames: Annotated[int, typer.Option(help="Frames of the video, 1 to 64; trained with up to 16.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    seed: Seeds = None,
    measures: Measures = 64,
    threads: Threads = 0,
    out: Out = Path("out"),
) -> None:
    """The embedded video model, dense and patched, same seed: the table, and pictures side by side."""
    from attn_plugins.pipelines.compare import compare as run
    from attn_plugins.pipelines.comparing import report_files
    from attn_plugins.pipelines.demo_model import load_pipeline, prompt, to_frames

    _use(threads)
    arguments = prompt(digits.split(","), frames, steps=steps)
    with console().status("loading the embedded model"):
        pipe = load_pipeline()
    settings = {"quality": quality, **read_options(option or [])}
    found = run(
        pipe, method, call_kwargs=arguments, seeds=seed or [0], options=settings, to_frames=to_frames,
        measure_rows=measures, progress=True,
    )  # fmt: skip
    _tell(found)
    _tell_files(report_files.write("demo", [found], out))


def compare(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of a diffusers pipeline, a language model or an image classifier; moving_digits or "
            "small_llama, which come with the package; or a name on the hub.",
        ),
    ],
    methods: Annotated[list[str], typer.Argument(metavar="METHOD...", help=METHOD_HELP)],
    quality: Quality = "balanced",
    option: Options = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    threads: Threads = 0,
    out: Out = Path("out"),
    prompt: Annotated[
        list[str] | None, _of_pipelines("What to draw, several times; of moving_digits two digits.")
    ] = None,
    prompts: Annotated[Path | None, _of_pipelines("A file of prompts, one a line.")] = None,
    seed: Annotated[list[int] | None, _of_pipelines("Noise, several times; default 0.")] = None,
    steps: Annotated[int | None, _of_pipelines("Default: the pipeline's own number.", least=1)] = None,
    height: Annotated[int | None, _of_pipelines("px")] = None,
    width: Annotated[int | None, _of_pipelines("px")] = None,
    frames: Annotated[int | None, _of_pipelines("Of a video.")] = None,
    argument: Annotated[
        list[str] | None,
        _of_pipelines("NAME=VALUE of the pipeline's call: guidance_scale=4.", "--argument", "-a"),
    ] = None,
    measures: Annotated[
        int | None, _of_pipelines("Query rows of each head for recall by layer and step; default 64; 0: none.", least=0)
    ] = None,
    shown: Annotated[
        int | None, _of_pipelines("Show the pictures of so many prompts and seeds; default 4.", least=0)
    ] = None,
    text: Annotated[
        list[Path] | None, _of_language("Held-out text, several times; default: the standard library's.")
    ] = None,
    window: Annotated[int | None, _of_language("Tokens of a row; default 2048.", least=2)] = None,
    rows: Annotated[int | None, _of_language("Rows; default 16.", least=1)] = None,
    prompt_tokens: Annotated[
        int | None, _of_language("Of the prompt behind which speed is measured; default: as a row.", least=2)
    ] = None,
    tokens: Annotated[int | None, _of_language("To generate for the clock; default 32; 0: no speed.", least=0)] = None,
    pictures: Annotated[
        Path | None, _of_classifiers("A folder of pictures; default: photographs of installed packages.")
    ] = None,
    count: Annotated[int | None, _of_classifiers("Pictures; default 64.", least=1)] = None,
    batch: Annotated[int | None, _of_classifiers("Of them at a time; default 8.", least=1)] = None,
) -> None:
    """A model of your own, dense and patched, by one method or several: speed, cost and bound, as one HTML report.

    Pipelines: pictures side by side, drift, recall, PSNR, SSIM. Language models: perplexity, KL, prefill, decoding and
    cache. Image classifiers: KL and agreement. Dense is run twice: what it differs from itself is the noise floor.
    """
    from attn_plugins.pipelines.comparing import asked, job, loading, report_files

    _use(threads)
    settings = {"quality": quality, **read_options(option or [])}
    wanted = asked.read(methods, settings)  # an unknown name should fail before a model is loaded
    place = loading.locate(model)
    loading.checked_dtype(dtype or "float32")
    request = job.Request(
        prompts=tuple(prompt or ()), prompt_file=prompts, seeds=tuple(seed or ()), steps=steps, height=height,
        width=width, frames=frames, arguments=read_options(argument or []), measures=measures, shown=shown,
        text=tuple(text or ()), window=window, rows=rows, prompt_tokens=prompt_tokens, tokens=tokens,
        pictures=pictures, count=count, batch=batch,
    )  # fmt: skip
    request.check(place.kind)
    with console().status(f"loading {place.name}"):
        loaded = loading.load(place, device, dtype)
    found, notes = job.run(loaded, wanted, request, progress=True)
    if len(found) == 1:
        _tell(found[0])
    _tell_all(place.name, found, notes)
    _tell_files(report_files.write(place.name, found, out, notes))


def _use(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _tell(found: AnyComparison) -> None:
    """The tables of one method."""
    from attn_plugins.pipelines.comparing.comparison import LAYERS_TITLE, STEPS_TITLE, Comparison

    screen = console()
    if not isinstance(found, Comparison):
        screen.print(found.render(), markup=False, soft_wrap=True)
        return
    screen.print(found.summary, markup=False, soft_wrap=True)
    seeds = ", ".join(map(str, found.seeds))
    title = f"{found.method} on {found.model}: {found.steps} steps, seed {seeds}; {found.machine}"
    screen.print(_table(title, [("", "dense", "patched", ""), *found.rows()]))
    screen.print(_table(STEPS_TITLE, found.per_step()))
    if found.measures is not None:
        if found.measures.layer_steps:
            screen.print(_table(LAYERS_TITLE, found.measures.per_layer()))
        screen.print(found.measures.summary(), markup=False, soft_wrap=True)


def _tell_all(name: str, found: Sequence[AnyComparison], notes: Sequence[str]) -> None:
    """All methods in one table, and each one's verdict."""
    from attn_plugins.pipelines.comparing.overview import overview
    from attn_plugins.pipelines.comparing.pages import rows_of

    screen = console()
    if len(found) > 1:
        screen.print(_table(f"{name}: {found[0].machine}", overview(rows_of(found))))
    for one in found:
        for kind, line in zip(("speed", "cost", "bound"), one.sentences(), strict=True):
            screen.print(f"{one.method}, {kind}: {line}", markup=False, soft_wrap=True)
    for note in (*notes, *found[0].notes):
        screen.print(note, markup=False, soft_wrap=True)


def _tell_files(paths: Sequence[Path]) -> None:
    from attn_plugins.pipelines.comparing.measure_files import can_plot

    screen = console()
    for path in paths:
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    if not can_plot():
        screen.print("no plot of the steps: it needs matplotlib (pip install matplotlib)", markup=False)


def _table(title: str, rows: Sequence[tuple[Any, ...]]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    return table
