"""`attn-plugins demo | compare`: dense against patched, in numbers and in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import options as read_options

if TYPE_CHECKING:
    from attn_plugins.pipelines.comparing.comparison import Comparison

Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Noise; may be given several times. Default 0.")]
Quality = Annotated[str, typer.Option(help="Which of a preset's settings: safe, balanced or fast.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the method or of patch: window=8x12x12.")
]
Out = Annotated[Path, typer.Option(help="Folder for the pictures.")]
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
    _tell(found, out, f"demo_{method}")


def compare(
    folder: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A diffusers pipeline on disk.")],
    methods: Annotated[list[str], typer.Argument(metavar="METHOD...", help="One or more names that `list` shows.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a cat walking on a beach at sunset",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number.", min=1)] = None,
    seed: Seeds = None,
    height: Annotated[int | None, typer.Option(help="px")] = None,
    width: Annotated[int | None, typer.Option(help="px")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    quality: Quality = "balanced",
    option: Options = None,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", "-a", help="NAME=VALUE of the pipeline's call: guidance_scale=4.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    measures: Measures = 64,
    threads: Threads = 0,
    out: Out = Path("out"),
) -> None:
    """A pipeline of your own, dense and patched, same seed. Nothing is downloaded."""
    from attn_plugins.pipelines.compare import compare as run
    from attn_plugins.registry import method as known

    _use(threads)
    for method in methods:
        known(method)  # an unknown name should fail before a model is loaded
    given = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    call: dict[str, Any] = {"prompt": prompt, **{name: value for name, value in given.items() if value is not None}}
    call |= read_options(argument or [])
    settings = {"quality": quality, **read_options(option or [])}
    with console().status(f"loading {folder}"):
        pipe = load_pipeline(folder, device, dtype)
    for method in methods:
        found = run(
            pipe, method, call_kwargs=call, seeds=seed or [0], options=settings, measure_rows=measures, progress=True
        )
        _tell(found, out, f"{folder.resolve().name}_{method}")


def load_pipeline(folder: Path, device: str | None = None, dtype: str | None = None) -> Any:
    """A diffusers pipeline from a folder.

    Raises:
        ValueError: no pipeline there, or an unknown dtype.
    """
    import torch

    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder}: no model_index.json there; give the folder of a diffusers pipeline on this machine"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = dtype or ("float32" if device == "cpu" else "bfloat16")
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {name}: give float32, bfloat16 or float16")
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, torch_dtype=kind, local_files_only=True).to(device)


def _use(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _tell(found: Comparison, out: Path, name: str) -> None:
    """The tables, and where the pictures and the numbers are."""
    from attn_plugins.pipelines.comparing import measure_files, pictures
    from attn_plugins.pipelines.comparing.comparison import LAYERS_TITLE, STEPS_TITLE

    screen = console()
    seeds = ", ".join(map(str, found.seeds))
    screen.print(found.summary, markup=False, soft_wrap=True)
    title = f"{found.method} on {found.model}: {found.steps} steps, seed {seeds}; {found.machine}"
    screen.print(_table(title, [("", "dense", "patched", ""), *found.rows()]))
    screen.print(_table(STEPS_TITLE, found.per_step()))
    if found.measures is not None:
        if found.measures.layer_steps:
            screen.print(_table(LAYERS_TITLE, found.measures.per_layer()))
        screen.print(found.measures.summary(), markup=False, soft_wrap=True)
    for path in [*pictures.write(found, out, name), *measure_files.write(found, out, name)]:
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    if not measure_files.can_plot():
        screen.print("no plot of the steps: it needs matplotlib (pip install 'attn-plugins[plots]')", markup=False)


def _table(title: str, rows: list[tuple[str, ...]]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    return table
