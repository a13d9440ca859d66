"""The pipeline of named references on FLUX: from saved files to a picture and its maps, and by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from attn_plugins.pipelines.cli import app  # noqa: E402
from attn_plugins.pipelines.mip_sdxl import draw, load  # noqa: E402
from tests.pipelines.test_mip_sdxl import picture, pixels  # noqa: E402
from tests.support import ip_adapters  # noqa: E402
from tests.support.flux_adapters import checkpoint, pipeline, write  # noqa: E402
from tests.support.snapshot import snapshot  # noqa: E402
from tests.support.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 24, "max_sequence_length": 32}
PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("mip")
    pipe = pipeline(0)
    pipe.save_pretrained(root / "flux")
    write(checkpoint(pipe.transformer), root / "flux.safetensors")
    ip_adapters.write(ip_adapters.checkpoint(build("sd15").unet), root / "sd15.bin")
    ip_adapters.image_encoder().save_pretrained(root / "image_encoder")
    for index in range(3):
        picture(index).save(root / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe = load(folder / "flux", folder / "flux.safetensors")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def references(folder: Path) -> dict[str, Any]:
    return {"cat": folder / "0.png", "dog": [str(folder / "1.png"), picture(2)]}


def test_from_files_to_a_picture_and_its_maps(pipe: Any, folder: Path, tmp_path: Path) -> None:
    plain = draw(pipe, references(folder), PROMPT, **CALL)  # diffusers leaves a registry of hooks after the first run
    before = snapshot(pipe.transformer)
    drawing = draw(pipe, references(folder), PROMPT, maps=True, **CALL)
    assert snapshot(pipe.transformer) == before
    assert (pixels(plain.pictures[0]) == pixels(drawing.pictures[0])).all() and plain.maps == {}
    assert list(drawing.maps) == ["cat", "dog"] and drawing.maps["cat"].shape == (1, 32, 24)
    torch.testing.assert_close(drawing.maps["cat"] + drawing.maps["dog"], torch.ones(1, 32, 24))
    assert [path.name for path in drawing.save(tmp_path, "both")] == ["both.png", "both_maps.png"]


def test_masks_scales_and_guidance(pipe: Any, folder: Path) -> None:
    from PIL import Image

    left = Image.fromarray(torch.tensor([[255] * 12 + [0] * 12] * 32, dtype=torch.uint8).numpy())
    masks = {"cat": left, "dog": Image.fromarray(255 - pixels(left))}
    drawing = draw(pipe, references(folder), PROMPT, masks=masks, maps=True, **CALL)
    assert drawing.maps["cat"][0, :, :8].min() > 0.9 and drawing.maps["cat"][0, :, 16:].max() < 0.1

    def run(**more: Any) -> torch.Tensor:
        return draw(pipe, references(folder), PROMPT, output_type="latent", **CALL, **more).pictures

    usual = run()
    assert torch.equal(usual, run(scale=1.0)) and torch.equal(usual, run(checkpoint=folder / "flux.safetensors"))
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 2.0}
    for more in ({"scales": {"dog": 0.2}}, {"scale": 0.3}, guided):
        assert not torch.equal(usual, run(**more)), more


def test_what_is_wrong_is_said(pipe: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="does not say 'hat'"), pytest.warns(UserWarning, match="no prompt says 'hat'"):
        draw(pipe, {"cat": folder / "0.png", "hat": folder / "1.png"}, PROMPT, **CALL)
    with pytest.raises(ValueError, match="sd15.bin does not fit FluxPipeline: an adapter for a model of another width"):
        load(folder / "flux", folder / "sd15.bin")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.png"
    rows = ["-r", f"cat={folder / '0.png'}", "-r", f"dog={folder / '1.png'},{folder / '2.png'}", "--maps"]
    models = ["--model", str(folder / "flux"), "--adapter", str(folder / "flux.safetensors")]
    sizes = ["--steps", "1", "--height", "32", "--width", "32", "--out", str(out)]
    result = CliRunner().invoke(app, ["mip", PROMPT, *rows, *models, *sizes], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert out.is_file() and out.with_name("two_maps.png").is_file() and f"wrote {out}" in result.output
