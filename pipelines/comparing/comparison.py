"""What a comparison found, and how it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attn_plugins.measures import TITLES, LayerStep, Measures, cells, mean
from attn_plugins.metrics import mean_interval
from attn_plugins.pipelines.comparing.clocks import NOTHING, Timing, bound, scatter
from attn_plugins.pipelines.comparing.likeness import Likeness, decibels
from attn_plugins.pipelines.comparing.overview import Figures, milliseconds, power, with_ends
from attn_plugins.report import table

STEPS_TITLE = "each step: latents after it, and attention over all layers, against dense"
LAYERS_TITLE = "each layer: attention against dense, the mean over its steps"


@dataclass(frozen=True)
class Comparison:
    """Dense against patched, case by case: each prompt with each seed, in this order; no prompts are one.

    `frames`: per case (dense, patched), each (B, F, C, H, W) float in 0..1; `again`: dense once more. Both as far as
    pictures were kept. `measures`: of a run of its own, of the first case; None if it was not asked for. `notes`: what
    is missing, and why.
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
    again: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Attention's share of a dense step, at the sites that the method patches."""
        return self.dense.share

    @property
    def cases(self) -> tuple[str, ...]:
        """Their names: prompt and seed."""
        names = self.prompts or ("",)
        return tuple(f"{name}, seed {seed}" if name else f"seed {seed}" for name in names for seed in self.seeds)

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
        return bound(self.share)

    @property
    def job_bound(self) -> float:
        """The same for the whole schedule, whose first steps stay dense."""
        return bound(self.share * self.sparse_share)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, patched, gain or bound), for any table."""
        dense, patched, likeness, noise = self.dense, self.patched, self.likeness, self.noise
        step = (milliseconds(dense.step), milliseconds(patched.step))
        attention = (milliseconds(dense.attention), milliseconds(patched.attention))
        rows = [
            ("step", *step, f"{self.step_speedup:.2f}x of at most {self.step_bound:.2f}x"),
            ("attention in a step", *attention, _times(self.attention_speedup)),
            ("attention's share of a step", f"{self.share:.1%}", f"{patched.share:.1%}", ""),
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
            rows.append(("PSNR", decibels(noise.psnr), decibels(likeness.psnr), "against dense, same seed"))
        if likeness.ssim is not None and noise.ssim is not None:
            rows.append(("SSIM", f"{noise.ssim:.4f}", f"{likeness.ssim:.4f}", "against dense, same seed"))
        if likeness.lpips is not None and noise.lpips is not None:
            rows.append(("LPIPS", f"{noise.lpips:.4f}", f"{likeness.lpips:.4f}", "against dense, same seed"))
        return rows

    def figures(self) -> Figures:
        """The patched run's numbers by name (overview.py), with intervals over the cases where there are several."""
        found: Figures = {
            "density": self.density, "step_seconds": self.patched.step, "step_speedup": self.step_speedup,
            "step_bound": self.step_bound, "attention_seconds": self.patched.attention,
            "attention_speedup": self.attention_speedup, "attention_share": self.patched.share,
            "job_seconds": self.patched.job, "job_speedup": self.job_speedup, "job_bound": self.job_bound,
        }  # fmt: skip
        if self.measures is not None:
            rows = self.measures.layer_steps
            found |= {name: mean(getattr(row, name) for row in rows) for name in ("recall", "relative_l1")}
        return found | _quality(self.likeness)

    def floor(self) -> Figures:
        """The same of dense: its times, and how far it is from itself, run again."""
        times: Figures = {
            "density": 1.0, "step_seconds": self.dense.step, "attention_seconds": self.dense.attention,
            "attention_share": self.share, "job_seconds": self.dense.job,
        }  # fmt: skip
        return times | _quality(self.noise)

    def sentences(self) -> tuple[str, str, str]:
        """Speed, cost and bound, one sentence each."""
        dense, patched, likeness, noise = self.dense, self.patched, self.likeness, self.noise
        speed = (
            f"A sparse step takes {milliseconds(patched.step)} where a dense one takes {milliseconds(dense.step)}, "
            f"{self.step_speedup:.2f}x; the whole job, with {self.dense_steps} of {self.steps} steps dense, "
            f"{self.job_speedup:.2f}x; {scatter(dense.spread)}."
        )
        cost = f"The last latents differ from dense by {power(likeness.drift[-1].relative_l2)} of their norm"
        cost += f" (dense from itself: {power(noise.drift[-1].relative_l2)})"
        if likeness.psnr is not None:
            cost += f"; the pictures' PSNR is {decibels(likeness.psnr)}"
            cost += f" and their SSIM {likeness.ssim:.3f}" if likeness.ssim is not None else ""
            cost += f" (dense against itself: {decibels(noise.psnr or 0.0)})"
        limit = (
            f"Attention at the patched sites is {self.share:.1%} of a dense step, so no method could make a sparse "
            f"step faster than {self.step_bound:.2f}x, or this job faster than {self.job_bound:.2f}x (Amdahl)."
        )
        return speed, f"{cost}.", limit if dense.attention else NOTHING

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
        prompts = f", {len(self.prompts)} prompts" if len(self.prompts) > 1 else ""
        lines = [
            f"{self.method} on {self.model}; {self.steps} steps{prompts}, seeds {seeds}; {self.machine}",
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


def _quality(likeness: Likeness) -> Figures:
    found: Figures = {"drift": likeness.drift[-1].relative_l2, "latent_psnr": likeness.latent_psnr[-1]}
    for name in ("psnr", "ssim", "lpips"):
        found[name] = getattr(likeness, name)
    for name in ("drift", "psnr", "ssim", "lpips"):
        values = [value for one in likeness.cases if (value := getattr(one, name)) is not None]
        if len(values) > 1:
            found |= with_ends(name, mean_interval(values))
    return found


def _times(value: float) -> str:
    return "not called" if math.isnan(value) else f"{value:.2f}x"
