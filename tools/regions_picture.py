"""Draws what regions see, from their block plans, into docs/pictures/regions.png: python tools/regions_picture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from attn_plugins.methods.regions.areas import area_of
from attn_plugins.methods.regions.layout import RegionLayout
from attn_plugins.methods.regions.plans import Call, plan_of

matplotlib.use("Agg")
PATH = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "regions.png"
GRID, LENGTHS = (10, 10), (12, 12, 12)
COLOURS = ("#d9d9d9", "#4c78a8", "#e8923c")  # uncovered; regions 1 and 2


def main() -> None:
    """Left: who has which token. Middle: joint attention in the model's order. Right: sorted by group."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    layout = RegionLayout([area_of((0.0, 0.2, 0.5, 1.0)), area_of((0.5, 0.4, 1.0, 0.9))], [1.0, 1.0])
    ids = layout.ids(GRID)
    text = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    prompt = torch.cat([text, ids])
    order = torch.argsort(prompt, stable=True)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.1))
    axes[0].imshow(ids.view(GRID), cmap=ListedColormap(COLOURS))
    axes[0].set_title("whose token", fontsize=9)
    mask = plan_of(layout, Call(GRID, LENGTHS, before=True, own=True)).to_mask()[0, 0]
    coloured = torch.where(mask, prompt[:, None], -1)
    for axis, shown, title in (
        (axes[1], coloured, "who sees whom: text of 3 prompts, picture"),
        (axes[2], coloured[order][:, order], "the same, sorted by prompt"),
    ):
        axis.imshow(np.ma.masked_less(shown.numpy(), 0), cmap=ListedColormap(COLOURS), vmin=0, vmax=2)
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(PATH, dpi=90)
    print(f"{PATH.name}: {PATH.stat().st_size / 1024:.0f} KiB, density {float(mask.float().mean()):.2f}")


if __name__ == "__main__":
    main()
