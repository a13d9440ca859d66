"""What became of latents and pictures: patched against dense, or dense against dense again, case by case."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from attn_plugins.metrics import Drift, bit_identical, drift, latent_psnr, psnr, ssim
from attn_plugins.metrics.perceptual import Perceptual
from attn_plugins.metrics.ssim import WINDOW
from attn_plugins.pipelines.comparing.runs import Run


@dataclass(frozen=True)
class Scores:
    """One case: drift of its last latents (relative L2); of its pictures the means over frames, None without them."""

    drift: float
    psnr: float | None
    ssim: float | None
    lpips: float | None


@dataclass(frozen=True)
class Likeness:
    """Patched against dense, or dense against dense again: the noise floor. Pictures: mean over cases and frames.

    `drift`, `latent_psnr` (dB, over the range of the dense latents) and `identical` (the same bits, in every case) have
    one entry per step, of the latents after it, means over the cases (a prompt with a seed); psnr, ssim and lpips are
    None without pictures, or where they cannot be had. `cases`: each by itself.
    """

    drift: tuple[Drift, ...]
    latent_psnr: tuple[float, ...]
    identical: tuple[bool, ...]
    psnr: float | None
    ssim: float | None
    lpips: float | None = None
    cases: tuple[Scores, ...] = ()

    def latent_cell(self, step: int) -> str:
        """The latents' PSNR after a step as text."""
        return "bit-identical" if self.identical[step] else decibels(self.latent_psnr[step])


class Tally:
    """Collects cases as they are run, so that nothing of them but numbers has to be kept."""

    def __init__(self, perceptual: Perceptual | None = None) -> None:
        self.perceptual = perceptual
        self.drifts: list[list[Drift]] = []
        self.latents: list[list[float]] = []
        self.identical: list[list[bool]] = []
        self.scores: list[Scores] = []

    def add(self, run: Run, dense: Run) -> None:
        """One case more."""
        pairs = list(zip(run.latents, dense.latents, strict=True))
        self.drifts.append([drift(a, b) for a, b in pairs])
        self.latents.append([latent_psnr(a, b) for a, b in pairs])
        self.identical.append([bit_identical(a, b) for a, b in pairs])
        peak = similarity = distance = None
        if run.frames is not None and dense.frames is not None:
            peak = float(psnr(run.frames, dense.frames).mean())
            if min(run.frames.shape[-2:]) >= WINDOW:
                similarity = float(ssim(run.frames, dense.frames).mean())
            if self.perceptual is not None:
                distance = float(self.perceptual(run.frames, dense.frames).mean())
        self.scores.append(Scores(self.drifts[-1][-1].relative_l2, peak, similarity, distance))

    def likeness(self) -> Likeness:
        """The means so far."""
        return Likeness(
            _mean_drift(self.drifts),
            tuple(finite_mean(step) for step in zip(*self.latents, strict=True)),
            tuple(all(step) for step in zip(*self.identical, strict=True)),
            _mean([one.psnr for one in self.scores]),
            _mean([one.ssim for one in self.scores]),
            _mean([one.lpips for one in self.scores]),
            tuple(self.scores),
        )


def finite_mean(decibels: Sequence[float]) -> float:
    """Of those that differ from dense; infinite where none does."""
    return statistics.fmean([value for value in decibels if not math.isinf(value)] or [math.inf])


def decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return finite_mean(known) if known else None


def _mean_drift(rows: list[list[Drift]]) -> tuple[Drift, ...]:
    """Per step, the mean over the cases (outer list: cases; inner: steps)."""
    return tuple(
        Drift(sum(d.relative_l2 for d in step) / len(step), sum(d.cosine for d in step) / len(step))
        for step in zip(*rows, strict=True)
    )
