"""A dense model becomes a mixture of heads: the whole job, its files, a LoRA, a resumed run, other kinds of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.tuned_moh import (
    CALIBRATED,
    CONTROL,
    DENSE,
    NORMS,
    PRUNED,
    TUNED,
    UNTRAINED,
    TunedMoH,
)
from attn_plugins.training.routers import RouterRow
from tests.support.examples import load_example

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_accelerator")
SHORT = [
    "--steps", "3", "--batch", "2", "--length", "24", "--save-every", "2", "--held-out", "4", "--calibration", "2",
    "--seeds", "0", "1", "--start-steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> tuple[str, ...]:
    """A tiny Llama with the embedded model's tokenizer, and a text: arguments of the example."""
    text = tiny_llama / "text.txt"
    text.write_text(" ".join(f"line {number} of {number % 7}" for number in range(600)), encoding="utf-8")
    return "--model", str(tiny_llama), "--data", str(text)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    load_example("continue_tune_moh").main(["--out", str(out), *SHORT, *arguments])
    return json.loads((out / "tuned.json").read_text())


def test_the_example(tmp_path: Path, dense: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, *dense)
    assert list(found["perplexity"]) == [DENSE, UNTRAINED, NORMS, PRUNED, CALIBRATED, TUNED, CONTROL]
    seeds = {name: len(losses) for name, losses in found["held_out"].items()}
    assert seeds == {DENSE: 1, UNTRAINED: 2, NORMS: 1, PRUNED: 2, CALIBRATED: 2, TUNED: 1, CONTROL: 1}
    assert all(len(items) == 4 for losses in found["held_out"].values() for items in losses)
    values = [items for losses in found["held_out"].values() for items in losses]
    assert len({tuple(items) for items in values}) == len(values)  # nothing was judged twice
    assert len(found["losses"]["moh"]) == len(found["losses"]["dense"]) == 3
    assert len(found["routers"]) == 2 and all(row["dead"] >= 0 and len(row["load"]) == 3 for row in found["routers"])
    assert (tmp_path / "tuned.png").read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr().out
    assert f"| {TUNED} |" in output and "routers add" in output and "certainty" in output

    tuned = attn_plugins.from_pretrained(tmp_path / "moh")
    control = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert "moh" in attn_plugins.summary(tuned) and not hasattr(control.config, "attn_plugins")

    with pytest.raises(ValueError, match="is there already: resume"):
        run(tmp_path, *dense)
    again = run(tmp_path, *dense, "--resume")  # all steps are done: judged once more
    assert again["losses"] == found["losses"] and again["held_out"] == found["held_out"]


def test_a_lora_beside_the_routers_and_a_run_that_is_cut_short(
    tmp_path: Path, dense: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", *dense, "--lora", "2", "--no-dense")
    assert CONTROL not in whole["held_out"] and not (tmp_path / "whole/dense").exists()
    names = {file.name for file in (tmp_path / "whole/moh").iterdir()}
    assert {"adapter_model.safetensors", "attn_plugins.safetensors"} <= names and "model.safetensors" not in names

    from attn_plugins.training.routers import RouterWatch

    joined, calls = RouterWatch.joined, []

    def cut_short(self: RouterWatch, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        calls.append(loss)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return joined(self, loss, share)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(RouterWatch, "joined", cut_short)
        run(tmp_path / "cut", *dense, "--lora", "2", "--no-dense")
    accelerate.state.AcceleratorState._reset_state(True)
    resumed = run(tmp_path / "cut", *dense, "--lora", "2", "--no-dense", "--resume")
    assert resumed["losses"] == whole["losses"] and resumed["held_out"] == whole["held_out"]


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_other_routers(tmp_path: Path, dense: tuple[str, ...], router: str) -> None:
    found = run(tmp_path, *dense, "--no-dense", "-o", f"router={router}", "-o", "active=0.5")
    assert found["options"]["router"] == router and bool(found["weights"][0]) == (router == "learned")
    assert found["held_out"][TUNED][0] != found["held_out"][DENSE][0]


@pytest.mark.parametrize(("kind", "size", "unit"), [("vit", "32", "cross-entropy"), ("dit", "32", "squared error")])
def test_other_kinds_of_models_are_trained_first(
    tmp_path: Path, kind: str, size: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    if kind == "dit":
        pytest.importorskip("diffusers")
        from attn_plugins.pipelines.tuning import tasks

        monkeypatch.setitem(tasks.SMALL_DIT, "sample_size", 8)
        monkeypatch.setitem(tasks.SMALL_DIT, "num_layers", 2)
    found = run(tmp_path, "--kind", kind, "--size", size)
    assert list(found[unit]) == [DENSE, UNTRAINED, PRUNED, CALIBRATED, TUNED, CONTROL]
    assert found["unit"] == unit and (tmp_path / "start/config.json").is_file()
    assert "moh" in attn_plugins.summary(attn_plugins.from_pretrained(tmp_path / "moh"))


def test_what_is_told() -> None:
    """Differences are item by item, over the means of the seeds: seeds that agree take nothing off the interval."""
    held_out = {DENSE: [[1.0, 2.0]], CALIBRATED: [[1.1, 2.3], [1.3, 2.3]], TUNED: [[1.0, 2.0]]}
    told = TunedMoH(
        "M", {}, "T", "perplexity", {"steps": 1, "batch": 2}, [0, 1], 1, (5, 100), held_out, {"moh": [1.0]},
        [RouterRow("layer", 1.0, 0.9, 0.1, 1, (1.0, 0.0))], environment(),
    )  # fmt: skip
    gap, half = told.difference(CALIBRATED, DENSE)
    assert gap == pytest.approx(0.25) and half == pytest.approx(1.96 * 0.05)
    assert told.difference(TUNED, DENSE) == (0.0, 0.0)
    assert f"| {CALIBRATED} | 5.755 | 5.474 - 6.050 | +0.2500 ± 0.0980 |" in told.table()


def test_the_trainer_of_transformers(tmp_path: Path, dense: tuple[str, ...]) -> None:
    """Two batches accumulated, or one of both: the same balance loss in the gradients, and logs of the routers."""
    from attn_plugins.training.moh_trainer import MoHTrainer

    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(4)]
    grads, logs = [], []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        model = transformers.AutoModelForCausalLM.from_pretrained(dense[1])
        with pytest.warns(UserWarning, match="moh"):
            handle = attn_plugins.patch(model, "moh", router="learned")
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=1,
            report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-9, max_grad_norm=0.0,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = MoHTrainer(model=model, handle=handle, balance=10.0, args=arguments, train_dataset=rows)
        kept: dict[str, torch.Tensor] = {}

        class Keep(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, model: Any, kept: Any = kept, **kwargs: Any) -> None:
                kept.update({name: part.grad.clone() for name, part in model.named_parameters() if "w_r" in name})

        trainer.add_callback(Keep())
        trainer.train()
        grads.append(kept)
        logs.append(trainer.state.log_history[0])
    for other in grads[1:]:
        for name, grad in grads[0].items():
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)
    assert all({"balance", "router_entropy", "dead_heads"} <= log.keys() for log in logs)


@pytest.mark.parametrize(("accepts", "of_its_own"), [(False, True), (False, False), (True, True)])
def test_what_the_trainer_does_not_divide(
    tmp_path: Path, dense: tuple[str, ...], accepts: bool, of_its_own: bool
) -> None:
    """A loss function of one's own is divided by nothing, whatever the model takes; four batches count as one."""
    from attn_plugins.training.moh_trainer import MoHTrainer

    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(6)]
    model = transformers.AutoModelForCausalLM.from_pretrained(dense[1])
    with pytest.warns(UserWarning, match="moh"):
        handle = attn_plugins.patch(model, "moh", router="learned")

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", learning_rate=1e-9, max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = MoHTrainer(
        model=model, handle=handle, args=arguments, train_dataset=rows, compute_loss_func=own if of_its_own else None
    )
    trainer.model_accepts_loss_kwargs = accepts
    scales: list[float] = []
    for module in model.modules():
        if type(module).__name__ == "HeadRouter":
            module.w_r.weight.register_hook(lambda grad: scales.append(float(trainer.watch.scale)))
            break
    trainer.train()
    assert scales == pytest.approx([1 / 4] * 4 + [1 / 2] * 2)
