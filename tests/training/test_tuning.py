"""The loop: a step as one would write it, a resumed run to the bit, a saved LoRA in a fresh pipeline, two processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.training.seeds import seeded
from attn_plugins.training.trainable import make_trainable, save_trained, trained
from attn_plugins.training.tuning import TuneSettings, held_out_losses, tune
from attn_plugins.training.video_batches import training_batch
from attn_plugins.training.video_data import Item
from tests.support.beside import traces
from tests.support.together import together

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
SETTINGS = TuneSettings(steps=4, batch=2, lr=1e-2, warmup=2, save_every=2, held_out=3)
SPARSE: dict[str, Any] = {"rule": "threshold", "scope": "head", "tau": 0.25, "dense_steps": 0, "strict": True}


@dataclass
class Noise:
    """Videos of noise. `fails_at`: the number at which the machine goes down."""

    fails_at: int | None = None

    def item(self, number: int) -> Item:
        if number == self.fails_at:
            raise KeyboardInterrupt
        generator = seeded("video", number)
        return torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 8, generator=generator)

    def held_out(self, number: int) -> Item:
        return self.item(10_000 + number)

    def empty(self) -> torch.Tensor:
        return torch.zeros(2, 8)


def build() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=16, freq_dim=16, in_channels=1,
        out_channels=1, patch_size=(1, 2, 2), text_dim=8, rope_max_seq_len=16,
    )  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in model.named_parameters()}


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """accelerate keeps its state for the whole process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="no")
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_run_is_what_one_would_write(accelerator: Any, tmp_path: Path, lora: int, sparse: bool) -> None:
    model, plain = build(), build()
    for one in (model, plain):
        make_trainable(one, lora=lora)
        if sparse:
            attn_plugins.patch(one, "vmoba", **SPARSE)
    losses = tune(accelerator, model, Noise(), SETTINGS, tmp_path / "checkpoint")

    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], betas=(0.9, 0.99), weight_decay=0)
    expected = []
    for step, rate in enumerate((5e-3, 1e-2, 1e-2, 5e-3)):
        batch = training_batch(Noise(), step, 2, shift=3.0, drop_prompt=0.1)
        level = batch.levels.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * batch.latents + level * batch.noise
        flow = plain(noisy, 1000 * batch.levels, batch.prompts, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(flow, batch.noise - batch.latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(plain), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, part in weights(plain).items():
        torch.testing.assert_close(model.state_dict()[name], part, rtol=1e-3, atol=1e-5)
    if lora:
        frozen = {name: part for name, part in weights(model).items() if "lora_" not in name}
        begin = weights(build())
        assert all(torch.equal(part, begin[name.replace(".base_layer", "")]) for name, part in frozen.items())


@pytest.mark.parametrize("lora", [0, 2])
def test_a_resumed_run_is_one_that_never_stopped(accelerator: Any, tmp_path: Path, lora: int) -> None:
    def run(data: Noise, resume: bool, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = build()
        make_trainable(model, lora=lora)
        with attn_plugins.patched(model, "vmoba", **SPARSE):
            losses = tune(accelerator, model, data, SETTINGS, tmp_path / folder, resume=resume)
        return losses, weights(model)

    straight, end = run(Noise(), False, "straight")
    with pytest.raises(KeyboardInterrupt):
        run(Noise(fails_at=6), False, "stopped")  # in step 3, which the checkpoint has not
    accelerator.free_memory()
    assert len(json.loads((tmp_path / "stopped" / "run.json").read_text())["losses"]) == 2
    torch.rand(5)  # another process would have drawn other numbers
    resumed, same = run(Noise(), True, "stopped")
    assert resumed == straight and all(torch.equal(same[name], part) for name, part in end.items())
    files = {file.name for file in (tmp_path / "stopped").iterdir()}
    assert "trained.safetensors" in files and not any("model" in name for name in files)


def test_a_run_cannot_be_resumed_with_other_settings(accelerator: Any, tmp_path: Path) -> None:
    model = build()
    tune(accelerator, model, Noise(), TuneSettings(steps=1), tmp_path / "a", run={"data": "noise"})
    with pytest.raises(ValueError, match=r"a run with steps=1, this one has 2"):
        tune(accelerator, model, Noise(), TuneSettings(steps=2), tmp_path / "a", run={"data": "noise"}, resume=True)
    with pytest.raises(ValueError, match="data='noise'"):
        tune(accelerator, model, Noise(), TuneSettings(steps=1), tmp_path / "a", run={"data": "x"}, resume=True)
    with pytest.raises(ValueError, match="steps=0"):
        TuneSettings(steps=0)


def test_checkpointing_changes_no_bit_and_bf16_little(tmp_path: Path) -> None:
    found = {}
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        for checkpointing in (False, True):
            model = build()
            make_trainable(model, checkpointing=checkpointing)
            with attn_plugins.patched(model, "vmoba", **SPARSE):
                found[precision, checkpointing] = tune(accelerator, model, Noise(), SETTINGS, tmp_path / "run")
            assert not traces(model)
    accelerate.state.AcceleratorState._reset_state(True)
    assert found["no", True] == found["no", False]
    assert found["bf16", False] != found["no", False]
    assert found["bf16", False] == pytest.approx(found["no", False], rel=0.02)


def test_a_fresh_pipeline_loads_what_was_saved(accelerator: Any, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    found = {}
    for lora in (0, 2):
        model = build()
        make_trainable(model, lora=lora)
        with attn_plugins.patched(model, "vmoba", **SPARSE):
            tune(accelerator, model, Noise(), SETTINGS, tmp_path / "checkpoint")
        save_trained(model, tmp_path)
        found[lora] = held_out_losses(accelerator, model, Noise(), SETTINGS)
    untuned = held_out_losses(accelerator, build(), Noise(), SETTINGS)
    whole = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert held_out_losses(accelerator, whole, Noise(), SETTINGS) == found[0] != untuned
    pipe = WanPipeline(None, None, None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=build())
    pipe.load_lora_weights(tmp_path)
    loaded = held_out_losses(accelerator, pipe.transformer, Noise(), SETTINGS)
    assert loaded == pytest.approx(found[2], rel=1e-6) and loaded != pytest.approx(untuned, rel=1e-4)
    pipe.unload_lora_weights()
    assert held_out_losses(accelerator, pipe.transformer, Noise(), SETTINGS) == untuned


def in_each_process(rank: int, folder: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # accelerate wants to see one, although the processes have met already
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, settings = build(), TuneSettings(steps=3, batch=1, held_out=3)
    make_trainable(model, lora=2)
    with attn_plugins.patched(model, "vmoba", **SPARSE):
        losses = tune(accelerator, model, Noise(), settings, Path(folder, "checkpoint"))
    return losses, held_out_losses(accelerator, model, Noise(), settings), weights(model)


def test_two_processes_do_what_one_does_with_twice_the_batch(accelerator: Any, tmp_path: Path) -> None:
    both = together(in_each_process, str(tmp_path))
    model, settings = build(), TuneSettings(steps=3, batch=2, held_out=3)
    make_trainable(model, lora=2)
    with attn_plugins.patched(model, "vmoba", **SPARSE):
        losses = tune(accelerator, model, Noise(), settings, tmp_path / "alone")
    kept = held_out_losses(accelerator, model, Noise(), settings)
    for found, judged, parts in both:
        assert found == pytest.approx(losses, rel=1e-5) and judged == pytest.approx(kept, rel=1e-5)
        for name, part in weights(model).items():
            torch.testing.assert_close(parts[name], part, rtol=1e-4, atol=1e-6)
    assert len(list((tmp_path / "checkpoint").glob("random_states_*"))) == 2
