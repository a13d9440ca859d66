"""A dense ViT becomes one with agents: the whole job, its files, a LoRA, a resumed run, what is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.tuned_vit import CONTROL, DENSE, FREE, SWAPPED, TUNED, Speed, TunedVit
from attn_plugins.training.classifying import logits
from attn_plugins.training.pictures import DigitPictures, picture_batch
from tests.support.examples import load_example

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_accelerator")
SHORT = [
    "--size", "32", "--start-steps", "2", "--steps", "3", "--batch", "2", "--save-every", "2", "--held-out", "6",
    "--speeds", "32", "48", "-o", "agents=1",
]  # fmt: skip


def run(out: Path, *arguments: str) -> dict[str, Any]:
    load_example("continue_tune_agent_vit").main(["--out", str(out), *SHORT, *arguments])
    return json.loads((out / "tuned.json").read_text())


@torch.no_grad()
def told(model: Any) -> torch.Tensor:
    return logits(model.eval(), picture_batch(DigitPictures(32), 0, 4)[0])


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path)
    assert list(found["hits"]) == [DENSE, FREE, SWAPPED, TUNED, CONTROL]
    assert all(len(hits) == 6 for hits in found["hits"].values())
    assert len(found["losses"]["agents"]) == len(found["losses"]["dense"]) == 3
    assert found["losses"]["agents"][0] != found["losses"]["dense"][0]
    assert [row["tokens"] for row in found["speeds"]] == [4, 9]
    assert (tmp_path / "tuned.png").read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr().out
    assert "| agents, tuned |" in output and "agents add" in output

    agents = attn_plugins.from_pretrained(tmp_path / "agents")
    dense = transformers.ViTForImageClassification.from_pretrained(tmp_path / "dense")
    start = transformers.ViTForImageClassification.from_pretrained(tmp_path / "start")
    assert "trained_agent" in attn_plugins.summary(agents) and not hasattr(dense.config, "attn_plugins")
    results = [told(model) for model in (agents, dense, start)]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    # what is in the file is what was judged
    data = DigitPictures(32)
    pixels, labels = zip(*(data.held_out(number) for number in range(6)), strict=True)
    with torch.no_grad():
        hits = logits(agents.eval(), torch.stack(pixels)).argmax(-1) == torch.tensor(labels)
    assert hits.tolist() == found["hits"][TUNED]

    with pytest.raises(ValueError, match="is there already: resume"):
        run(tmp_path)
    again = run(tmp_path, "--resume")  # all steps are done: judged once more
    assert again["losses"] == found["losses"] and again["hits"] == found["hits"]


def test_a_lora_beside_the_agents_and_what_a_person_loads(tmp_path: Path) -> None:
    found = run(tmp_path, "--lora", "2", "--no-dense", "--checkpointing")
    assert CONTROL not in found["hits"] and not (tmp_path / "dense").exists()
    files = {file.name for file in (tmp_path / "agents").iterdir()}
    assert {"adapter_model.safetensors", "attn_plugins.safetensors", "attn_plugins.json"} <= files
    assert "model.safetensors" not in files
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "start")
    before = told(model)
    model.load_adapter(str(tmp_path / "agents"))
    attn_plugins.load(model, tmp_path / "agents")
    assert not torch.allclose(told(model), before, atol=1e-4)
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "agents" / "checkpoint" / "trained.safetensors")
    assert all("lora_" in name or "trained_agent" in name for name in trained)
    assert any("lora_B" in name for name in trained) and any("dwc.weight" in name for name in trained)


def test_labels_that_the_model_has_not(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="10 classes, and this ViTForImageClassification tells 3"):
        run(tmp_path / "out", "--model", str(tmp_path / "model"))


def test_what_is_told() -> None:
    hits = {DENSE: [True, True, True, False], TUNED: [True, True, False, False], CONTROL: [True] * 4}
    made = TunedVit(
        "model", {}, "data", {"steps": 2, "batch": 3}, 2, (10, 100), hits, {"agents": [1.0, 0.5]},
        [Speed(224, 196, 16, 0.2, 0.1)], environment(),
    )  # fmt: skip
    assert made.accuracy(DENSE) == (0.75, math.sqrt(0.75 * 0.25 / 4))
    assert made.difference(TUNED, CONTROL) == (-0.5, math.sqrt(1 / 3) / 2)
    table = made.table()
    assert f"| {TUNED} | 50.0% ± 25.0% | +25.0% ± 25.0% |" in table
    assert "| 224 px | 196 | 16 | 200.0 ms | 100.0 ms | 2.00x |" in table
    words = "\n".join(made.sentences())
    assert "10 weights to 100 (10.0%)" in words and "2 steps of 6 pictures" in words and "-50.0% ± 28.9%" in words
