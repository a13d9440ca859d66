"""A report's plots (matplotlib): the latents' drift by step, and a language model's predictions by position."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attn_plugins.pipelines.comparing.measure_files import DPI, canvas
from attn_plugins.pipelines.comparing.page import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attn_plugins.pipelines.comparing.comparison import Comparison
    from attn_plugins.pipelines.comparing.language_comparison import LanguageComparison

NO_PLOTS = "no plots: they need matplotlib (pip install matplotlib)"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def latents(comparisons: Sequence[Comparison]) -> Picture:
    """PSNR of the latents after each step, all methods, with the floor."""
    from matplotlib.ticker import MaxNLocator

    figure = canvas(9, 3.4)
    ax = figure.subplots()
    for one in comparisons:
        ax.plot(range(one.steps), _finite(one.likeness.latent_psnr), "o-", ms=3, label=one.method)
    noise = comparisons[0].noise
    if all(noise.identical):
        ax.plot([], [], color="0.5", ls="--", label="dense again: bit-identical")
    else:
        ax.plot(
            range(len(noise.latent_psnr)), _finite(noise.latent_psnr), "o--", ms=3, color="0.5", label="dense again"
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step (none where the latents are still equal)")
    ax.set_ylabel("dB")
    ax.set_title("PSNR of the latents after each step, over the dense latents' range", fontsize=10)
    _finish(ax)
    return Picture(png(figure), "the latents' PSNR against dense, by step")


def positions(comparisons: Sequence[LanguageComparison]) -> Picture:
    """Perplexity over dense, KL and agreement by how many tokens stand before."""
    figure = canvas(11, 3.6)
    axes = figure.subplots(1, 3)
    stretches = comparisons[0].stretches()
    places = range(len(stretches))
    for one in comparisons:
        parts = [slice(*stretch) for stretch in stretches]
        columns = (
            [math.exp(float((one.patched.losses - one.dense)[:, part].mean())) for part in parts],
            [float(one.patched.kl[:, part].mean()) for part in parts],
            [100 * float(one.patched.agree[:, part].double().mean()) for part in parts],
        )
        for ax, column in zip(axes, columns, strict=True):
            ax.plot(places, column, "o-", ms=3, label=one.method)
    floor = comparisons[0].noise
    axes[0].axhline(1, color="0.5", ls="--", lw=1)
    axes[1].axhline(float(floor.kl.mean()), color="0.5", ls="--", lw=1)
    axes[2].axhline(100 * float(floor.agree.double().mean()), color="0.5", ls="--", lw=1, label="dense again")
    titles = ("perplexity over dense", "KL(dense || patched), nats", "first choice is dense's, %")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xticks(places, [f"{first}+" for first, _ in stretches], fontsize=8)
        ax.set_xlabel("tokens before")
        ax.grid(alpha=0.3)
    _finish(axes[2])
    return Picture(png(figure), "predictions against dense, by position in the text")


def _finite(values: Sequence[float]) -> list[float]:
    return [math.nan if math.isinf(value) else value for value in values]


def _finish(ax: object) -> None:
    ax.grid(alpha=0.3)  # type: ignore[attr-defined]
    ax.legend(fontsize=8)  # type: ignore[attr-defined]
