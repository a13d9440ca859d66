"""Who was put where: the weights of the references over the picture, as means over layers and steps."""

from __future__ import annotations

from typing import Any

from attn_plugins.watching import GridMaps


class ReferenceMaps(GridMaps):
    """Collects the weights of all layers of a patch inside a block; outputs stay as they are.

        with ReferenceMaps(handle) as maps:
            pipe(...)
        maps.mean()     # (B, R, H, W)

    Layers whose scale is 0 merge nothing and are not counted. A compiled model must run eagerly inside the block, or
    have been compiled in it.
    """

    gated = False  # w alone, without t
    nothing = "no reference was merged inside the block: run the pipeline in it, with a scale above 0"

    def __init__(self, handle: Any) -> None:
        """handle: what `attn_plugins.patch(pipe, "mip", ...)` returned.

        Raises:
            ValueError: a patch of another method.
        """
        super().__init__([layer for patched in handle.patches for layer in patched.layers])
        if handle.method != "mip":
            raise ValueError(f"maps are of patches by 'mip', not {handle.method!r}")
        self.phrases: tuple[str, ...] = self.layers[0].processor.phrases
