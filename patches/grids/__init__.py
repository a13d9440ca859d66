"""What the tokens of a running forward are, read from its arguments: one reader per way of saying it.

A reader gets (root, args, kwargs) of the root's forward and returns a `Sequence`, or a sentence that says why it cannot
tell. Readers look at shapes; those that need values (position ids, text masks) read them once per tensor, not once per
layer or step.
"""

from attn_plugins.patches.grids import image, packed, unet, video, video_references, video_text, video_unet
from attn_plugins.patches.grids.arguments import TensorReading, argument
from attn_plugins.patches.grids.image import sd3
from attn_plugins.patches.grids.packed import flux
from attn_plugins.patches.grids.unet import by_level, feature_map
from attn_plugins.patches.grids.video import patched_video
from attn_plugins.patches.grids.video_references import ltx_video
from attn_plugins.patches.grids.video_text import cogvideox, hunyuan_video

__all__ = [
    "TensorReading",
    "argument",
    "by_level",
    "cogvideox",
    "feature_map",
    "flux",
    "hunyuan_video",
    "image",
    "ltx_video",
    "packed",
    "patched_video",
    "sd3",
    "unet",
    "video",
    "video_references",
    "video_text",
    "video_unet",
]
