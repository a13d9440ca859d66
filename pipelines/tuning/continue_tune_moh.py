"""A dense model becomes a mixture of heads: untrained, pruned, calibrated, tuned; beside dense tuning of equal length.

All are judged on the same held-out items. What depends on chance (a router's first weights, what it is calibrated on)
is repeated for several seeds. Then the calibrated mixture is tuned, and the dense model from the same start on the same
items in the same order.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attn_plugins import registry
from attn_plugins.handle import PatchHandle
from attn_plugins.methods.moh import MoHConfig, calibrate
from attn_plugins.methods.moh.calibrate import PENALTY
from attn_plugins.patching import patch, unpatch
from attn_plugins.pipelines.attention_projections import attention_projections
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
from attn_plugins.training.loop import LoopSettings
from attn_plugins.training.routers import RouterRow, RouterWatch
from attn_plugins.training.seeds import seeded
from attn_plugins.training.tasks import Task, held_out_losses, train_task
from attn_plugins.training.trainable import make_trainable

ROUTER = "ridge"  # tuned beside the paper's learned gates it lost less, and needs no balance loss
PRUNING = 1e9  # a ridge penalty that leaves a regression nothing but the mean: the same heads for every token
CALIBRATION = "calibration"  # its items are drawn apart from those of training


class MoHTuning:
    """The whole job.

    Args:
        accelerator: an `accelerate.Accelerator`.
        task: the dense model and its data.
        settings: how to tune; a LoRA trains the routers too.
        out: folder of `moh/` and `dense/`: a checkpoint and the tuned weights in each.
        options: of the method `moh`; `router` is that of the tuned mixture: "ridge" unless named, calibrated and fixed.
        seeds: of routers and calibration.
        calibration: batches for it.
        balance: weight of the balance loss of a learned router.
    """

    def __init__(
        self,
        accelerator: Any,
        task: Task,
        settings: LoopSettings,
        out: Path,
        options: Mapping[str, Any],
        seeds: Sequence[int] = (0, 1, 2),
        calibration: int = 16,
        balance: float = 0.01,
    ) -> None:
        self.accelerator, self.task, self.settings, self.out = accelerator, task, settings, out
        self.options, self.seeds, self.calibration, self.balance = dict(options), seeds, calibration, balance
        self.held_out: dict[str, list[list[float]]] = {}
        self.losses: dict[str, list[float]] = {}

    def run(self, *, dense: bool = True, resume: bool = False) -> TunedMoH:
        """Judge what needs no training, tune, and tune densely where asked; `resume` takes up what lies in the folder.

        Raises:
            ValueError: a folder with a run that is not to be resumed, or a router that the model cannot have.
        """
        taken = [folder for folder in map(self._checkpoint, ("moh", "dense")) if folder.exists()]
        if taken and not resume:
            raise ValueError(f"{taken[0]} is there already: resume that run, or give another folder")
        model = self.task.load().to(self.accelerator.device)
        weights = sum(part.numel() for part in model.parameters())
        self._judge(DENSE, model)
        self._without_training(model)
        del model

        model = self._fresh()
        handle = self._start(model)
        options = dict(handle.patches[0].config.to_options())
        added = sum(held.numel() for name, held in model.state_dict().items() if ".moh." in name)
        with watched(handle, self.balance) as watch:
            self.losses["moh"] = self._tune("moh", model, resume, joined=watch.joined)
        self._save(model, "moh", handle)
        with watched(handle, 0.0) as watch:
            self._judge(TUNED, model)
            routers = watch.rows(lambda sums: self.accelerator.reduce(sums.to(self.accelerator.device), "sum"))
        if dense:
            control = self._fresh()
            self.losses["dense"] = self._tune("dense", control, resume)
            self._save(control, "dense")
            self._judge(CONTROL, control)
        return TunedMoH(
            model=f"{type(model).__name__}, {weights:,} parameters", options=options, task=repr(self.task),
            unit=self.task.unit, settings=dataclasses.asdict(self.settings), seeds=list(self.seeds),
            processes=self.accelerator.num_processes, weights=(added, weights), held_out=self.held_out,
            losses=self.losses, routers=[RouterRow(*row) for row in routers], environment=environment(),
        )  # fmt: skip

    def _without_training(self, model: Any) -> None:
        """The routers that need none, for every seed; the model is dense again afterwards."""
        active = {name: value for name, value in self.options.items() if name not in ("router", "scale")}
        for seed in self.seeds:
            with quiet_patch(model, router="learned", **active) as handle:
                _draw_again(handle, seed)
                self._judge(UNTRAINED, model)
            for name, penalty in ((PRUNED, PRUNING), (CALIBRATED, PENALTY)):
                with quiet_patch(model, router="ridge", **active) as handle:
                    shown = self.accelerator.is_main_process
                    calibrate(handle, self._calibration(seed), penalty=penalty, progress=shown)
                    self._judge(name, model)
        if _causal(model):
            try:
                with quiet_patch(model, router="query_norm", **active):
                    self._judge(NORMS, model)
            except ValueError as error:  # queries that are normed head by head
                self.accelerator.print(f"no query norms here: {error}")

    def _start(self, model: Any) -> PatchHandle:
        """The mixture that is tuned: with routers that have weights, it begins calibrated."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="attn_plugins: moh:")  # it is calibrated and tuned right here
            handle = patch(model, "moh", strict=True, **{"router": ROUTER, **self.options})
        if _router(handle) != "query_norm":
            was_training = model.training
            calibrate(handle, self._calibration(self.settings.seed), progress=self.accelerator.is_main_process)
            model.train(was_training)
        return handle

    def _calibration(self, seed: int) -> Iterator[Mapping[str, Any]]:
        size = self.settings.batch
        shift = int(torch.randint(1 << 20, (), generator=seeded(CALIBRATION, seed)))
        for number in range(self.calibration):
            batch = self.task.batch(range(shift + number * size, shift + (number + 1) * size), seed)
            yield self.task.inputs(self.task.moved(batch, self.accelerator.device))

    def _fresh(self) -> Any:
        model, settings = self.task.load(), self.settings
        make_trainable(
            model, lora=settings.lora, checkpointing=settings.checkpointing, seed=settings.seed,
            projections=attention_projections(model),
        )  # fmt: skip
        return model.to(self.accelerator.device)

    def _tune(self, name: str, model: Any, resume: bool, **more: Any) -> list[float]:
        run = {"attention": {"method": "moh", **self.options, "balance": self.balance} if name == "moh" else {}}
        parts = self.accelerator, model, self.task, self.settings, self._checkpoint(name)
        return train_task(*parts, run=run, resume=resume, title=name, **more)

    def _save(self, model: Any, name: str, handle: PatchHandle | None = None) -> None:
        """A whole model, its routers among its weights; of a LoRA the LoRA alone, and the routers beside it."""
        if self.accelerator.is_main_process:
            model.save_pretrained(self.out / name)
            if handle is not None and self.settings.lora and _router(handle) != "query_norm":
                handle.save_weights(self.out / name)

    def _checkpoint(self, name: str) -> Path:
        return self.out / name / "checkpoint"

    def _judge(self, name: str, model: Any) -> None:
        found = held_out_losses(self.accelerator, model, self.task, self.settings.held_out)
        self.held_out.setdefault(name, []).append(found)


@contextmanager
def quiet_patch(model: Any, **options: Any) -> Iterator[PatchHandle]:
    """A mixture for as long as the `with` lasts, without the warning that it is untrained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attn_plugins: moh:")
        handle = patch(model.eval(), "moh", strict=True, **options)
    try:
        yield handle
    finally:
        unpatch(model)


@contextmanager
def watched(handle: PatchHandle, weight: float) -> Iterator[RouterWatch]:
    watch = RouterWatch.of(handle, weight)
    try:
        yield watch
    finally:
        watch.close()


@torch.no_grad()
def _draw_again(handle: PatchHandle, seed: int) -> None:
    """Other first weights of the same size: those of a new router are the same every time."""
    for name, weight in handle.named_weights():
        if name.endswith("w_r.weight"):
            draw = torch.randn(weight.shape, generator=seeded("router", name, seed)).to(weight)
            weight.copy_(draw * weight.std())


def _router(handle: PatchHandle) -> str:
    config = handle.patches[0].config
    assert isinstance(config, MoHConfig)  # of the patch that was made here
    return config.router


def _causal(model: Any) -> bool:
    family = registry.family_of(model)
    return family is not None and any(site.kind == "causal" for site in family.find_sites(model))
