"""MIP is trained on a small pipeline: the whole job, its files, a resumed run, a folder of cut-outs, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.methods.mip import read_adapter
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.train_mip_inputs import AdapterInputs
from attn_plugins.pipelines.tuning.train_mip_models import load_adapted, small_folder
from attn_plugins.pipelines.tuning.tuned_mip import FREE, MEAN, STOCK, TRAINED, Judged, TunedMIP
from attn_plugins.training import two_objects_model as small
from attn_plugins.training.two_objects import DrawnObjects
from tests.support.examples import load_example
from tests.support.ip_adapters import checkpoint, image_encoder, write
from tests.support.tiny_pipelines import build

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytestmark = [pytest.mark.usefixtures("one_accelerator", "quiet_diffusers")]
SHORT = [
    "--steps", "2", "--batch", "2", "--save-every", "1", "--held-out", "2", "--drawn", "1", "--sampler-steps", "1",
]  # fmt: skip


def run(out: Path, *arguments: str) -> dict[str, Any]:
    load_example("train_mip").main(["--out", str(out), *SHORT, *arguments])
    return json.loads((out / "tuned.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    out = tmp_path_factory.mktemp("train_mip")
    return out, run(out, "--dice", "0.1")


def test_the_example(first: tuple[Path, dict[str, Any]]) -> None:
    out, found = first
    assert list(found["judged"]) == [STOCK, MEAN, FREE, TRAINED]
    assert len(found["losses"]) == 2 and found["settings"]["drops"] == {"image": 0.05, "text": 0.05, "both": 0.05}
    assert found["judged"][STOCK]["dices"] == {}
    assert found["judged"][STOCK]["lower"] == found["judged"][MEAN]["lower"] == [0.5, 0.5]  # the order says nothing
    # an even mean is at one half where the objects are, if they are of one size
    assert found["judged"][MEAN]["dices"]["objects"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert found["judged"][TRAINED]["dices"]["picture"] != found["judged"][FREE]["dices"]["picture"]
    for name in ("tuned.png", "tuned_sheet.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_the_file_is_an_ip_adapters(first: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    out, _ = first
    state = load_file(out / "mip.safetensors")
    base = load_file(small_folder() / small.ADAPTER)
    crosses = len([name for name in state if "text_to_weight" in name])
    assert state.keys() - base.keys() == {f"ip_adapter.{2 * i + 1}.text_to_weight.weight" for i in range(crosses)}
    changed = {name for name in base if not torch.equal(base[name], state[name])}
    assert changed == {name for name in base if "_ip." in name}  # the projection is as it was
    trained = load_file(out / "mip" / "trained.safetensors")
    assert len(trained) == 3 * crosses and all("_ip" in name or "text_to_weight" in name for name in trained)
    pipe = load_adapted(small_folder(), out / "mip.safetensors")
    handle = attn_plugins.patch(pipe, "mip", phrases=["circle", "ring"], checkpoint=str(out / "mip.safetensors"))
    weights = [layer.references.text_weight for layer in handle.patches[0].layers]
    assert all(torch.equal(row, state[f"ip_adapter.{2 * i + 1}.text_to_weight.weight"][0]) and bool(row.any())
               for i, row in enumerate(weights))  # fmt: skip


def test_a_run_that_was_stopped(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """To the bit what it had been without a stop; with other settings it is refused."""
    from attn_plugins.pipelines.tuning import train_mip

    class Stopped(Exception):
        pass

    out, found = first
    before = train_mip.training_batch

    def stop(data: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        if step == 1:
            raise Stopped
        return before(data, step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(train_mip, "training_batch", stop)
        with pytest.raises(Stopped):
            run(tmp_path, "--dice", "0.1")
    with pytest.raises(ValueError, match="is there already: resume"):
        run(tmp_path, "--dice", "0.1")
    again = run(tmp_path, "--dice", "0.1", "--resume")
    assert again["losses"] == found["losses"] and again["judged"] == found["judged"]
    assert (tmp_path / "mip.safetensors").read_bytes() == (out / "mip.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is of a run with dice=0.1, this one has 0.2"):
        run(tmp_path, "--dice", "0.2", "--resume")


def test_a_folder_of_cutouts(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("circle", (255, 0, 0)), ("ring", (0, 0, 255))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (40, 40), (255, 255, 255))
            image.paste(colour, (5, 5, 30, 35))
            image.save(tmp_path / "data" / name / f"{number}.png")
    found = run(tmp_path / "out", "--data", str(tmp_path / "data"), "--steps", "1")
    assert found["judged"][TRAINED]["swap accuracy"] is None and found["judged"][TRAINED]["right"] == []
    assert len(found["judged"][TRAINED]["lower"]) == 2
    with pytest.raises(SystemExit, match="go together"):
        run(tmp_path / "other", "--model", "somewhere")


@pytest.mark.parametrize(("name", "kind"), [("sd15", "plus"), ("sdxl", "base")])
def test_a_pipeline_of_ones_own(name: str, kind: str, tmp_path: Path) -> None:
    """With an autoencoder, which predicts the noise; of an adapter that reads hidden states, and of pooled prompts."""
    pipe = build(name)
    pipe.save_pretrained(tmp_path / name)
    file = write(checkpoint(pipe.unet, kind), tmp_path / f"{name}.bin")
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    found = run(
        tmp_path / "out", "--model", str(tmp_path / name), "--adapter", str(file), "--size", "32", "--steps", "1",
    )  # fmt: skip
    assert len(found["losses"]) == 1 and 0.3 < found["losses"][0] < 10  # of noise
    assert found["judged"][STOCK]["lower"] == [0.5, 0.5]
    state = read_adapter(tmp_path / "out" / "mip.safetensors")
    before = read_adapter(file)
    assert all(torch.equal(before["image_proj"][part], state["image_proj"][part]) for part in before["image_proj"])
    assert any("text_to_weight" in part for part in state["ip_adapter"])


def test_what_the_model_is_given() -> None:
    pipe = load_adapted(small_folder(), small_folder() / small.ADAPTER)
    inputs, data = AdapterInputs(pipe), DrawnObjects()
    picture = data.item(0).picture[None]
    torch.testing.assert_close(2 * inputs.pictures(inputs.latents(picture)) - 1, picture, atol=1e-6, rtol=0)
    assert inputs.size == (32, 32)
    rows, lengths = inputs.phrases([("circle", "ring"), ("cross", "a circle and a ring")])
    assert rows.shape[:3] == (2, 2, 5) and lengths.tolist() == [[1, 1], [1, 5]]
    images = inputs.images([data.item(0).references], torch.tensor([False]))
    assert images.shape == (1, 2, small.EMBEDDING) and bool(images.any())
    assert not inputs.images([data.item(0).references], torch.tensor([True])).any()
    pipe.unload_ip_adapter()
    with pytest.raises(ValueError, match="has 0 IP-Adapters"):
        AdapterInputs(pipe)


def test_what_is_told() -> None:
    judged = {
        FREE: Judged(
            {"picture": [0.2], "objects": [0.5]}, [0.5, 0.5], [[[1, 0], [1, 0]], [None, None], [[1, 1], [0, 0]]]
        ),
        TRAINED: Judged({}, [1.0, 1.0], [[[1, 1], [1, 1]], [None, [1, 0]], [[1, 1], [1, 0]]]),
    }
    made = TunedMIP("pipe", "data", {"steps": 4, "batch": 3}, 2, 1234, [4.0, 3.0, 2.0, 1.0], judged, environment())
    assert judged[FREE].accuracy == (0.5, 0.0)
    assert judged[TRAINED].accuracy == pytest.approx((0.75, 0.25 / 3**0.5))
    table, words = made.table(), "\n".join(made.sentences())
    assert f"| {FREE} | 50.0% ± 0.0% | 4 of 6 | 50.0% ± 0.0% | 0.200 ± 0.000 | 0.500 ± 0.000 |" in table
    assert f"| {TRAINED} | 75.0% ± 28.3% | 5 of 6 | 100.0% ± 0.0% | - | - |" in table
    assert "4 steps of 6 pictures, 1,234 weights; loss of the last quarter 1.0000" in words
    assert "trained less training-free merge: +37.5% ± 24.5% swap accuracy, pair by pair" in words


def test_the_small_pipeline_is_made_by_one_command(tmp_path: Path) -> None:
    """A run that goes on from its checkpoint ends as one without a stop; what it saves is loaded."""
    from safetensors.torch import load_file

    example = load_example("train_two_objects")
    short = ["--batch", "2", "1", "--save-every", "1"]
    example.main(["--out", str(tmp_path / "one"), "--steps", "2", *short])
    (tmp_path / "two").mkdir()
    with pytest.MonkeyPatch.context() as patching:
        before = example.Trainer.loss

        def stop(trainer: Any, step: int) -> Any:
            if step == 1:
                raise KeyboardInterrupt
            return before(trainer, step)

        patching.setattr(example.Trainer, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            example.main(["--out", str(tmp_path / "two"), "--steps", "2", *short])
    example.main(["--out", str(tmp_path / "two"), "--steps", "2", *short, "--resume"])
    files = ["unet/diffusion_pytorch_model.safetensors", small.ADAPTER, "text_encoder/model.safetensors"]
    for file in files:
        one, two = (load_file(tmp_path / way / file) for way in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    pipe = load_adapted(tmp_path / "one", tmp_path / "one" / small.ADAPTER)
    middle = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor.to_k_ip[0].weight
    assert torch.equal(middle, load_file(tmp_path / "one" / small.ADAPTER)["ip_adapter.7.to_k_ip.weight"])
