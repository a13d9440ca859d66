"""What a comparison found, and how it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attn_plugins.measures import TITLES, LayerStep, Measures, cells
from attn_plugins.metrics import Drift
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.report import table

STEPS_TITLE = "each step: latents after it, and attention over all layers, against dense"
LAYERS_TITLE = "each layer: attention against dense, the mean over its steps"


@dataclass(frozen=True)
class Timing:
    """Medians in seconds. `step`: a denoising step; of the patched run, a sparse one. `job`: the whole call.

    `attention`: attention at the patched sites within a step, measured in runs of its own, because a clock around each
    layer costs time; `timed_step` is the step in those runs.
    """

    step: float
    job: float
    attention: float
    timed_step: float


@dataclass(frozen=True)
class Likeness:
    """Patched against dense, or dense against dense again: the noise floor. Pictures: mean over seeds and frames.

    `drift`, `latent_psnr` (dB, over the range of the dense latents) and `identical` (the same bits, in every seed) have
    one entry per step, of the latents after it, means over the seeds; psnr and ssim are None without pictures.
    """

    drift: tuple[Drift, ...]
    latent_psnr: tuple[float, ...]
    identical: tuple[bool, ...]
    psnr: float | None
    ssim: float | None

    def latent_cell(self, step: int) -> str:
        """The latents' PSNR after a step as text."""
        return "bit-identical" if self.identical[step] else _decibels(self.latent_psnr[step])


@dataclass(frozen=True)
class Comparison:
    """Dense against patched, seed by seed. `frames`: per seed (dense, patched), each (B, F, C, H, W) float in 0..1.

    `measures`: of a run of its own, of the first seed; None if it was not asked for.
    """

    model: str
    method: str
    summary: str
    seeds: tuple[int, ...]
    steps: int
    dense_steps: int
    density: float | None
    dense: Timing
    patched: Timing
    likeness: Likeness
    noise: Likeness
    machine: str
    measures: Measures | None = None
    frames: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(default=(), repr=False)

    @property
    def share(self) -> float:
        """Attention's share of a dense step, at the sites that the method patches."""
        return min(self.dense.attention / self.dense.timed_step, 1.0)

    @property
    def sparse_share(self) -> float:
        """Share of the steps that are not kept dense."""
        return 1 - self.dense_steps / self.steps

    @property
    def step_speedup(self) -> float:
        return self.dense.step / self.patched.step

    @property
    def attention_speedup(self) -> float:
        return self.dense.attention / self.patched.attention if self.patched.attention else math.nan

    @property
    def job_speedup(self) -> float:
        return self.dense.job / self.patched.job

    @property
    def step_bound(self) -> float:
        """What a sparse step could gain at most, with attention that costs nothing (Amdahl)."""
        return end_to_end(math.inf, self.share)

    @property
    def job_bound(self) -> float:
        """The same for the whole schedule, whose first steps stay dense."""
        return end_to_end(math.inf, self.share * self.sparse_share)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, patched, gain or bound), for any table."""
        dense, patched, likeness, noise = self.dense, self.patched, self.likeness, self.noise
        rows = [
            ("step", _ms(dense.step), _ms(patched.step), f"{self.step_speedup:.2f}x of at most {self.step_bound:.2f}x"),
            ("attention in a step", _ms(dense.attention), _ms(patched.attention), _times(self.attention_speedup)),
            ("attention's share of a step", f"{self.share:.1%}", _share(patched), ""),
            ("whole job", f"{dense.job:.2f} s", f"{patched.job:.2f} s",
             f"{self.job_speedup:.2f}x of at most {self.job_bound:.2f}x"),
            ("density", "100.0%", "?" if self.density is None else f"{self.density:.1%}", ""),
            ("dense steps", f"{self.steps} of {self.steps}", f"{self.dense_steps} of {self.steps}", ""),
        ]  # fmt: skip
        last, floor = likeness.drift[-1], noise.drift[-1]
        rows.append(("", "dense again", "patched", ""))
        rows.append(("drift of the last latents", f"{floor.relative_l2:.2e}", f"{last.relative_l2:.2e}", "relative L2"))
        rows.append(("cosine of the last latents", f"{floor.cosine:.5f}", f"{last.cosine:.5f}", ""))
        rows.append(("PSNR of the last latents", noise.latent_cell(-1), likeness.latent_cell(-1), "over their range"))
        if likeness.psnr is not None and noise.psnr is not None:
            rows.append(("PSNR", _decibels(noise.psnr), _decibels(likeness.psnr), "against dense, same seed"))
        if likeness.ssim is not None and noise.ssim is not None:
            rows.append(("SSIM", f"{noise.ssim:.4f}", f"{likeness.ssim:.4f}", "against dense, same seed"))
        return rows

    def measured_in(self, step: int) -> list[LayerStep]:
        """What was measured in a step, by layer; a run that began in mid schedule ends where the schedule does."""
        if self.measures is None:
            return []
        step += max(self.measures.steps - self.steps, 0)
        return [row for row in self.measures.layer_steps if row.step == step]

    def per_step(self) -> list[tuple[str, ...]]:
        """Cells of a table, header first: the latents after each step, and what was measured in it, over all layers."""
        titles = TITLES if self.measures is not None and self.measures.layer_steps else ()
        lines: list[tuple[str, ...]] = [("step", "drift", "PSNR", "floor", *titles)]
        for step in range(self.steps):
            latents = (one.latent_cell(step).removeprefix("bit-") for one in (self.likeness, self.noise))
            measured = cells(self.measured_in(step)) if titles else ()
            lines.append((str(step), f"{self.likeness.drift[step].relative_l2:.1e}", *latents, *measured))
        return lines

    def render(self) -> str:
        """Tables in plain text: the patch, the measures, then each step and each layer."""
        seeds = ", ".join(map(str, self.seeds))
        lines = [
            f"{self.method} on {self.model}; {self.steps} steps, seeds {seeds}; {self.machine}",
            "",
            self.summary,
            "",
        ]
        lines += table([("", "dense", "patched", ""), *self.rows()])
        lines += ["", STEPS_TITLE, *table(self.per_step())]
        if self.measures is not None:
            lines += ["", LAYERS_TITLE, self.measures.table()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def mean_drift(rows: list[list[Drift]]) -> tuple[Drift, ...]:
    """Per step, the mean over the seeds (outer list: seeds; inner: steps)."""
    return tuple(
        Drift(sum(d.relative_l2 for d in step) / len(step), sum(d.cosine for d in step) / len(step))
        for step in zip(*rows, strict=True)
    )


def _share(timing: Timing) -> str:
    return f"{min(timing.attention / timing.timed_step, 1.0):.1%}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _times(value: float) -> str:
    return "not called" if math.isnan(value) else f"{value:.2f}x"


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
