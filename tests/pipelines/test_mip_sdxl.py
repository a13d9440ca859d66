"""The pipeline of named references: from saved files to a picture and its maps, as a person calls it and by the CLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from attn_plugins.pipelines.cli import app  # noqa: E402
from attn_plugins.pipelines.mip import heat_maps  # noqa: E402
from attn_plugins.pipelines.mip_sdxl import draw, load  # noqa: E402
from tests.support.ip_adapters import checkpoint, image_encoder, write  # noqa: E402
from tests.support.snapshot import snapshot  # noqa: E402
from tests.support.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 24}
PROMPT = "a cat and a dog"


def picture(seed: int, size: tuple[int, int] = (30, 30), mode: str = "RGB") -> Any:
    from PIL import Image

    pixels = torch.randint(0, 255, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def pixels(image: Any) -> Any:
    return numpy.asarray(image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A saved pipeline, an adapter of each format, its image encoder, and photos."""
    root = tmp_path_factory.mktemp("mip")
    for name in ("sd15", "sdxl"):
        pipe = build(name)
        pipe.save_pretrained(root / name)
        write(checkpoint(pipe.unet), root / f"{name}.bin")
        write(checkpoint(pipe.unet, "plus"), root / f"{name}_plus.safetensors")
        write(checkpoint(pipe.unet, text_weights=True), root / f"{name}_mip.safetensors")
    image_encoder().save_pretrained(root / "image_encoder")
    for index in range(3):
        picture(index).save(root / f"{index}.png")
    return root


def references(folder: Path) -> dict[str, Any]:
    return {"cat": folder / "0.png", "dog": [str(folder / "1.png"), picture(2)]}


@pytest.mark.parametrize("adapter", ["sdxl.bin", "sdxl_plus.safetensors", "sd15.bin"])
def test_from_files_to_a_picture_and_its_maps(adapter: str, folder: Path, tmp_path: Path) -> None:
    pipe = load(folder / adapter[:4], folder / adapter)
    pipe.set_progress_bar_config(disable=True)
    before = snapshot(pipe.unet)
    drawing = draw(pipe, references(folder), PROMPT, maps=True, **CALL)
    assert snapshot(pipe.unet) == before
    plain = draw(pipe, references(folder), PROMPT, **CALL)
    assert (pixels(plain.pictures[0]) == pixels(drawing.pictures[0])).all() and plain.maps == {}
    assert list(drawing.maps) == ["cat", "dog"] and drawing.maps["cat"].shape == (1, 32, 24)
    torch.testing.assert_close(drawing.maps["cat"] + drawing.maps["dog"], torch.ones(1, 32, 24))
    one, sheet = drawing.save(tmp_path / "out", "both")
    assert one.name == "both.png" and sheet.name == "both_maps.png"
    from PIL import Image

    assert Image.open(sheet).size == (3 * 24 + 2 * heat_maps.GAP, 32 + heat_maps.LABEL)
    others = {"dog": references(folder)["cat"], "cat": references(folder)["dog"]}
    swapped = draw(pipe, others, PROMPT, output_type="pt", **CALL).pictures
    named = draw(pipe, references(folder), PROMPT, output_type="pt", **CALL).pictures
    assert (torch.as_tensor(swapped) - torch.as_tensor(named)).abs().max() > 1e-6


def test_masks_scales_and_the_checkpoints_weights(folder: Path) -> None:
    from PIL import Image

    pipe = load(folder / "sdxl", folder / "sdxl_mip.safetensors", device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    left = Image.fromarray(numpy.uint8([[255] * 12 + [0] * 12] * 32))
    masks = {"cat": left, "dog": Image.fromarray(255 - pixels(left))}
    drawing = draw(pipe, references(folder), PROMPT, masks=masks, maps=True, **CALL)
    assert drawing.maps["cat"][0, :, :8].min() > 0.9 and drawing.maps["cat"][0, :, 16:].max() < 0.1

    def run(**more: Any) -> torch.Tensor:
        return torch.as_tensor(draw(pipe, references(folder), PROMPT, output_type="latent", **CALL, **more).pictures)

    usual = run()
    assert torch.equal(usual, run(scale=0.75))  # as published, of four tokens
    for more in ({"checkpoint": folder / "sdxl_mip.safetensors"}, {"scales": {"dog": 0.2}}, {"scale": 0.3}):
        assert not torch.equal(usual, run(**more)), more
    assert torch.equal(usual, run(checkpoint=folder / "sdxl.bin"))  # a plain one: training-free


def test_several_prompts_and_pictures(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder / "sd15", folder / "sd15.bin")
    pipe.set_progress_bar_config(disable=True)
    more = {"num_images_per_prompt": 2, "guidance_scale": 1.0}
    drawing = draw(pipe, references(folder), [PROMPT, "a dog"], maps=True, **CALL, **more)
    assert len(drawing.pictures) == 4 and drawing.maps["dog"].shape == (4, 32, 24)
    assert [path.name for path in drawing.save(tmp_path, "x")][::2] == [f"x_{index}.png" for index in range(4)]


def test_what_is_wrong_is_said(folder: Path) -> None:
    pipe = load(folder / "sd15", folder / "sd15.bin")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="references={}: give a picture for each name"):
        draw(pipe, {}, PROMPT)
    with pytest.raises(ValueError, match="masks of hat: the references are cat, dog"):
        draw(pipe, references(folder), PROMPT, masks={"hat": picture(1)})
    with pytest.raises(ValueError, match="no picture of 'cat'"):
        draw(pipe, {"cat": []}, PROMPT)
    with pytest.warns(UserWarning, match="no prompt says 'dog'"):
        draw(pipe, references(folder), "a cat", **CALL)
    with pytest.raises(FileNotFoundError, match="no IP-Adapter at nowhere.bin"):
        load(folder / "sd15", "nowhere.bin")
    with pytest.raises(
        ValueError, match="sdxl.bin does not fit StableDiffusionPipeline: an adapter for a model of anot"
    ):
        load(folder / "sd15", folder / "sdxl.bin")
    cut = folder / "cut.safetensors"
    cut.write_bytes((folder / "sdxl_mip.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read: is it truncated"):
        load(folder / "sdxl", cut)
    lonely = folder / "alone"
    lonely.mkdir()
    write(checkpoint(pipe.unet), lonely / "adapter.bin")
    with pytest.raises(ValueError, match=r"no image encoder at .*alone/image_encoder: give the folder"):
        load(folder / "sd15", lonely / "adapter.bin")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "two.png"
    rows = ["-r", f"cat={folder / '0.png'}", "-r", f"dog={folder / '1.png'},{folder / '2.png'}"]
    models = ["--model", str(folder / "sdxl"), "--adapter", str(folder / "sdxl_mip.safetensors")]
    sizes = ["--steps", "1", "--height", "32", "--width", "32", "--maps", "--out", str(out)]
    result = CliRunner().invoke(app, ["mip", PROMPT, *rows, *models, *sizes], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert out.is_file() and out.with_name("two_maps.png").is_file() and f"wrote {out}" in result.output
    wrong = CliRunner().invoke(app, ["mip", PROMPT, "-r", "cat", *models], env={"COLUMNS": "300"})
    assert wrong.exit_code == 2 and "--reference 'cat': write NAME=FILE" in wrong.output


def test_a_map_is_cold_where_nothing_is_and_hot_where_all_is() -> None:
    share = torch.zeros(4, 6)
    share[:, 3:] = 1.0
    colours = pixels(heat_maps.overlay(picture(0, (4, 6)), share)).astype(int)
    assert (colours[:, :3, 2] > colours[:, :3, 0]).all() and (colours[:, 3:, 0] > colours[:, 3:, 2]).all()
