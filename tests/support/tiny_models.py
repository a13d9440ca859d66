"""Random-weight denoisers of diffusers, and inputs for one forward: a row per family of the registry."""

from __future__ import annotations

from tests.support import (
    tiny_controlnets,
    tiny_image_models,
    tiny_packed_image_models,
    tiny_unets,
    tiny_video_grids,
    tiny_video_joint,
    tiny_video_models,
    tiny_video_wan,
)
from tests.support.tiny import TinyModel, forward, randn
from tests.support.tiny_image_models import sd3
from tests.support.tiny_packed_image_models import flux, flux_ids
from tests.support.tiny_unets import sd15, sdxl
from tests.support.tiny_video_models import cogvideox, cosmos, hunyuan_video, ltx_video, wan

MODELS: dict[str, TinyModel] = {
    **tiny_video_models.MODELS,
    **tiny_video_wan.MODELS,
    **tiny_video_joint.MODELS,
    **tiny_video_grids.MODELS,
    **tiny_image_models.MODELS,
    **tiny_packed_image_models.MODELS,
    **tiny_unets.MODELS,
    **tiny_controlnets.MODELS,
}

__all__ = [
    "MODELS", "TinyModel", "cogvideox", "cosmos", "flux", "flux_ids", "forward", "hunyuan_video", "ltx_video", "randn",
    "sd15", "sd3", "sdxl", "wan",
]  # fmt: skip
