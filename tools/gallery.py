"""Pictures of what each method sees: `python tools/gallery.py [--out docs/pictures/gallery] [METHOD ...]`.

No method is drawn by hand. Attention is linear in its values, so with the identity as values the output of a layer *is*
its matrix of weights: each method is called once, as a pipeline would call it, and what comes back is drawn. Queries
and keys are made of position and a little chance, near ones alike, as in pictures; white is a weight of exactly 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins import registry  # noqa: E402
from attn_plugins.method import AttentionCall, Method  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402

GRID, TEXT = (8, 4, 8), 256  # tokens of the video, and of the text
ACROSS, LEAST = 4, 1e-4  # frames side by side; the least weight that is told from others
# what a method is asked for in the picture, where its defaults are for larger grids
SETTINGS: dict[str, dict[str, Any]] = {
    "gna": {"window": (3, 3, 4), "stride": (1, 1, 2)},
    "vmoba": {"blocks": ((1, -1, -1), (-1, 2, 4), (2, 2, 4)), "k_blocks": 2, "tile": 16},
    "draft": {"pool": (2, 4), "keep": 0.25},
    "sparge": {"block": 16, "tau": 0.5},
    "radial": {"block": 8, "decay": 0.6},
    "agent": {"ratio": 1 / 16},
    "moa": {"span": 96, "sink": 16, "block": 16},
    "moba": {"block": 32, "k_blocks": 3},
}

ELSEWHERE = ("regions",)  # its page has a picture of its own: what it sees is what a person drew


def drawable() -> list[Method]:
    """The methods that compute something from q, k, v alone."""
    found = [registry.method(name) for name in registry.method_names()]
    plain = [one for one in found if one.kind != "module" and not one.needs_references and one.name not in ELSEWHERE]
    return [one for one in plain if one.sites & {"self", "causal"}]


def weights(method: Method) -> torch.Tensor:
    """(N, N): what each query, a row, gives each key."""
    causal = "causal" in method.sites and "self" not in method.sites
    grid = (TEXT,) if causal else GRID
    q, k = _features(grid)
    v = torch.eye(q.shape[2])[None, None]
    config = method.config_class.from_options(**SETTINGS.get(method.name, {}))
    processor = method.processor(config, 2, 3, "causal" if causal else "self")
    assert processor is not None
    call = AttentionCall(q, k, v, "causal" if causal else "self", Sequence(grid), causal=causal)
    reason = processor.refuses(call)
    if reason is not None:
        raise ValueError(f"{method.name}: {reason}")
    with torch.no_grad():
        return processor(call)[0, 0]


def _features(grid: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (1, 1, N, N), so that the values may be the identity; near tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.linspace(0, 1, size) for size in grid], indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], dim=-1)
    tokens = places.shape[0]
    waves = torch.randn(places.shape[1], tokens // 2, generator=generator) * 6
    angles = places @ waves
    found = torch.cat([angles.cos(), angles.sin()], dim=-1)
    q, k = (found + 0.3 * torch.randn(found.shape, generator=generator) for _ in range(2))
    return 0.7 * q[None, None], k[None, None]


def draw(method: Method, path: Path) -> Path:
    """The matrix, and beside it what one query sees: frame by frame, or along the text."""
    from matplotlib.figure import Figure

    found = weights(method).abs()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _matrix(left, found)
    left.set_title(f"{method.name}: {float((found > 0).float().mean()):.0%} of the pairs", fontsize=10)
    left.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    (_along if "self" not in method.sites else _frames)(right, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    return path


def _along(axes: Any, found: torch.Tensor) -> None:
    row = TEXT * 3 // 4
    axes.bar(range(TEXT), found[row], width=1.0)
    axes.axvline(row, color="tab:red", linewidth=1)
    axes.set(yscale="log", ylim=(LEAST, 1), xlabel="key")
    axes.set_title(f"what token {row} of {TEXT} sees", fontsize=10)


def _frames(axes: Any, found: torch.Tensor) -> None:
    from matplotlib.patches import Rectangle

    frames, height, width = GRID
    frame, row, column = 2, 1, 4
    seen = found[(frame * height + row) * width + column].view(GRID)
    lines = -(-frames // ACROSS)
    sheet = torch.zeros(lines * (height + 1) - 1, ACROSS * (width + 1) - 1)
    for number in range(frames):
        top, left = number // ACROSS * (height + 1), number % ACROSS * (width + 1)
        sheet[top : top + height, left : left + width] = seen[number]
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, linewidth=0.8))
    _matrix(axes, sheet)
    axes.plot(frame % ACROSS * (width + 1) + column, frame // ACROSS * (height + 1) + row, "r+", markersize=10)
    axes.set_title(f"what the token at the cross sees in {frames} frames", fontsize=10)
    axes.set(xticks=[], yticks=[])


def _matrix(axes: Any, found: torch.Tensor) -> None:
    """On a logarithmic scale, white where a weight is exactly 0."""
    from matplotlib.colors import LogNorm

    shown = found.masked_fill(found == 0, float("nan")).numpy()
    axes.imshow(shown, norm=LogNorm(vmin=LEAST, vmax=1.0, clip=True), cmap="viridis_r", interpolation="nearest")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: all that can be drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/gallery"))
    options = parser.parse_args(None if arguments is None else list(arguments))
    for method in drawable():
        if not options.methods or method.name in options.methods:
            print(draw(method, options.out / f"{method.name}.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
