"""Image transformers of diffusers."""

from attn_plugins.patches import grids
from attn_plugins.patches.family import Family
from attn_plugins.patches.processor_swap import ProcessorSwap

_SWAP = ProcessorSwap()

FAMILIES = (
    Family(
        name="flux",
        title="FLUX.1",
        library="diffusers",
        classes=("FluxTransformer2DModel",),
        sites=((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),),
        read=grids.flux,
        interception=_SWAP,
        notes="Calls with reference pictures (Kontext) stay dense.",
    ),
    Family(
        name="sd3",
        title="Stable Diffusion 3 / 3.5",
        library="diffusers",
        classes=("SD3Transformer2DModel",),
        sites=((r"transformer_blocks\.\d+\.attn", "joint"), (r"transformer_blocks\.\d+\.attn2", "self")),
        read=grids.sd3,
        interception=_SWAP,
    ),
)
