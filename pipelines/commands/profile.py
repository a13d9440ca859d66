"""`attn-plugins profile`: what the heads of a model attend to, what each is worth, and what follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_plugins.pipelines.commands.app import console
from attn_plugins.pipelines.commands.values import options as read_options

if TYPE_CHECKING:
    from attn_plugins.pipelines.profile import Profile
    from attn_plugins.pipelines.profiling.inputs import Inputs


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(profile)


def profile(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder on this machine, or moving_digits or small_llama.")
    ],
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file for a language model; several times.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Picture for a vision model; several times.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a text.", min=2)] = 1024,
    texts: Annotated[int, typer.Option(help="Texts.", min=1)] = 2,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", "-a", help="NAME=VALUE of the pipeline's call: height=480.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Query rows of each head and call.", min=1)] = 32,
    keep: Annotated[float, typer.Option(help="Share of the attention mass that suggestions keep.")] = 0.95,
    sinks: Annotated[int, typer.Option(help="First tokens of a text that spans keep anyway.", min=0)] = 64,
    importance: Annotated[
        int, typer.Option(help="Forwards on which each head is switched off; 0: importance is not measured.", min=0)
    ] = 1,
    copies: Annotated[int, typer.Option(help="Heads that are tried at once.", min=1)] = 8,
    groups: Annotated[int, typer.Option(help="Most groups of heads.", min=1)] = 5,
    check: Annotated[bool, typer.Option("--check", help="Run the model as suggested, and measure the recall.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's own choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and recipes.")] = Path("out/profile"),
) -> None:
    """Attention by head: distance, entropy, groups, importance; and windows, spans and heads that it suggests."""
    import torch

    from attn_plugins.pipelines import profile as pipeline
    from attn_plugins.pipelines.profiling.inputs import Given, inputs_for

    if not 0 < keep < 1:
        raise ValueError(f"--keep {keep}: give a share of the attention mass between 0 and 1, such as 0.95")
    if threads:
        torch.set_num_threads(threads)
    given = Given(
        prompt=prompt or Given.prompt,
        call=read_options(argument or []),
        text=tuple(text or ()),
        length=length,
        texts=texts,
        images=tuple(images or ()),
        steps=steps,
        seed=seed,
    )
    with console().status(f"loading {model}"):
        inputs = inputs_for(model, given, device, dtype)
    with _bar(pipeline.work(inputs.obj, importance, copies)) as tick:
        found = pipeline.profile(
            inputs.obj, inputs.run, rows=rows, sinks=sinks, importance=importance, copies=copies, groups=groups,
            inputs=inputs.words, tick=tick,
        )  # fmt: skip
    for number, one in enumerate(found):
        _tell(one, inputs, keep, out if len(found) == 1 else out / str(number), check)


def _tell(one: Profile, inputs: Inputs, keep: float, folder: Path, check: bool) -> None:
    from attn_plugins.pipelines import profile as pipeline
    from attn_plugins.pipelines.profiling import plots, suggestions
    from attn_plugins.targets import find

    screen = console()

    def say(line: str) -> None:
        screen.print(line, markup=False, soft_wrap=True)

    for line in one.summary():
        say(line)
    written = [*one.save(folder), *plots.write(one, folder, keep)]
    family = next(target.family.name for target in find(inputs.obj) if type(target.root).__name__ == one.model)
    found = suggestions.suggest(one, keep)
    for line in suggestions.needed(one, keep):
        say(f"  least window of {line}")
    if not found:
        say(f"suggests nothing: no window keeps {keep:.0%} with much less, and all heads matter; try a smaller --keep")
    for each in found:
        path = each.save(folder, family)
        written.append(path)
        say(f"suggests {each.method}: {each.why[0]}")
        for why in each.why[1:]:
            say(f"    ({why})")
        if each.dense:
            say(f"    dense, or nearly so: {', '.join(each.dense)}")
        for line in suggestions.code(each, path, inputs.name):
            say(f"    {line}")
        if check and each.recall is not None:
            measures = pipeline.check(inputs.obj, inputs.run, each)
            say(f"    recall {each.recall:.1%} was expected; {measures.summary()}")
    for path in written:
        say(f"wrote {path}")
    if not plots.can_plot():
        say("no pictures: they need matplotlib (pip install matplotlib)")


def _bar(total: int) -> Any:
    """A context that gives a tick with what is done."""
    import contextlib

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task("running", total=total)
            yield lambda what: bar.update(task, advance=1, description=what)

    return shown()
