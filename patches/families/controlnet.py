"""ControlNets of diffusers: dense beside a patched denoiser, unless one is given to `patch` itself."""

from typing import Any

from attn_plugins.patches.families.packed import _BOTH
from attn_plugins.patches.families.unet import _EXTRAS, _SITES
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import image, packed, unet
from attn_plugins.patches.processor_swap import ProcessorSwap

_NOTES = "`patch(pipe)` leaves it dense, `patch(pipe.controlnet)` does not."


def _family(name: str, title: str, classes: tuple[str, ...], sites: Any, read: Any, **extras: Any) -> Family:
    return Family(
        name=f"{name}_controlnet",
        title=f"ControlNet of {title}",
        library="diffusers",
        classes=classes,
        sites=sites,
        read=read,
        interception=ProcessorSwap(),
        notes=_NOTES,
        extras={"beside": True, **extras},
    )


FAMILIES = (
    _family(
        "sd", "Stable Diffusion, SDXL", ("ControlNetModel", "ControlNetUnionModel"), _SITES, unet.by_level, **_EXTRAS
    ),
    _family("sd3", "Stable Diffusion 3", ("SD3ControlNetModel",), _BOTH, image.sd3_controlnet),
    _family("flux", "FLUX.1", ("FluxControlNetModel",), _BOTH, packed.flux_controlnet),
    _family("qwen_image", "Qwen-Image", ("QwenImageControlNetModel",), _BOTH, packed.qwen_image, key_padding=True),
)
