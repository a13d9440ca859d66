"""Continue-tuning with sparse attention, beside dense tuning of the same length: same weights, videos, order and noise.

The untuned model is judged first; then it is tuned with the method in place, and once more from the start without it.
Every model is judged on the same held-out videos, run dense and run sparse, so one sees what sparsity costs before
tuning and after it, and whether dense tuning would have done as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attn_plugins import presets
from attn_plugins.measures import NAMES, mean
from attn_plugins.patching import patched
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.stopwatch import now
from attn_plugins.pipelines.tuning.tuned import DENSE, SPARSE, UNTUNED, Tuned
from attn_plugins.training.flow_matching import flow_loss
from attn_plugins.training.trainable import make_trainable, save_trained, trained
from attn_plugins.training.tuning import TuneSettings, held_out_losses, tune
from attn_plugins.training.video_batches import training_batch
from attn_plugins.training.video_data import VideoData

ROUNDS = 5  # timed steps of each kind, after one that is not timed
ROWS = 16  # of each head, sampled for density and recall


def preset_options(method: str, preset: str, quality: str) -> dict[str, Any]:
    """A preset's options, for a Wan model of any size: its `base_size` scales them to the grid that the model has.

    Raises:
        ValueError: no such preset of this method, or no such quality.
    """
    rows = {row.name: row for row in presets.available(method)}
    if preset not in rows:
        raise ValueError(f"preset={preset!r}: method {method!r} has {', '.join(rows) or 'none'}")
    if quality not in presets.QUALITIES:
        raise ValueError(f"quality={quality!r}: legal are {', '.join(presets.QUALITIES)}")
    return dict(rows[preset].at(quality).options)


class ContinueTuning:
    """The whole job.

    Args:
        accelerator: an `accelerate.Accelerator`.
        load: gives the untuned model, a Wan transformer; called once for each run, equal every time.
        data: what it is tuned on.
        settings: how.
        out: folder of `sparse/` and `dense/`: a checkpoint and the tuned weights in each.
        method, options: as for `patch`. All steps are sparse unless the options say otherwise, and a call that the
            method cannot do is an error.
    """

    def __init__(
        self,
        accelerator: Any,
        load: Callable[[], Any],
        data: VideoData,
        settings: TuneSettings,
        out: Path,
        method: str,
        options: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.load, self.data, self.settings, self.out = accelerator, load, data, settings, out
        self.method = method
        self.attention: dict[str, Any] = {"method": method, "strict": True, "dense_steps": 0, **options}
        self.held_out: dict[str, dict[str, list[float]]] = {"dense": {}, "sparse": {}}
        self.kept: dict[str, dict[str, float | None]] = {}

    def run(self, *, dense: bool = True, resume: bool = False) -> Tuned:
        """Tune sparse, and dense too where asked; `resume` takes up what lies in the folder.

        Returns:
            What was found; the times, and what was kept of attention, are of this process.

        Raises:
            ValueError: videos that the model cannot take, or a folder with a run that is not to be resumed, or cannot.
        """
        taken = [folder for folder in map(self._checkpoint, ("sparse", "dense")) if folder.exists()]
        if taken and not resume:
            raise ValueError(f"{taken[0]} is there already: resume that run, or give another folder")
        model = self._fresh()
        name, parameters = type(model).__name__, sum(part.numel() for part in model.parameters())
        latents = tuple(self.data.item(0)[0].shape)
        seconds = self._step_times(model)
        self._judge(UNTUNED, model)
        losses = {"sparse": self._tune("sparse", SPARSE, model, resume)}
        if dense:
            del model  # before the next one is loaded
            losses["dense"] = self._tune("dense", DENSE, self._fresh(), resume)
        return Tuned(
            model=f"{name}, {parameters:,} parameters", method=self.method, options=self.attention, latents=latents,
            settings=dataclasses.asdict(self.settings), processes=self.accelerator.num_processes, kept=self.kept,
            step_seconds=seconds, losses=losses, held_out=self.held_out, environment=environment(),
        )  # fmt: skip

    def _fresh(self) -> Any:
        model, settings = self.load(), self.settings
        video, prompt = self.data.item(0)
        has, takes = (len(video), prompt.shape[1]), (model.config.in_channels, model.config.text_dim)
        if has != takes:
            raise ValueError(
                f"the videos have latents of {has[0]} channels and prompts of width {has[1]}; this "
                f"{type(model).__name__} takes {takes[0]} and {takes[1]}: give data that was made with its own pipeline"
            )
        make_trainable(model, lora=settings.lora, checkpointing=settings.checkpointing, seed=settings.seed)
        return model.to(self.accelerator.device)  # now: a LoRA made on the CPU is the same for every device

    def _tune(self, name: str, title: str, model: Any, resume: bool) -> list[float]:
        """Tune with the attention called `name`, save without the patch, judge as `title`."""
        attention = self.attention if name == "sparse" else {}
        with patched(model, **attention) if attention else contextlib.nullcontext():
            losses = tune(
                self.accelerator, model, self.data, self.settings, self._checkpoint(name),
                run={"data": repr(self.data), "attention": attention}, resume=resume, title=name,
            )  # fmt: skip
        if self.accelerator.is_main_process:
            save_trained(model, self.out / name)
        self._judge(title, model)
        return losses

    def _checkpoint(self, name: str) -> Path:
        return self.out / name / "checkpoint"

    def _judge(self, name: str, model: Any) -> None:
        """The held-out losses of a model, run dense and run sparse; of the latter also what was kept of attention."""
        parts = self.accelerator, model, self.data, self.settings
        self.held_out["dense"][name] = held_out_losses(*parts)
        with patched(model, **self.attention) as handle, handle.measure(ROWS) as measures:
            self.held_out["sparse"][name] = held_out_losses(*parts)
        rows = measures.layer_steps
        self.kept[name] = {measure: mean(getattr(row, measure) for row in rows) for measure in NAMES}

    def _step_times(self, model: Any) -> dict[str, float]:
        """Medians in seconds of forward and backward, dense and sparse in turn; no process waits for another."""
        device = self.accelerator.device
        batch = training_batch(self.data, 0, self.settings.batch, shift=self.settings.shift).to(device)

        def step() -> float:
            start = now(device)
            with self.accelerator.autocast():
                loss = flow_loss(model, batch.latents, batch.prompts, batch.levels, batch.noise).mean()
            loss.backward()
            for part in trained(model):
                part.grad = None
            return now(device) - start

        found: dict[str, list[float]] = {"dense": [], "sparse": []}
        for _ in range(1 + ROUNDS):
            found["dense"].append(step())
            with patched(model, **self.attention):
                found["sparse"].append(step())
        return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
