"""`attn-plugins mip`: a picture of several named things after photos of them, and maps of who was put where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.pipelines.commands.app import console

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
ADAPTER = "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.bin"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(mip)


def mip(
    prompt: Annotated[str, typer.Argument(help="What to draw; it says the names.")],
    reference: Annotated[
        list[str],
        typer.Option("--reference", "-r", help="NAME=FILE of each thing, or NAME=FILE,FILE of several photos."),
    ],
    mask: Annotated[
        list[str] | None, typer.Option("--mask", "-m", help="NAME=FILE, white where that thing may be.")
    ] = None,
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = SDXL,
    adapter: Annotated[str, typer.Option(help="A file, or owner/name/path on the Hub: IP-Adapter or MIP.")] = ADAPTER,
    image_encoder: Annotated[str | None, typer.Option(help="Default: the folder image_encoder beside it.")] = None,
    scale: Annotated[float | None, typer.Option(help="Of the adapter; default as published.")] = None,
    temperature: Annotated[float, typer.Option(help="1 is the paper; larger ones blend the references.")] = 1.0,
    background: Annotated[
        float | None, typer.Option(help="Bias of a column for what belongs to no reference; default: no column.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 30,
    height: Annotated[int | None, typer.Option(help="px")] = None,
    width: Annotated[int | None, typer.Option(help="px")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    maps: Annotated[bool, typer.Option("--maps", help="Also write who was put where, a heat map a name.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the model that runs.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    out: Annotated[Path, typer.Option(help="The picture's file.")] = Path("out/mip.png"),
) -> None:
    """Draw several named things, each after photos of it (MIP on Stable Diffusion XL or 1.5, or FLUX.1)."""
    from attn_plugins.pipelines.mip_sdxl import draw, load

    references = {name: file.split(",") for name, file in _named(reference, "reference").items()}
    masks = _named(mask or [], "mask")
    pipe = load(model, adapter, image_encoder=image_encoder, device=device, offload=offload)
    drawing = draw(
        pipe, references, prompt, scale=scale, masks=masks, maps=maps, seed=seed, num_inference_steps=steps,
        height=height, width=width, checkpoint=adapter, options={"temperature": temperature, "null_bias": background},
    )  # fmt: skip
    for path in drawing.save(out.parent, out.stem):
        console().print(f"wrote {path}", markup=False)


def _named(rows: list[str], option: str) -> dict[str, str]:
    """NAME=FILE rows.

    Raises:
        ValueError: a row of another form, or a name twice.
    """
    found: dict[str, str] = {}
    for row in rows:
        name, _, file = row.partition("=")
        if not name.strip() or not file:
            raise ValueError(f"--{option} {row!r}: write NAME=FILE, as in cat=cat.png")
        if name in found:
            raise ValueError(f"--{option} names {name!r} twice: several photos are NAME=FILE,FILE")
        found[name] = file
    return found
