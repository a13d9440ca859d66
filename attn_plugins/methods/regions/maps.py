"""Where the prompts would be without masks: the shares of the attention to text, as means over layers and steps."""

from __future__ import annotations

from typing import Any

from attn_plugins.watching import GridMaps


class RegionMaps(GridMaps):
    """Collects, of all layers of a patch that see the text, which prompt a token would attend to; outputs stay.

        with RegionMaps(handle) as maps:
            pipe(...)
        maps.mean()     # (B, R, H, W), of a video (B, R, T, H, W)

    B are the batch items that the regions are for. A token's shares over the regions and the pipeline's own prompt add
    up to 1; they are those of one softmax over all prompts, whatever the masks are. Beside the masks they say whether
    the model keeps the subjects apart by itself (metrics/confusion.py). A compiled model must run eagerly inside.

    Args:
        handle: what `attn_plugins.patch(pipe, "regions", ...)` returned.
        graph: keep the autograd graph, for a loss on the maps (`metrics.dice_loss`).

    Raises:
        ValueError: a patch of another method.
    """

    nothing = "no layer has seen the regions' prompts inside the block: run the pipeline in it"

    def __init__(self, handle: Any, graph: bool = False) -> None:
        if handle.method != "regions":
            raise ValueError(f"these maps are of patches by 'regions', not {handle.method!r}")
        found = [layer for patched in handle.patches for layer in patched.layers if layer.kind != "self"]
        super().__init__(found, graph)
