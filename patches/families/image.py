"""Image transformers of diffusers that get latents (B, C, H, W)."""

from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import SitePattern
from attn_plugins.patches.grids import image
from attn_plugins.patches.longer_text import LongerText

_SELF: SitePattern = (r"(transformer_blocks|blocks|layers)\.\d+\.attn1", "self")
_CROSS: SitePattern = (r"(transformer_blocks|blocks|layers)\.\d+\.attn2", "cross")
_JOINT: SitePattern = (r"(joint_|single_)?transformer_blocks\.\d+\.attn1?", "joint")

FAMILIES = (
    diffusers_family(
        "sd3",
        "Stable Diffusion 3 / 3.5",
        "SD3Transformer2DModel",
        (_JOINT, (r"transformer_blocks\.\d+\.attn2", "self")),
        image.sd3,
        prompts=LongerText(),
    ),
    diffusers_family("pixart", "PixArt-α / Σ", "PixArtTransformer2DModel", (_SELF, _CROSS), image.picture),
    diffusers_family("dit", "DiT", "DiTTransformer2DModel", (_SELF,), image.picture),
    diffusers_family("hunyuan_dit", "HunyuanDiT", "HunyuanDiT2DModel", (_SELF, _CROSS), image.picture),
    diffusers_family(
        "lumina_next",
        "Lumina-Next",
        "LuminaNextDiT2DModel",
        (_SELF, _CROSS),
        image.picture,
        key_padding=True,
        time_rises=True,
    ),
    diffusers_family(
        "sana",
        "Sana",
        "SanaTransformer2DModel",
        (_CROSS,),
        image.picture,
        notes="Its self-attention is linear: there is no softmax to be sparse in.",
    ),
    diffusers_family("auraflow", "AuraFlow", "AuraFlowTransformer2DModel", (_JOINT,), image.auraflow),
    diffusers_family("cogview3", "CogView 3+", "CogView3PlusTransformer2DModel", (_JOINT,), image.text_picture),
    diffusers_family("cogview4", "CogView 4", "CogView4Transformer2DModel", (_JOINT,), image.text_picture),
    diffusers_family(
        "glm_image",
        "GLM-Image",
        "GlmImageTransformer2DModel",
        (_JOINT,),
        image.glm_image,
        notes="Steps that read the keys of condition pictures from a cache stay dense.",
    ),
    diffusers_family(
        "hidream",
        "HiDream-I1",
        "HiDreamImageTransformer2DModel",
        ((r"(double|single)_stream_blocks\.\d+\.block\.attn1", "joint"),),
        image.hidream,
        notes="What fills a picture that is not square up to the largest resolution is attended, as in the original.",
    ),
    diffusers_family(
        "lumina2",
        "Lumina-Image 2.0",
        "Lumina2Transformer2DModel",
        ((r"layers\.\d+\.attn", "joint"), (r"noise_refiner\.\d+\.attn", "self")),
        image.lumina2,
        notes="Batches of prompts of different lengths stay dense.",
        time_rises=True,
    ),
    diffusers_family(
        "z_image",
        "Z-Image",
        "ZImageTransformer2DModel",
        ((r"layers\.\d+\.attention", "joint"),),
        image.z_image,
        notes="Captions of different lengths are shorter text, per item. Refiners and pictures to edit stay dense.",
        key_padding=True,
        time_rises=True,
    ),
    diffusers_family(
        "ernie_image",
        "ERNIE-Image",
        "ErnieImageTransformer2DModel",
        ((r"layers\.\d+\.self_attention", "joint"),),
        image.ernie_image,
        notes="Padded prompts are shorter text, per item.",
        key_padding=True,
    ),
    diffusers_family(
        "hunyuan_image",
        "HunyuanImage 2.1",
        "HunyuanImageTransformer2DModel",
        (_JOINT,),
        image.hunyuan_image,
        notes="Padded prompts are shorter text, per item.",
        key_padding=True,
    ),
    diffusers_family(
        "joy_image",
        "JoyImage Edit",
        "JoyImageEditTransformer3DModel",
        ((r"double_blocks\.\d+\.attn", "joint"),),
        image.joy_image,
        notes="Reference pictures are dense, the picture that is made is sparse.",
    ),
    diffusers_family(
        "joy_image_plus",
        "JoyImage Edit Plus",
        "JoyImageEditPlusTransformer3DModel",
        ((r"double_blocks\.\d+\.attn", "joint"),),
        image.joy_image_plus,
        notes="As JoyImage Edit; batches whose pictures differ in size stay dense.",
        key_padding=True,
    ),
    diffusers_family(
        "prx",
        "PRX",
        "PRXTransformer2DModel",
        ((r"blocks\.\d+\.attention", "joint"),),
        image.prx,
        notes="Its text gives keys only.",
        key_padding=True,
    ),
    diffusers_family(
        "bria_fibo2",
        "Bria Fibo 2",
        "BriaFibo2Transformer2DModel",
        ((r"layers\.\d+\.attention", "joint"), (r"layers\.\d+\.cross_attention", "cross")),
        image.bria_fibo2,
        notes="Reference pictures are dense, the picture that is made is sparse. Refiner layers stay dense.",
        key_padding=True,
    ),
)
