"""The whole job of continue-tuning: dense beside sparse, told, drawn, resumed, and the example that people copy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.continue_tune import preset_options
from attn_plugins.pipelines.tuning.tuned import DENSE, SPARSE, UNTUNED, Tuned, smoothed
from attn_plugins.pipelines.tuning.wan_checkpoint import load_wan, wan_shift
from attn_plugins.training.video_data import LatentFolder
from tests.support import tiny_pipelines
from tests.support.examples import load_example
from tests.support.tiny import randn

accelerate = pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("quiet_diffusers", "one_accelerator")
ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = ["--steps", "3", "--save-every", "2", "--held-out", "2", "--frames", "4", "--size", "24", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("continue_tune_vmoba")


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that takes moving digits, with random weights."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, ffn_dim=16, freq_dim=16, in_channels=1,
        out_channels=1, patch_size=(1, 2, 2), text_dim=16, rope_max_seq_len=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("digits")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    diffusers.WanPipeline(None, None, None, scheduler=scheduler, transformer=transformer).save_pretrained(folder)
    return str(folder)


def test_the_example(example: Any, digits_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", digits_model, "--out", str(tmp_path), *SHORT]
    example.main(arguments)
    told = json.loads((tmp_path / "tuned.json").read_text())
    assert (tmp_path / "tuned.png").read_bytes()[:4] == b"\x89PNG"
    assert told["settings"]["shift"] == 5.0 and told["options"]["tau"] == 0.25 and told["latents"] == [1, 4, 24, 24]
    # the same weights, video and noise, so that the first losses differ by what sparsity does and no more
    sparse, dense = told["losses"]["sparse"], told["losses"]["dense"]
    assert len(sparse) == len(dense) == 3 and sparse[0] != dense[0] and sparse[0] == pytest.approx(dense[0], rel=0.05)
    held_out = told["held_out"]
    assert set(held_out["dense"]) == set(held_out["sparse"]) == {"untuned", "sparse-tuned", "dense-tuned"}
    assert held_out["dense"]["untuned"] != held_out["sparse"]["untuned"]
    assert all(0 < row["density"] < row["recall"] < 1 for row in told["kept"].values()) and told["step_ratio"] > 0

    weights = {name: load_wan_part(tmp_path / name).state_dict() for name in ("sparse", "dense")}
    untuned = load_wan(digits_model).state_dict()
    for one, other in (
        (weights["sparse"], untuned),
        (weights["dense"], untuned),
        (weights["sparse"], weights["dense"]),
    ):
        assert one.keys() == other.keys() and any(not torch.equal(part, other[name]) for name, part in one.items())

    output = capsys.readouterr().out
    assert "| held-out loss, run sparse |" in output and "after tuning it costs" in output and "x\n" in output
    with pytest.raises(ValueError, match="is there already: resume"):
        example.main(arguments)
    example.main([*arguments, "--resume"])  # all steps are done: judged once more
    again = json.loads((tmp_path / "tuned.json").read_text())
    assert again["losses"] == told["losses"] and again["held_out"] == held_out


def load_wan_part(folder: Path) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")


def test_a_lora_in_half_precision_with_any_method(example: Any, digits_model: str, tmp_path: Path) -> None:
    arguments = ["--model", digits_model, "--out", str(tmp_path), "--method", "gna", "-o", "window=2", *SHORT]
    example.main([*arguments, "--lora", "2", "--mixed-precision", "bf16", "--checkpointing", "--no-dense"])
    told = json.loads((tmp_path / "tuned.json").read_text())
    assert list(told["losses"]) == ["sparse"] and told["method"] == "gna" and not (tmp_path / "dense").exists()
    assert "dense-tuned" not in told["held_out"]["dense"]
    absent = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipe = diffusers.WanPipeline.from_pretrained(digits_model, **absent)
    pipe.load_lora_weights(tmp_path / "sparse")
    names = [name for name, part in pipe.transformer.named_parameters() if "lora_B" in name and part.any()]
    assert len(names) == 3 * 2 * 4  # layers, self- and cross-attention, q k v o


def test_errors_say_what_to_do(example: Any, digits_model: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["--method", "vmobb"], "vmoba"),
        (["--preset", "wan"], "wan_1_3b_train"),
        (["--quality", "best"], "safe, balanced, fast"),
        (["--model", str(tmp_path)], "no model_index.json there"),
        (["--model", "nothing-of-the-kind"], "no model_index.json there"),
        (["--data", str(tmp_path / "none")], "no such folder"),
        (["-o", "tau"], "NAME=VALUE"),
        (["--steps", "0"], "steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            example.main(["--model", digits_model, "--out", str(tmp_path / "out"), *arguments])


def test_presets_of_a_method() -> None:
    published = preset_options("vmoba", "wan_1_3b_train", "balanced")
    assert published["exact"] and published["scope"] == "head" and published["rule"] == "threshold"
    with pytest.raises(ValueError, match="method 'gna' has"):
        preset_options("gna", "wan_1_3b_train", "balanced")


def test_other_checkpoints_are_refused(tmp_path: Path, digits_model: str) -> None:
    index = json.loads(Path(digits_model, "model_index.json").read_text())
    for change, message in (
        ({"_class_name": "LTXPipeline"}, "a LTXPipeline"),
        ({"boundary_ratio": 0.875}, "Wan 2.2"),
        ({"expand_timesteps": True}, "Wan 2.2"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            load_wan(tmp_path)


def test_the_docs_snippet_makes_data_for_a_whole_pipeline(example: Any, tmp_path: Path) -> None:
    """docs/continue_tuning.md: videos through the pipeline's own VAE and text encoder, then a run on them."""
    page = (ROOT / "docs" / "continue_tuning.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    pipe = tiny_pipelines.build("wan")
    pipe.save_pretrained(tmp_path / "wan")
    assert wan_shift(tmp_path / "wan") == 7.0
    clips = [(randn(1, 3, 5, 32, 32, seed=number).clamp(-1, 1), f"video {number}") for number in range(3)]
    folder = tmp_path / "latents"
    folder.mkdir()
    exec(compile(snippet, "docs/continue_tuning.md", "exec"), {"pipe": pipe, "clips": clips, "folder": folder})
    data = LatentFolder(folder)
    assert data.item(0)[0].shape == (16, 2, 4, 4) and data.empty() is not None
    arguments = ["--model", str(tmp_path / "wan"), "--out", str(tmp_path / "out"), *SHORT]
    with pytest.raises(ValueError, match="latents of 1 channels and prompts of width 16"):
        example.main(arguments)
    example.main([*arguments, "--data", str(folder), "--lora", "2", "--no-dense", "-o", "tile=4"])
    tuned = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert all(map(math.isfinite, tuned["losses"]["sparse"]))


def test_what_is_told() -> None:
    losses = {"dense": [0.4, 0.3, 0.2, 0.1], "sparse": [0.5, 0.4, 0.3, 0.3]}
    held_out = {
        "dense": {UNTUNED: [1.0, 2.0], DENSE: [0.5, 1.5], SPARSE: [0.8, 1.8]},
        "sparse": {UNTUNED: [2.0, 4.0], DENSE: [1.9, 3.9], SPARSE: [0.75, 1.75]},
    }
    kept: dict[str, dict[str, float | None]] = {
        name: {"density": 0.25, "recall": None} for name in (UNTUNED, SPARSE, DENSE)
    }
    tuned = Tuned(
        "model", "vmoba", {}, (1, 2, 3, 4), {"steps": 4}, 1, {"dense": 3.0, "sparse": 2.0}, losses, held_out, kept,
        environment(),
    )  # fmt: skip
    assert tuned.step_ratio == 1.5 and tuned.difference(SPARSE, DENSE) == (0.25, 0.0)
    assert tuned.difference(UNTUNED, UNTUNED) == (1.5, 0.5)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tuned.table().splitlines()]
    assert rows[0] == ["", UNTUNED, DENSE, SPARSE] and rows[2][1:] == ["1.5000", "1.0000", "1.3000"]
    assert rows[3][1:] == ["3.0000", "2.9000", "1.2500"] and rows[4][1:] == ["25.0%"] * 3 and rows[5][1:] == ["-"] * 3
    told = "\n".join(tuned.sentences())
    assert "dense 3.000 s, sparse 2.000 s: 1.50x" in told and "costs +1.5000 (standard error 0.5000)" in told
    assert "it costs +0.2500" in told and "dense 0.1000, sparse 0.3000" in told


def test_smoothing() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
