"""ControlNets of diffusers: dense beside a patched denoiser, unless one is given to `patch` itself."""

from typing import Any

from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.families.packed import _BOTH
from attn_plugins.patches.families.unet import _LEVELS, _SITES, MIN_TOKENS
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import image, packed, unet

_NOTES = "`patch(pipe)` leaves it dense, `patch(pipe.controlnet)` does not."


def _family(name: str, title: str, classes: tuple[str, ...], sites: Any, read: Any, **extras: Any) -> Family:
    name, title = f"{name}_controlnet", f"ControlNet of {title}"
    return diffusers_family(name, title, classes, sites, read, notes=_NOTES, beside=True, **extras)


FAMILIES = (
    _family(
        "sd",
        "Stable Diffusion, SDXL",
        ("ControlNetModel", "ControlNetUnionModel"),
        _SITES,
        unet.by_level,
        levels=_LEVELS,
        min_tokens=MIN_TOKENS,
    ),
    _family("sd3", "Stable Diffusion 3", ("SD3ControlNetModel",), _BOTH, image.sd3_controlnet),
    _family("flux", "FLUX.1", ("FluxControlNetModel",), _BOTH, packed.flux_controlnet),
    _family("qwen_image", "Qwen-Image", ("QwenImageControlNetModel",), _BOTH, packed.qwen_image, key_padding=True),
)
