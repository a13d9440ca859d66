"""A dense vision transformer becomes one with trained agents, beside dense tuning of the same length.

The dense model is judged, then the model after the swap; then it is tuned with agents, and once more from the start
without them, on the same pictures in the same order. All are judged on the same held-out pictures. Last come the times
of a forward, dense and with agents, at several sizes of picture.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attn_plugins.handle import PatchHandle
from attn_plugins.patching import patch, patched, unpatch
from attn_plugins.pipelines.attention_projections import attention_projections
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.stopwatch import now
from attn_plugins.pipelines.tuning.tuned_vit import CONTROL, DENSE, FREE, SWAPPED, TUNED, Speed, TunedVit
from attn_plugins.training.classifying import held_out_hits, logits, muon, small_vit, train_classifier
from attn_plugins.training.loop import LoopSettings
from attn_plugins.training.pictures import PictureData
from attn_plugins.training.trainable import make_trainable

METHOD = "trained_agent"
ROUNDS = 7  # timed forwards of each kind, after one that is not timed
TOKENS_AT_ONCE = 3136  # of all pictures that are timed together, so that small ones fill the machine too


def small_dense_model(
    accelerator: Any, data: PictureData, size: int, steps: int, folder: Path, seed: int = 0
) -> Callable[[], Any]:
    """Loads a small dense ViT, trained on `data` from the start; it is trained now unless `folder` holds it already."""
    from transformers import ViTForImageClassification

    if not (folder / "config.json").is_file():
        settings = LoopSettings(steps=steps, batch=16, lr=2e-3, warmup=50, save_every=250, seed=seed)
        model = small_vit(data, size, seed).to(accelerator.device)
        make_trainable(model)
        parts = accelerator, model, data, settings, folder / "checkpoint"
        train_classifier(*parts, resume=True, title="dense ViT", optimizers=muon)
        if accelerator.is_main_process:
            model.save_pretrained(folder)
        accelerator.wait_for_everyone()
    return lambda: ViTForImageClassification.from_pretrained(folder)


class AgentTuning:
    """The whole job.

    Args:
        accelerator: an `accelerate.Accelerator`.
        load: gives the dense classifier (ViT, DeiT, DINOv2, ...); called once for each run, equal every time.
        data: what it is tuned on, with the model's own labels.
        settings: how; a LoRA trains the method's own weights too.
        out: folder of `agents/` and `dense/`: a checkpoint and the tuned weights in each.
        options: of the method `trained_agent`.
        sizes: px, of the pictures whose forward is timed.
    """

    def __init__(
        self,
        accelerator: Any,
        load: Callable[[], Any],
        data: PictureData,
        settings: LoopSettings,
        out: Path,
        options: Mapping[str, Any],
        sizes: Sequence[int] = (224, 448, 896),
    ) -> None:
        self.accelerator, self.load, self.data, self.settings, self.out = accelerator, load, data, settings, out
        self.options, self.sizes = dict(options), sizes
        self.hits: dict[str, list[bool]] = {}
        self.losses: dict[str, list[float]] = {}

    def run(self, *, dense: bool = True, resume: bool = False) -> TunedVit:
        """Tune with agents, and dense too where asked; `resume` takes up what lies in the folder.

        Raises:
            ValueError: labels that the model does not have, or a folder with a run that is not to be resumed.
        """
        taken = [folder for folder in map(self._checkpoint, ("agents", "dense")) if folder.exists()]
        if taken and not resume:
            raise ValueError(f"{taken[0]} is there already: resume that run, or give another folder")
        model = self._fresh()
        before = sum(part.numel() for name, part in model.named_parameters() if "lora_" not in name)
        self._judge(DENSE, model)
        with patched(model, "agent", agents=self.options.get("agents", 49), min_tokens=0):
            self._judge(FREE, model)
        handle = patch(model, METHOD, strict=True, **self.options)
        added = sum(weight.numel() for _, weight in handle.named_weights())
        self._judge(SWAPPED, model)
        self.losses["agents"] = self._tune("agents", model, resume)
        self._save(model, "agents", handle)
        self._judge(TUNED, model)
        speeds = self._speeds(model)
        if dense:
            control = self._fresh()
            self.losses["dense"] = self._tune("dense", control, resume)
            self._save(control, "dense")
            self._judge(CONTROL, control)
        return TunedVit(
            model=f"{type(model).__name__}, {before:,} parameters", options=self.options, data=repr(self.data),
            settings=dataclasses.asdict(self.settings), processes=self.accelerator.num_processes,
            weights=(added, before), hits=self.hits, losses=self.losses, speeds=speeds, environment=environment(),
        )  # fmt: skip

    def _fresh(self) -> Any:
        model, settings = self.load(), self.settings
        if model.config.num_labels != len(self.data.classes):
            raise ValueError(
                f"the pictures have {len(self.data.classes)} classes, and this {type(model).__name__} tells "
                f"{model.config.num_labels}: give it a head for them (from_pretrained(..., num_labels=...))"
            )
        make_trainable(
            model, lora=settings.lora, checkpointing=settings.checkpointing, seed=settings.seed,
            projections=attention_projections(model),
        )  # fmt: skip
        return model.to(self.accelerator.device)

    def _tune(self, name: str, model: Any, resume: bool) -> list[float]:
        run = {"attention": {"method": METHOD, **self.options} if name == "agents" else {}}
        parts = self.accelerator, model, self.data, self.settings, self._checkpoint(name)
        return train_classifier(*parts, run=run, resume=resume, title=name)

    def _save(self, model: Any, name: str, handle: PatchHandle | None = None) -> None:
        """A whole model, its agents among its weights; of a LoRA the LoRA alone, and the agents beside it."""
        if self.accelerator.is_main_process:
            model.save_pretrained(self.out / name)
            if handle is not None and self.settings.lora:
                handle.save_weights(self.out / name)

    def _checkpoint(self, name: str) -> Path:
        return self.out / name / "checkpoint"

    def _judge(self, name: str, model: Any) -> None:
        self.hits[name] = held_out_hits(self.accelerator, model, self.data, self.settings)

    @torch.no_grad()
    def _speeds(self, model: Any) -> list[Speed]:
        """Dense and with agents in turn, of the same weights."""
        agents, dense = model.eval(), copy.deepcopy(model)
        unpatch(dense)
        side = agents.config.patch_size
        rows = []
        for size in self.sizes:
            tokens = (size // (side if isinstance(side, int) else side[0])) ** 2
            batch = max(1, TOKENS_AT_ONCE // tokens)
            pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            times: dict[str, list[float]] = {"dense": [], "agents": []}
            for _ in range(1 + ROUNDS):
                for name, one in (("dense", dense), ("agents", agents)):
                    times[name].append(_seconds(one, pixels.to(self.accelerator.device)))
            medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
            rows.append(Speed(size, tokens, batch, **medians))
        return rows


def _seconds(model: Any, pixels: torch.Tensor) -> float:
    start = now(pixels.device)
    logits(model, pixels)
    return now(pixels.device) - start
