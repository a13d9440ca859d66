"""What a comparison found, and how it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attn_plugins.metrics import Drift
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.report import table


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

    `drift` holds one row per step, of the latents after it, the mean over the seeds; psnr and ssim are None where there
    are no pictures.
    """

    drift: tuple[Drift, ...]
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class Comparison:
    """Dense against patched, seed by seed. `frames`: per seed (dense, patched), each (B, F, C, H, W) float in 0..1."""

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
        if likeness.psnr is not None and noise.psnr is not None:
            rows.append(("PSNR", _decibels(noise.psnr), _decibels(likeness.psnr), "against dense, same seed"))
        if likeness.ssim is not None and noise.ssim is not None:
            rows.append(("SSIM", f"{noise.ssim:.4f}", f"{likeness.ssim:.4f}", "against dense, same seed"))
        return rows

    def render(self) -> str:
        """Tables in plain text: the patch, the measures, the drift per step."""
        seeds = ", ".join(map(str, self.seeds))
        lines = [
            f"{self.method} on {self.model}; {self.steps} steps, seeds {seeds}; {self.machine}",
            "",
            self.summary,
            "",
        ]
        lines += table([("", "dense", "patched", ""), *self.rows()])
        lines += ["", "drift of the latents from dense, per step (relative L2; dense steps first):"]
        drifts = [f"{row.relative_l2:.1e}" for row in self.likeness.drift]
        lines += ["  " + "  ".join(drifts[start : start + 10]) for start in range(0, len(drifts), 10)]
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
